"""What torch puts into a pickle, as inert values: a storage is a key, a tensor is a view of one.

Source: https://github.com/pytorch/pytorch/blob/main/torch/_utils.py (the _rebuild functions)
        https://github.com/pytorch/pytorch/blob/main/torch/_weights_only_unpickler.py (what is harmless)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadstone.dtypes import DTYPES
from loadstone.errors import UnsafePickle, UnsupportedFormat

# Source: https://github.com/pytorch/pytorch/blob/main/torch/storage.py (_dtype_to_storage_type_map)
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A name that the pickle refers to: `module.name`, never looked up."""

    module: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageRef:
    """A storage that a tensor is a view of.

    Attributes:
        key: the name of its bytes in the file.
        dtype: of its elements.
        numel: how many elements the pickle says it has.
        offset: of its first element in the storage of that key (legacy files have views of storages).
    """

    key: str
    dtype: str
    numel: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """A tensor: a view of a storage, all in elements of `dtype`."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A harmless object that is no tensor."""


SKIPPED = Skipped()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> TensorRef:
    if (
        type(storage) is not StorageRef
        or not _is_size(offset)
        or type(shape) is not tuple
        or type(strides) is not tuple
    ):
        raise TypeError("a tensor is made of a storage, an offset, a shape and strides")
    if not len(shape) == len(strides) <= 64 or not all(map(_is_size, shape)) or not all(map(_is_size, strides)):
        raise ValueError("shape and strides are equally many non-negative integers")
    return TensorRef(storage=storage, dtype=dtype or storage.dtype, offset=offset, shape=shape, strides=strides)


def _tensor_v3(args: tuple[Any, ...]) -> TensorRef:
    dtype = args[6]
    if type(dtype) is not Name or dtype.name not in DTYPES:
        raise TypeError("the dtype of a tensor is one of torch's")
    storage, offset, shape, strides = args[:4]
    return _tensor(storage, offset, shape, strides, dtype.name)


def _from_type(args: tuple[Any, ...]) -> Any:
    function, _, arguments = args[:3]
    return call(function, arguments)


_CONSTRUCTORS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor"): lambda args: _tensor(*args[:4]),
    ("torch._utils", "_rebuild_tensor_v2"): lambda args: _tensor(*args[:4]),
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda args: args[0],
    ("torch._utils", "_rebuild_parameter_with_state"): lambda args: args[0],
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "Parameter"): lambda args: args[0],
    ("torch", "Size"): lambda args: args[0],
    ("torch", "device"): lambda _: SKIPPED,
    ("torch.serialization", "_get_layout"): lambda _: SKIPPED,
    ("collections", "OrderedDict"): lambda args: _pairs(args[0]) if args else {},
    ("collections", "defaultdict"): lambda _: {},
    ("collections", "Counter"): lambda _: {},
    ("builtins", "dict"): lambda _: {},
    ("_codecs", "encode"): lambda _: SKIPPED,
}
_CONSTRUCTORS |= {
    ("builtins", name): lambda _: SKIPPED for name in ("bytearray", "complex", "float", "int", "list", "set")
}
# What trainers keep beside the weights: settings, the best loss so far.
_CONSTRUCTORS |= {
    ("argparse", "Namespace"): lambda _: SKIPPED,
    ("pytorch_lightning.utilities.parsing", "AttributeDict"): lambda _: {},
    ("lightning.fabric.utilities.data", "AttributeDict"): lambda _: {},
    ("lightning_fabric.utilities.data", "AttributeDict"): lambda _: {},
    ("numpy", "dtype"): lambda _: SKIPPED,
    ("numpy.core.multiarray", "scalar"): lambda _: SKIPPED,
    ("numpy._core.multiarray", "scalar"): lambda _: SKIPPED,
}
_CONSTRUCTORS |= {("__builtin__", name): run for (module, name), run in _CONSTRUCTORS.items() if module == "builtins"}

# Names that are values, not functions.
_VALUES = {("torch", "Tensor"), ("torch", "strided"), ("torch", "contiguous_format"), ("torch", "preserve_format")}
# Old versions of Lightning keep the state of a callback under its class: a key that is no text, and dropped as such.
# Source: https://github.com/Lightning-AI/pytorch-lightning/blob/1.4.0/pytorch_lightning/trainer/callback_hook.py
_VALUES |= {
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
}
_STORAGE_MODULES = {"torch", "torch.cuda", "torch.storage"}


def _pairs(items: Any) -> dict[str, Any]:
    """Python 2's way to write an OrderedDict: a list of pairs."""
    if type(items) is not list:
        raise TypeError("an OrderedDict is made of a list of pairs")
    result = {key: value for key, value in items if type(key) is str}
    # Used once, then empty: a pickle cannot have a long list copied over and over.
    items.clear()
    return result


def call(function: Any, args: Any) -> Any:
    """What stands for a call of one of torch's constructors."""
    if type(function) is not Name or type(args) is not tuple:
        raise TypeError("only a constructor can be called")
    return _CONSTRUCTORS[function.module, function.name](args)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOwner:
    """Answers for the pickle of one file: only what torch writes for tensors and plain containers is let through.

    Attributes:
        path: the file, for messages.
        storages: the first mention of each storage, by key.
    """

    path: Path
    storages: dict[str, StorageRef] = field(default_factory=dict)

    def find(self, module: str, name: str) -> Name:
        """The name itself, if it is harmless.

        Raises:
            UnsupportedFormat: it is the storage of a dtype that is not read.
            UnsafePickle: it is anything else.
        """
        known = (module, name) in _CONSTRUCTORS or (module, name) in _VALUES
        is_dtype = module == "torch" and name in DTYPES and DTYPES[name].bits >= 8
        is_storage = module in _STORAGE_MODULES and (name in STORAGE_DTYPES or name == "TypedStorage")
        if known or is_dtype or is_storage:
            return Name(module=module, name=name)
        if module in _STORAGE_MODULES and name.endswith("Storage"):
            raise UnsupportedFormat(
                f"{self.path}: expected storages of {' '.join(STORAGE_DTYPES)}, found {name[:80]!r}, which is not "
                "read; save the model with another dtype."
            )
        raise UnsafePickle(
            f"{self.path}: expected a pickle of tensors and plain containers, found a reference to "
            f"{f'{module}.{name}'[:160]!r}; nothing was run. Use a safetensors version of this checkpoint, or save its "
            "state_dict anew where you trust it."
        )

    def call(self, function: Any, args: Any) -> Any:
        """What stands for the result of a call."""
        return call(function, args)

    def persistent(self, pid: Any) -> StorageRef:
        """The storage that a persistent id names.

        Source: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py (persistent_id)
        """
        kind, storage, key, _, numel = pid[:5]
        dtype = STORAGE_DTYPES[storage.name]
        if kind != "storage" or type(key) is not str or not _is_size(numel):
            raise ValueError("a persistent id is that of a storage")
        ref = StorageRef(key=key, dtype=dtype, numel=numel)
        self.storages.setdefault(key, ref)
        if len(pid) > 5 and pid[5] is not None:
            _, offset, numel = pid[5]
            if not _is_size(offset) or not _is_size(numel) or offset + numel > ref.numel:
                raise ValueError("a view lies inside its storage")
            return replace(ref, offset=offset)
        return ref
