"""The directory of a zip archive: where the bytes of each uncompressed entry lie. Nothing is unpacked.

Python's zipfile takes 10 µs and 1 kB an entry and has no bound on either; a torch file has an entry a tensor.

Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from loadstone.checkpoint.files import OpenFile
from loadstone.errors import InvalidHeader, TruncatedFile, UnsupportedFormat
from loadstone.units import format_name

MAX_DIRECTORY_BYTES = 64_000_000
MAX_ENTRIES = 100_000

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT_BYTES = 0xFFFF
_SEE_ZIP64 = 0xFFFFFFFF
_ZIP64_FIELD = 0x0001
_ENCRYPTED = 0x0001


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipEntry:
    """One file of the archive.

    Attributes:
        name: its path in the archive.
        header_offset: where its local header begins.
        nbytes: its size in the archive.
        plain: whether it is stored as it is, neither compressed nor encrypted.
    """

    name: str
    header_offset: int
    nbytes: int
    plain: bool


def read_zip_directory(file: OpenFile) -> dict[str, ZipEntry]:
    """Read the directory at the end of the archive.

    Raises:
        TruncatedFile: there is none: the file is cut short.
        InvalidHeader: it contradicts itself.
    """
    offset, nbytes = _find_directory(file)
    if nbytes > MAX_DIRECTORY_BYTES or offset + nbytes > file.nbytes:
        raise InvalidHeader(
            f"{file.path}: expected a zip directory of at most {MAX_DIRECTORY_BYTES} bytes inside the file, found one "
            f"of {nbytes} bytes at {offset}; download or write the file again."
        )
    data = file.read(offset, nbytes)
    entries: dict[str, ZipEntry] = {}
    try:
        for entry in _entries(data):
            if entry.name in entries:
                raise InvalidHeader(
                    f"{file.path}: expected each zip entry once, found {format_name(entry.name)} twice; "
                    "write the file again."
                )
            if len(entries) == MAX_ENTRIES:
                raise InvalidHeader(
                    f"{file.path}: expected at most {MAX_ENTRIES:,} zip entries, found more; save it in several files."
                )
            entries[entry.name] = entry
    except struct.error:
        raise InvalidHeader(
            f"{file.path}: expected whole entries in the zip directory, found a damaged one after {len(entries)}; "
            "download or write the file again."
        ) from None
    return entries


def data_offset(file: OpenFile, entry: ZipEntry) -> int:
    """Where the bytes of an entry begin in the file.

    Raises:
        UnsupportedFormat: the entry is compressed or encrypted, its bytes cannot be read in place.
        InvalidHeader: there is no entry at the place that the directory names.
        TruncatedFile: the file ends before the entry does.
    """
    if not entry.plain:
        raise UnsupportedFormat(
            f"{file.path}: expected {format_name(entry.name)} stored as it is, found it compressed or encrypted; "
            "torch.save does not do that: save the file anew."
        )
    if entry.header_offset + _LOCAL.size > file.nbytes:
        raise InvalidHeader(f"{file.path}: expected {format_name(entry.name)} inside the file, found it past the end.")
    signature, *_, name_bytes, extra_bytes = _LOCAL.unpack(file.read(entry.header_offset, _LOCAL.size))
    if signature != b"PK\x03\x04":
        raise InvalidHeader(
            f"{file.path}: expected a zip entry for {format_name(entry.name)} at {entry.header_offset}, found none; "
            "download or write the file again."
        )
    offset = entry.header_offset + _LOCAL.size + int(name_bytes) + int(extra_bytes)
    if offset + entry.nbytes > file.nbytes:
        raise TruncatedFile(
            f"{file.path}: expected {entry.nbytes} bytes of {format_name(entry.name)} at {offset}, found the end of "
            f"the file at {file.nbytes}; copy or download it again."
        )
    return offset


def _find_directory(file: OpenFile) -> tuple[int, int]:
    tail_bytes = min(file.nbytes, _END.size + _MAX_COMMENT_BYTES)
    tail_offset = file.nbytes - tail_bytes
    tail = file.read(tail_offset, tail_bytes)
    at = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _END.size + 4))
    if at < 0:
        raise TruncatedFile(
            f"{file.path}: expected a zip archive to end with its directory, found none; "
            "the file is cut short: copy or download it again."
        )
    *_, nbytes, offset, comment_bytes = _END.unpack_from(tail, at)
    if at + _END.size + comment_bytes != len(tail):
        raise InvalidHeader(
            f"{file.path}: expected the zip archive to end with the file, found its end at byte "
            f"{tail_offset + at + _END.size + comment_bytes} of {file.nbytes}; download or write the file again."
        )
    locator_offset = tail_offset + at - _END64_LOCATOR.size
    if locator_offset >= 0:
        signature, _, end64_offset, _ = _END64_LOCATOR.unpack(file.read(locator_offset, _END64_LOCATOR.size))
        if signature == b"PK\x06\x07" and end64_offset + _END64.size <= file.nbytes:
            signature64, *_, nbytes64, offset64 = _END64.unpack(file.read(end64_offset, _END64.size))
            if signature64 == b"PK\x06\x06":
                return int(offset64), int(nbytes64)
    return int(offset), int(nbytes)


def _entries(data: bytes) -> Iterator[ZipEntry]:
    position = 0
    while position < len(data):
        fields = _ENTRY.unpack_from(data, position)
        signature, _, _, flags, method, _, _, _, packed, nbytes, name_bytes, extra_bytes, comment_bytes = fields[:13]
        if signature != b"PK\x01\x02":
            raise struct.error
        header_offset = fields[-1]
        position += _ENTRY.size
        name = data[position : position + name_bytes].decode("utf-8", "replace")
        position += name_bytes
        if _SEE_ZIP64 in {nbytes, packed, header_offset}:
            extra = data[position : position + extra_bytes]
            nbytes, packed, header_offset = _zip64(extra, (nbytes, packed, header_offset))
        position += extra_bytes + comment_bytes
        plain = method == 0 and not flags & _ENCRYPTED and packed == nbytes
        yield ZipEntry(name=name, header_offset=header_offset, nbytes=packed, plain=plain)


def _zip64(extra: bytes, values: tuple[int, int, int]) -> Iterator[int]:
    """Replace those values that did not fit into 32 bits."""
    position = 0
    while True:
        kind, nbytes = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == _ZIP64_FIELD:
            break
        position += nbytes
    for value in values:
        if value == _SEE_ZIP64:
            yield struct.unpack_from("<Q", extra, position)[0]
            position += 8
        else:
            yield value
