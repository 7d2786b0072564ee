"""Hub ids: a complete cache needs no network, an incomplete one is completed."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save

from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import SourceNotFound

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": save({"weight": torch.arange(3000, dtype=torch.float32)}),
    "tokenizer.json": b"{}",
    "modeling_own.py": b"raise SystemExit",
    "README.md": b"hello",
    "model.fp16.safetensors": save({"weight": torch.arange(9, dtype=torch.float16)}),
    "model_index.json": b"{}",
    "unet/config.json": b'{"_class_name": "UNet"}',
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json": json.dumps(
        {"weight_map": {"weight": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}}
    ).encode(),
    "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors": save({"weight": torch.ones(3)}),
    "unet/diffusion_pytorch_model.safetensors": save({"weight": torch.ones(4)}),
    "parts/config.json": b'{"model_type": "llama"}',
    "parts/model.safetensors.index.json": json.dumps(
        {"weight_map": {"a.x": "one.safetensors", "a.y": "two.safetensors", "b.x": "two.safetensors"}}
    ).encode(),
    "parts/one.safetensors": save({"a.x": torch.ones(3)}),
    "parts/two.safetensors": save({"a.y": torch.ones(3), "b.x": torch.ones(3)}),
}


def cache(root: Path, *names: str) -> Path:
    """A hub cache that holds these files of org/name."""
    folder = root / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name in names:
        (snapshot / name).write_bytes(FILES[name])
    return snapshot


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_complete_snapshot_is_used_without_the_network(tmp_path: Path, revision: str | None) -> None:
    snapshot = cache(tmp_path, "config.json", "model.safetensors")
    checkpoint = open_checkpoint("org/name", revision=revision, hub=HubAccess(cache_dir=tmp_path))
    assert checkpoint.root == snapshot
    assert list(checkpoint.tensors) == ["weight"]


@pytest.mark.usefixtures("no_network")
def test_a_missing_file_is_named_where_the_network_may_not_be_asked(tmp_path: Path) -> None:
    cache(tmp_path, "config.json")
    with pytest.raises(
        SourceNotFound, match=r"did not find .* because of local_files_only: run `hf download org/name`"
    ):
        open_checkpoint("org/name", local_files_only=True, hub=HubAccess(cache_dir=tmp_path))


@pytest.mark.usefixtures("no_network")
def test_offline_mode_of_the_hub_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceNotFound, match="because of HF_HUB_OFFLINE"):
        open_checkpoint("org/name", hub=HubAccess(cache_dir=tmp_path))


@pytest.mark.usefixtures("no_network")
def test_an_index_is_complete_only_with_all_its_shards(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "config.json")
    weight_map = {"weight": "model-00001-of-00002.safetensors", "other": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (snapshot / "model-00001-of-00002.safetensors").write_bytes(FILES["model.safetensors"])
    with pytest.raises(SourceNotFound, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint("org/name", local_files_only=True, hub=HubAccess(cache_dir=tmp_path))


@pytest.mark.parametrize("name", ["no such folder/really", "a/b/c", "../up", "x--y"])
def test_what_is_neither_path_nor_id_is_said_so(name: str) -> None:
    with pytest.raises(SourceNotFound, match="expected a file, a folder or a hub id"):
        open_checkpoint(name)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download uses."""

    requests: tuple[list[str]] = ([],)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.requests[0].append(path)
        if path.startswith("/api/models/org/name/tree"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": name} for name, content in FILES.items()
            ]
            self._send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
            return
        if path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            content = json.dumps(
                {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings}
            ).encode()
            self._send(content, body, {"Content-Type": "application/json"})
            return
        name = unquote(path).removeprefix(f"/org/name/resolve/{COMMIT}/").removeprefix("/org/name/resolve/main/")
        if not path.startswith("/org/name/resolve/") or name not in FILES:
            self.send_error(404)
            return
        self._send(FILES[name], body, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing: the test reads `requests`."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.requests[0].clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


# The hub's address is read when huggingface_hub is imported: each download has a process of its own.
DOWNLOAD = """
import json, sys
from pathlib import Path
from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
events = []
access = HubAccess(cache_dir=Path(sys.argv[1]))
excerpt = Excerpt(**json.loads(sys.argv[3]))
checkpoint = open_checkpoint(sys.argv[2], hub=access, observer=events.append, excerpt=excerpt)
moved = [[event.done_bytes, event.total_bytes] for event in events]
print(json.dumps({"files": sorted(p.name for p in checkpoint.root.iterdir()), "moved": moved}))
"""


def download(endpoint: str, folder: Path, name: str = "org/name", **excerpt: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": endpoint, "HOME": str(folder), "PATH": "/usr/bin", "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, str(folder), name, json.dumps(excerpt)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_an_incomplete_cache_is_completed_with_progress_in_bytes(tmp_path: Path, hub: str) -> None:
    cache(tmp_path, "config.json")
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == ["config.json", "model.safetensors", "model_index.json", "tokenizer.json"]
    assert told["moved"][-1][0] == told["moved"][-1][1] > 12_000
    assert not any("modeling_own" in path for path in Hub.requests[0])


def test_only_the_variant_is_downloaded(tmp_path: Path, hub: str) -> None:
    done = download(hub, tmp_path, variant="fp16")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == ["config.json", "model.fp16.safetensors", "model_index.json", "tokenizer.json"]


def test_only_the_subfolder_is_downloaded_with_the_shards_of_its_index(tmp_path: Path, hub: str) -> None:
    done = download(hub, tmp_path, subfolder="unet", variant="fp16")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == [
        "config.json",
        "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    assert sorted(path.name for path in (tmp_path / "models--org--name" / "snapshots" / COMMIT).iterdir()) == ["unet"]
    # All of it is there now: the cache answers without the hub.
    Hub.requests[0].clear()
    assert download(hub, tmp_path, subfolder="unet", variant="fp16").returncode == 0
    assert Hub.requests[0] == []


PARTS = ["config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("excerpt", [{"prefix": "b."}, {"select": "b.*"}, {"prefix": "a", "select": "y"}])
def test_only_the_shards_of_the_tensors_asked_for_are_downloaded(
    tmp_path: Path, hub: str, excerpt: dict[str, str]
) -> None:
    done = download(hub, tmp_path, subfolder="parts", **excerpt)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [PARTS[0], PARTS[1], PARTS[3]]
    assert not any("one.safetensors" in path for path in Hub.requests[0])
    # The cache answers for the same part, and is completed for another.
    Hub.requests[0].clear()
    assert download(hub, tmp_path, subfolder="parts", **excerpt).returncode == 0
    assert Hub.requests[0] == []
    done = download(hub, tmp_path, subfolder="parts")
    assert json.loads(done.stdout)["files"] == PARTS


def test_a_selection_that_matches_nothing_downloads_no_shard(tmp_path: Path, hub: str) -> None:
    done = download(hub, tmp_path, subfolder="parts", select="c.*")
    assert (
        "NotACheckpoint: org/name/parts: expected tensors that select='c.*' matches, found none among 3 " in done.stderr
    )
    assert not any("/one.safetensors" in path or "/two.safetensors" in path for path in Hub.requests[0])


def test_a_variant_the_hub_does_not_have_lists_those_it_has(tmp_path: Path, hub: str) -> None:
    done = download(hub, tmp_path, variant="bf16")
    assert 'org/name: expected weights of the variant "bf16", found fp16 and weights without a variant' in done.stderr


def test_a_model_the_hub_does_not_have_is_not_found(tmp_path: Path, hub: str) -> None:
    done = download(hub, tmp_path, "org/other")
    assert "SourceNotFound" in done.stderr or "DownloadFailed" in done.stderr
    assert "org/other: expected" in done.stderr


def test_no_network_is_said_in_a_sentence(tmp_path: Path) -> None:
    done = download("http://127.0.0.1:9", tmp_path)
    assert "DownloadFailed: org/name: expected the hub to answer" in done.stderr
