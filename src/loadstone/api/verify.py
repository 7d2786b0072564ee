"""`verify`: whether a checkpoint is what it should be, every file of it, and every fault told."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.known_hashes import KnownHash, known_hashes
from loadstone.checkpoint.layout import Weights, weights_at, weights_in
from loadstone.checkpoint.manifest import NAME as MANIFEST
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.resolve import Resolved, Source, resolve
from loadstone.checkpoint.sharded import honour
from loadstone.errors import DownloadFailed, LoadstoneError, MissingShard, NotACheckpoint, SourceNotFound
from loadstone.events import Observer, ignore
from loadstone.report.verification import Verdict, Verification, VerifiedFile
from loadstone.stream.hashing import Hashed, Wanted, hash_files


@dataclass(slots=True)
class _Structure:
    """What the headers say.

    Attributes:
        root: the folder.
        files: the weight files.
        num_tensors: in those that could be read.
        faults: by file; under None those of the whole.
    """

    root: Path
    files: list[Path]
    num_tensors: int = 0
    faults: dict[Path | None, list[str]] = field(default_factory=dict)

    def note(self, path: Path | None, error: LoadstoneError) -> None:
        if not any(str(error) in faults for faults in self.faults.values()):
            self.faults.setdefault(path, []).append(str(error))


def verify(
    source: Source,
    *,
    structure_only: bool = False,
    subfolder: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    num_threads: int | None = None,
    progress: Observer | None = None,
) -> Verification:
    """Check a checkpoint: headers, sizes, overlaps and index, and the content of every file whose hash is known.

    A hash is known from a SHA256SUMS beside the weights, and from the names of blobs in the hub cache. Nothing is
    written, torch is not imported.

    Args:
        source: as for `loadstone.load`.
        structure_only: read only headers; no content is hashed.
        subfolder: a folder inside the source, such as a component of a diffusers pipeline.
        variant: the `fp16` of files named `model.fp16.safetensors`.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        num_threads: how many files are hashed at a time; by default as many as there are cores.
        progress: is called with the events of `loadstone.events`.

    Returns:
        What was found; faults of files are in it, not raised.

    Raises:
        SourceError: there is no such source, or it is no checkpoint at all.
    """
    begin = time.perf_counter()
    access = HubAccess(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    observer = progress or ignore
    structure = _structure(source, access, Excerpt(subfolder=subfolder or "", variant=variant), observer)
    known: Mapping[Path, tuple[KnownHash, ...]] = {}
    try:
        known = known_hashes(structure.root, structure.files)
    except LoadstoneError as error:
        structure.note(None, error)
    hashed = [] if structure_only else _hash(known, observer, num_threads)
    by_path = {one.path: one for one in hashed}
    paths = dict.fromkeys([*structure.files, *known])
    files = [_verified(path, structure, known.get(path, ()), by_path.get(path)) for path in paths]
    return Verification(
        root=str(structure.root),
        files=tuple(files),
        faults=(*structure.faults.get(None, ()), *(fault for file in files for fault in file.faults)),
        num_tensors=structure.num_tensors,
        hashed_bytes=sum(one.nbytes for one in hashed),
        seconds=time.perf_counter() - begin,
    )


def _structure(source: Source, access: HubAccess, excerpt: Excerpt, observer: Observer) -> _Structure:
    try:
        checkpoint = open_checkpoint(
            source,
            revision=access.revision,
            local_files_only=access.local_files_only,
            hub=access,
            observer=observer,
            excerpt=excerpt,
        )
    except DownloadFailed:
        raise
    except LoadstoneError as error:
        return _one_by_one(resolve(source, access, observer, excerpt), excerpt.variant, error)
    files = [file.path for file in checkpoint.files]
    return _Structure(root=checkpoint.root, files=files, num_tensors=len(checkpoint.tensors))


def _one_by_one(resolved: Resolved, variant: str | None, first: LoadstoneError) -> _Structure:
    """Something is wrong: look at each file by itself, so that every fault is told."""
    structure = _Structure(root=resolved.root, files=[])
    try:
        weights = _weights(resolved, variant)
    except (NotACheckpoint, SourceNotFound):
        raise first from None
    except LoadstoneError as error:
        structure.note(None, error)
        return structure
    structure.files = list(weights.files)
    for position, path in enumerate(weights.files):
        try:
            if not os.path.lexists(path):
                raise MissingShard(f"{path}: expected a file, found nothing there; download what is missing.")
            tensors = open_checkpoint(path).tensors
            if weights.index is not None:
                tensors = honour(weights.index, list(weights.index.shards)[position], tensors)
            structure.num_tensors += len(tensors)
        except LoadstoneError as error:
            structure.note(path, error)
    if not structure.faults:  # each is in order by itself, so it is what they say together
        structure.note(None, first)
    return structure


def _weights(resolved: Resolved, variant: str | None) -> Weights:
    files = resolved.files
    if files is None:
        return weights_in(resolved.root, variant)
    return weights_at(files[0]) if len(files) == 1 else Weights(files=files)


def _hash(known: Mapping[Path, tuple[KnownHash, ...]], observer: Observer, num_threads: int | None) -> list[Hashed]:
    wanted = [Wanted(path=path, begins=tuple(one.begin for one in hashes)) for path, hashes in known.items()]
    return hash_files(wanted, observer=observer, num_threads=num_threads)


def _verified(path: Path, structure: _Structure, known: tuple[KnownHash, ...], hashed: Hashed | None) -> VerifiedFile:
    found = structure.faults.get(path, [])
    headers = Verdict.FAULT if found else Verdict.OK
    named = path.relative_to(structure.root) if path.is_relative_to(structure.root) else path
    file = VerifiedFile(
        name=os.fspath(named),
        nbytes=path.stat().st_size if path.is_file() else 0,
        structure=headers if path in structure.files else Verdict.NOT_CHECKED,
        content=Verdict.NOT_CHECKED if known else Verdict.UNKNOWN,
        said_by=", ".join(f"{one.algorithm} from {one.said_by}" for one in known) or _why_unknown(structure.root),
        faults=tuple(found),
    )
    return file if hashed is None else _with_content(file, path, known, hashed)


def _with_content(file: VerifiedFile, path: Path, known: tuple[KnownHash, ...], hashed: Hashed) -> VerifiedFile:
    faults: tuple[str, ...]
    if hashed.fault:
        faults = () if file.faults else (hashed.fault,)  # what kept it from being read is told already
    else:
        faults = tuple(
            f"{path}: expected {one.algorithm} {one.digest}, as {one.said_by} says, found {digest}; the content is "
            "damaged or was changed: download or copy the file again."
            for one, digest in zip(known, hashed.digests, strict=True)
            if digest != one.digest
        )
    bad = bool(faults or hashed.fault)
    return replace(
        file,
        content=Verdict.FAULT if bad else Verdict.OK,
        seconds=hashed.seconds,
        faults=(*file.faults, *faults),
    )


def _why_unknown(root: Path) -> str:
    return f"not in {MANIFEST}" if (root / MANIFEST).exists() else "no hash is known"
