"""Read ahead the files that the imports of torch and transformers will open, while the first of them is still running.

On a cold start those imports read some 4,500 small files one after the other, and the disk waits for the interpreter
in between. Which files they are is learnt once, after a load, and kept in the cache folder; a list that has gone stale
costs nothing but a little reading ahead in vain. Nothing is imported from here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from loadstone.checkpoint.files import write_whole
from loadstone.errors import LoadstoneError
from loadstone.stream.memory import is_cached, map_file

_STEP_BYTES = 8 << 20
# A cold page cache lacks nearly all files, a warm one nearly none: a few tell them apart.
_NUM_PROBES = 8
_PACKAGES = ("torch", "transformers")
# What the lists hold; lists that held something else are not found again.
_LIST_VERSION = "2"
# To open a file takes a read of its folder, which waits for the disk: one thread alone is hardly ahead of the imports
# (all files are asked for after 4.4-5.8 s with one thread, after 1.1-1.7 s with eight).
_NUM_THREADS = 8
# One for each environment; those of the ones that are no more go.
_MAX_LISTS = 8
_PATIENCE_S = 5.0


class Asked:
    """Files that are asked for: whoever would take the disk from them can wait until all of them are."""

    def __init__(self, num_threads: int = 0) -> None:
        self._left = num_threads
        self._lock = threading.Lock()
        self._over = threading.Event()
        if not num_threads:
            self._over.set()

    def one_is_done(self) -> None:
        """One of the threads that ask has come to its end."""
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                self._over.set()

    def wait(self) -> None:
        """Return when all of them have, or a disk has taken too long over it."""
        self._over.wait(_PATIENCE_S)


def read_ahead(cache: Path) -> Asked:
    """Start reading ahead in the background, if a list is known, torch is not imported, and the files are not cached.

    Args:
        cache: the folder that keeps the list.

    Returns:
        What tells when that is done; at once where there is nothing to read.
    """
    if "torch" in sys.modules or not hasattr(os, "posix_fadvise"):
        return Asked()
    try:
        paths = _list_file(cache).read_text().splitlines()
    except OSError:
        return Asked()
    if not any(map(_is_cold, paths[:: max(1, len(paths) // _NUM_PROBES)])):
        return Asked()
    remaining, asked = iter(paths), Asked(_NUM_THREADS)
    for number in range(_NUM_THREADS):
        name = f"loadstone-imports-{number}"
        threading.Thread(target=_ask, args=(remaining, asked), name=name, daemon=True).start()
    return asked


def learn(cache: Path) -> None:
    """Write the list down, if there is none: call it once everything is imported.

    Args:
        cache: the folder that keeps the list.
    """
    file = _list_file(cache)
    if file.exists():
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written only leaves the next start as it was
        write_whole(file, "\n".join(_imported_files()))
        lists = sorted(file.parent.glob("*.txt"), key=lambda one: one.stat().st_mtime, reverse=True)
        for stale in lists[_MAX_LISTS:]:
            stale.unlink(missing_ok=True)


def _list_file(cache: Path) -> Path:
    """One list for each set of installed versions, told by the packages' places and times."""
    key = hashlib.sha256(f"{_LIST_VERSION} {sys.version}".encode())
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        origin = spec.origin if spec is not None and spec.origin else ""
        key.update(f"{origin} {Path(origin).stat().st_mtime_ns if origin else 0}".encode())
    return cache / "imports" / f"{key.hexdigest()[:16]}.txt"


def _imported_files() -> list[str]:
    """The files of all imported modules in the order of their imports, shared libraries first."""
    sources = _sources_read()
    files: dict[str, None] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if ".so" in line:
                files.setdefault(line.split(maxsplit=5)[-1])
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers."):
            files.update(sources)
            sources = {}  # they have their place before the first of these modules
        # Some of torch's modules answer every attribute with an object of their own.
        for path in (getattr(module, "__cached__", None), getattr(module, "__file__", None)):
            if isinstance(path, str) and path.endswith((".pyc", ".so")):
                files.setdefault(path)
    return list(files)


def _sources_read() -> dict[str, None]:
    """The sources that transformers reads when it is imported, to learn what each model's modules define."""
    file = getattr(sys.modules.get("transformers"), "__file__", None)
    if file is None:
        return {}
    unread = ("__init__", "convert_", "modular_")
    sources = (Path(file).parent / "models").glob("**/*.py")
    return dict.fromkeys(str(source) for source in sorted(sources) if not source.name.startswith(unread))


def _is_cold(path: str) -> bool:
    """Whether a file is there and would have to be read from the disk."""
    try:
        return not is_cached(map_file(Path(path)))
    except LoadstoneError:
        return False


def _ask(paths: Iterator[str], asked: Asked) -> None:
    try:
        _advise(paths)
    finally:
        asked.one_is_done()


def _advise(paths: Iterator[str]) -> None:
    """Read files ahead, as many as others leave: the next of a list's iterator is taken in one step."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            # The kernel reads at most its readahead window for one advice.
            for offset in range(0, max(1, os.fstat(descriptor).st_size), _STEP_BYTES):
                os.posix_fadvise(descriptor, offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
