#!/usr/bin/env python3
"""Draw what the code knows into docs/architecture.md: transition tables as Mermaid diagrams, messages as a table.

    python draw_tables.py            write them between their markers
    python draw_tables.py --check    write nothing; exit 1 where the page shows something else than the code

A transition table maps (state, move) to the next state. What is drawn stands between ``<!-- NAME -->`` and
``<!-- /NAME -->``.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from daskfed import messages

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"

TABLES: tuple[tuple[str, str, str], ...] = (
    ("hub-block-table", "daskfed.hub.states", "BLOCK_MOVES"),
    ("hub-key-table", "daskfed.hub.states", "KEY_MOVES"),
    ("site-block-table", "daskfed.site.states", "BLOCK_MOVES"),
    ("site-key-table", "daskfed.site.states", "KEY_MOVES"),
)
"""Marker on the page, module, name of the table in it."""


def name_of(state: Any) -> str:
    """Return what a diagram calls a state: the name of an Enum member in lower case, or the text itself."""
    return state.name.lower() if isinstance(state, Enum) else str(state)


def diagram(table: Mapping[tuple[Any, str], Any]) -> str:
    """Return a transition table as a Mermaid state diagram; moves between the same two states share an arrow."""
    labels: dict[tuple[str, str], list[str]] = {}
    for (state, move), target in table.items():
        labels.setdefault((name_of(state), name_of(target)), []).append(move)
    starts = {pair[0] for pair in labels}
    lines = [f"    {source} --> {target}: {', '.join(moves)}" for (source, target), moves in labels.items()]
    first = name_of(next(iter(table))[0])
    ends = [f"    {state} --> [*]" for state in dict.fromkeys(pair[1] for pair in labels) if state not in starts]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {first}", *lines, *ends, "```"])


def message_rows() -> str:
    """Return a Markdown table of the messages: who says it, its name, its docstring's first sentence."""
    rows, speaker = ["| who | message | meaning |", "|---|---|---|"], ""
    for line in inspect.getsource(messages).splitlines():
        if (section := re.match(r"# -- (hub to site|site to hub) -", line)) is not None:
            speaker = section[1]
        elif (found := re.match(r"class (\w+)\(Message\)", line)) is not None:
            text = (inspect.getdoc(getattr(messages, found[1])) or "").replace("``", "`")
            meaning = " ".join(text.split("\n\n")[0].split())
            rows.append(f"| {speaker} | `{found[1]}` | {meaning} |")
    return "\n".join(rows)


def place(page: str, marker: str, drawing: str) -> str:
    """Return ``page`` with ``drawing`` between the two markers; raises ValueError where the page lacks them."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, found, rest = page.partition(opening)
    _, ended, tail = rest.partition(closing)
    if not found or not ended:
        raise ValueError(f"{PAGE.name} lacks {opening} or {closing} after it")
    return f"{head}{opening}\n{drawing}\n{closing}{tail}"


def main() -> int:
    """Write or check the page; return 1 where a check finds it out of date, else 0."""
    old = new = PAGE.read_text(encoding="utf-8")
    for marker, module, name in TABLES:
        new = place(new, marker, diagram(getattr(import_module(module), name)))
    new = place(new, "message-table", message_rows())
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    if new != old:
        print("docs/architecture.md shows other tables than the code; run .venv/bin/python ci/tools/draw_tables.py")
    return int(new != old)


if __name__ == "__main__":
    sys.exit(main())
