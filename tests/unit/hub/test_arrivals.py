"""Blocks need earlier blocks only, in whatever order they and their clients come."""

from __future__ import annotations

import pytest

from daskfed.hub import events as ev
from daskfed.hub.arrivals import inputs_first
from daskfed.hub.recovery import LEASE_S
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import Import, KeyImported
from tests.unit.hub.builders import Stage, block, forget, forget_block, keys, release, run
from tests.unit.hub.test_recovery import Anew, working


@pytest.fixture
def stage() -> Stage:
    return Stage("north")


def arrival(stage: Stage, name: str) -> int:
    return stage.block(name).order[-1]


class TestInputsFirst:
    def test_blocks_in_order_stay_as_they_are(self) -> None:
        blocks = [block("a", "x"), block("c", "u"), block("b", "y", "x elsewhere")]
        assert inputs_first(blocks) == blocks

    def test_others_follow_what_they_need(self) -> None:
        a, b, c = block("a", "x"), block("b", "y", "x"), block("c", "z", "x y")
        assert inputs_first([c, b, a]) == [a, b, c]

    def test_a_circle_is_broken_somewhere(self) -> None:
        a, b = block("a", "x", "y"), block("b", "y", "x")
        assert inputs_first([a, b]) == [b, a]


class TestLateProducers:
    def test_a_block_that_waits_for_a_promise_is_numbered_anew_when_its_graph_comes(self, stage: Stage) -> None:
        stage.desire("x", client="d")
        b, c = block("b", "y", "x"), block("c", "z", "y")
        stage.submit(b, c, wanted="z")
        a = block("a", "x")
        assert stage.submit(a, wanted="x", client="d") == [run("north", a)]
        assert arrival(stage, "a") < arrival(stage, "b") < arrival(stage, "c")

    def test_what_a_later_block_makes_too_it_makes_in_place_of_one_that_waited(self, stage: Stage) -> None:
        stage.desire("x", client="d")
        stage.submit(block("b", "y", "x"), wanted="y")
        a, again = block("a", "x"), block("again", "y z", "x")
        commands = stage.submit(a, again, wanted="x z", client="d")
        assert commands == [forget_block("b"), run("north", a)]
        assert stage.key("y").producer == "again"

    def test_two_blocks_that_wait_for_each_other_end(self, stage: Stage) -> None:
        stage.desire("x", client="d")
        stage.submit(block("b", "y", "x"), wanted="y")
        commands = stage.submit(block("a", "x", "y"), wanted="x", client="d")
        ended = [command for command in commands if isinstance(command, ev.TellClient)]
        assert {each.client: set(each.keys) for each in ended} == {"c": {"y"}, "d": {"x"}}
        assert all(each.outcome is ev.Outcome.CANCELLED for each in ended)
        assert stage.empty


def waits_in_vain(stage: Anew) -> None:
    """The lease of a client that never comes has ended."""
    stage.later(LEASE_S + 1)
    assert stage.core.recovery.settled


class TestLostProducers:
    def test_a_circle_is_cut_at_a_key_that_exists(self) -> None:
        """What ``y`` was made from, of a client that is gone, is made from ``y`` now."""
        stage = Anew("north", clients="c d")
        stage.back(block("b", "y", "x"), wanted="y")
        stage.holds("north", "y", working("b", "", "y"))
        waits_in_vain(stage)
        assert stage.key("x").phase is KeyPhase.RETIRED and stage.key("x").producer is None
        commands = stage.submit(block("a", "x", "y"), wanted="x")
        assert stage.block("a").phase is BlockPhase.PLACED and forget_block("b") in commands
        assert stage.key("y").phase is KeyPhase.HELD and stage.key("y").producer is None

    def test_a_circle_that_was_closed_meanwhile_is_cut_when_nobody_is_waited_for(self) -> None:
        stage = Anew("north", clients="c d")
        stage.holds("north")
        stage.back(block("b", "y", "x"), wanted="y")
        stage.submit(block("a", "x", "y"), wanted="x")
        waits_in_vain(stage)
        assert stage.empty

    def test_a_circle_of_blocks_that_cut_the_same_tasks_differently_is_opened(self) -> None:
        """``x`` needs nothing, ``y`` needs ``x``, ``z`` needs ``y``; the number of the block that made ``x`` is lost."""
        stage = Anew("north", clients="c d")
        a, b, c = block("a", "x"), block("b", "y", "x"), block("c", "x z", "y")
        stage(ev.ClientBack("d", "ann", ((a, 0), (b, 0)), keys("y"), ()))
        stage(ev.ClientBack("c", "ann", ((c, 12),), keys("z"), ()))
        commands = stage.holds("north")
        assert not any(isinstance(command, ev.TellClient) for command in commands)
        assert stage.key("x").producer == "a" and arrival(stage, "a") < arrival(stage, "b") < arrival(stage, "c")
        for name, key in zip("abc", "xyz", strict=True):
            stage.made(name, key)
        assert stage.key("z").phase is KeyPhase.HELD

    def test_blocks_that_come_back_out_of_order_are_put_in_order(self) -> None:
        stage = Anew("north", clients="c d")
        stage.holds("north")
        b, a = block("b", "y", "x"), block("a", "x")
        stage(ev.ClientBack("c", "ann", ((b, 1), (a, 0)), ("y",), ()))
        waits_in_vain(stage)
        assert arrival(stage, "a") < arrival(stage, "b")
        assert stage.block("a").phase is BlockPhase.PLACED


