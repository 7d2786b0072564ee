"""Where threads that read and expand want the cores, those that compute sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loadstone.hardware.openmp import sleeping_waits

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
