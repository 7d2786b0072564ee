"""The public surface, and what importing it costs."""

import subprocess
import sys

import pytest

import loadstone

HEAVY = ("torch", "transformers", "numpy", "rich", "typer", "huggingface_hub", "gguf", "safetensors")


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_are_these() -> None:
    assert loadstone.__all__ == [
        "LoadstoneError",
        "States",
        "convert",
        "inspect",
        "load",
        "load_tokenizer",
        "machine",
        "of",
        "offload",
        "plan",
        "verify",
    ]
    for name in loadstone.__all__:
        assert getattr(loadstone, name) is not None
    assert set(loadstone.__all__) <= set(dir(loadstone))


def test_importing_loadstone_imports_nothing_heavy() -> None:
    assert not imported_by("import loadstone") & set(HEAVY)


def test_load_is_reachable_without_torch() -> None:
    assert not imported_by("import loadstone; loadstone.load") & {"torch", "transformers", "rich", "typer", "gguf"}


def test_inspecting_imports_neither_torch_nor_transformers() -> None:
    code = """
import json, struct, tempfile, pathlib, loadstone
folder = pathlib.Path(tempfile.mkdtemp())
header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
(folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
loadstone.inspect(folder)
"""
    assert not imported_by(code) & {"torch", "transformers", "gguf"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'bananas'"):
        loadstone.bananas  # noqa: B018


def test_plan_is_the_function_also_after_the_room_of_that_name_was_imported() -> None:
    code = "import loadstone, loadstone.plan.values, loadstone.plan.make; assert loadstone.plan.__name__ == 'plan'"
    assert not imported_by(code) & {"torch", "transformers"}
