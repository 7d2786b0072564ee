"""Downloads of what the cache lacks: the only file that calls huggingface_hub."""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loadstone.checkpoint.excerpt import Excerpt, index_of
from loadstone.checkpoint.hub_cache import HubAccess, cached_snapshot
from loadstone.checkpoint.layout import is_index, pick
from loadstone.checkpoint.sharded import read_index
from loadstone.errors import DownloadFailed, LoadstoneError, NotACheckpoint, SourceNotFound
from loadstone.events import BytesMoved, Observer

STAGE = "download"

# What a model needs beside its weights: configs, tokenizers, templates, licences.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")
_CODE_FILES = "*.py"


def download(repo_id: str, access: HubAccess, observer: Observer, excerpt: Excerpt) -> Path:
    """Complete the cached snapshot of a model: its weights in one format, config and tokenizer.

    Args:
        repo_id: `org/name`.
        access: the revision, and how the hub is used; the model's Python files come only with `trust_remote_code`.
        observer: is told of the bytes that arrive, as stage `download`.
        excerpt: the subfolder, the variant and the tensors that are wanted; shards without any of them stay away.

    Returns:
        The folder of the snapshot.

    Raises:
        SourceNotFound: there is no such model or revision.
        NotACheckpoint: it holds no weights, or several that exclude one another.
        DownloadFailed: the hub refuses or cannot be reached.
    """
    import huggingface_hub

    with _faults_named(repo_id, access):
        info = huggingface_hub.HfApi(token=access.token).model_info(
            repo_id, revision=access.revision, files_metadata=True, timeout=30
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        pinned = replace(access, revision=info.sha)
        names = _wanted(repo_id, sizes, pinned, excerpt)
        here = cached_snapshot(repo_id, pinned)
        total = sum(sizes.get(name, 0) for name in names if here is None or not (here / name).exists())
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=access.revision,
            allow_patterns=[glob.escape(name) for name in names],
            cache_dir=access.cache_dir,
            token=access.token,
            tqdm_class=_progress_class(observer, total),
        )
    return Path(folder)


@contextmanager
def _faults_named(repo_id: str, access: HubAccess) -> Iterator[None]:
    """huggingface_hub's errors as ours."""
    from huggingface_hub import errors

    try:
        yield
    except LoadstoneError:
        raise
    except Exception as error:
        for kind, fault in _FAULTS:
            if isinstance(error, getattr(errors, kind)):
                raise fault(repo_id, access, error) from error
        raise DownloadFailed(
            f"{repo_id}: expected the hub to answer, found {_first_line(error)}; check the network and the room on "
            "disk, or pass the path of a local copy."
        ) from error


def _wanted(repo_id: str, sizes: dict[str, int], access: HubAccess, excerpt: Excerpt) -> list[str]:
    """The names of the files to fetch; an index is fetched on the way to know its shards."""
    import huggingface_hub

    folder = f"{excerpt.subfolder.strip('/')}/" if excerpt.subfolder else ""
    names = [name.removeprefix(folder) for name in sizes if name.startswith(folder)]
    where = f"{repo_id}/{excerpt.subfolder}" if folder else repo_id
    try:
        weights = list(pick(names, where=where, variant=excerpt.variant))
    except NotACheckpoint as error:
        raise NotACheckpoint(f"{error} On the hub: `hf download {repo_id} FILE` fetches one file.") from None
    if is_index(weights[0]):
        index = huggingface_hub.hf_hub_download(
            repo_id, folder + weights[0], revision=access.revision, cache_dir=access.cache_dir, token=access.token
        )
        weights += index_of(read_index(Path(index)), excerpt, where=where).shards
    patterns = (*SIDE_FILES, _CODE_FILES) if access.trust_remote_code else SIDE_FILES
    beside = [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)]
    return [folder + name for name in (*weights, *beside)]


def _progress_class(observer: Observer, total_bytes: int) -> type:
    """A progress bar that draws nothing and reports bytes.

    Depending on the storage the hub counts received bytes, written bytes or both, in bars of their own; what is
    furthest counts.
    """
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()
    reported = 0

    class Progress(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("unit") == "B"
            self.done_bytes = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            if not self.counts_bytes:
                return
            with lock:
                self.done_bytes += int(n or 0)
                if self.done_bytes <= reported:
                    return
                reported = min(self.done_bytes, max(total_bytes, reported))
                observer(BytesMoved(stage=STAGE, done_bytes=reported, total_bytes=total_bytes))

    return Progress


def _gated(repo_id: str, access: HubAccess, error: Exception) -> LoadstoneError:
    return DownloadFailed(
        f"{repo_id}: expected access to the model, found it gated; accept its terms at "
        f"https://huggingface.co/{repo_id} and run `hf auth login`."
    )


def _no_repo(repo_id: str, access: HubAccess, error: Exception) -> LoadstoneError:
    return SourceNotFound(
        f"{repo_id}: expected a path or a model on the hub, found neither; check the name, or run `hf auth login` "
        "if the model is private."
    )


def _no_revision(repo_id: str, access: HubAccess, error: Exception) -> LoadstoneError:
    return SourceNotFound(
        f"{repo_id}: expected the revision {access.revision or 'main'!r} on the hub, found none of that name; "
        "check the branch, tag or commit."
    )


def _invalid_id(repo_id: str, access: HubAccess, error: Exception) -> LoadstoneError:
    return SourceNotFound(f"{repo_id}: expected a path or a hub id such as org/name, found neither; check the name.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# In the order of inheritance: a gated repository is a kind of missing one.
_FAULTS: tuple[tuple[str, Callable[[str, HubAccess, Exception], LoadstoneError]], ...] = (
    ("GatedRepoError", _gated),
    ("RepositoryNotFoundError", _no_repo),
    ("RevisionNotFoundError", _no_revision),
    ("HFValidationError", _invalid_id),
)
