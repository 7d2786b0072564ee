"""Where Loadstone keeps what it made or fetched itself."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$LOADSTONE_CACHE`, else `$XDG_CACHE_HOME/loadstone`, else `~/.cache/loadstone`; it need not exist yet."""
    if folder := os.environ.get("LOADSTONE_CACHE"):
        return Path(folder).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "loadstone"
    return Path.home() / ".cache" / "loadstone"
