"""Threads that compute: as many as there is time for, asleep while they wait where others want the cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from loadstone.hardware import cpu, openmp
from loadstone.hardware.openmp import fit_threads_to_cores, sleeping_waits

_CHILD = """
import os, sys
from loadstone.hardware.openmp import sleeping_waits
if "before" in sys.argv:
    import torch
with sleeping_waits("wanted" in sys.argv):
    print(os.environ.get("OMP_WAIT_POLICY"))
    import torch
print(os.environ.get("OMP_WAIT_POLICY"))
"""


def said_by_child(*arguments: str, **environment: str) -> list[str]:
    known = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        env={**known, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_it_is_said_while_torch_is_imported_and_not_after() -> None:
    assert said_by_child("wanted") == ["PASSIVE", "None"]


def test_nothing_is_said_where_it_is_not_wanted_too_late_or_the_user_has_spoken() -> None:
    assert said_by_child() == ["None", "None"]
    assert said_by_child("wanted", "before") == ["None", "None"]
    assert said_by_child("wanted", OMP_WAIT_POLICY="active") == ["active", "active"]
    assert said_by_child("wanted", GOMP_SPINCOUNT="7") == ["None", "None"]


def test_an_import_that_fails_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ImportError), sleeping_waits(True):
        raise ImportError
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("said", "threads"), [(None, 64), ("", 64), ("3", 3), ("3,2", 3), ("100", 64), ("0", 64), ("many", 64)]
)
def test_torch_has_a_thread_for_each_core_whatever_time_it_is_given_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: str | None, threads: int
) -> None:
    monkeypatch.setattr(openmp, "num_bound_cores", lambda: 64)
    monkeypatch.setattr(cpu, "num_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    found = cpu.cpu()
    assert (found.num_cores, found.num_threads) == (2, threads)


@pytest.mark.parametrize(("cores", "said", "threads"), [(2, None, "2"), (64, None, None), (2, "5", "5"), (2, "", "2")])
def test_our_own_process_has_no_more_threads_than_it_is_given_time_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, said: str | None, threads: str | None
) -> None:
    monkeypatch.setattr(openmp, "num_bound_cores", lambda: 64)
    monkeypatch.setattr(openmp, "num_cores", lambda: cores)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", said or "")
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    fit_threads_to_cores()
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_once_torch_is_there_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "num_bound_cores", lambda: 64)
    monkeypatch.setattr(openmp, "num_cores", lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    fit_threads_to_cores()
    assert "OMP_NUM_THREADS" not in os.environ
