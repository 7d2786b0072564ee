"""What a Hugging Face folder holds beside its weights: config, tokenizer, templates, licence. Never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loadstone.checkpoint.download import SIDE_FILES
from loadstone.checkpoint.layout import is_index
from loadstone.dtypes import DTYPES

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Where transformers keeps the templates beside the main one.
_TEMPLATES = "additional_chat_templates/*.jinja"
_DTYPE_KEYS = ("dtype", "torch_dtype")


def side_files(folder: Path, *, described_by: str = CONFIG) -> dict[str, Path]:
    """The files that belong to a model, by their name in the folder; none where the one that describes it is not there.

    Without one the folder is any folder, a download folder perhaps, and what lies there belongs to others.
    """
    if not (folder / described_by).is_file():
        return {}
    names = [path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in SIDE_FILES)]
    names = [name for name in names if not is_index(name)]
    names += [str(path.relative_to(folder)) for path in folder.glob(_TEMPLATES)]
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()}


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says that the weights are of a dtype, its nested configs too."""
    changed = _with_dtype(config, dtype)
    if not any(key in changed for key in _DTYPE_KEYS):
        changed["dtype"] = dtype
    return changed


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    changed = dict(config)
    for key, value in config.items():
        if key in _DTYPE_KEYS and _is_dtype(value):
            changed[key] = dtype
        elif isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
    return changed


def _is_dtype(value: Any) -> bool:
    name = str(value).removeprefix("torch.")
    return value is None or (name in DTYPES and DTYPES[name].floating)


def json_text(value: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
