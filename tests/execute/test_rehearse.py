"""Chat templates that do not end, or take all memory, are stopped; others are left alone."""

from __future__ import annotations

import sys
import time

import pytest

from loadstone.errors import InvalidTemplate
from loadstone.execute import rehearse as rehearsing
from loadstone.execute.generate import encode
from loadstone.execute.rehearse import rehearse
from loadstone.execute.values import Prompt

MESSAGES = [{"role": "user", "content": "hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsing, "CPU_S", 0.5)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% set ns = namespace(x='x') %}" + LOOP.replace("{% endfor %}", "{% set ns.x = ns.x ~ ns.x %}{% endfor %}"),
        "{{ 'x' * 100000000000 }}",
        "{{ 'x'.ljust(100000000000) }}",
        "{{ 'x' | center(100000000000) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = messages[0].content | length %}{{ (n ** 9) ** (n ** 9) }}",
        "{{ '%0100000000000d' % 1 }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_is_stopped(template: str) -> None:
    begin = time.monotonic()
    with pytest.raises(
        InvalidTemplate, match=r"^org/name: .* within 0\.5 s and .*, found that it takes more; .* --raw\.$"
    ):
        rehearse(template, MESSAGES, {}, where="org/name")
    # A bound that only shows that it was stopped, not how fast this machine is.
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ bos_token + message['role'] }}{{ message['content'] | trim }}{% endfor %}",
        "{% generation %}{{ strftime_now('%d %b') }}{% endgeneration %}{{ messages | tojson(indent=2) }}",
        "{% for message in messages %}{% break %}{% endfor %}{{ namespace(a=1).a }}{{ dict(a=1) }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_ends_passes_even_if_it_fails(template: str) -> None:
    rehearse(template, MESSAGES, {"bos_token": "<s>"}, where="org/name")


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsing, "CPU_S", 1000.0)
    monkeypatch.setattr(rehearsing, "_WALL_S", 1.0)
    with pytest.raises(InvalidTemplate, match="found that it takes more"):
        rehearse(LOOP, MESSAGES, {}, where="org/name")


def test_where_there_is_no_interpreter_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    rehearse(LOOP, MESSAGES, {}, where="org/name")


def test_without_jinja2_it_is_left_to_the_rendering_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsing.sys, "path", [])
    rehearse(LOOP, MESSAGES, {}, where="org/name")


def test_a_hostile_template_of_a_tokenizer_is_a_named_fault() -> None:
    class Tokenizer:
        name_or_path = "org/name"
        chat_template = {"default": "{{ 'x' * 100000000000 }}"}  # noqa: RUF012

        def get_chat_template(self) -> str:
            return self.chat_template["default"]

    with pytest.raises(InvalidTemplate, match=r"^org/name: expected the chat template .* within 2 s and 537 MB"):
        encode(Tokenizer(), Prompt(text="hello"))
