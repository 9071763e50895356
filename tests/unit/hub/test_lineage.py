"""Lost results are made again, from what is still there, and from nothing more."""

from __future__ import annotations

from daskfed.hub import events as ev
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import BlockSpec, Import, ImportFailed
from tests.unit.hub.builders import (
    Stage,
    block,
    forget,
    forget_block,
    hello,
    lost_for_good,
    release,
    run,
    told,
    told_failed,
)


def chain(length: int) -> list[BlockSpec]:
    """Return blocks b0, b1 ... of which each makes one key, x0, x1 ..., of the one before."""
    return [block(f"b{n}", f"x{n}", f"x{n - 1}" if n else "") for n in range(length)]


def test_a_chain_whose_values_were_released_runs_again_from_its_start() -> None:
    stage = Stage("north", "south")
    first, second, third = chain(3)
    stage.submit(first, second, third, wanted="x2")
    for name, made in (("b0", "x0"), ("b1", "x1"), ("b2", "x2")):
        stage.made(name, made)
    assert stage.leave("north") == [run("south", first, n=2)]
    assert stage.made("b0", "x0") == [run("south", second, n=2)]
    assert stage.made("b1", "x1") == [release("south", "x0"), run("south", third, n=2)]
    assert stage.made("b2", "x2") == [release("south", "x1"), told("x2")]


def test_a_deep_chain_needs_no_deep_stack() -> None:
    stage = Stage("north")
    stage.core.check = lambda: None  # type: ignore[method-assign]  # it takes as long as the chain, each time
    blocks = chain(5000)
    stage.submit(*blocks, wanted="x4999")
    for n in range(5000):
        stage.made(f"b{n}", f"x{n}")
    stage.leave("north")
    assert stage.join("north", hello("north", incarnation="north-2")) == [run("north", blocks[0], n=2)]
    assert stage.block("b4999").phase is BlockPhase.WAITING
    stage.drop("x4999")
    assert stage.empty


def test_a_shared_ancestor_runs_once() -> None:
    stage = Stage("north", "south")
    root, left, right = block("r", "x"), block("a", "y", "x"), block("b", "z", "x")
    stage.submit(root, left, right, wanted="y z")
    stage.made("r", "x")
    stage.made("a", "y")
    stage.made("b", "z")
    assert stage.leave("north") == [run("south", root, n=2)]
    assert stage.made("r", "x") == [run("south", left, n=2), run("south", right, n=2)]


def test_what_another_site_holds_is_brought_from_there_instead() -> None:
    stage = Stage("north", "south", "west")
    root, last = block("r", "x", sites=("south",)), block("b", "y", "x", sites=("north", "west"))
    stage.submit(root, last, wanted="x y")
    stage.made("r", "x")
    stage.made("b", "y")
    assert stage.leave("north") == [run("west", last, Import("x", "south", 8), n=2)]


def test_only_the_output_that_is_lost_is_asked_for() -> None:
    stage = Stage("north", "south")
    both = block("b", "x y")
    stage.submit(both, wanted="x y")
    stage.made("b", "x y")
    stage.scatter("south", "x", client="d")
    assert stage.leave("north") == [run("south", both, n=2, only="y")]
    assert stage.made("b", "y") == [told("y")]


def test_a_client_that_wants_a_retired_key_has_it_made_again() -> None:
    stage = Stage("north")
    first, second = chain(2)
    stage.submit(first, second, wanted="x1")
    stage.made("b0", "x0")
    stage.made("b1", "x1")
    assert stage.key("x0").phase is KeyPhase.RETIRED
    assert stage.desire("x0", client="d") == [run("north", first, n=2)]
    assert stage.made("b0", "x0") == [told("x0", client="d")]


