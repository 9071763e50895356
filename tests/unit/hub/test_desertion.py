"""Sites that lost their workers for good, or their connection for a moment: who does what they were to do."""

from __future__ import annotations

import pytest

from daskfed.hub import events as ev
from daskfed.hub.desertion import PATIENCE_S, REST_S
from daskfed.hub.placement import DataOnly
from daskfed.messages import Attempt, BlockKind, BlockStarted, KeysMade, MadeKey
from tests.unit.hub.builders import Stage, block, cancel, run, status, told

EMPTY = {"workers": 0, "threads": 0}


def stage_with_block_at_north(**constraint: object) -> Stage:
    """Return a stage whose north has a block, and has lost its workers just now."""
    stage = Stage("north", policy=DataOnly())
    spec = block("A", "x", **constraint)  # type: ignore[arg-type]
    assert run("north", spec) in stage.submit(spec, wanted="x")
    stage(ev.FromSite("north", BlockStarted("A", Attempt(0, 1))))
    stage.join("south")
    assert stage(ev.FromSite("north", status(**EMPTY))) == []
    return stage


def test_blocks_of_a_site_that_gets_no_workers_go_elsewhere() -> None:
    stage = stage_with_block_at_north()
    assert stage.later(PATIENCE_S) == []
    assert stage.later(1) == [cancel("north", "A"), run("south", block("A", "x"), n=2)]
    assert stage(ev.FromSite("south", KeysMade("A", Attempt(0, 2), (MadeKey("x", 8),)))) == [told("x")]


def test_a_site_that_has_workers_again_in_time_keeps_its_blocks() -> None:
    stage = stage_with_block_at_north()
    stage.later(PATIENCE_S)
    stage(ev.FromSite("north", status()))
    assert stage.later(2) == []
    stage(ev.FromSite("north", status(**EMPTY)))
    assert stage.later(PATIENCE_S) == []  # the time counts anew


def test_a_site_whose_workers_take_long_to_start_has_more_time() -> None:
    stage = stage_with_block_at_north()
    stage(ev.FromSite("north", status(queue_wait_s=100.0, cold_start_s=(("default", 50.0),), **EMPTY)))
    assert stage.later(PATIENCE_S + 300) == []
    assert cancel("north", "A") in stage.later(1)


@pytest.mark.parametrize("others", ["bound", "whole", "none has workers"])
def test_what_no_other_site_may_do_waits(others: str) -> None:
    kind = BlockKind.WHOLE if others == "whole" else BlockKind.GRAPH
    stage = stage_with_block_at_north(sites=("north",) if others == "bound" else (), kind=kind)
    if others == "none has workers":
        stage(ev.FromSite("south", status(**EMPTY)))
    assert stage.later(PATIENCE_S + 1) == [] and stage.later(100) == []


def test_a_deserted_site_gets_no_work_until_it_has_workers() -> None:
    stage = stage_with_block_at_north()
    stage.later(PATIENCE_S + 1)
    for name in "BCD":  # data-only would give some to north, which has none
        assert run("south", block(name, f"x{name}")) in stage.submit(block(name, f"x{name}"), wanted=f"x{name}")
    only_north = block("E", "xE", sites=("north",))
    assert run("north", only_north) in stage.submit(only_north, wanted="xE")
    stage(ev.FromSite("north", status()))
    assert run("north", block("F", "xF")) in stage.submit(block("F", "xF"), wanted="xF")


def test_a_deserted_site_is_tried_again_after_a_while() -> None:
    stage = stage_with_block_at_north()
    stage.later(PATIENCE_S + 1)
    stage.later(REST_S)
    assert run("north", block("B", "xB")) in stage.submit(block("B", "xB"), wanted="xB")


def test_a_site_that_is_away_gets_no_blocks_until_it_is_back() -> None:
    stage = Stage("north", policy=DataOnly())
    a, b = block("A", "x", sites=("north",)), block("B", "y")
    stage(ev.SiteReach("north", away=True))
    assert stage.submit(a, b, wanted="x y") == []
    assert "north (away) may run it" in stage.core.explain("x")["why"]
    assert run("south", b) in stage.join("south")
    assert run("north", a) in stage(ev.SiteReach("north", away=False))
