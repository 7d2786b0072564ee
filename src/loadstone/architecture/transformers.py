"""The bridge to transformers: config -> class -> skeleton -> key map, and what must happen after the weights are in.

transformers knows the architectures and how their checkpoints changed over the years; its conversion mapping is used as
it is, but driven by Loadstone's bytes. This file and its neighbours `transformers_*.py` are the only ones that call it.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from loadstone.architecture.skeleton import SkipMetaInitialisers
from loadstone.errors import InvalidConfig, RemoteCodeRefused, UnknownArchitecture, UnsupportedFormat

_MAX_REASON = 240

# Building a model sets torch's default dtype and transformers' own flags, which are global: one at a time.
_BUILD_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the caller asked for.

    Attributes:
        architecture: the name of a transformers class, or None for what config.json says.
        attn_implementation: as in transformers, or None for the class's choice.
        trust_remote_code: whether code that the checkpoint brings may run.
        root: the folder of the checkpoint.
        name: how the source was called.
        described_in: what the config was read from.
    """

    root: Path
    name: str
    described_in: str = "config.json"
    architecture: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass(slots=True)
class Described:
    """A model class with its config, ready to be built.

    Attributes:
        config: the transformers config.
        model_class: the class.
        chosen_by: where the class came from, for the report.
    """

    config: Any
    model_class: Any
    chosen_by: str
    notes: list[str] = field(default_factory=list)


def describe(config: Mapping[str, Any], wanted: Wanted) -> Described:
    """Find the config class and the model class.

    Args:
        config: the parsed config.json.
        wanted: what the caller asked for.

    Raises:
        InvalidConfig: config.json lacks `model_type`, or its class refuses it.
        UnknownArchitecture: no class of that name or for that model type.
        RemoteCodeRefused: the class is code in the checkpoint and `trust_remote_code` is off.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedFormat(
            f"{wanted.root / 'config.json'}: the weights are quantised ({method}), which Loadstone does not load yet; "
            "use the unquantised checkpoint or a GGUF file."
        )
    hf_config, remote = _build_config(config, wanted)
    model_class, chosen_by = _find_class(hf_config, config, wanted, remote)
    # A part of a composite checkpoint (a CLIP text tower, say) has a config class of its own.
    own = model_class.config_class
    if own is not None and not isinstance(hf_config, own):
        nested = config.get(getattr(own, "base_config_key", "") or "", config)
        hf_config = own.from_dict(_plain(own, nested))
    hf_config.name_or_path = wanted.name
    if wanted.attn_implementation is not None:
        hf_config._attn_implementation = wanted.attn_implementation
    return Described(config=hf_config, model_class=model_class, chosen_by=chosen_by)


def _build_config(config: Mapping[str, Any], wanted: Wanted) -> tuple[Any, bool]:
    where = wanted.root / "config.json"
    model_type = config.get("model_type")
    mapping = transformers.CONFIG_MAPPING
    remote = _remote_class(config, "AutoConfig")
    if model_type in mapping:
        config_class = mapping[model_type]
    elif remote is not None:
        config_class = _import_remote(remote, wanted)
    elif model_type is None and "_class_name" in config:
        name = config["_class_name"]
        raise UnknownArchitecture(
            f"{where}: {name} is a class of diffusers, which is not chosen by itself; import it and pass into={name} "
            "and config= with its arguments."
        )
    elif model_type is None:
        raise InvalidConfig(
            f'{where}: there is no "model_type", so no class can be chosen; add the model type that transformers uses '
            '(such as "llama"), or pass into= with your own class.'
        )
    else:
        close = difflib.get_close_matches(str(model_type), list(mapping.keys()), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UnknownArchitecture(
            f'{where}: model_type "{model_type}" is not one that transformers {transformers.__version__} knows.{hint} '
            "Upgrade transformers, or pass into= with your own class."
        )
    try:
        return config_class.from_dict(_plain(config_class, config)), model_type not in mapping
    except Exception as error:
        raise InvalidConfig(f"{where}: {config_class.__name__} does not accept it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Another library's error in one line; torch appends a stack trace of its own from the third on."""
    told = " ".join(" ".join(str(error).strip().splitlines()[:2]).split())[:_MAX_REASON]
    return told if isinstance(error, ImportError | ValueError) else f"{type(error).__name__} {told}"


