"""The ledger: what follows when interest ends and when things are lost, and the tables of legal moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from itertools import product
from typing import TypeVar

import pytest

from daskfed.errors import IllegalTransition
from daskfed.hub import events as ev
from daskfed.hub import ledger
from daskfed.hub.ledger import Ledger
from daskfed.hub.states import BLOCK_MOVES, KEY_MOVES, BlockPhase, KeyPhase, next_block_phase, next_key_phase
from daskfed.messages import (
    Attempt,
    HeldBlock,
    Import,
    ImportFailed,
    KeyImported,
    KeysLost,
    KeysStopped,
    ReleaseKeys,
    RunBlock,
    SiteHoldings,
)
from tests.unit.hub.builders import (
    Stage,
    block,
    cancel,
    forget,
    forget_block,
    lost_for_good,
    release,
    run,
    stop,
    told,
    told_cancelled,
    told_failed,
)

Phase = TypeVar("Phase", bound=Enum)


@pytest.fixture
def stage() -> Stage:
    return Stage("north", "south")


def test_whose_a_key_was_is_known_for_a_while(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a site says of a key may come after its end; only so many are remembered."""
    monkeypatch.setattr(ledger, "MOST_FORMER", 2)
    for name in ("x", "y", "x", "z"):
        stage.submit(block(f"b-{name}", name), wanted=name)
        owner = stage.key(name).owner
        stage.drop(name)
        assert stage.core.ledger.former[name] == owner
    assert list(stage.core.ledger.former) == ["x", "z"]


class TestRelease:
    def test_of_a_block_that_waits(self, stage: Stage) -> None:
        stage.desire("x", client="d")
        stage.submit(block("b", "y", "x"), wanted="y")
        assert stage.drop("y") == [forget("y"), forget_block("b")]
        assert stage.key("x").consumers == {}

    def test_of_a_block_that_is_ready(self) -> None:
        stage = Stage()
        stage.submit(block("b", "x"), wanted="x")
        assert stage.drop("x") == [forget("x"), forget_block("b")]
        assert stage.join("north") == []
        assert stage.empty

    def test_of_a_block_that_runs(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        assert stage.drop("x") == [forget("x"), cancel("north", "b"), forget_block("b")]
        assert stage.empty

    def test_of_one_output_of_a_block_that_runs(self, stage: Stage) -> None:
        stage.submit(block("b", "x y"), wanted="x y")
        assert stage.drop("x") == [forget("x"), stop("north", "b", "x")]
        assert stage.made("b", "x y") == [release("north", "x"), told("y")]
        assert stage.drop("y") == [release("north", "y"), forget("y"), forget_block("b")]

    def test_what_was_stopped_is_not_waited_for(self, stage: Stage) -> None:
        stage.submit(block("b", "x y"), wanted="x y")
        stage.drop("x")
        assert stage.made("b", "y") == [told("y")]
        assert stage.says("north", KeysStopped("b", Attempt(0, 1), ("x",))) == []
        assert stage.core.ledger.blocks["b"].phase is BlockPhase.DONE

    def test_what_is_wanted_again_while_it_is_being_stopped_is_made_again(self, stage: Stage) -> None:
        stage.submit(block("b", "x y"), wanted="x y")
        stage.drop("x")
        d = block("d", "x", sites=("south",))
        assert stage.submit(d, wanted="x") == [run("south", d)]
        assert stage.says("north", KeysStopped("b", Attempt(0, 1), ("x",))) == []
        assert stage.made("d", "x") == [told("x")]

    def test_of_a_chain_while_its_first_block_runs(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), block("b", "y", "x"), wanted="y")
        assert stage.drop("y") == [
            forget("y"), forget_block("b"), forget("x"), cancel("north", "a"), forget_block("a")
        ]  # fmt: skip
        assert stage.empty

    def test_of_a_key_that_an_unfinished_block_needs(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), wanted="x")
        stage.made("a", "x")
        stage.submit(block("b", "y", "x"), wanted="y")
        assert stage.drop("x") == []
        assert stage.made("b", "y") == [release("north", "x"), told("y")]

    def test_of_a_key_that_is_being_imported(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        stage.submit(block("b", "y", "x", sites=("south",)), wanted="y")
        stage.drop("x")
        assert stage.drop("y") == [
            forget("y"), cancel("south", "b"), forget_block("b"),
            release("north", "x"), release("south", "x"), forget("x"),
        ]  # fmt: skip
        assert stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False)) == []
        assert stage.empty

    def test_copies_of_a_key_that_is_only_wanted_are_dropped(self, stage: Stage) -> None:
        stage.join("west")
        stage.scatter("north", "x")
        stage.submit(block("b", "y", "x", sites=("south",)), block("d", "z", "x", sites=("west",)), wanted="y z")
        stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False))
        assert stage.made("b", "y") == [told("y")]
        assert stage.drop("z") == [
            forget("z"), cancel("west", "d"), forget_block("d"), release("south", "x"), release("west", "x")
        ]  # fmt: skip
        assert list(stage.key("x").holders) == ["north"]

    def test_of_a_key_that_is_unknown(self, stage: Stage) -> None:
        assert stage.drop("x") == []
        assert stage.empty


