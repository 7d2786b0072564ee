"""Every fault Loadstone reports, one class each.

    LoadstoneError
    ├── SourceError                 the source cannot be used as a checkpoint
    │   ├── SourceNotFound          no such path, no such hub id, nothing cached
    │   ├── NotACheckpoint          the path exists and holds no weights
    │   ├── UnsupportedFormat       a format or encoding that is not read
    │   ├── UnreadableFile          the system does not let a file be read, or no longer
    │   ├── FileChanged             a file is another one than when its header was read
    │   ├── DownloadFailed          the hub did not give what was asked for
    │   └── ChecksumMismatch        a file is not the one that was expected
    ├── CorruptCheckpoint           a file contradicts itself
    │   ├── TruncatedFile           a file ends before its tensors do
    │   ├── InvalidHeader           a header that lies or cannot be parsed
    │   ├── InvalidIndex            an index that names what is not there, or what it must not name
    │   ├── MissingShard            a file the index names is missing
    │   ├── UnsafePickle            a pickle that would run code
    │   └── InvalidTemplate         a chat template that fails, or reaches for what it must not
    ├── ConfigError                 config.json cannot be used
    │   ├── InvalidConfig           not JSON, not an object, no model_type, or sizes that contradict the files
    │   └── UnknownArchitecture     no class is known for it
    ├── CheckpointMismatch          tensors and parameters do not fit together
    ├── RemoteCodeRefused           the checkpoint wants to run its own code
    ├── DestinationError            what is asked for cannot be written there
    │   ├── DestinationExists       something is there already
    │   ├── DestinationBusy         another process is writing it
    │   └── DiskFull                the disk has no room for it
    ├── UnsupportedDtype            a dtype this torch or this conversion does not have
    ├── StreamedModel               what was asked needs weights that are not kept in memory
    ├── DeviceUnavailable           the device asked for is not there
    ├── DoesNotFit                  no plan keeps within the memory allowed
    ├── InvalidPlan                 a plan that cannot be read, or is no longer true
    ├── PlanNotSupported            a plan that cannot be carried out yet
    └── InvalidMachine              no machine of that name, or a machine file that cannot be used

A message says where, what was expected, what was found, and what to do. Misuse of an argument stays
`ValueError` or `TypeError`.
"""

from __future__ import annotations

from typing import Any


class LoadstoneError(Exception):
    """The base of every fault; catching it catches them all."""


class SourceError(LoadstoneError):
    """The source cannot be used as a checkpoint."""


class SourceNotFound(SourceError):
    """There is no such path, and no such model in the cache or on the hub."""


class NotACheckpoint(SourceError):
    """The path exists but holds no weights in a format that is read."""


class UnsupportedFormat(SourceError):
    """The file is of a kind, or holds an encoding, that is not read."""


class UnreadableFile(SourceError):
    """A file cannot be read, or can no longer: removed, forbidden, a disk that fails."""


class FileChanged(SourceError):
    """A file was replaced or written to while it was loaded."""


class DownloadFailed(SourceError):
    """The hub did not give what was asked for."""


class ChecksumMismatch(SourceError):
    """A downloaded file is not the one that was expected."""


class CorruptCheckpoint(LoadstoneError):
    """A checkpoint file contradicts itself."""


class TruncatedFile(CorruptCheckpoint):
    """A file ends before the tensors its header promises do."""


class InvalidHeader(CorruptCheckpoint):
    """A header cannot be parsed, or describes what cannot be."""


class InvalidIndex(CorruptCheckpoint):
    """An index names something that is not there or that it must not name."""


class MissingShard(CorruptCheckpoint):
    """A file that the index names is missing."""


class UnsafePickle(CorruptCheckpoint):
    """A pickle refers to code; nothing of it was run."""


class InvalidTemplate(CorruptCheckpoint):
    """A chat template does not parse, fails, or reaches for what its sandbox does not give."""


class ConfigError(LoadstoneError):
    """The checkpoint's config.json cannot be used."""


class InvalidConfig(ConfigError):
    """config.json is not a JSON object, lacks what is needed, or contradicts the weight files."""


class UnknownArchitecture(ConfigError):
    """No class is known for the model_type or architecture."""


class CheckpointMismatch(LoadstoneError):
    """The tensors of the checkpoint and the parameters of the module do not fit together.

    Attributes:
        missing: fqns that no tensor was found for.
        unexpected: tensors that belong to no parameter.
        mismatched: "fqn: expected shape, found shape" lines.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched


class RemoteCodeRefused(LoadstoneError):
    """The checkpoint names code of its own, and nobody asked for it to run."""


class DestinationError(LoadstoneError):
    """The destination cannot be written; nothing was left there."""


class DestinationExists(DestinationError):
    """Something is at the destination already, and nothing is ever overwritten."""


class DestinationBusy(DestinationError):
    """Another process is writing the same destination."""


class DiskFull(DestinationError):
    """The disk has no room for the result; nothing was left on it."""


class UnsupportedDtype(LoadstoneError):
    """A dtype that this torch, or this conversion, does not have."""


class StreamedModel(LoadstoneError):
    """What was asked of a model needs weights that are there only while they are computed with."""


class DeviceUnavailable(LoadstoneError):
    """The device that was asked for is not on this machine."""


class DoesNotFit(LoadstoneError):
    """No plan keeps within the memory allowed.

    Attributes:
        shortfall_bytes: the least that is missing.
        alternatives: plans (`loadstone.plan.values.Plan`) that do fit, each with a label of what it does differently.
    """

    def __init__(self, message: str, *, shortfall_bytes: int, alternatives: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.shortfall_bytes = shortfall_bytes
        self.alternatives = alternatives


class InvalidPlan(LoadstoneError):
    """A plan file cannot be read, or describes another checkpoint or machine."""


class PlanNotSupported(LoadstoneError):
    """A plan that is right, and that this version cannot carry out yet."""


class InvalidMachine(LoadstoneError):
    """There is no machine of that name, or the file describes none that can be."""
