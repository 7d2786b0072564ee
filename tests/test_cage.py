"""The memory cgroup of benchmarks and tests: it ends what takes too much, and says what was used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cage import Cage, NoCage

_TAKE = "data = bytearray(int(__import__('sys').argv[1])); print(len(data))"


@pytest.fixture
def cage() -> Iterator[Cage]:
    try:
        with Cage(100_000_000) as made:
            yield made
    except NoCage as reason:
        pytest.skip(f"no memory cgroup can be made here: {reason}")


def test_what_fits_runs_and_is_measured(cage: Cage) -> None:
    done = cage.run([sys.executable, "-c", _TAKE, "40000000"], timeout_s=30)
    assert (done.outcome, done.returncode, done.stdout) == ("finished", 0, "40000000\n")
    assert 40_000_000 <= done.peak_bytes <= 100_000_000


def test_what_does_not_fit_is_killed_and_the_next_one_runs(cage: Cage) -> None:
    done = cage.run([sys.executable, "-c", _TAKE, "300000000"], timeout_s=30)
    assert (done.outcome, done.num_killed, done.stdout) == ("killed", 1, "")
    assert cage.run([sys.executable, "-c", _TAKE, "1"], timeout_s=30).outcome == "finished"


def test_what_takes_too_long_is_ended(cage: Cage) -> None:
    done = cage.run(["sleep", "60"], timeout_s=0.2)
    assert (done.outcome, done.returncode) == ("out of time", None)
    assert done.seconds < 30


def test_what_fails_says_why(cage: Cage) -> None:
    done = cage.run([sys.executable, "-c", "raise SystemExit('on purpose')"], timeout_s=30)
    assert (done.outcome, done.stderr) == ("failed (1)", "on purpose\n")