class TestCancel:
    def test_it_ends_the_key_and_all_that_depends_on_it(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), block("b", "y", "x"), block("d", "z", "y"), wanted="x y z")
        assert stage(ev.KeysCancelled("c", ("x",), reason="enough", msg="really")) == [
            told_cancelled("y z", reason="enough", msg="really"), forget("z"), forget_block("d"), forget("y"),
            forget_block("b"), forget("x"), cancel("north", "a"), forget_block("a"),
        ]  # fmt: skip
        assert stage.empty

    def test_what_another_block_makes_as_well_goes_on(self, stage: Stage) -> None:
        stage.submit(block("e", "s"), block("a", "x"), wanted="s x")
        stage.submit(block("b", "y s", "x"), wanted="y s")
        commands = stage(ev.KeysCancelled("c", ("x",), reason="enough"))
        assert told_cancelled("y", reason="enough") in commands
        assert stage.made("e", "s") == [told("s")]

    def test_what_others_want_goes_on_without_force(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.desire("x", client="d")
        assert stage(ev.KeysCancelled("c", ("x",))) == []
        assert stage.made("b", "x") == [told("x", client="d")]

    def test_force_ends_it_for_everybody(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.desire("x", client="d")
        assert stage(ev.KeysCancelled("c", ("x",), force=True, reason="enough")) == [
            told_cancelled("x", client="d", reason="enough"), forget("x"), cancel("north", "b"), forget_block("b"),
        ]  # fmt: skip

    def test_what_others_make_of_it_goes_on_without_force(self, stage: Stage) -> None:
        b = block("b", "y", "x")
        stage.submit(block("a", "x"), wanted="x")
        stage.submit(b, wanted="y", client="d")
        assert stage(ev.KeysCancelled("c", ("x",))) == []
        assert stage.made("a", "x") == [run("north", b)]
        assert stage.made("b", "y") == [release("north", "x"), told("y", client="d")]

    def test_force_ends_what_others_make_of_it(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), wanted="x")
        stage.submit(block("b", "y", "x"), wanted="y", client="d")
        assert stage(ev.KeysCancelled("c", ("x",), force=True)) == [
            told_cancelled("y", client="d"), forget("y"), forget_block("b"), forget("x"), cancel("north", "a"),
            forget_block("a"),
        ]  # fmt: skip

    def test_of_a_block_of_calls_only_those_end_that_need_it(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), block("b", "w"), wanted="x w")
        calls = replace(block("d", "y z", "x w"), uses=((0,), (1,)))
        stage.submit(calls, wanted="y z")
        why = ev.FailKeys(("x",), "CancelledKeyError", "'x' was cancelled")
        assert stage(ev.KeysCancelled("c", ("x",))) == [told_cancelled("y"), forget("y"), why, stop("north", "a", "x")]
        assert stage.says("north", KeysStopped("a", Attempt(0, 1), ("x",))) == []
        (order,) = [each for each in stage.made("b", "w") if isinstance(each, ev.TellSite)]
        assert isinstance(order.message, RunBlock) and order.message.only == ("z",)
        assert {each.key: each.failed for each in order.message.imports if each.failed} == {"x": True}
        assert stage.made("d", "z")[-1] == told("z")

    def test_of_a_key_in_memory_releases_it(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.made("b", "x")
        assert stage(ev.KeysCancelled("c", ("x",))) == [
            release("north", "x"), forget("x"), forget_block("b")
        ]  # fmt: skip

    def test_of_unknown_keys_does_nothing(self, stage: Stage) -> None:
        assert stage(ev.KeysCancelled("c", ("x",))) == []


class TestLosses:
    def test_a_block_whose_site_is_gone_runs_elsewhere(self, stage: Stage) -> None:
        b = block("b", "x")
        stage.submit(b, wanted="x")
        assert stage.leave("north") == [run("south", b, n=2)]
        assert stage.made("b", "x") == [told("x")]

    def test_a_result_that_is_gone_is_made_again_with_all_that_it_takes(self, stage: Stage) -> None:
        a, b = block("a", "x"), block("b", "y", "x")
        stage.submit(a, b, wanted="x y")
        stage.made("a", "x")
        stage.made("b", "y")
        assert stage.leave("north") == [run("south", a, n=2)]
        assert stage.made("a", "x") == [told("x"), run("south", b, n=2)]
        assert stage.made("b", "y") == [told("y")]

    def test_only_what_is_gone_is_made_again(self, stage: Stage) -> None:
        a, b = block("a", "x", sites=("north",)), block("b", "y", "x", sites=("south",))
        stage.submit(a, b, wanted="x y")
        stage.made("a", "x")
        stage.made("b", "y")
        assert stage.leave("north") == []  # a waits for its site
        assert stage.join("north") == [run("north", a, n=2)]
        assert stage.key("y").holders == {"south": ("b",)}

    def test_what_needs_data_that_is_gone_fails_from_it(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        b = block("b", "y", "x", sites=("south",))
        stage.submit(b, wanted="y")
        assert stage.leave("north") == [
            lost_for_good("x", "north"), told_failed("x")
        ]  # fmt: skip
        imported = Import("x", "", 0, failed=True)
        assert stage.says("south", ImportFailed("x", "north", "no such site")) == [
            release("south", "x"), cancel("south", "b"), run("south", b, imported, n=2)
        ]  # fmt: skip

    def test_a_ready_block_waits_again_when_its_input_is_gone(self) -> None:
        stage = Stage("north")
        a, b = block("a", "x"), block("b", "y", "x", sites=("south",))
        stage.submit(a, b, wanted="y", wait=True)
        stage.made("a", "x")
        assert stage.leave("north") == []
        assert stage.join("south") == [run("south", a, n=2)]
        assert stage.made("a", "x") == [run("south", b)]

    def test_a_block_that_runs_without_an_input_that_is_gone_waits_for_it_when_it_is_given_back(
        self, stage: Stage
    ) -> None:
        a, b = block("a", "x", sites=("north", "west")), block("b", "y", "x", sites=("south",))
        stage.submit(a, b, wanted="x y")
        stage.made("a", "x")
        assert stage.leave("north") == []
        assert stage.says("south", ImportFailed("x", "north", "cut")) == [release("south", "x"), cancel("south", "b")]
        assert stage.join("west") == [run("west", a, n=2)]
        again = run("south", b, Import("x", "west", 8), n=2)
        assert stage.made("a", "x") == [told("x"), again]

    def test_an_import_ends_with_its_site(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        b = block("b", "y", "x", sites=("south", "west"))
        assert stage.submit(b, wanted="y") == [run("south", b, Import("x", "north", 8))]
        assert stage.leave("south") == []
        assert stage.join("west") == [run("west", b, Import("x", "north", 8), n=2)]

    def test_a_copy_that_arrives_after_the_original_is_gone_saves_it(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        stage.submit(block("b", "y", "x", sites=("south",)), wanted="y")
        stage.leave("north")
        assert stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False)) == [told("x")]
        assert stage.made("b", "y") == [told("y")]
        assert stage.drop("x") == [release("south", "x")]
        assert stage.drop("y") == [release("south", "y"), forget("y"), forget_block("b"), forget("x")]

    def test_keys_that_a_site_lost_are_made_again(self, stage: Stage) -> None:
        b = block("b", "x")
        stage.submit(b, wanted="x")
        stage.made("b", "x")
        assert stage.says("north", KeysLost(("x", "unknown"))) == [run("north", b, n=2)]

    def test_a_block_one_of_whose_outputs_is_lost_while_it_runs_makes_it_again_when_it_has_finished(
        self, stage: Stage
    ) -> None:
        b = block("b", "x y")
        stage.submit(b, wanted="x y")
        stage.made("b", "x")
        assert stage.says("north", KeysLost(("x",))) == []
        assert stage.made("b", "y") == [told("y"), run("north", b, n=2, only="x")]
        assert stage.made("b", "x") == [told("x")]

    def test_a_block_that_runs_is_left_alone_where_another_copy_of_its_output_is_lost(self, stage: Stage) -> None:
        stage.submit(block("a", "x y"), wanted="x y")
        stage.scatter("south", "x")
        assert stage.leave("south") == []
        assert stage.made("a", "x y") == [told("x y")]

    def test_a_second_copy_that_is_lost_costs_nothing(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        stage.submit(block("b", "y", "x", sites=("south",)), wanted="y")
        stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False))
        assert stage.says("south", KeysLost(("x",))) == [release("south", "x")]  # it may be there anew
        assert list(stage.key("x").holders) == ["north"]

    def test_a_late_farewell_of_an_earlier_incarnation_is_ignored(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        assert stage(ev.SiteLeft("north", "north-0"), ev.SiteLeft("west", "west-1")) == []
        assert stage.site_of("b") == "north"


class TestClaims:
    """Two blocks at one site may make the same key: it is there as long as one of them claims it."""

    @pytest.fixture
    def shared(self, stage: Stage) -> Stage:
        stage.submit(block("a", "x w"), wanted="x w")
        stage.submit(block("b", "x y"), wanted="y")
        stage.made("a", "x")
        stage.made("b", "x")
        assert stage.key("x").holders == {"north": ("a", "b")}
        return stage

    def test_when_one_is_stopped_the_key_stays(self, shared: Stage) -> None:
        shared.lost("b")
        assert shared.key("x").holders == {"north": ("a",)}

    def test_when_both_are_stopped_it_is_gone(self, shared: Stage) -> None:
        shared.lost("b")
        shared.lost("a")
        assert (shared.key("x").phase, shared.key("x").holders) == (KeyPhase.PENDING, {})

    def test_when_one_is_cancelled_the_key_stays(self, shared: Stage) -> None:
        assert shared.drop("y") == [forget("y"), cancel("north", "b"), forget_block("b")]
        assert shared.key("x").holders == {"north": ("a",)}

    def test_data_that_was_brought_in_outlives_the_block_that_made_it_too(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        stage.submit(block("b", "x y"), wanted="y")
        stage.made("b", "x")
        stage.lost("b")
        assert stage.key("x").holders == {"north": ("data",)}


Story = Callable[[Stage], object]


def ready(stage: Stage) -> None:
    """Block b waits for a site, all its inputs there."""
    stage.scatter("north", "x")
    stage.submit(block("b", "y", "x", sites=("west",)), wanted="y", wait=True)


def placed(stage: Stage) -> None:
    """Block b is at north."""
    stage.submit(block("b", "y"), wanted="y")


def recalling(stage: Stage) -> None:
    """Block b is at north, which wants to leave."""
    placed(stage)
    stage.drain("north")


def done(stage: Stage) -> None:
    """Block b made y."""
    placed(stage)
    stage.made("b", "y")


def failed(stage: Stage) -> None:
    """Block b did not."""
    placed(stage)
    stage.failed("b", "y")


def waiting(stage: Stage) -> None:
    """Block b waits for a key that is not there."""
    stage.desire("x", client="d")
    stage.submit(block("b", "y", "x"), wanted="y")


def used(stage: Stage) -> None:
    """Block b made y, of which block d made z."""
    north = {"sites": ("north",)}
    first, then, last = block("a", "x", sites=("west",)), block("b", "y", "x", **north), block("d", "z", "y", **north)
    stage.submit(first, then, last, wanted="y z", wait=True)
    stage.join("west")
    stage.made("a", "x")
    stage.made("b", "y")
    stage.made("d", "z")


def retired(stage: Stage) -> None:
    """Only z is needed."""
    used(stage)
    stage.drop("y")


def needed_again(stage: Stage) -> None:
    """A new block needs y too; block b waits for x, which only west may make."""
    retired(stage)
    stage.leave("west")
    stage.submit(block("e", "w", "y"), wanted="w")


def adopted(stage: Stage) -> None:
    """North says that it works at block b since before this hub started."""
    held = HeldBlock("b", Attempt(0, 1), open=("y",), kept=())
    stage.says("north", SiteHoldings((), (), (), (), (held,), 0))


def made_after_all(stage: Stage) -> None:
    """Another block makes the key that failed."""
    stage.submit(block("other", "y z"), wanted="z")
    stage.made("other", "y")


BLOCK_STORIES: dict[tuple[BlockPhase, str], tuple[Story, Story]] = {
    (BlockPhase.WAITING, "inputs exist"): (waiting, lambda stage: stage.scatter("north", "x", client="d")),
    (BlockPhase.READY, "input lost"): (ready, lambda stage: stage.leave("north")),
    (BlockPhase.READY, "place"): (ready, lambda stage: stage.join("west")),
    (BlockPhase.PLACED, "recall"): (placed, lambda stage: stage.drain("north")),
    (BlockPhase.RECALLING, "given back"): (recalling, lambda stage: stage.gave_back("b")),
    (BlockPhase.RECALLING, "too late"): (recalling, lambda stage: stage.gave_back("b", given=False)),
    (BlockPhase.PLACED, "finished"): (placed, lambda stage: stage.made("b", "y")),
    (BlockPhase.RECALLING, "finished"): (recalling, lambda stage: stage.made("b", "y")),
    (BlockPhase.PLACED, "site lost"): (placed, lambda stage: stage.leave("north")),
    (BlockPhase.RECALLING, "site lost"): (recalling, lambda stage: stage.leave("north")),
    (BlockPhase.DONE, "needed again"): (done, lambda stage: stage.leave("north")),
    (BlockPhase.WAITING, "stand down"): (needed_again, lambda stage: stage.drop("w")),
    (BlockPhase.READY, "stand down"): (ready, lambda stage: stage.scatter("north", "y")),
    (BlockPhase.WAITING, "adopt"): (waiting, adopted),
    (BlockPhase.READY, "adopt"): (ready, adopted),
    (BlockPhase.WAITING, "cancel"): (waiting, lambda stage: stage.drop("y")),
    (BlockPhase.READY, "cancel"): (ready, lambda stage: stage.drop("y")),
    (BlockPhase.PLACED, "cancel"): (placed, lambda stage: stage.drop("y")),
    (BlockPhase.RECALLING, "cancel"): (recalling, lambda stage: stage.drop("y")),
    (BlockPhase.DONE, "forget"): (done, lambda stage: stage.drop("y")),
}

KEY_STORIES: dict[tuple[KeyPhase, str], tuple[Story, Story]] = {
    (KeyPhase.PENDING, "made"): (placed, lambda stage: stage.made("b", "y")),
    (KeyPhase.PENDING, "failed"): (placed, lambda stage: stage.failed("b", "y")),
    (KeyPhase.HELD, "lost"): (done, lambda stage: stage.leave("north")),
    (KeyPhase.FAILED, "made"): (failed, made_after_all),
    (KeyPhase.FAILED, "retry"): (failed, lambda stage: stage(ev.KeysRetried(("y",)))),
    (KeyPhase.PENDING, "retire"): (needed_again, lambda stage: stage.drop("w")),
    (KeyPhase.HELD, "retire"): (used, lambda stage: stage.drop("y")),
    (KeyPhase.RETIRED, "needed again"): (retired, lambda stage: stage.desire("y")),
    (KeyPhase.RETIRED, "made"): (retired, lambda stage: stage.scatter("north", "y")),
    (KeyPhase.RETIRED, "release"): (retired, lambda stage: stage.drop("z")),
    (KeyPhase.PENDING, "release"): (placed, lambda stage: stage.drop("y")),
    (KeyPhase.HELD, "release"): (done, lambda stage: stage.drop("y")),
    (KeyPhase.FAILED, "release"): (failed, lambda stage: stage.drop("y")),
}


class TestTables:
    @pytest.mark.parametrize("row", BLOCK_MOVES, ids=lambda row: f"{row[0].value}, {row[1]}")
    def test_every_move_of_a_block_is_made(self, stage: Stage, row: tuple[BlockPhase, str]) -> None:
        before, step = BLOCK_STORIES[row]
        before(stage)
        moves = stage.core.ledger.story("b")
        assert phase_after(moves, BLOCK_MOVES, BlockPhase.WAITING) is row[0]
        step(stage)
        assert stage.core.ledger.story("b")[len(moves)] == row[1]

    @pytest.mark.parametrize("row", KEY_MOVES, ids=lambda row: f"{row[0].value}, {row[1]}")
    def test_every_move_of_a_key_is_made(self, stage: Stage, row: tuple[KeyPhase, str]) -> None:
        before, step = KEY_STORIES[row]
        before(stage)
        moves = stage.core.ledger.story("y")
        assert phase_after(moves, KEY_MOVES, KeyPhase.PENDING) is row[0]
        step(stage)
        assert stage.core.ledger.story("y")[len(moves)] == row[1]

    def test_no_other_move_is_legal(self) -> None:
        for phase, move in product(BlockPhase, {move for _, move in BLOCK_MOVES}):
            if (phase, move) not in BLOCK_MOVES:
                with pytest.raises(IllegalTransition, match=f"block 'b' is {phase.value}: it cannot '{move}'"):
                    next_block_phase(phase, move, "b")
        for at, move in product(KeyPhase, {move for _, move in KEY_MOVES}):
            if (at, move) not in KEY_MOVES:
                with pytest.raises(IllegalTransition, match=f"key 'x' is {at.value}: it cannot '{move}'"):
                    next_key_phase(at, move, "x")

    def test_an_illegal_move_tells_the_story_so_far(self, stage: Stage) -> None:
        done(stage)
        with pytest.raises(IllegalTransition, match=r"its story: \['inputs exist', 'place', 'finished'\]"):
            stage.core.ledger.move_block(stage.block("b"), "place")
        with pytest.raises(IllegalTransition, match=r"key 'y' is held: it cannot 'failed'; its story: \['made'\]"):
            stage.core.ledger.move_key(stage.key("y"), "failed")


def phase_after(moves: list[str], table: dict[tuple[Phase, str], Phase], start: Phase) -> Phase:
    """Return where these moves lead."""
    phase = start
    for move in moves:
        phase = table[phase, move]
    return phase


class TestCommands:
    def test_a_release_says_how_many_reports_of_the_site_were_taken_in(self, stage: Stage) -> None:
        stage.submit(block("b", "x y z"), block("d", "w"), wanted="x w")
        stage.made("b", "x")
        stage.started("d")
        stage.failed("d", "w")
        messages = [c.message for c in stage.drop("x w") if isinstance(c, ev.TellSite)]
        assert [(m.keys, m.seen) for m in messages if isinstance(m, ReleaseKeys)] == [(("w",), 2), (("x",), 2)]
        assert stage.core.ledger.reports == {"north": 2, "south": 0}
        stage.leave("south")
        assert stage.core.ledger.reports == {"north": 2}

    def test_what_is_for_one_receiver_is_merged_and_an_order_keeps_its_place(self) -> None:
        ledger = Ledger(epoch=0)
        ledger.tell(("c", "d"), ev.Outcome.IN_MEMORY, "x")
        ledger.tell(("c",), ev.Outcome.IN_MEMORY, "y")
        ledger.release_at("north", "x")
        ledger.command(forget_block("b"))
        ledger.release_at("north", "y")
        assert ledger.flush() == [
            release("north", "x"), told("x y"), told("x", client="d"), forget_block("b"), release("north", "y")
        ]  # fmt: skip
        assert ledger.flush() == []