def test_the_end_of_the_last_heir_frees_the_whole_chain() -> None:
    stage = Stage("north")
    stage.submit(*chain(3), wanted="x2")
    for n in range(3):
        stage.made(f"b{n}", f"x{n}")
    assert stage.drop("x2") == [
        release("north", "x2"), forget("x2"), forget_block("b2"), forget("x1"), forget_block("b1"), forget("x0"),
        forget_block("b0"),
    ]  # fmt: skip
    assert stage.empty


def test_an_input_that_failed_is_not_tried_again() -> None:
    stage = Stage("north", "south")
    bad, user = block("a", "x"), block("b", "y z", "x")
    stage.submit(bad, user, wanted="y z")
    stage.failed("a", "x")
    stage.failed("b", "y")
    stage.made("b", "z")
    assert stage.leave("north") == [run("south", user, Import("x", "", 0, failed=True), n=2, only="z")]


def test_a_copy_that_a_client_keeps_takes_the_place_of_lost_data() -> None:
    stage = Stage("north", "south")
    stage(ev.KeysScattered("c", "north", (("x", 8),), kept=True))
    user = block("b", "y", "x", sites=("south",))
    stage.submit(user, wanted="y")
    assert stage.leave("north") == [ev.AskForData("c", ("x",))]
    stage.says("south", ImportFailed("x", "north", "no such site"))
    again = ev.KeysScattered("c", "south", (("x", 8),), kept=True, again=True)
    assert stage(again) == [told("x"), run("south", user, n=2)]
    assert stage.made("b", "y") == [told("y")]


def test_a_client_that_is_back_is_asked_once_more_for_data_that_is_lost() -> None:
    stage = Stage("north", "south")
    stage(ev.ClientJoined("c", "ann"), ev.KeysScattered("c", "north", (("x", 8),), kept=True))
    stage.leave("north")
    back = ev.ClientBack("c", "ann", blocks=(), wanted=("x",), kept=("x",))
    assert stage(back) == [ev.AskForData("c", ("x",))]


def test_a_block_that_was_forgotten_and_comes_again_repeats_no_attempt() -> None:
    stage = Stage("north")
    a = block("a", "x")
    stage(ev.ClientJoined("c", "ann"))
    stage.submit(a, wanted="x")
    stage.made("a", "x")
    stage.drop("x")
    assert stage.core.ledger.blocks == {}
    commands = stage(ev.ClientBack("c", "ann", blocks=((a, 1),), wanted=("x",)))
    assert run("north", a, n=2) in commands


def test_data_is_lost_with_the_client_that_kept_it() -> None:
    stage = Stage("north", "south")
    stage(ev.ClientJoined("d", "ann"), ev.KeysScattered("d", "north", (("x", 8),), kept=True))
    stage.desire("x")
    stage.leave("north")
    assert stage(ev.ClientLeft("d")) == [lost_for_good("x", "north"), told_failed("x")]


def test_a_copy_is_dropped_with_its_key() -> None:
    stage = Stage("north")
    stage(ev.KeysScattered("c", "north", (("x", 8),), kept=True))
    assert stage.drop("x") == [release("north", "x"), forget("x"), ev.DropCopies("c", ("x",))]
    assert stage(ev.KeysScattered("c", "north", (("x", 8),), kept=True, again=True)) == [release("north", "x")]
    assert stage.empty


def test_the_loss_of_a_source_is_no_fault_of_the_block_that_needs_it() -> None:
    stage = Stage("north", "south")
    user = block("b", "y", "x", sites=("south",))
    stage.submit(block("a", "x", sites=("north", "west")), user, wanted="y")
    stage.made("a", "x")
    stage.leave("north")
    stage.says("south", ImportFailed("x", "north", "cut"))
    assert stage.block("b").failures == 0


def test_a_block_whose_output_comes_from_elsewhere_does_not_run() -> None:
    stage = Stage("north", "south")
    stage.submit(block("b", "x", sites=("west",)), wanted="x", wait=True)
    assert stage.scatter("south", "x", client="d") == [told("x"), told("x", client="d")]
    assert stage.block("b").phase is BlockPhase.DONE
    assert stage.join("west") == []
