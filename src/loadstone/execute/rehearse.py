"""Find out in another process whether a chat template ends, before it is rendered in this one.

A template is a program by the author of the checkpoint. Its sandbox keeps it from files and code, not from running for
ever or from asking for all memory there is, in one multiplication if need be; a thread cannot be stopped in the middle
of that, and shares its memory with the model. A process can.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadstone.errors import InvalidTemplate
from loadstone.execute.rehearsal import ENDED, NO_JINJA
from loadstone.units import format_bytes

# Large templates of models in use are compiled and rendered in a tenth of a second.
CPU_S = 2.0
MEMORY_BYTES = 512 << 20
TEXT_BYTES = 64 << 20
# For a machine so busy that those seconds take long.
_WALL_S = 60.0


def rehearse(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], *, where: str) -> None:
    """Check that a chat template ends within bounds of time and memory.

    Args:
        template: its source.
        messages: what it is rendered with.
        names: the special tokens by their names.
        where: what a message begins with.

    Raises:
        InvalidTemplate: it does not.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return  # There is no interpreter to run it in.
    asked = {
        "path": sys.path,
        "template": template,
        "names": {**names, "messages": messages, "add_generation_prompt": True},
        "cpu_s": CPU_S,
        "memory_bytes": MEMORY_BYTES,
        "text_bytes": TEXT_BYTES,
    }
    # Without jinja2 nothing will be rendered here either.
    if _exit_status(asked) not in (ENDED, NO_JINJA):
        raise InvalidTemplate(
            f"{where}: expected the chat template to make a prompt of the messages within {CPU_S:g} s and "
            f"{format_bytes(MEMORY_BYTES)}, found that it takes more; do not trust this checkpoint, or give the "
            "prompt --raw."
        )


def _exit_status(asked: dict[str, Any]) -> int | None:
    """How the rehearsal ended; None if it had to be ended."""
    program = Path(__file__).with_name("rehearsal.py")
    try:
        done = subprocess.run(
            # Without site-packages of its own: the path is that of this process.
            [sys.executable, "-I", "-S", str(program)],
            input=json.dumps(asked).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode
