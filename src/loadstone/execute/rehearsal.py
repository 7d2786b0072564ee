"""A program: render a chat template once, in a process that may be ended at any point.

It is run as a file, by itself, and imports jinja2 alone. It reads JSON from standard input and says by its exit status
how it went. Its environment has the names that transformers gives to templates, so that they take the same way here.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

# How it exits. 1 and 2 are what Python itself exits with.
ENDED, TOO_LARGE, NO_JINJA = 0, 3, 4


def main() -> int:
    """Render; whether it ends is all that is asked."""
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    try:
        render = _renderer()
    except ImportError:
        return NO_JINJA
    _bound(asked["cpu_s"], asked["memory_bytes"])
    try:
        nbytes = len(render(asked["template"], asked["names"]))
    except MemoryError:
        return TOO_LARGE
    except Exception:  # the one who renders it in earnest will say what is wrong
        return ENDED
    return TOO_LARGE if nbytes > asked["text_bytes"] else ENDED


def _bound(cpu_s: float, memory_bytes: int) -> None:
    """Have the system end this process, whatever it is doing, once it has taken so much."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        import resource
    except ImportError:
        return
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        # Not every system has every limit; there, the time is what bounds the memory.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _renderer() -> Callable[[str, dict[str, Any]], str]:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the answers of the model."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def render(template: str, names: dict[str, Any]) -> str:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        return environment.from_string(template).render(**names)

    return render


if __name__ == "__main__":
    sys.exit(main())
