"""`convert`: any checkpoint that can be read, written anew as safetensors in Hugging Face layout."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone import __version__
from loadstone.api.load import read_headers
from loadstone.api.pause import paused_gc
from loadstone.architecture.implied import with_config, with_vocabulary
from loadstone.architecture.implied_side_files import config_files, tokenizer_files, vocabulary_bytes
from loadstone.architecture.meta_tokenizer import bare_vocabulary
from loadstone.checkpoint.excerpt import Excerpt, Select
from loadstone.checkpoint.files import check_unchanged
from loadstone.checkpoint.hub_cache import HubAccess, local_path
from loadstone.checkpoint.layout import PARAMS_NAME
from loadstone.checkpoint.new_folder import NewFolder, check_destination, leftovers, new_folder
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.side_files import CONFIG, json_text, side_files, with_dtype
from loadstone.checkpoint.values import Checkpoint, Format
from loadstone.checkpoint.write import INDEX_NAME, Shard, index_text, plan_shards
from loadstone.errors import DestinationError, LoadstoneError, NotACheckpoint
from loadstone.events import Observer, Recorder, ignore
from loadstone.hardware.memory import PeakWatch, num_cores
from loadstone.plan.choose import Choice, choose_dtype
from loadstone.plan.conversion import Conversion, Roles, check_castable, needs_roles, plan_conversion
from loadstone.report.conversion import ConversionReport
from loadstone.stream.rewrite import STAGE, Sources, bound_bytes, rewrite
from loadstone.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

_AS_STORED = (None, "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A conversion before a byte is written.

    Attributes:
        checkpoint: what is read, with its config.
        dtype: the floating-point dtype of the result as a whole, and why.
        casts: whether it was asked for, so that tensors are cast to it.
        conversion: which tensors are written.
        shards: into which files.
    """

    checkpoint: Checkpoint
    dtype: Choice
    casts: bool
    conversion: Conversion
    shards: tuple[Shard, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weight files."""
        return tuple(shard.name for shard in self.shards)

    @property
    def sources(self) -> Sources:
        """Where the new tensors come from."""
        return Sources(tensors=self.checkpoint.tensors, assignments=self.conversion.assignments)

    @property
    def bound_bytes(self) -> int:
        """The most anonymous memory that writing takes."""
        return bound_bytes(self.shards, self.sources, num_cores()) + vocabulary_bytes(self.checkpoint)


def convert(
    source: Source,
    destination: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    prefix: str | None = None,
    select: Select | None = None,
    progress: Observer | None = None,
) -> ConversionReport:
    """Write a checkpoint anew: sharded safetensors with config, generation config, tokenizer and SHA256SUMS.

    The destination appears whole or not at all. A process that is killed leaves a hidden folder beside it, from which
    the same call goes on; one that fails leaves nothing.

    Args:
        source: as for `loadstone.load`.
        destination: a folder that does not exist yet, or is empty.
        dtype: a torch dtype or its name, to cast floating-point tensors to; tensors that the class keeps in a dtype of
            their own stay as they are, so that loading the result gives what loading the source in that dtype would.
            By default, and with "auto", everything stays as stored, and GGUF blocks are decoded to float32.
        max_shard_size: the most bytes of tensors in a file: a number, or "5GB", "2GiB".
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        subfolder: a folder inside the source, such as a component of a diffusers pipeline.
        variant: the `fp16` of files named `model.fp16.safetensors`.
        prefix: only the tensors whose names begin with it, without it: one model of a file that holds several.
        select: only tensors whose names (without the prefix) match a shell pattern, one of several, or a function.
        progress: is called with the events of `loadstone.events`.

    Returns:
        What was done.

    Raises:
        LoadstoneError: see `loadstone.errors`; nothing is left behind.
        ValueError: an argument means nothing.
    """
    start = time.perf_counter()
    recorder = Recorder(observer=progress or ignore)
    max_shard_bytes = parse_bytes(max_shard_size, option="max_shard_size")
    place = _place(source, local_path(destination))
    access = HubAccess(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    excerpt = Excerpt(subfolder=subfolder or "", variant=variant, prefix=prefix, select=select)
    checkpoint = read_headers(source, access, recorder, excerpt)
    wanted = None if dtype is None else str(dtype).removeprefix("torch.")
    planned = _plan(checkpoint, wanted, max_shard_bytes, recorder)
    with PeakWatch() as watch:
        before = watch.peak
        with new_folder(place, _fingerprint(planned)) as folder:
            resumed = _fill(folder, planned, recorder)
    return ConversionReport(
        source=str(source) if isinstance(source, str | Path) else ", ".join(map(str, source)),
        format=checkpoint.format.value,
        destination=str(place),
        files=planned.names,
        side_files=tuple(sorted(set(folder.sums) - set(planned.names))),
        resumed=resumed,
        num_tensors=len(planned.conversion.tensors),
        num_parameters=sum(tensor.numel for tensor in planned.conversion.tensors),
        nbytes=sum(shard.nbytes for shard in planned.shards),
        dtype=planned.dtype,
        phases=tuple(recorder.finished),
        seconds=time.perf_counter() - start,
        bound_bytes=planned.bound_bytes,
        before_bytes=before.anonymous_bytes,
        peak_bytes=watch.peak.anonymous_bytes - before.anonymous_bytes,
        notes=(*planned.conversion.notes, *_leftover_notes(place)),
    )


def _place(source: Source, destination: Path) -> Path:
    """Where the result goes; a source is never written, not even beside its files."""
    folder = local_path(source) if isinstance(source, str | Path) else None
    if folder is not None and folder.is_dir() and destination.resolve().is_relative_to(folder.resolve()):
        raise DestinationError(
            f"{destination}: expected a folder outside the source {folder}, which is never written; name another."
        )
    return check_destination(destination)


def _plan(checkpoint: Checkpoint, wanted: str | None, max_shard_bytes: int, recorder: Recorder) -> _Planned:
    checkpoint = with_vocabulary(with_config(checkpoint))
    if not checkpoint.tensors:
        raise NotACheckpoint(
            f"{checkpoint.files[0].path}: expected tensors, found none; pass a file that holds weights."
        )
    dtype = choose_dtype(checkpoint, wanted)
    casts = wanted not in _AS_STORED
    if casts:
        check_castable(checkpoint, dtype.value)
    roles, notes = _roles(checkpoint, dtype.value, casts, recorder)
    conversion = plan_conversion(checkpoint, dtype.value if casts else None, roles)
    return _Planned(
        checkpoint=checkpoint,
        dtype=dtype,
        casts=casts,
        conversion=replace(conversion, notes=(*conversion.notes, *notes)),
        shards=plan_shards(conversion.tensors, max_shard_bytes),
    )


def _roles(checkpoint: Checkpoint, dtype: str, casts: bool, recorder: Recorder) -> tuple[Roles, tuple[str, ...]]:
    """What the class says, where that can matter; torch is imported only then."""
    if not needs_roles(checkpoint, dtype if casts else None):
        return Roles(), ()
    with recorder.stage("class") as told, paused_gc():
        from loadstone.api.roles import roles_of

        try:
            roles = roles_of(checkpoint, dtype)
        except LoadstoneError as error:
            told.text = "no class: every tensor is like the others"
            return Roles(), (f"no model class was asked which tensors are special: {error}",)
        told.text = f"{len(roles.kept)} tensors keep a dtype of their own, {len(roles.spare)} are tied to others"
    return roles, ()


def _fingerprint(planned: _Planned) -> str:
    """Of everything that decides which bytes are written: the source's files, what is read, the new files' headers."""
    digest = hashlib.sha256(__version__.encode())
    for file in planned.checkpoint.files:
        mtime_ns = file.version.mtime_ns if file.version else None
        digest.update(repr((str(file.path.resolve()), file.nbytes, mtime_ns)).encode())
    for name, info in planned.checkpoint.tensors.items():
        digest.update(repr((name, info.file.name, info.offset)).encode())
    for shard in planned.shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()[:16]


def _fill(folder: NewFolder, planned: _Planned, recorder: Recorder) -> tuple[str, ...]:
    """Write everything; gives the names of the files that were finished before."""
    resumed = folder.resume({shard.name: shard.nbytes for shard in planned.shards})
    rest = [shard for shard in planned.shards if shard.name not in resumed]
    with recorder.stage(STAGE) as told:
        folder.require(sum(shard.nbytes for shard in rest))
        rewrite(rest, planned.sources, folder, recorder.observer)
        told.text = f"{format_bytes(sum(shard.nbytes for shard in rest))} in {len(rest)} files"
    with recorder.stage("side files") as told:
        for name, content in _side_contents(planned):
            folder.add(name, content)
        told.text = ", ".join(sorted(set(folder.sums) - set(planned.names)))
    with recorder.stage("put in place"):
        check_unchanged(planned.checkpoint.files, advice="convert it again")
        folder.publish()
    return resumed


def _side_contents(planned: _Planned) -> Iterator[tuple[str, bytes]]:
    """The files beside the weights, one after the other."""
    checkpoint = planned.checkpoint
    if len(planned.shards) > 1:
        yield INDEX_NAME, index_text(planned.shards).encode()
    copied = _copied(checkpoint)
    if checkpoint.format is Format.GGUF or checkpoint.params is not None:
        if CONFIG not in copied:
            made = config_files(checkpoint, planned.dtype.value)
            yield from ((name, content) for name, content in made if name not in copied)
        yield from tokenizer_files(checkpoint)
    for name, path in copied.items():
        if name == CONFIG and planned.casts:
            yield CONFIG, json_text(with_dtype(checkpoint.config or {}, planned.dtype.value))
        else:
            yield name, path.read_bytes()


def _copied(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files beside the weights that belong to the result as they are."""
    if checkpoint.format is Format.GGUF:
        return {}
    if checkpoint.params is None:
        return side_files(checkpoint.root)
    # What describes Meta's layout would describe nothing in the new folder.
    replaced = {checkpoint.root / PARAMS_NAME, bare_vocabulary(checkpoint.root)}
    found = side_files(checkpoint.root, described_by=PARAMS_NAME)
    return {name: path for name, path in found.items() if path not in replaced}


def _leftover_notes(destination: Path) -> Sequence[str]:
    return [
        f"an unfinished conversion of another source, or with other options, lies in {path}; remove it"
        for path in leftovers(destination)
    ]
