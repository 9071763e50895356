"""Failed keys are made again with what they failed from and what failed from them, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from daskfed.hub import events as ev
from daskfed.hub.states import BlockPhase
from daskfed.messages import RunBlock
from tests.unit.hub.builders import Stage, block, cancel, release, run, told, told_failed


@pytest.fixture
def stage() -> Stage:
    """Two sites."""
    return Stage("north", "south")


def told_retried(names: str, client: str = "c") -> ev.TellClient:
    """Return the news that these keys are made again."""
    return ev.TellClient(client, ev.Outcome.RETRIED, tuple(names.split()))


def retry(stage: Stage, names: str) -> list[ev.Command]:
    return stage(ev.KeysRetried(tuple(names.split())))


def orders(commands: list[ev.Command]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the blocks that sites are told to run, with the outputs that they are to make where not all."""
    messages = [each.message for each in commands if isinstance(each, ev.TellSite)]
    return [(each.block.id, each.only) for each in messages if isinstance(each, RunBlock)]


def test_one_key(stage: Stage) -> None:
    b = block("b", "x")
    stage.submit(b, wanted="x")
    stage.failed("b", "x")
    assert retry(stage, "x") == [release("north", "x"), told_retried("x"), run("north", b, n=2)]
    assert stage.made("b", "x") == [told("x")]


def test_dependents_are_told_before_it_and_made_after_it(stage: Stage) -> None:
    stage.submit(block("a", "x", sites=("north",)), block("b", "y", "x", sites=("south",)), wanted="x y")
    stage.failed("a", "x")
    stage.failed("b", "y")
    commands = retry(stage, "x")
    assert told_retried("y x") in commands and orders(commands) == [("a", ())]
    assert orders(stage.made("a", "x")) == [("b", ())]
    assert stage.made("b", "y")[-1] == told("y")


def test_what_it_failed_from_is_made_first_though_nobody_holds_it(stage: Stage) -> None:
    stage.submit(block("a", "x"), block("b", "y", "x"), wanted="y")
    stage.failed("a", "x")
    stage.failed("b", "y")
    assert orders(retry(stage, "y")) == [("a", ())]
    assert orders(stage.made("a", "x")) == [("b", ())]
    assert stage.made("b", "y")[-1] == told("y")
    stage.drop("y")
    assert not stage.core.ledger.keys


def test_of_a_block_of_calls_only_those_run_that_failed(stage: Stage) -> None:
    stage.submit(block("b", "x y z"), wanted="x y z")
    stage.made("b", "x")
    stage.failed("b", "y")
    stage.made("b", "z")
    assert orders(retry(stage, "x y z")) == [("b", ("y",))]
    assert stage.made("b", "y") == [told("y")]


def test_of_dependent_calls_only_those_run_that_need_it(stage: Stage) -> None:
    calls = replace(block("d", "v w", "x y"), uses=((0,), (1,)))
    stage.submit(block("a", "x"), block("b", "y"), calls, wanted="x y v w")
    stage.failed("a", "x")
    stage.failed("b", "y")
    stage.failed("d", "v w")
    assert orders(retry(stage, "x")) == [("a", ())]
    assert orders(stage.made("a", "x")) == [("d", ("v",))]


def test_a_call_of_a_block_that_still_runs_waits_for_the_others(stage: Stage) -> None:
    stage.submit(block("b", "x y"), wanted="x y")
    stage.failed("b", "x")
    assert orders(retry(stage, "x")) == []
    assert orders(stage.made("b", "y")) == [("b", ("x",))]


def test_a_dependent_that_was_sent_the_failure_is_called_back(stage: Stage) -> None:
    stage.submit(block("a", "x", sites=("north",)), block("b", "y", "x", sites=("south",)), wanted="x y")
    stage.failed("a", "x")
    commands = retry(stage, "x")
    assert cancel("south", "b") in commands and orders(commands) == [("a", ())]
    assert stage.block("b").phase is BlockPhase.WAITING
    assert orders(stage.made("a", "x")) == [("b", ())]


def test_what_did_not_fail_or_is_unknown_is_left_alone(stage: Stage) -> None:
    stage.submit(block("b", "x"), wanted="x")
    assert retry(stage, "x z") == []
    stage.made("b", "x")
    assert retry(stage, "x") == []


def test_what_nobody_can_make_stays_failed(stage: Stage) -> None:
    stage.scatter("north", "x")
    stage.leave("north")
    assert retry(stage, "x") == []
    assert stage.desire("x", client="d") == [told_failed("x", client="d")]
