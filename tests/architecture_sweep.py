"""Load tiny checkpoints of every model type with Loadstone and with transformers, and compare everything.

python tests/architecture_sweep.py --kind causal --json sweep.json
python tests/architecture_sweep.py --kind causal --devices     # cut into three parts, on three fake devices
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import builders
import loadstone

BATCH = 12
BATCH_S = 400


def differences(ours: Any, theirs: Any) -> list[str]:
    """What differs between two loads of one checkpoint, in words; nothing if they are alike."""
    found = []
    if type(ours) is not type(theirs):
        found.append(f"class {type(ours).__name__} / {type(theirs).__name__}")
    for what, read in (("state", _state), ("buffers", _buffers), ("requires_grad", _grads), ("ties", _ties)):
        left, right = read(ours), read(theirs)
        if left.keys() != right.keys():
            found.append(f"{what}: names {sorted(left.keys() ^ right.keys())[:3]}")
            continue
        unlike = [name for name in left if not _same(left[name], right[name])]
        if unlike:
            found.append(f"{what}: {unlike[:3]}")
    if ours.config.to_dict() != theirs.config.to_dict():
        left, right = ours.config.to_dict(), theirs.config.to_dict()
        found.append(f"config: {[key for key in left | right if left.get(key) != right.get(key)][:3]}")
    if _generation(ours) != _generation(theirs):
        found.append("generation config")
    if any(module.training for module in ours.modules()):
        found.append("training mode")
    if ours.config._attn_implementation != theirs.config._attn_implementation:
        found.append("attention implementation")
    return found


def _state(model: Any) -> dict[str, Any]:
    return dict(model.state_dict())


def _buffers(model: Any) -> dict[str, Any]:
    return dict(model.named_buffers())


def _grads(model: Any) -> dict[str, Any]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _ties(model: Any) -> dict[str, Any]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _generation(model: Any) -> Any:
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_dict()


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return bool(left == right)
    if left.dtype != right.dtype or left.shape != right.shape or left.device != right.device:
        return False
    return torch.equal(_bits(left), _bits(right))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_outputs(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of outputs have the same bits."""
    return len(left) == len(right) and all(map(_same, left, right))


def check(model_type: str, kind: str, dtype: torch.dtype) -> str:
    """Compare one type: "ok", "skipped: ..." where transformers cannot do it by itself, or "failed: ..."."""
    try:
        model = builders.tiny_model(model_type, kind, dtype)
        inputs = builders.sample_inputs(model, kind)
    except Exception as error:
        return f"skipped: cannot be built: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            builders.write_checkpoint(model, folder)
            theirs, info = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
        except Exception as error:
            return f"skipped: cannot be reloaded: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if lacking := info["missing_keys"]:
            return f"skipped: transformers does not find {len(lacking)} of the weights it saved: {min(lacking)}"
        try:
            ours = loadstone.load(folder, dtype="auto", architecture=type(model).__name__)
        except Exception as error:
            return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found = differences(ours, theirs)
        try:
            expected = builders.outputs(theirs, inputs)
            again = builders.outputs(theirs, inputs)
        except Exception as error:
            note = f"forward: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
            return f"failed: {'; '.join(found)}" if found else f"ok without outputs ({note})"
        if not same_outputs(expected, again):
            return f"failed: {'; '.join(found)}" if found else "ok without outputs (transformers differs from itself)"
        if not same_outputs(builders.outputs(ours, inputs), expected):
            found.append("outputs")
        return f"failed: {'; '.join(found)}" if found else "ok"


def check_spread(model_type: str, kind: str) -> str:
    """Compare one type on three devices, cut wherever a third of its walk ends, with the same on one of them."""
    import fake_devices

    try:
        model = builders.tiny_model(model_type, kind)
        inputs = builders.sample_inputs(model, kind)
        _outputs(model, inputs)
    except Exception as error:
        return f"skipped: cannot be built: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        machine = fake_devices.pretend(patch)
        load = {"architecture": type(model).__name__, "dtype": "float32"}
        try:
            builders.write_checkpoint(model, folder)
            one = loadstone.load(folder, device="cuda:0", **load)
            expected = _outputs(one, {key: tensor.to(one.device) for key, tensor in inputs.items()})
        except Exception as error:
            return f"skipped: on one device: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        try:
            spread = loadstone.load(folder, device_map=fake_devices.in_parts(folder, machine), **load)
            found = _outputs(spread, inputs)
        except Exception as error:
            return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    # The last bits of products depend on where their operands lie in memory.
    pairs = zip(found, expected, strict=True)
    return "ok" if all(torch.allclose(a, b, 1e-5, 2e-6, equal_nan=True) for a, b in pairs) else "failed: outputs"


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(builders.SEED)
    with torch.no_grad():
        return [tensor.cpu() for tensor in builders.flat(model(**inputs))]


def child(kind: str, types: list[str], *, spread: bool) -> None:
    """Check types in this process; a line for each."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for model_type in types:
        if spread:
            print(json.dumps([model_type, "torch.float32", check_spread(model_type, kind)]), flush=True)
            continue
        for dtype in (torch.bfloat16, torch.float32):
            print(json.dumps([model_type, str(dtype), check(model_type, kind, dtype)]), flush=True)


def sweep(kind: str, types: list[str], *, spread: bool) -> dict[str, str]:
    """Check types in child processes; a type that ends or hangs its process is reported and passed over."""
    results: dict[str, str] = {}
    waiting = list(types)
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        command = [sys.executable, __file__, "--kind", kind, "--child", "--types", ",".join(batch)]
        command += ["--devices"] if spread else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BATCH_S, check=False)
            out, reason = done.stdout, f"process ended with {done.returncode}: {done.stderr[-200:]}"
        except subprocess.TimeoutExpired as error:
            out, reason = (error.stdout or b"").decode(), "no answer in time"
        for line in out.splitlines():
            if line.startswith("["):
                model_type, dtype, outcome = json.loads(line)
                results[f"{model_type} {dtype.removeprefix('torch.')}"] = outcome
        missed = [one for one in batch if f"{one} float32" not in results]
        if missed:
            results[f"{missed[0]} float32"] = f"skipped: {reason}"
            waiting = missed[1:] + waiting
    return results


def main() -> None:
    """Run the sweep and print what is not ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="causal", choices=sorted(builders.KINDS))
    parser.add_argument("--types", help="comma-separated; all of the kind by default")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    parser.add_argument("--devices", action="store_true", help="on three fake devices, compared with one of them")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    types = arguments.types.split(",") if arguments.types else builders.model_types(arguments.kind)
    if arguments.child:
        child(arguments.kind, types, spread=arguments.devices)
        return
    results = sweep(arguments.kind, types, spread=arguments.devices)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    for name, outcome in results.items():
        if outcome != "ok":
            print(f"{name}: {outcome}")
    counts = Counter(outcome.split(":")[0].split(" (")[0] for outcome in results.values())
    good = {name.split()[0] for name, outcome in results.items() if outcome.startswith("ok")}
    print(f"{arguments.kind}: {dict(counts)}; {len(good)} of {len(types)} types equal")


if __name__ == "__main__":
    main()
