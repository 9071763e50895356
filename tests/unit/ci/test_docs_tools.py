"""The tools that keep the documentation true: dead links are named, diagrams show the tables."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "ci" / "tools"))

from check_docs_links import dead_links  # noqa: E402
from draw_tables import diagram, place  # noqa: E402


def test_dead_links_are_named_and_good_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# What a *site* is\n\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Top\n[ok](b.md) [ok](b.md#what-a-site-is) [ok](#top) [ok](https://example.org/x) `[code](nowhere.md)`\n"
        "[dead](c.md) [dead](b.md#no-heading) [dead](#bottom)\n```\n[code](nowhere.md)\n```\n"
    )
    assert list(dead_links(page)) == [
        f"{page}: c.md: no such file",
        f"{page}: b.md#no-heading: no such heading",
        f"{page}: #bottom: no such heading",
    ]


class Phase(Enum):
    READY = "ready"
    DONE = "done"


def test_a_table_becomes_a_diagram() -> None:
    moves = {(Phase.READY, "run"): Phase.DONE, (Phase.READY, "skip"): Phase.DONE}
    assert diagram(moves).splitlines() == [
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> ready",
        "    ready --> done: run, skip",
        "    done --> [*]",
        "```",
    ]


def test_a_diagram_goes_between_its_markers() -> None:
    assert place("a\n<!-- t -->\nold\n<!-- /t -->\nb", "t", "new") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb"
    with pytest.raises(ValueError, match="lacks <!-- t -->"):
        place("a\n<!-- t -->\nb", "t", "new")
