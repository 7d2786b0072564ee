"""The way to a device, on a fake one that works late, and on a real one where there is one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import builders
import loadstone
from loadstone.checkpoint.open import open_checkpoint
from loadstone.hardware.fake import FakeLink
from loadstone.hardware.pages import Bytes
from loadstone.stream import transfer
from loadstone.stream.read import HostStaging, Reader, Staging
from loadstone.stream.transfer import CHUNK_BYTES, LockedStaging, device_fill

LATE_S = 0.005


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(3 * CHUNK_BYTES // 2 + 77, generator=generator).bfloat16(),
        "small": torch.randn(5, 7, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    }


@pytest.fixture
def link() -> Iterator[FakeLink]:
    made = FakeLink(delay_s=LATE_S)
    yield made
    made.close()


def sent(
    folder: Path, tensors: dict[str, torch.Tensor], link: FakeLink, staging: Callable[[], Staging], wanted: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors as they arrive on the fake device."""
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder / "model.safetensors")
    places = {name: torch.zeros(tensor.shape, dtype=wanted) for name, tensor in tensors.items()}
    fills = [
        device_fill(info, (torch.bfloat16, wanted), places[name].view(-1).view(torch.uint8), link)
        for name, info in checkpoint.tensors.items()
    ]
    reader = Reader(staging=staging, num_threads=2)
    reader.submit(fills).wait()
    reader.close()
    link.join()
    return places


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_what_arrives_late_arrives_whole(
    tmp_path: Path, tensors: dict[str, torch.Tensor], link: FakeLink, wanted: torch.dtype
) -> None:
    places = sent(tmp_path, tensors, link, lambda: LockedStaging(link), wanted)
    for name, tensor in tensors.items():
        assert torch.equal(places[name], tensor.to(wanted)), name


def test_the_fake_device_notices_a_slot_that_is_read_into_too_early(
    tmp_path: Path, tensors: dict[str, torch.Tensor], link: FakeLink
) -> None:
    class Hasty(HostStaging):
        """One slot, handed out again at once."""

        def __init__(self) -> None:
            self._slot = np.zeros(2 * CHUNK_BYTES, np.uint8)
            self._slot = self._slot[-self._slot.ctypes.data % 4096 :]

        def next(self) -> Bytes:
            return self._slot

    places = sent(tmp_path, tensors, link, Hasty, torch.bfloat16)
    assert not torch.equal(places["large"], tensors["large"])


def test_an_error_on_the_device_is_raised_at_the_join(link: FakeLink) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory, over there")

    link.enqueue(fail)
    with pytest.raises(RuntimeError, match="over there"):
        link.join()


def test_a_model_is_loaded_through_a_link_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[FakeLink] = []

    def late(device: torch.device) -> FakeLink:
        links.append(FakeLink(delay_s=LATE_S))
        return links[-1]

    for model_type in ("llama", "mixtral"):  # mixtral's experts are read into slices
        folder = tmp_path / model_type
        builders.write_checkpoint(builders.tiny_model(model_type, "causal", torch.bfloat16), folder)
        for dtype in ("bfloat16", "float32"):
            expected = loadstone.load(folder, dtype=dtype)
            with monkeypatch.context() as patch:
                patch.setitem(transfer.LINKS, "cpu", late)
                found = loadstone.load(folder, dtype=dtype)
            assert links.pop().num_locked_bytes == 0
            assert found.state_dict().keys() == expected.state_dict().keys()
            for name, tensor in expected.state_dict().items():
                assert torch.equal(tensor, found.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_on_a_gpu_is_the_one_on_the_host(tmp_path: Path, dtype: str) -> None:
    builders.write_checkpoint(builders.tiny_model("mixtral", "causal", torch.bfloat16), tmp_path)
    expected = loadstone.load(tmp_path, dtype=dtype, device="cpu")
    found = loadstone.load(tmp_path, dtype=dtype, device="cuda:0")
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].device.type == "cuda"
        assert torch.equal(tensor, found.state_dict()[name].cpu()), name
