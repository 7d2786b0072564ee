from pathlib import Path

import pytest

from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.errors import DeviceUnavailable, InvalidConfig
from loadstone.hardware.spec import Device
from loadstone.plan.choose import check_counts, choose_device, choose_dtype

FILE = Path("model.safetensors")


def checkpoint(*dtypes: str, config: dict[str, object] | None = None, encoding: str | None = None) -> Checkpoint:
    infos = [
        TensorInfo(name=f"t{i}", dtype=dtype, shape=(1,), file=FILE, offset=0, nbytes=8, encoding=encoding)
        for i, dtype in enumerate(dtypes)
    ]
    return Checkpoint(
        format=Format.SAFETENSORS,
        root=Path("folder"),
        files=(CheckpointFile(path=FILE, nbytes=100),),
        tensors={info.name: info for info in infos},
        config=config,
    )


def device(identity: str, free: int) -> Device:
    return Device(id=identity, kind=identity.partition(":")[0], name=identity, total_bytes=free, free_bytes=free)


def test_what_is_asked_for_is_given_by_any_of_its_names() -> None:
    for name in ("bf16", "bfloat16"):
        assert choose_dtype(checkpoint("float32"), name).value == "bfloat16"


def test_auto_is_what_config_says_then_what_is_stored() -> None:
    assert choose_dtype(checkpoint("float32", config={"torch_dtype": "bfloat16"}), "auto").value == "bfloat16"
    assert choose_dtype(checkpoint("float32", config={"dtype": "float16"}), None).value == "float16"
    assert choose_dtype(checkpoint("int64", "float16", "float32"), "auto").value == "float16"
    assert choose_dtype(checkpoint("int64"), "auto").value == "float32"


def test_blocks_are_decoded_to_float32() -> None:
    choice = choose_dtype(checkpoint("float32", encoding="Q4_1", config={"dtype": "bfloat16"}), "auto")
    assert (choice.value, choice.reason) == ("float32", "Q4_1 blocks are decoded to float32")


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "bf17", ""])
def test_what_cannot_be_computed_in_is_misuse(name: str) -> None:
    with pytest.raises(ValueError, match=r'expected "auto" or a floating-point dtype'):
        choose_dtype(checkpoint("float32"), name)


def test_the_first_device_with_room_is_chosen() -> None:
    devices = (device("cuda:0", 10), device("cuda:1", 100), device("cpu", 1000))
    assert choose_device(devices, None, 50).value == "cuda:1"
    assert choose_device(devices, None, 500).value == "cpu"
    assert choose_device(devices, None, 500).reason == "no accelerator has 500 B free"
    assert choose_device(devices, "cuda", 500).value == "cuda:0"


def test_a_device_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(DeviceUnavailable, match=r'device="mps" is not on this machine, which has: cpu'):
        choose_device((device("cpu", 1),), "mps", 1)


def test_counts_beyond_the_tensors_are_refused_also_in_nested_configs() -> None:
    with pytest.raises(InvalidConfig, match=r"num_hidden_layers is 5,000, but the checkpoint holds only 1 tensors"):
        check_counts({"text_config": {"num_hidden_layers": 5000}}, checkpoint("float32"))
    check_counts({"num_hidden_layers": 1000, "vocab_size": 10**9, "num_layers": True}, checkpoint("float32"))
