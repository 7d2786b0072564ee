"""Prompts from a file: a line each, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadstone.execute.values import Prompt

_KEYS = frozenset({"prompt", "system"})


def read_prompts(path: Path, *, system: str | None = None, raw: bool = False) -> list[Prompt]:
    """Every prompt of a file; lines without text are passed over.

    Args:
        path: lines of text, or of JSON objects with "prompt" and perhaps "system" where the first begins with a brace.
        system: the system message of those that have none of their own.
        raw: see `Prompt`.

    Raises:
        ValueError: the file is empty, is no text, or has a line that is no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text with a prompt a line, found {error.reason}; convert it."
        ) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: expected a prompt a line, found an empty file; write one there.")
    if not numbered[0][1].startswith("{"):
        return [Prompt(text=line, system=system, raw=raw) for _, line in numbered]
    return [_prompt(f"{path}, line {number}", line, system, raw) for number, line in numbered]


def _prompt(where: str, line: str, system: str | None, raw: bool) -> Prompt:
    wanted = 'expected a JSON object such as {"prompt": "Why?", "system": "Be brief"}'
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {wanted}, found what is no JSON ({error}); mend the line.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {wanted}, found a {type(found).__name__}; mend the line.")
    unknown = sorted(found.keys() - _KEYS)
    if unknown:
        raise ValueError(f"{where}: {wanted}, found {unknown[0]!r} too; leave it out.")
    text, own = found.get("prompt"), found.get("system", system)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: {wanted}, found no text as "prompt"; add it.')
    if own is not None and not isinstance(own, str):
        raise ValueError(f'{where}: {wanted}, found a {type(own).__name__} as "system"; make it text.')
    return Prompt(text=text, system=own, raw=raw)