def test_a_client_that_was_asleep_when_its_blocks_were_numbered_is_told_again(stage: Stage) -> None:
    a, b = block("a", "x"), block("b", "y")
    stage.submit(a, b, wanted="x y")
    numbered = ((a, 0), (b, arrival(stage, "b")))
    commands = stage.core.handle(ev.ClientBack("c", "ann", numbered, keys("x y"), ()), stage.now)
    told_again = [command for command in commands if isinstance(command, ev.BlocksArrived)]
    assert told_again == [ev.BlocksArrived("c", "a", arrival(stage, "a"))]


class TestForgottenKeys:
    def test_a_client_that_missed_that_blocks_were_forgotten_has_their_inputs_made_again(self, stage: Stage) -> None:
        a, b = block("a", "x y"), block("b", "z", "x")
        stage.submit(a, b, wanted="y z")
        stage.made("a", "x y")
        stage.made("b", "z")
        assert stage.drop("z") == [release("north", "z"), forget("z"), forget_block("b"), forget("x")]
        commands = stage(ev.ClientBack("c", "ann", ((a, 1), (b, 2)), keys("y z"), ()))
        assert run("north", a, n=2, only="x") in commands
        assert not any(isinstance(c, ev.TellClient) and c.outcome is ev.Outcome.CANCELLED for c in commands)
        stage.made("a", "x")
        assert stage.block("b").phase is BlockPhase.PLACED

    def test_what_nobody_needs_of_them_stays_forgotten(self, stage: Stage) -> None:
        a, b = block("a", "x y"), block("b", "z", "x")
        stage.submit(a, b, wanted="y z")
        stage.made("a", "x y")
        stage.made("b", "z")
        stage.drop("z")
        stage(ev.ClientBack("c", "ann", ((a, 1), (b, 2)), keys("y"), ()))
        assert set(stage.core.ledger.keys) == {"y"} and set(stage.core.ledger.blocks) == {"a"}


def test_a_failure_that_crosses_an_order_to_import_does_not_take_the_import_along() -> None:
    """The release of the failure would come after the order, and drop what it asks for."""
    stage = Stage("north", "south")
    a = block("a", "x", sites=("south",))
    stage.submit(a, wanted="x")
    stage.scatter("north", "x")  # another client has it
    b = block("b", "y", "x", sites=("south",))
    assert stage.submit(b, wanted="y") == [run("south", b, Import("x", "north", 8))]
    assert stage.failed("a", "x") == []
    stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False))
    assert list(stage.key("x").holders) == ["north", "south"]


def test_a_failure_elsewhere_of_a_key_that_exists_is_released() -> None:
    stage = Stage("north", "south")
    stage.submit(block("a", "x", sites=("south",)), wanted="x")
    stage.scatter("north", "x")
    assert stage.failed("a", "x") == [release("south", "x")]


def test_a_block_that_is_forgotten_and_cannot_run_ends_nothing_of_those_that_can(stage: Stage) -> None:
    """It comes back with its old number, from before the others; what only it makes nobody needs."""
    new, use = block("new", "m"), block("use", "x", "m")
    stage.submit(new, use, wanted="x")
    old = (block("old", "m z", "gone"), -1), (block("after", "x y", "z"), 0)
    commands = stage(ev.ClientBack("d", "ann", old, ()))
    assert forget_block("old") in commands and forget_block("after") in commands
    assert not any(isinstance(each, ev.TellClient) for each in commands)
    assert stage.key("m").producer == "new" and stage.key("x").producer == "use"
