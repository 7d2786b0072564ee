"""The corpus of malformed checkpoints, and the controls that must be read.

python tests/malformed.py FOLDER            writes every case into a folder of its own
python tests/malformed.py --measure inspect prints how each case ended, how long it took and what memory it needed
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import malformed_folders
import malformed_gguf
import malformed_pickles
import malformed_safetensors
from malformed_base import Case, Control, Through

CASES: tuple[Case, ...] = (
    *malformed_safetensors.CASES,
    *malformed_folders.CASES,
    *malformed_pickles.CASES,
    *malformed_gguf.CASES,
)
CONTROLS: tuple[Control, ...] = (
    *malformed_safetensors.CONTROLS,
    *malformed_folders.CONTROLS,
    *malformed_pickles.CONTROLS,
    *malformed_gguf.CONTROLS,
)

DEADLINE_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one case ended.

    Attributes:
        name: of the case.
        error: the class of what was raised.
        seconds: of the processor; a process that only waits is ended after `DEADLINE_S`.
        peak_bytes: resident memory at most so far, above what there was before the first case.
    """

    name: str
    error: str
    seconds: float
    peak_bytes: int


def _inspect(source: Any) -> Any:
    import loadstone

    return loadstone.inspect(source, local_files_only=True)


def _load(source: Any) -> Any:
    import loadstone

    return loadstone.load(source, local_files_only=True, device="cpu")


def _tokenizer(source: Any) -> Any:
    import loadstone

    return loadstone.load_tokenizer(source, local_files_only=True)


def _chat(source: Any) -> Any:
    from loadstone.execute.generate import encode
    from loadstone.execute.values import Prompt

    return encode(_tokenizer(source), Prompt(text="hello", system=None, raw=False))


_MEETINGS: dict[Through, Callable[[Any], Any]] = {
    Through.INSPECT: _inspect,
    Through.LOAD: _load,
    Through.TOKENIZER: _tokenizer,
    Through.CHAT: _chat,
}


def meet(case: Case, folder: Path) -> Any:
    """Write a case and let it be met; its fault is raised."""
    return _MEETINGS[case.through](case.write(folder))


def measured(throughs: tuple[Through, ...]) -> Iterator[Ended]:
    """Meet the cases in this process, which has imported everything before; a case that hangs ends it."""
    with tempfile.TemporaryDirectory() as name:
        control = malformed_folders.llama(None, **malformed_folders.tokenizer_files("hello"))(Path(name))
        for through in throughs:
            _MEETINGS[through](control)
    before = _status_bytes("VmRSS")
    for case in CASES:
        if case.through in throughs:
            with tempfile.TemporaryDirectory() as name:
                yield _measure(case, Path(name), before)


def _measure(case: Case, folder: Path, before: int) -> Ended:
    source = case.write(folder)
    signal.alarm(DEADLINE_S)
    begin = time.process_time()
    error: BaseException | None = None
    try:
        _MEETINGS[case.through](source)
    except Exception as raised:
        error = raised
    seconds = time.process_time() - begin
    signal.alarm(0)
    peak = _status_bytes("VmHWM") - before
    return Ended(name=case.name, error=type(error).__name__, seconds=seconds, peak_bytes=peak)


def _status_bytes(field: str) -> int:
    """A figure of this process alone; `ru_maxrss` is also that of the process which started it."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _write_all(folder: Path) -> None:
    for case in (*CASES, *CONTROLS):
        place = folder / re.sub(r"\W+", "-", case.name)
        place.mkdir(parents=True)
        case.write(place)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write the corpus")
    parser.add_argument("--measure", choices=[through.value for through in Through], action="append")
    options = parser.parse_args()
    if options.folder:
        _write_all(options.folder)
    for ended in measured(tuple(map(Through, options.measure or ()))):
        sys.stdout.write(json.dumps(asdict(ended)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
