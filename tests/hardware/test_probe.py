"""Looking at a machine: this one, and ones whose torch and kernel are stood in for."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loadstone.hardware import cpu, link, measured, probe, torch_build
from loadstone.hardware.measured import MeasuredDevice
from loadstone.hardware.spec import ComputeRate, Device, Rates
from loadstone.hardware.torch_build import TorchBuild


def test_the_cpu_is_always_the_last_device(tmp_path: Path) -> None:
    found = probe.probe()
    assert found.host.id == "cpu"
    assert 0 < found.host.free_bytes <= found.host.total_bytes
    assert found.cpu.num_cores >= 1
    assert found.host.name == found.cpu.name != ""
    (disk,) = found.disks
    assert disk.total_bytes > 0


def test_a_machine_without_gpu_is_probed_without_torch_and_what_is_slow_to_import() -> None:
    if probe.may_have_accelerator():
        pytest.skip("this machine may have a GPU")
    code = "import sys; from loadstone.hardware.probe import probe; probe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "psutil", "rich", "typer", "transformers"}


def test_the_disks_of_the_model_and_of_the_cache_are_told_also_before_they_exist(tmp_path: Path) -> None:
    found = probe.probe(tmp_path / "model", tmp_path / "cache" / "deep")
    assert [disk.path for disk in found.disks] == [tmp_path / "model", tmp_path / "cache" / "deep"]
    assert found.disks[0].total_bytes == found.disks[1].total_bytes >= found.disks[0].free_bytes


def test_what_was_measured_before_is_there(tmp_path: Path) -> None:
    rates = Rates(disk_bytes_per_s=1e9)
    compute = {"bfloat16": ComputeRate(weight_bytes_per_s=1e10, flops_per_s=1e11)}
    measured.remember_rates(rates, tmp_path, tmp_path)
    measured.remember_devices(probe.probe(), {"cpu": MeasuredDevice(compute=compute)}, tmp_path)
    found = probe.probe(cache_folder=tmp_path)
    assert found.rates == rates
    assert found.host.compute == compute


class FakeModule:
    """A device module of torch with two devices."""

    def __init__(self, properties: SimpleNamespace) -> None:
        self.properties = properties

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def get_device_name(self, index: int) -> str:
        return f"Card {index}"

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return (8, 9)

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return self.properties

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return (index + 1, 10)


def accelerators(monkeypatch: pytest.MonkeyPatch, **modules: object) -> tuple[Device, ...]:
    absent = SimpleNamespace(is_available=lambda: False)
    for kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(torch, kind, modules.get(kind, absent))
    monkeypatch.setattr(probe, "may_have_accelerator", lambda: True)
    return probe.probe().devices[:-1]


def test_cuda_tells_memory_capability_and_the_rate_of_the_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_PCI_DEVICES", tmp_path)
    slot(tmp_path, "0000:0a:00.0", speed="16.0 GT/s PCIe", width="8")
    module = FakeModule(SimpleNamespace(pci_domain_id=0, pci_bus_id=10, pci_device_id=0))
    first, second = accelerators(monkeypatch, cuda=module)
    assert (first.id, first.kind, first.name, first.capability) == ("cuda:0", "cuda", "Card 0", "8.9")
    assert (first.free_bytes, first.total_bytes) == (1, 10)
    assert first.link_bytes_per_s == pytest.approx(15.75e9 * link.LINK_EFFICIENCY, rel=1e-3)
    assert (second.id, second.free_bytes) == ("cuda:1", 2)


def test_rocm_keeps_torchs_ids_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    module = FakeModule(SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-"))
    first, _ = accelerators(monkeypatch, cuda=module)
    assert (first.id, first.name, first.capability) == ("cuda:0", "Card 0 (ROCm 6.4)", "gfx942")
    assert first.link_bytes_per_s is None


def test_xpu_is_told_also_by_a_torch_that_does_not_know_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeModule(SimpleNamespace(total_memory=10))
    assert [(device.id, device.free_bytes) for device in accelerators(monkeypatch, xpu=module)] == [
        ("xpu:0", 1),
        ("xpu:1", 2),
    ]
    older = SimpleNamespace(
        is_available=module.is_available,
        device_count=lambda: 1,
        get_device_name=module.get_device_name,
        get_device_properties=module.get_device_properties,
        memory_reserved=lambda _: 3,
    )
    (only,) = accelerators(monkeypatch, xpu=older)
    assert (only.total_bytes, only.free_bytes, only.capability) == (10, 7, None)


def test_mps_is_one_device_that_takes_from_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "host_memory", lambda _: (16000, 500))
    module = SimpleNamespace(
        is_available=lambda: True, recommended_max_memory=lambda: 10000, driver_allocated_memory=lambda: 2000
    )
    (only,) = accelerators(monkeypatch, mps=module)
    assert (only.id, only.kind, only.total_bytes, only.free_bytes) == ("mps", "mps", 10000, 500)
    assert only.name.endswith(" GPU")


def test_a_gpu_that_cannot_be_used_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def memory(index: int) -> tuple[int, int]:
        if index == 0:
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
        return (5, 10)

    module = FakeModule(SimpleNamespace())
    module.mem_get_info = memory  # type: ignore[method-assign]
    assert [device.id for device in accelerators(monkeypatch, cuda=module)] == ["cuda:1"]
    assert "cuda:0 is left out, because torch cannot use it: CUDA-capable" in caplog.text


@pytest.mark.parametrize(
    ("build", "drivers", "asked"),
    [
        (TorchBuild(version="2.13.0", cuda="12.8"), ["nvidiactl"], True),
        (TorchBuild(version="2.13.0", cuda="12.8"), ["dri"], False),
        (TorchBuild(version="2.13.0+cpu"), ["nvidiactl", "kfd", "dri"], False),
        (TorchBuild(version="2.13.0", hip="6.4"), ["kfd"], True),
        (TorchBuild(version="2.13.0", xpu="2025"), ["dri"], True),
        (TorchBuild(version="2.13.0", cuda="12.8"), [], False),
        (None, ["nvidiactl"], False),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch is asked")
def test_torch_is_asked_only_for_what_it_was_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: TorchBuild | None, drivers: list[str], asked: bool
) -> None:
    for driver in drivers:
        (tmp_path / driver).touch()
    places = {kind: [str(tmp_path / Path(file).name) for file in files] for kind, files in probe._DRIVERS.items()}
    monkeypatch.setattr(probe, "_DRIVERS", places)
    monkeypatch.setattr(probe, "torch_build", lambda: build)
    assert probe.may_have_accelerator() == asked


def test_the_build_of_torch_is_told_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch_build.torch_build()
    assert found is not None
    assert (found.version, found.cuda, found.hip) == (torch.__version__, torch.version.cuda, torch.version.hip)
    (tmp_path / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.9.0+cu128'\ncuda: Optional[str] = '12.8'\n"
        "hip: Optional[str] = None\n"
    )
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(torch_build.importlib.util, "find_spec", lambda _: spec)
    assert torch_build.torch_build() == TorchBuild(version="2.9.0+cu128", cuda="12.8")
    (tmp_path / "version.py").unlink()
    assert torch_build.torch_build() is None
    monkeypatch.setattr(torch_build.importlib.util, "find_spec", lambda _: None)
    assert torch_build.torch_build() is None


def slot(folder: Path, address: str, *, speed: str, width: str, port_speed: str | None = None) -> None:
    port = folder / f"port-{address.replace(':', '-')}"
    (port / address).mkdir(parents=True)
    (port / address / "max_link_speed").write_text(speed + "\n")
    (port / address / "current_link_width").write_text(width + "\n")
    if port_speed is not None:
        (port / "max_link_speed").write_text(port_speed + "\n")
    (folder / address).symlink_to(port / address)


@pytest.mark.parametrize(
    ("speed", "width", "port_speed", "gb_per_s"),
    [
        ("32.0 GT/s PCIe", "16", None, 63.0),
        ("16.0 GT/s PCIe", "4", "16.0 GT/s PCIe", 7.88),
        ("16.0 GT/s PCIe", "16", "8.0 GT/s PCIe", 15.75),  # the slot is older than the card
        ("5.0 GT/s PCIe", "16", None, 8.0),
        ("Unknown", "16", "Unknown", None),
        ("16.0 GT/s PCIe", "0", None, None),
        ("16.0 GT/s PCIe", "255", None, None),  # how a virtual slot says that it does not know
        ("16.0 GT/s PCIe", "?", None, None),
    ],
)
def test_a_slot_is_as_fast_as_both_its_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speed: str,
    width: str,
    port_speed: str | None,
    gb_per_s: float | None,
) -> None:
    monkeypatch.setattr(link, "_PCI_DEVICES", tmp_path)
    slot(tmp_path, "0000:01:00.0", speed=speed, width=width, port_speed=port_speed)
    found = link.pci_bytes_per_s("0000:01:00.0")
    assert (None if found is None else found / 1e9 / link.LINK_EFFICIENCY) == (
        gb_per_s if gb_per_s is None else pytest.approx(gb_per_s, rel=1e-2)
    )


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        (
            "processor\t: 0\nmodel name\t: A  Xeon @ 2.50GHz\nflags\t\t: fpu avx2 amx_tile amx_bf16 avx512f "
            "avx512_bf16\n\n"
            "processor\t: 1\nmodel name\t: Another\n",
            "A Xeon @ 2.50GHz",
            ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"),
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU part\t: 0xd40\n",
            None,
            ("neon", "bf16", "i8mm", "sve"),
        ),
        ("", None, ()),
    ],
    ids=["x86", "arm", "nothing"],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="there sysctl is asked")
def test_the_features_of_the_processor_are_as_the_kernel_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str | None, features: tuple[str, ...]
) -> None:
    import platform

    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    found = cpu.cpu()
    assert (found.name, found.features) == (name or platform.machine(), features)


def test_a_mac_tells_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        b"machdep.cpu.brand_string": b"Apple M3\0",
        b"hw.optional.neon": b"\1\0\0\0",
        b"hw.optional.arm.FEAT_BF16": b"\1\0\0\0",
        b"hw.optional.arm.FEAT_SME": b"\0\0\0\0",
    }

    def sysctlbyname(name: bytes, buffer: object, size: object, *_: object) -> int:
        if name not in told:
            return -1
        value = told[name]
        buffer[: len(value)] = value  # type: ignore[index]
        size._obj.value = len(value)  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(sysctlbyname=sysctlbyname))
    monkeypatch.setattr(sys, "platform", "darwin")
    found = cpu.cpu()
    assert (found.name, found.features) == ("Apple M3", ("neon", "bf16"))
