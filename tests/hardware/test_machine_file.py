"""Machines as files: what is saved comes back, what comes from elsewhere is refused in one sentence."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadstone.errors import InvalidMachine
from loadstone.hardware import machine_file
from loadstone.hardware.machine_file import find_machine, from_json, gallery, read_machine, save_machine, to_json
from loadstone.hardware.probe import probe
from loadstone.hardware.spec import ComputeRate, Cpu, Device, Disk, Limit, Machine, Rates

GALLERY = Path(machine_file.__file__).parent / "gallery"

MACHINE = Machine(
    devices=(
        Device(
            id="cuda:0",
            kind="cuda",
            name="a GPU",
            total_bytes=1 << 33,
            free_bytes=0,
            capability="8.9",
            link_bytes_per_s=2.5e10,
            compute={"bfloat16": ComputeRate(weight_bytes_per_s=8e11, flops_per_s=1e14)},
        ),
        Device(id="cpu", kind="cpu", name="a processor", total_bytes=1 << 34, free_bytes=1 << 33),
    ),
    cpu=Cpu(name="a processor", num_cores=8, num_threads=16, features=("avx2",)),
    disks=(Disk(path=Path("/models"), file_system="ext4", rotational=False, total_bytes=10**12, free_bytes=10**11),),
    rates=Rates(disk_bytes_per_s=3e9),
    host_limits=(Limit(what="ulimit -v", limit_bytes=1 << 34, used_bytes=1 << 20),),
    name="mine",
)


@pytest.mark.parametrize("machine", [MACHINE, probe()], ids=["every field", "this one"])
def test_what_is_saved_comes_back(tmp_path: Path, machine: Machine) -> None:
    save_machine(machine, tmp_path / "new folder" / "machine.json")
    assert read_machine(tmp_path / "new folder" / "machine.json") == machine
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["machine.json"]


def test_fields_that_have_a_default_may_be_left_out() -> None:
    host = {"id": "cpu", "kind": "cpu", "name": "a processor", "total_bytes": 1e9, "free_bytes": 5e8}
    value = {"loadstone_machine": 1, "devices": [host], "cpu": {"name": "a processor", "num_cores": 2}}
    machine = from_json(value, "machine.json")
    assert machine.host.total_bytes == 10**9
    assert isinstance(machine.host.total_bytes, int)
    assert machine.num_cores == 2


def changed(change: Callable[[Any], object]) -> dict[str, Any]:
    value = copy.deepcopy(to_json(MACHINE))
    change(value)
    return value


def into(*path: str | int, value: object) -> Callable[[Any], None]:
    """Put a value into a place of the JSON."""

    def change(found: Any) -> None:
        for step in path[:-1]:
            found = found[step]
        found[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("loadstone_machine"), 'with the key "loadstone_machine", found the keys devices, cpu'),
        (lambda value: (value.clear(), value.update(name="x")), "found the keys name"),
        (into("loadstone_machine", value=2), "expected version 1 of the layout, found 2; save it anew"),
        (into("loadstone_machine", value=True), "expected version 1 of the layout, found True"),
        (
            into("devices", 0, "total_bytes", value=-1),
            r"machine.devices\[0\].total_bytes: .* above 0, found -1; correct",
        ),
        (into("devices", 1, "total_bytes", value=0), r"machine.devices\[1\].total_bytes: .* above 0, found 0;"),
        (into("devices", 0, "free_bytes", value=-5), r"free_bytes: expected 0 or a number above, found -5"),
        (into("devices", 0, "free_bytes", value=1.5), r"free_bytes: expected a whole number, found 1.5"),
        (into("devices", 0, "total_bytes", value=float("nan")), "total_bytes: expected a number above 0, found NaN"),
        (
            into("devices", 0, "total_bytes", value=float("inf")),
            "total_bytes: expected a number above 0, found Infinity",
        ),
        (into("devices", 0, "total_bytes", value=10**400), "total_bytes: expected a number above 0, found 1000"),
        (into("devices", 0, "total_bytes", value=True), "total_bytes: expected a number above 0, found true"),
        (into("devices", 0, "total_bytes", value="8 GB"), 'total_bytes: expected a number above 0, found "8 GB"'),
        (
            into("devices", 0, "free_bytes", value=1 << 40),
            "free_bytes: expected at most total_bytes, which is 8589934592",
        ),
        (into("devices", 0, "link_bytes_per_s", value=0), "link_bytes_per_s: expected a number above 0, found 0"),
        (into("devices", 0, "name", value=7), "name: expected text, found 7"),
        (
            into("devices", 0, "compute", "bfloat16", "flops_per_s", value=-1.0),
            "compute.bfloat16.flops_per_s: expected",
        ),
        (into("devices", 0, "compute", "bf17", value={"weight_bytes_per_s": 1, "flops_per_s": 1}), 'found "bf17"'),
        (into("devices", 0, "compute", value=[]), r"compute: expected an object, found \[\]"),
        (into("devices", 0, "id", value="cuda"), 'expected an id as torch writes it .* found "cuda" of kind "cuda"'),
        (into("devices", 0, "kind", value="xpu"), 'found "cuda:0" of kind "xpu"'),
        (into("devices", 0, "id", value="cpu"), 'expected each device once, found "cpu" 2 times'),
        (into("devices", value=[]), 'expected a device "cpu" as the last one, found no device'),
        (lambda value: value["devices"].pop(), 'expected a device "cpu" as the last one, found cuda:0'),
        (lambda value: value["devices"].reverse(), 'expected a device "cpu" as the last one, found cpu, cuda:0'),
        (into("devices", value={"cpu": 1}), r"machine.devices: expected a list, found \{"),
        (lambda value: value["devices"][0].pop("total_bytes"), 'expected a field "total_bytes", found none'),
        (lambda value: value.pop("cpu"), 'expected a field "cpu", found none'),
        (into("devices", 0, "vram", value=1), r'devices\[0\]: expected the fields id, .*, found "vram"; correct'),
        (into("devices", 0, "totalbytes", value=1), 'found "totalbytes"; did you mean "total_bytes"?'),
        (into("cpu", "num_cores", value=0), "cpu.num_cores: expected a number above 0, found 0"),
        (into("cpu", "features", value="avx2"), 'cpu.features: expected a list, found "avx2"'),
        (into("disks", 0, "network", value="no"), r'disks\[0\].network: expected true or false, found "no"'),
        (into("disks", 0, "path", value=None), r"disks\[0\].path: expected a path, found null"),
        (into("disks", 0, "free_bytes", value=10**13), r"disks\[0\].free_bytes: expected at most total_bytes"),
        (into("rates", "disk_bytes_per_s", value=-1), "rates.disk_bytes_per_s: expected a number above 0, found -1"),
        (into("host_limits", 0, "limit_bytes", value=0), r"host_limits\[0\].limit_bytes: expected a number above 0"),
    ],
)
def test_what_cannot_be_a_machine_is_named(change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(InvalidMachine, match=message) as caught:
        from_json(changed(change), "box.json")
    assert str(caught.value).startswith("box.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON, found what does not parse .*; correct it"),
        (b"not JSON", "expected JSON, found what does not parse"),
        (b"[]", "expected a JSON object, found a list"),
        (b"\xff\xfe", "expected UTF-8, found an invalid byte at 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        (b'{"a": "' + b"x" * 1_100_000 + b'"}', "expected at most 1.00 MB of JSON, found 1.10 MB"),
        (b'{"a": ' + b"1" * 5000 + b"}", "expected JSON"),
        (b'{"model_type": "llama"}', "found the keys model_type; make one with `loadstone machine --save`"),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "box.json"
    path.write_bytes(content)
    with pytest.raises(InvalidMachine, match=message) as caught:
        find_machine(path)
    assert str(caught.value).startswith(str(path))


def test_a_folder_is_no_machine(tmp_path: Path) -> None:
    with pytest.raises(InvalidMachine, match=re.escape(str(tmp_path))):
        find_machine(tmp_path)


def test_an_unknown_name_lists_the_gallery_and_the_nearest() -> None:
    with pytest.raises(
        InvalidMachine, match=r"^desktop-rtx4090: .*mi300x.*found neither; did you mean \"desktop-rtx4090-24gb\"\?"
    ):
        find_machine("desktop-rtx4090")
    with pytest.raises(InvalidMachine, match=r"found neither\.$"):
        find_machine("/nowhere/zzz")


def test_saving_where_one_may_not_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError, match=r"folder\.json"):
        save_machine(MACHINE, tmp_path / "folder.json")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def table(heading: str) -> dict[str, list[str]]:
    """A table of the gallery's README, by its first column."""
    section = (GALLERY / "README.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("name", gallery())
def test_a_machine_of_the_gallery_is_its_makers_figures_derated(name: str) -> None:
    machine = find_machine(name)
    assert machine.name == name
    assert machine.sources
    if name == "container-2-core-4gb":  # measured
        assert machine.host_limits[0].limit_bytes == machine.host.total_bytes
        return
    assert all(source.startswith("https://") for source in machine.sources)
    accelerators, hosts = table("Accelerators"), table("Hosts")
    for device in machine.devices[:-1]:
        told, gib, bandwidth, float32, half, link = accelerators[name]
        assert device.name == told
        assert device.total_bytes == pytest.approx(float(gib) * 2**30, rel=0.021)
        assert device.link_bytes_per_s == pytest.approx(float(link) * 0.8e9, rel=0.01)
        assert device.compute.keys() == {"float32", "bfloat16", "float16"}
        for dtype, rate in device.compute.items():
            assert rate.weight_bytes_per_s == pytest.approx(float(bandwidth) * 0.8e9, rel=0.01)
            assert rate.flops_per_s == pytest.approx(float(float32 if dtype == "float32" else half) * 0.6e12, rel=0.01)
    told, gib, bandwidth, float32, _, disk = hosts[name]
    assert machine.cpu.name == machine.host.name == told
    assert machine.host.total_bytes == int(gib) * 2**30
    assert machine.rates.disk_bytes_per_s == pytest.approx(float(disk) * 0.8e9, rel=0.01)
    assert machine.rates.copy_bytes_per_s == pytest.approx(float(bandwidth) * 0.4e9, rel=0.01)
    assert machine.host.compute["float32"].flops_per_s == pytest.approx(float(float32) * 0.6e12, rel=0.01)


def test_the_gallery_has_laptops_desktops_servers_and_no_gpu_at_all() -> None:
    kinds = {name: [device.kind for device in find_machine(name).devices] for name in gallery()}
    assert kinds["cpu-8-core-32gb"] == ["cpu"]
    assert kinds["server-8x-h100-80gb"] == ["cuda"] * 8 + ["cpu"]
    assert {kind for kinds in kinds.values() for kind in kinds} == {"cuda", "xpu", "mps", "cpu"}
    assert json.loads((GALLERY / "mi300x.json").read_text())["devices"][0]["capability"] == "gfx942"
