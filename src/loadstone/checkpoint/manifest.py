"""SHA256SUMS: the hashes of a folder's files, in the form that `sha256sum` writes and checks.

Source: https://www.gnu.org/software/coreutils/manual/html_node/md5sum-invocation.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loadstone.checkpoint.files import open_regular
from loadstone.errors import InvalidHeader

NAME = "SHA256SUMS"
_MAX_BYTES = 16_000_000
# A backslash before the hash marks an escaped name; an asterisk before the name, a hash of binary reads.
_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_ESCAPES = {"\\n": "\n", "\\r": "\r", "\\\\": "\\"}


def read_manifest(path: Path) -> dict[str, str]:
    """The SHA-256 of each file, in lower-case hex, by its path relative to the manifest.

    Raises:
        InvalidHeader: a line is not one that `sha256sum` writes, or a name leads out of the folder.
    """
    with open_regular(path) as file:
        if file.nbytes > _MAX_BYTES:
            raise InvalidHeader(f"{path}: expected at most {_MAX_BYTES:,} bytes of hashes, found {file.nbytes:,}.")
        text = file.read(0, file.nbytes).decode("utf-8", "replace")
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise InvalidHeader(
                f"{path}: expected a SHA-256 in hex and a file name in line {number}, found {line[:80]!r}; "
                f"write it again with `sha256sum`."
            )
        name = match["name"]
        if match["escaped"]:
            name = re.sub(r"\\[nr\\]", lambda found: _ESCAPES[found[0]], name)
        name = name.removeprefix("./")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InvalidHeader(f"{path}: expected names inside its folder, found {name[:80]!r} in line {number}.")
        sums[name] = match["digest"].lower()
    return sums


def format_manifest(sums: Mapping[str, str]) -> str:
    """The text of a manifest.

    Args:
        sums: the SHA-256 in hex by relative path.
    """
    return "".join(_line(name, digest) for name, digest in sorted(sums.items()))


def _line(name: str, digest: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"