def _plain(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with infinities in place of the objects that transformers writes for them."""
    decoded: dict[str, Any] = config_class._decode_special_floats(dict(config))
    return decoded


def _find_class(hf_config: Any, config: Mapping[str, Any], wanted: Wanted, remote: bool) -> tuple[Any, str]:
    declared = (config.get("architectures") or [None])[0]
    name = wanted.architecture or declared
    chosen_by = "architecture=" if wanted.architecture else f"{wanted.described_in}'s architectures"
    if name is None:
        name, chosen_by = "AutoModel", f"model_type {hf_config.model_type}; {wanted.described_in} names no architecture"
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is not None and hasattr(found, "_model_mapping"):
        try:
            return _from_auto_class(found, hf_config, declared), f"{chosen_by} {name}"
        except KeyError:
            found = None
            known = f"{name} has no class for model_type {hf_config.model_type}"
    elif found is not None and hasattr(found, "from_pretrained") and hasattr(found, "config_class"):
        return found, chosen_by
    else:
        known = f"transformers {transformers.__version__} has no model class {name}"
    code = _remote_class(config, name if str(name).startswith("Auto") else None)
    if code is not None and (remote or wanted.architecture is None):
        return _import_remote(code, wanted), "code in the checkpoint (trust_remote_code)"
    close = difflib.get_close_matches(str(name), _model_class_names(), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UnknownArchitecture(f"{wanted.root}: {known}.{hint} Pass architecture= with another class name.")


def _from_auto_class(auto_class: Any, hf_config: Any, declared: str | None) -> Any:
    found = auto_class._model_mapping[type(hf_config)]
    if not isinstance(found, list | tuple):
        return found
    return next((candidate for candidate in found if candidate.__name__ == declared), found[0])


def _model_class_names() -> list[str]:
    return [name for name in dir(transformers) if name[:1].isupper() and not name.endswith(("Config", "Tokenizer"))]


def _remote_class(config: Mapping[str, Any], auto_name: str | None) -> str | None:
    references = config.get("auto_map")
    if not isinstance(references, Mapping):
        return None
    if auto_name is not None:
        found = references.get(auto_name)
    else:
        found = next((code for key, code in references.items() if key.startswith("AutoModel")), None)
    return found if isinstance(found, str) else None


def _import_remote(reference: str, wanted: Wanted) -> Any:
    if not wanted.trust_remote_code:
        raise RemoteCodeRefused(
            f"{wanted.root}: the class is code in the checkpoint itself ({reference}), which is not run unless you "
            "read it and pass trust_remote_code=True."
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(wanted.root), local_files_only=True)


def build(described: Described, dtype: torch.dtype) -> nn.Module:
    """Build the model on the meta device, in `dtype`, as `from_pretrained` does.

    Args:
        described: class and config.
        dtype: the floating-point dtype of the model as a whole.

    Raises:
        InvalidConfig: the class cannot be built from this config.
    """
    config, model_class = described.config, described.model_class
    config.dtype = dtype
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            getattr(config, key).dtype = dtype
    with _BUILD_LOCK, ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        stack.enter_context(SkipMetaInitialisers())
        try:
            model: nn.Module = model_class(config)
        except Exception as error:
            # transformers says in words of its own what is missing (a package, an attention implementation, a field);
            # sizes that cannot be are refused by torch, and names of activations and the like are looked up in tables.
            raise InvalidConfig(
                f"{config.name_or_path}: {model_class.__name__} cannot be built from the config: "
                f"{_reason(error)}; use the config that belongs to these weights."
            ) from error
    return model


def kept_dtypes(model: Any, dtype: torch.dtype, fqns: Iterable[str]) -> dict[str, str]:
    """What transformers would load in a dtype of its own, by fqn: routers, `A_log`, sinks and the like.

    Args:
        model: the model, on meta.
        dtype: what the others follow.
        fqns: the names of its tensors.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    search, group_to_pattern, _ = build_glob_alternation(list(plan))
    found = ((fqn, search.search(fqn)) for fqn in fqns)
    return {
        fqn: str(plan[group_to_pattern[match.lastgroup]]).removeprefix("torch.")
        for fqn, match in found
        if match is not None and match.lastgroup is not None
    }


def expected_missing(model: Any, missing: set[str]) -> set[str]:
    """Those of `missing` that are no fault: tied to a tensor that is there, or computed by the class."""
    import re

    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    fine = {fqn for group in groups.values() if group - missing for fqn in group}
    patterns = model._keys_to_ignore_on_load_missing or ()
    return {fqn for fqn in missing if fqn in fine or any(re.search(pattern, fqn) for pattern in patterns)}


def expected_unexpected(model: Any, unexpected: set[str]) -> set[str]:
    """Those of `unexpected` that the class knows to be leftovers of older versions."""
    import re

    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return {name for name in unexpected if any(re.search(pattern, name) for pattern in patterns)}


def finish(model: Any, missing: set[str], device: torch.device) -> None:
    """Do what the class does once the weights are in: buffers, ties, missing tensors, eval mode.

    Args:
        model: the model, its loaded tensors in place.
        missing: fqns that nothing was loaded for; tied and computed ones among them.
        device: where computed buffers and missing tensors go.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
    _mark_as_initialized(model, missing)
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(info.missing_keys, {"": device}, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model.eval()


def _mark_as_initialized(model: Any, missing: set[str]) -> None:
    """Set the flag by which transformers' initialisers know what to leave alone, on tensors and on whole modules."""
    walk = list(model.named_modules(remove_duplicate=False))
    lacking = {fqn.rpartition(".")[0] for fqn in missing}
    for path, module in walk:
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if name in module._non_persistent_buffers_set:  # nothing was loaded for it: its class computes it
                lacking.add(path)
            elif tensor is not None and prefix + name not in missing:
                tensor._is_hf_initialized = True
    # An initialiser of a module may fill what is further inside.
    around = {""}
    for path in lacking:
        around.update(accumulate(path.split("."), "{}.{}".format))
    # By identity: a module registered twice lacks something if it does under either name.
    incomplete = {id(module) for path, module in walk if path in around}
    for _, module in walk:
        if id(module) not in incomplete:
            module._is_hf_initialized = True


def adopt_generation_config(model: Any, root: Path) -> str:
    """Give the model the generation config of its folder.

    Returns:
        Where it came from, for the report.
    """
    if not (model.can_generate() and hasattr(model, "adjust_generation_fn")):
        return "none: the class does not generate"
    if not (root / "generation_config.json").exists() and not (root / "config.json").exists():
        return "made from the config"
    model.adjust_generation_fn(
        None,
        False,
        None,
        str(root),
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=False,
    )
    return "generation_config.json" if (root / "generation_config.json").exists() else "made from config.json"
