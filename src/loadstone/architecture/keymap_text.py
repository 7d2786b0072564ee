"""A key map in words, for those who want to see how loading works."""

from __future__ import annotations

from loadstone.architecture.keymap import KeyMap


def keymap_line(keymap: KeyMap, num_tensors: int) -> str:
    """How many tensors go to how many places, and what is done on the way."""
    renamed = sum(
        len(assignment.parts) == 1 and assignment.parts[0].source != assignment.target
        for assignment in keymap.assignments
    )
    fused = sum(len(assignment.parts) > 1 for assignment in keymap.assignments)
    extras = [
        f"{count} {what}"
        for count, what in ((renamed, "renamed"), (fused, "fused"), (len(keymap.conversions), "converted"))
        if count
    ]
    return f"{num_tensors:,} tensors -> {len(keymap.assignments) + len(keymap.conversions):,} places" + (
        f" ({', '.join(extras)})" if extras else ""
    )


def keymap_samples(keymap: KeyMap, count: int) -> tuple[str, ...]:
    """A line for each kind of mapping that occurs, the unusual kinds first; `count` of them, and what is computed."""
    lines: list[str] = []
    for assignment in sorted(keymap.assignments, key=lambda assignment: -len(assignment.parts)):
        first = assignment.parts[0].source
        more = f" and {len(assignment.parts) - 1} more" if len(assignment.parts) > 1 else ""
        if first != assignment.target or len(lines) < 2:
            lines.append(f"{first}{more} -> {assignment.target}")
        if len(lines) == count:
            break
    return (*lines, *(f"{conversion.sources} computed -> {conversion.name}" for conversion in keymap.conversions[:2]))
