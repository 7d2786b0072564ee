"""Fuzzes the three parsers of headers with atheris, which follows the branches that an input takes.

python tests/fuzz_headers.py --seconds 300                  all three, one after the other
python tests/fuzz_headers.py --seconds 300 --parser gguf    one
python tests/fuzz_headers.py --parser gguf --input FILE     one input again, with its traceback

atheris is not among the development dependencies: install it where Python has it (`pip install atheris`), it needs
numpy beside it. What breaks the rule is written to --findings; keep it as a case of `malformed.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

MAX_SECONDS = 1.0
_MAX_SEED_BYTES = 20_000
_MAX_INPUT_BYTES = 40_000


def parsers() -> dict[str, Callable[[Path], Mapping[str, object]]]:
    """The parsers: path -> tensors by name."""
    from loadstone.checkpoint.gguf import read_gguf
    from loadstone.checkpoint.safetensors import read_safetensors
    from loadstone.checkpoint.torch_pickle import read_torch_pickle

    return {
        "safetensors": lambda path: read_safetensors(path)[0],
        "torch_pickle": lambda path: read_torch_pickle(path)[0],
        "gguf": lambda path: read_gguf(path).tensors,
    }


def meet(
    read: Callable[[Path], Mapping[str, object]], data: bytes, path: Path, max_seconds: float = MAX_SECONDS
) -> bool:
    """The rule: tensors inside the file, or a named fault in one line, at once.

    Args:
        read: the parser.
        data: the content of the file.
        path: where the file is written.
        max_seconds: of the processor.

    Returns:
        Whether it was read.
    """
    from loadstone.checkpoint.values import TensorInfo
    from loadstone.errors import LoadstoneError

    path.write_bytes(data)
    begin = time.process_time()
    try:
        tensors = read(path)
    except LoadstoneError as error:
        told = str(error)
        if not told.isprintable() or len(told) > 500 + len(str(path)):
            raise AssertionError(f"a message that is not one clear line: {told!r}") from error
        return False
    finally:
        seconds = time.process_time() - begin
        if seconds > max_seconds:
            raise AssertionError(f"{seconds:.2f} s for {len(data)} bytes")
    for name, info in tensors.items():
        if not isinstance(info, TensorInfo) or info.name != name:
            raise AssertionError(f"{name!r} is {info}")
        if not 0 <= info.offset <= info.offset + info.nbytes <= len(data):
            raise AssertionError(f"{name!r} lies outside its {len(data)} bytes: {info}")
    return True


def seeds(parser: str) -> Iterator[bytes]:
    """The small cases and controls of the corpus of that format."""
    import malformed

    prefix = {"safetensors": "safetensors:", "torch_pickle": "pickle:", "gguf": "gguf"}[parser]
    for case in (*malformed.CONTROLS, *malformed.CASES):
        if not case.name.startswith(prefix):
            continue
        with tempfile.TemporaryDirectory() as name:
            case.write(Path(name))
            for path in Path(name).iterdir():
                if path.is_file() and 0 < path.stat().st_size <= _MAX_SEED_BYTES:
                    yield path.read_bytes()


def _fuzz(parser: str, seconds: int, findings: Path, scratch: Path) -> None:
    """Fuzz in this process, which libFuzzer ends."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["loadstone"]):
        read = parsers()[parser]
    corpus = scratch / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(parser)):
        (corpus / f"seed-{number}").write_bytes(seed)
    path = scratch / "input"
    options = [f"-max_total_time={seconds}", f"-max_len={_MAX_INPUT_BYTES}", "-timeout=20", "-rss_limit_mb=2000"]
    options += [f"-artifact_prefix={findings}/{parser}-", "-print_final_stats=1", "-use_value_profile=1"]
    # Instrumented code is several times slower.
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: meet(read, data, path, 5 * MAX_SECONDS))
    atheris.Fuzz()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--parser", choices=["safetensors", "torch_pickle", "gguf"])
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help="meet this one input and end")
    options = parser.parse_args()
    if options.input:
        with tempfile.TemporaryDirectory() as name:
            read = parsers()[options.parser]
            sys.stdout.write(f"read: {meet(read, options.input.read_bytes(), Path(name) / 'input')}\n")
        return 0
    if importlib.util.find_spec("atheris") is None:
        sys.stderr.write(
            "atheris is not installed here: pip install atheris, or run tests/checkpoint/test_fuzz_headers.py.\n"
        )
        return 2
    options.findings.mkdir(parents=True, exist_ok=True)
    if options.scratch:
        _fuzz(options.parser, options.seconds, options.findings, options.scratch)
    worst = 0
    for name in [options.parser] if options.parser else parsers():
        # libFuzzer ends its process without cleaning up: one for each parser, in a folder that goes with it.
        with tempfile.TemporaryDirectory(prefix="fuzz-headers-") as scratch:
            command = [sys.executable, __file__, "--seconds", str(options.seconds), "--parser", name]
            command += ["--findings", str(options.findings), "--scratch", scratch]
            worst = max(worst, subprocess.run(command, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
