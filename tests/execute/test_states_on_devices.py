"""Models that compute on an accelerator leave it, to RAM or to their files, and come back with the same bits.

The device is a fake one: its memory is the host's, and what is sent there arrives later, in order.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_residency import LAYERS, equal, folder, logits, stats
from test_states import away, hooks

import builders
import loadstone
from loadstone.api import assemble
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import FileChanged, PlanNotSupported, StreamedModel, TruncatedFile
from loadstone.execute.values import Streaming
from loadstone.hardware.fake import FakeLink
from loadstone.hardware.probe import probe
from loadstone.hardware.spec import Device
from loadstone.stream import transfer

__all__ = ["folder"]  # a fixture

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeLink]]:
    """A device `cuda:0`; at the end nothing is locked for it any more."""
    links: list[FakeLink] = []

    def link(device: torch.device) -> FakeLink:
        del device
        links.append(FakeLink(delay_s=0.0003))
        return links[-1]

    here = probe()
    device = Device(id="cuda:0", kind="cuda", name="fake", total_bytes=8 << 30, free_bytes=8 << 30)
    monkeypatch.setattr(assemble, "devices_here", lambda: (device, here.host))
    monkeypatch.setitem(transfer.STAND_INS, "cuda:0", "cpu")
    monkeypatch.setitem(transfer.LINKS, "cpu", link)
    yield links
    gc.collect()
    assert [made.num_locked_bytes for made in links] == [0] * len(links)


def on_device(path: Path, units: tuple[str, ...] = (), *, dtype: str | None = None, **more: Any) -> Any:
    """A model on the device, some units of which are streamed there."""
    streaming = Streaming(units=units, num_slots=2, device="cuda:0", **more) if units else None
    return carry_out(Request(source=path, device=None if units else "cuda:0", streaming=streaming, dtype=dtype))


def senders() -> int:
    return sum(thread.name.startswith("loadstone-send") for thread in threading.enumerate())


ZOO = [
    ("causal", "llama"),
    ("causal", "gpt2"),  # tied
    ("causal", "qwen3_moe"),
    ("causal", "mamba"),
    ("seq2seq", "t5"),
    ("encoder", "albert"),
]


@pytest.mark.parametrize("to", ["disk", "ram"])
@pytest.mark.parametrize(("kind", "model_type"), ZOO)
def test_a_model_that_left_its_device_comes_back_the_same(
    tmp_path: Path, gpu: list[FakeLink], kind: str, model_type: str, to: str
) -> None:
    made = builders.tiny_model(model_type, kind, torch.bfloat16)
    builders.write_checkpoint(made, tmp_path)
    model: Any = carry_out(Request(source=tmp_path, device="cuda:0", architecture=type(made).__name__))
    inputs = builders.sample_inputs(model, kind)
    expected, state = builders.outputs(model, inputs), {n: t.clone() for n, t in model.state_dict().items()}
    loaded = loadstone.of(model)
    assert (away(model), hooks(model)) == (set(), 0)
    for asks in (True, False, True):
        assert loaded.park(to) > 0
        assert loaded.is_parked
        assert away(model)
        assert senders() == 0
        assert gpu[0].num_locked_bytes == 0
        if asks:
            loaded.wake()
        assert equal(builders.outputs(model, inputs), expected)
        assert not loaded.is_parked
        assert (away(model), hooks(model)) == (set(), 0)
        assert (senders(), gpu[0].num_locked_bytes) == (0, 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("to", ["disk", "ram"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_model_that_is_streamed_to_its_device_leaves_it_too(
    folder: Path, gpu: list[FakeLink], in_memory: bool, to: str
) -> None:
    expected = logits(loadstone.load(folder))
    names = frozenset(open_checkpoint(folder).tensors) if in_memory else frozenset()
    model = on_device(folder, (*LAYERS[:4], "model.embed_tokens"), in_memory=names)
    loaded, before = loadstone.of(model), away(model)
    assert torch.equal(logits(model), expected)
    for asks in (True, False):
        assert loaded.park(to) > 0
        assert away(model) > before
        assert stats(model).slot_bytes == 0
        assert senders() == 0
        assert all(made.num_locked_bytes == 0 for made in gpu) or in_memory  # what lives in RAM stays locked there
        if asks:
            loaded.wake()
            assert away(model) == before
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        assert away(model) == before
    loaded.close()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_on_a_device_falls_and_rises(folder: Path, stream: bool) -> None:
    expected = logits(loadstone.load(folder))
    model = on_device(folder, LAYERS[:2] if stream else ())
    loaded = loadstone.of(model)
    whole = sum(one.nbytes for one in loadstone.load(folder).parameters())
    for share in (0.8, 0.5, 0.9, 0.6):
        loaded.limit(int(whole * share))
        kept = {id(one): one.nbytes for name, one in model.named_parameters() if name not in away(model)}
        assert sum(kept.values()) + stats(model).slot_bytes <= whole * share
        for _ in range(2):
            assert torch.equal(logits(model), expected)
    loaded.limit(None)
    assert away(model) == set()
    assert torch.equal(logits(model), expected)
    assert hooks(model) == 0
    loaded.close()


@pytest.mark.usefixtures("gpu")
def test_a_limit_that_falls_while_the_model_is_parked_is_what_it_wakes_up_to(folder: Path) -> None:
    model = on_device(folder)
    expected, loaded = logits(model), loadstone.of(model)
    nbytes = sum(one.nbytes for one in model.parameters())
    loaded.park("ram")
    loaded.limit(nbytes // 2)
    loaded.wake()
    assert away(model)
    assert torch.equal(logits(model), expected)
    loaded.limit(None)  # what did not come back from RAM comes from the files
    assert torch.equal(logits(model), expected)
    loaded.close()


@pytest.mark.usefixtures("gpu")
def test_what_was_changed_on_the_device_is_never_lost(folder: Path) -> None:
    model = on_device(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    changed = logits(model)
    for to in ("disk", "ram"):
        with pytest.raises(StreamedModel, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: expected it as it was"):
            loadstone.of(model).park(to)
        loadstone.of(model).park(to, keep_changed=True)
        assert torch.equal(logits(model), changed)


@pytest.mark.usefixtures("gpu")
def test_files_that_changed_are_named_by_what_comes_from_them_and_by_nothing_else(folder: Path, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(folder, tmp_path / "llama"))
    model = on_device(path)
    expected, loaded = logits(model), loadstone.of(model)
    file = path / "model.safetensors"
    content = file.read_bytes()
    loaded.park("disk")
    file.write_bytes(content[:-1])
    with pytest.raises((FileChanged, TruncatedFile), match=r"model\.safetensors: "):
        loaded.wake()
    assert loaded.is_parked
    assert senders() == 0
    shutil.copytree(folder, path, dirs_exist_ok=True)
    other = on_device(path)
    loadstone.of(other).park("ram")
    file.write_bytes(content[:-1])
    assert torch.equal(logits(other), expected)  # its bits are in RAM


def test_where_a_model_can_be_parked_is_told(folder: Path) -> None:
    model = loadstone.load(folder, device="cpu")
    with pytest.raises(ValueError, match=r'^park: expected to="disk" or to="ram", found \'moon\'\.$'):
        loadstone.of(model).park("moon")
    with pytest.raises(
        ValueError, match=r'^park: expected a model on an accelerator for to="ram", found one that is in'
    ):
        loadstone.of(model).park("ram")
    made = builders.tiny_model("llama", "causal")
    loadstone.offload(made, device="cpu", max_memory=sum(one.nbytes for one in made.parameters()) * 2)
    with pytest.raises(PlanNotSupported, match=r"^park: expected a module that computes elsewhere than its home is"):
        loadstone.of(made).park()


@pytest.mark.usefixtures("gpu")
def test_many_rounds_leave_nothing_behind(folder: Path) -> None:
    model = on_device(folder)
    expected, loaded = logits(model), loadstone.of(model)
    threads = threading.active_count()
    for number in range(40):
        loaded.park(("disk", "ram")[number % 2])
        loaded.wake()
        assert torch.equal(logits(model), expected)
    assert threading.active_count() <= threads + 1  # the fake device's own
    assert loaded.residency is not None
    assert loaded.residency._filler._destination._sent == {}  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("to", ["disk", "ram"])
def test_memory_of_a_gpu_is_given_back(folder: Path, to: str) -> None:
    model: Any = loadstone.load(folder, device="cuda")
    tokens = torch.arange(1, 9, device="cuda")[None]
    with torch.inference_mode():
        expected = model(tokens).logits.clone()
        before = torch.cuda.memory_reserved()
        loadstone.of(model).park(to)
        assert torch.cuda.memory_reserved() < before
        assert torch.equal(model(tokens).logits, expected)
