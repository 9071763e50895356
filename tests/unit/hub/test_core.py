"""The hub's core: for each event, the whole list of commands."""

from __future__ import annotations

import pytest

from daskfed.hub import events as ev
from daskfed.hub.core import MAX_FAILURES, HubCore
from daskfed.hub.states import KeyPhase
from daskfed.messages import (
    Attempt,
    BlockKind,
    BlockLost,
    BlockRecalled,
    BlockStarted,
    CopyKeys,
    Import,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    MadeKey,
    RunBlock,
)
from tests.unit.hub.builders import (
    Commands,
    Stage,
    block,
    cancel,
    forget,
    forget_block,
    hello,
    lost_for_good,
    release,
    run,
    told,
    told_cancelled,
    told_failed,
)

LOST = ev.Outcome.LOST


@pytest.fixture
def stage() -> Stage:
    return Stage("north", "south")


def unknown_site(names: str, name: str, selector: str, sites: str = "north, south") -> ev.FailKeys:
    reason = f"{name}: no site matches '{selector}'; sites are {sites}"
    return ev.FailKeys(tuple(names.split()), "UnknownSiteError", reason)


class TestRefusedBlocks:
    def test_a_block_for_a_worker_that_does_not_exist_fails_alone(self, stage: Stage) -> None:
        bad, good = block("bad", "x", label="inc"), block("good", "y")
        event = ev.BlocksSubmitted("c", (bad, good), ("x", "y"), refused=(("bad", "no worker 'bob'"),))
        assert stage(event) == [
            ev.FailKeys(("x",), "UnknownWorkerError", "inc: no worker 'bob'"),
            told_failed("x"),
            run("north", good),
        ]


class TestGraphs:
    def test_a_block_runs_its_client_is_told_and_nothing_is_left_after_its_release(self, stage: Stage) -> None:
        b = block("b", "x")
        assert stage.submit(b, wanted="x") == [run("north", b)]
        assert stage.started("b") == []
        assert stage.made("b", "x") == [told("x")]
        assert stage.drop("x") == [release("north", "x"), forget("x"), forget_block("b")]
        assert stage.empty

    def test_a_dependent_follows_and_what_it_used_up_is_released(self, stage: Stage) -> None:
        a, b = block("a", "x"), block("b", "y", "x")
        assert stage.submit(a, b, wanted="y") == [run("north", a)]
        assert stage.made("a", "x") == [run("north", b)]
        assert stage.made("b", "y") == [release("north", "x"), told("y")]
        assert (stage.key("x").phase, stage.key("x").heirs) == (KeyPhase.RETIRED, {"b": None})
        assert stage.drop("y") == [
            release("north", "y"), forget("y"), forget_block("b"), forget("x"), forget_block("a")
        ]  # fmt: skip

    def test_blocks_may_come_in_any_order(self, stage: Stage) -> None:
        a, b = block("a", "x"), block("b", "y", "x")
        assert stage.submit(b, a, wanted="y") == [run("north", a)]
        assert stage.made("a", "x") == [run("north", b)]

    def test_an_input_made_elsewhere_is_imported_and_both_copies_are_released(self, stage: Stage) -> None:
        a, b = block("a", "x", sites=("north",)), block("b", "y", "x", sites=("south",))
        stage.submit(a, b, wanted="y")
        assert stage.made("a", "x", nbytes=100) == [run("south", b, Import("x", "north", 100))]
        assert stage.says("south", KeyImported("x", "north", 100, 0.1, relayed=False)) == []
        assert list(stage.key("x").holders) == ["north", "south"]
        assert stage.made("b", "y") == [release("north", "x"), release("south", "x"), told("y")]

    def test_a_second_block_at_the_site_does_not_import_again_what_is_on_its_way(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        b, c = (block(name, f"y{name}", "x", sites=("south",)) for name in "bc")
        assert stage.submit(b, c, wanted="yb yc") == [run("south", b, Import("x", "north", 8)), run("south", c)]

    def test_outputs_are_reported_one_by_one(self, stage: Stage) -> None:
        stage.submit(block("b", "x y"), wanted="x y")
        assert stage.made("b", "x") == [told("x")]
        assert stage.made("b", "y") == [told("y")]

    def test_clients_are_told_of_many_keys_at_once(self, stage: Stage) -> None:
        stage.desire("x y", client="d")
        stage.submit(block("b", "x y"), wanted="x y")
        assert stage.made("b", "x y") == [told("x y", client="d"), told("x y")]

    def test_a_block_that_comes_again_is_not_run_again(self, stage: Stage) -> None:
        b = block("b", "x")
        stage.submit(b, wanted="x")
        assert stage.submit(b, wanted="x") == []
        stage.made("b", "x")
        assert stage.submit(b, wanted="x", client="d") == [told("x", client="d")]

    def test_a_block_whose_outputs_are_made_or_being_made_is_forgotten_at_once(self, stage: Stage) -> None:
        stage.submit(block("b", "x y"), wanted="x y")
        assert stage.submit(block("again", "y x"), wanted="y") == [forget_block("again")]
        stage.made("b", "x")
        assert stage.submit(block("more", "x"), wanted="x", client="d") == [
            forget_block("more", client="d"), told("x", client="d")
        ]  # fmt: skip

    def test_a_block_that_makes_one_new_key_runs_though_it_makes_known_ones_too(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), wanted="x")
        b = block("b", "x y", sites=("south",))
        assert stage.submit(b, wanted="y") == [run("south", b)]
        assert stage.made("a", "x") == [told("x")]
        assert stage.made("b", "x y") == [release("south", "x"), told("y")]
        assert list(stage.key("x").holders) == ["north"]

    def test_the_first_block_that_can_make_a_key_stays_its_producer(self, stage: Stage) -> None:
        """Whoever makes it: were it to change, two blocks might each need what the other makes."""
        stage.submit(block("a", "x"), wanted="x")
        stage.submit(block("b", "x y", sites=("south",)), wanted="y")
        assert stage.made("b", "x") == [told("x")]
        assert stage.made("b", "y") == [told("y")]
        assert stage.drop("y") == [release("south", "y"), forget("y"), forget_block("b")]
        assert stage.key("x").producer == "a"

    def test_a_block_without_outputs_is_of_no_use(self, stage: Stage) -> None:
        assert stage.submit(block("b", ""), wanted="") == [forget_block("b")]

    def test_a_block_that_nobody_wants_anything_of_ends_at_once(self, stage: Stage) -> None:
        a, b = block("a", "x"), block("b", "y", "x")
        assert stage.submit(a, b, wanted="x") == [forget("y"), forget_block("b"), run("north", a)]

    def test_a_key_that_nobody_makes_is_lost(self, stage: Stage) -> None:
        assert stage.submit(wanted="x") == [ev.TellClient("c", LOST, ("x",), "lost dependencies")]

    def test_a_block_runs_where_the_whole_of_its_input_is(self, stage: Stage) -> None:
        stage.scatter("south", "x", nbytes=10**9)
        b = block("b", "y", "x", prefixes=(("f", 1),))
        assert stage.submit(b, wanted="y") == [run("south", b, expected_s=0.1)]


class TestRefusals:
    def test_lost_dependencies_cancel_all_that_needs_them(self, stage: Stage) -> None:
        graph = block("a", "x", "gone"), block("b", "y", "x")
        why = "lost dependencies: ['gone']"
        assert stage.submit(*graph, wanted="x y") == [
            told_cancelled("x y", reason=why), forget("y"), forget_block("b"), forget("x"), forget_block("a")
        ]  # fmt: skip
        assert stage.empty

    @pytest.mark.parametrize("order", ["roots first", "roots last"])
    def test_a_refused_block_takes_nothing_with_it_that_others_need(self, stage: Stage, order: str) -> None:
        root, lost, good = block("r", "x"), block("a", "y", "x gone"), block("b", "z", "x")
        graph = (root, lost, good) if order == "roots first" else (lost, good, root)
        commands = stage.submit(*graph, wanted="y z")
        assert commands == [
            told_cancelled("y", reason="lost dependencies: ['gone']"), forget("y"), forget_block("a"),
            run("north", root),
        ]  # fmt: skip
        assert stage.made("r", "x") == [run("north", good)]

    def test_a_refused_block_leaves_a_shared_key_to_its_other_maker(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), wanted="x")
        why = "lost dependencies: ['gone']"
        assert stage.submit(block("b", "x y", "gone"), wanted="x y") == [
            told_cancelled("y", reason=why), forget("y"), forget_block("b")
        ]  # fmt: skip
        nowhere = block("d", "x z", sites=("nowhere",))
        assert stage.submit(nowhere, wanted="z") == [
            unknown_site("z", "d", "nowhere"), told_failed("z")
        ]  # fmt: skip
        assert stage.made("a", "x") == [told("x")]

    def test_an_unknown_site_fails_a_block_at_once_and_names_what_there_is(self, stage: Stage) -> None:
        b = block("b", "x y", label="read", sites=("nroth",))
        assert stage.submit(b, wanted="x y") == [
            unknown_site("x y", "read", "nroth"), told_failed("x y")
        ]  # fmt: skip
        assert stage.desire("x", client="d") == [told_failed("x", client="d")]
        stage.drop("x", client="d")
        assert stage.drop("x y") == [forget("y x"), forget_block("b")]
        assert stage.empty

    def test_what_depends_on_a_refused_block_fails_with_its_error(self, stage: Stage) -> None:
        a, b = block("a", "x", sites=("nowhere",)), block("b", "y", "x")
        assert stage.submit(b, a, wanted="y") == [
            unknown_site("x", "a", "nowhere"), run("north", b, Import("x", "", 0, failed=True))
        ]  # fmt: skip
        assert stage.failed("b", "y") == [release("north", "x"), told_failed("y")]

    def test_an_unknown_environment_fails_a_block_too(self, stage: Stage) -> None:
        b = block("b", "x", environment="torch")
        reason = "b: no site offers the environment 'torch'; environments are default"
        assert stage.submit(b, wanted="x") == [
            ev.FailKeys(("x",), "UnknownSiteError", reason), told_failed("x")
        ]  # fmt: skip

    def test_of_several_selectors_one_known_one_is_enough(self, stage: Stage) -> None:
        b = block("b", "x", sites=("west", "south"))
        assert stage.submit(b, wanted="x") == [run("south", b)]

    def test_one_may_ask_to_wait_for_a_site(self, stage: Stage) -> None:
        b = block("b", "x", sites=("disk=fast",))
        assert stage.submit(b, wanted="x", wait=True) == []
        west = hello("west", labels=(("disk", "fast"),))
        assert stage.join("west", west) == [run("west", b)]

    def test_one_may_ask_to_wait_for_an_environment(self, stage: Stage) -> None:
        b = block("b", "x", environment="torch")
        assert stage.submit(b, wanted="x", wait=True) == []
        assert stage.join("west", hello("west", environments=("default", "torch"))) == [run("west", b)]

    def test_before_any_site_joined_every_block_waits(self) -> None:
        stage, b = Stage(), block("b", "x", sites=("south",))
        assert stage.submit(b, wanted="x") == []
        assert stage.join("north") == []
        assert stage.join("south") == [run("south", b)]

    def test_resources_that_no_site_has_are_waited_for(self, stage: Stage) -> None:
        b = block("b", "x", resources=(("GPU", 2.0),))
        assert stage.submit(b, wanted="x") == []
        assert stage.join("small", hello("small", resources=(("GPU", 1.0),))) == []
        assert stage.join("large", hello("large", resources=(("GPU", 4.0),))) == [run("large", b)]


class TestWishes:
    def test_a_promised_key_is_told_when_its_graph_has_come_and_run(self, stage: Stage) -> None:
        b = block("b", "x")
        assert stage.desire("x", client="d") == []
        assert stage.submit(b, wanted="x") == [run("north", b)]
        assert stage.made("b", "x") == [told("x", client="d"), told("x")]

    def test_a_promise_that_is_not_kept_is_forgotten_when_released(self, stage: Stage) -> None:
        stage.desire("x")
        assert stage.drop("x") == [forget("x")]
        assert stage.empty

    def test_a_block_may_be_linked_to_a_promise(self, stage: Stage) -> None:
        b = block("b", "y", "x")
        stage.desire("x", client="d")
        assert stage.submit(b, wanted="y") == []
        assert stage.scatter("south", "x", client="d") == [told("x", client="d"), run("south", b)]

    def test_a_key_that_exists_is_told_at_once(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.made("b", "x")
        assert stage.desire("x", client="d") == [told("x", client="d")]
        assert stage.drop("x") == []
        assert stage.drop("x", client="d") == [release("north", "x"), forget("x"), forget_block("b")]

    def test_a_client_that_leaves_releases_what_only_it_wanted(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), block("b", "y"), wanted="x y")
        stage.desire("x", client="d")
        assert stage(ev.ClientLeft("c")) == [forget("y"), cancel("north", "b"), forget_block("b")]
        assert stage.made("a", "x") == [told("x", client="d")]
        assert stage(ev.ClientLeft("c")) == []
        assert stage.core.clients == {}

    def test_keys_belong_to_the_user_whose_block_or_data_they_are_whoever_named_them_before(self, stage: Stage) -> None:
        stage(ev.ClientJoined("d", "ben"))
        stage.desire("x", client="d")
        stage.scatter("north", "y", client="d")
        stage.submit(block("b", "x z"), wanted="z")
        assert [stage.key(name).owner for name in "xyz"] == ["ann", "ben", "ann"]


class TestFuturesOfTasks:
    """A task took a future out of a Variable or a Queue: its site is to have the key."""

    def needed(self, stage: Stage, site: str, *names: Key) -> Commands:
        return stage(ev.KeysNeeded(site, names))

    def test_a_key_that_is_elsewhere_is_copied_once(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        assert self.needed(stage, "south", "x") == [ev.TellSite("south", CopyKeys((Import("x", "north", 8),)))]
        assert self.needed(stage, "south", "x") == []
        assert stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False)) == []
        assert self.needed(stage, "south", "x") == []
        assert list(stage.key("x").holders) == ["north", "south"]

    def test_what_is_there_or_nowhere_is_not_copied(self, stage: Stage) -> None:
        stage.scatter("south", "x")
        stage.desire("y")
        assert self.needed(stage, "south", "x", "y", "unknown") == []

    def test_the_error_of_what_failed_elsewhere_is_brought(self, stage: Stage) -> None:
        stage.submit(block("b", "z", sites=("north",)), wanted="z")
        stage.failed("b", "z")
        error = Import("z", "", 0, failed=True)
        assert self.needed(stage, "south", "z") == [ev.TellSite("south", CopyKeys((error,)))]
        assert self.needed(stage, "north", "z") == []

    def test_a_copy_that_a_task_wants_stays(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        self.needed(stage, "south", "x")
        stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False))
        stage.desire("x", client="south/a task")
        stage.desire("x", client="d")
        assert stage.drop("x", client="d") == []
        assert stage.drop("x", client="south/a task") == [release("south", "x")]

    def test_a_site_that_is_gone_needs_nothing(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        assert self.needed(stage, "west", "x") == []


class TestScatter:
    def test_data_is_held_where_it_was_put_until_released(self, stage: Stage) -> None:
        assert stage.scatter("south", "x y") == [told("x y")]
        assert stage.drop("x y") == [release("south", "y x"), forget("y x")]
        assert stage.empty

    def test_a_promised_key_is_told_once(self, stage: Stage) -> None:
        stage.desire("x")
        assert stage.scatter("south", "x") == [told("x")]

    def test_a_block_that_would_make_only_that_is_forgotten(self, stage: Stage) -> None:
        stage.scatter("south", "x")
        assert stage.submit(block("b", "x"), wanted="x") == [forget_block("b"), told("x")]

    def test_a_block_that_could_make_it_too_does_not_live_for_it(self, stage: Stage) -> None:
        stage.scatter("south", "x")
        stage.submit(block("b", "x y"), wanted="y")
        assert stage.drop("y") == [forget("y"), cancel("north", "b"), forget_block("b")]

    def test_the_same_data_at_a_second_site_is_a_replica(self, stage: Stage) -> None:
        stage.scatter("south", "x")
        assert stage.scatter("north", "x") == []
        assert stage.leave("south") == []
        assert list(stage.key("x").holders) == ["north"]

    def test_data_that_is_lost_is_an_error(self, stage: Stage) -> None:
        stage.scatter("south", "x")
        assert stage.leave("south") == [
            lost_for_good("x", "south"), told_failed("x")
        ]  # fmt: skip

    def test_data_put_at_a_site_that_left_meanwhile_is_an_error(self, stage: Stage) -> None:
        stage.leave("south")
        assert stage.scatter("south", "x") == [
            told("x"), lost_for_good("x", "south"),
            told_failed("x"),
        ]  # fmt: skip


class TestImports:
    def test_the_answer_to_an_order_that_was_taken_back_says_nothing_of_the_next_one(self, stage: Stage) -> None:
        """South has released the first copy when it hears of the second order, and must still be able to get it."""
        stage.scatter("north", "x")
        stage(ev.KeysNeeded("south", ("x",)))
        first = stage.key("x").importing["south"]
        stage.desire("x", client="d")
        assert stage.drop("x", client="d") == [release("south", "x")]
        stage(ev.KeysNeeded("south", ("x",)))
        assert stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False, number=first)) == []
        assert list(stage.key("x").holders) == ["north"] and "south" in stage.key("x").importing
        assert stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False)) == []
        assert list(stage.key("x").holders) == ["north", "south"]


class TestFailures:
    def test_the_client_is_told_and_nothing_is_left_after_its_release(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        assert stage.failed("b", "x") == [told_failed("x")]
        assert stage.drop("x") == [release("north", "x"), forget("x"), forget_block("b")]
        assert stage.empty

    def test_a_dependent_at_the_same_site_needs_no_import_of_the_failure(self, stage: Stage) -> None:
        a, b = block("a", "x"), block("b", "y", "x")
        stage.submit(a, b, wanted="y")
        assert stage.failed("a", "x") == [run("north", b)]

    def test_a_site_that_forgot_a_failure_before_it_was_told_anew_is_to_release_it(self, stage: Stage) -> None:
        """Else it would keep what the hub thinks that it has not."""
        stage.submit(block("a", "x"), wanted="x")
        stage.failed("a", "x")
        assert stage.says("north", KeysLost(("x",))) == [release("north", "x")]
        assert stage.says("north", KeysLost(("x",))) == []

    def test_a_block_that_was_lost_for_want_of_a_failure_at_its_own_site_imports_it(self, stage: Stage) -> None:
        """A scheduler that could not open a graph says that its keys failed, and does not know them afterwards."""
        stage.submit(block("a", "x"), block("b", "y", "x", sites=("north",)), wanted="x y")
        stage.failed("a", "x")
        commands = stage.lost("b", "its input is unknown")
        assert release("north", "x") in commands
        (again,) = [each for each in commands if isinstance(each, ev.TellSite) and isinstance(each.message, RunBlock)]
        assert again.message.imports == (Import("x", "", 0, failed=True),)

    def test_a_dependent_elsewhere_imports_the_failure_and_is_not_waited_for(self, stage: Stage) -> None:
        a, b = block("a", "x", sites=("north",)), block("b", "y z", "x", sites=("south",))
        stage.submit(a, b, wanted="y z")
        assert stage.failed("a", "x") == [run("south", b, Import("x", "", 0, failed=True))]
        assert stage.failed("b", "y z") == [release("north", "x"), release("south", "x"), told_failed("y z")]

    def test_a_failure_outlives_the_site_that_reported_it(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.failed("b", "x")
        assert stage.leave("north") == []
        assert stage.desire("x", client="d") == [told_failed("x", client="d")]
        stage.drop("x", client="d")
        assert stage.drop("x") == [forget("x"), forget_block("b")]

    def test_some_outputs_of_a_block_may_fail_and_others_not(self, stage: Stage) -> None:
        stage.submit(block("b", "x y z"), wanted="x y")
        assert stage.failed("b", "x") == [told_failed("x")]
        assert stage.failed("b", "z") == [release("north", "z")]
        assert stage.made("b", "y") == [told("y")]

    def test_a_shared_key_fails_once(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), wanted="x")
        stage.submit(block("b", "y x", sites=("south",)), wanted="y")
        assert stage.failed("a", "x") == [told_failed("x")]
        assert stage.failed("b", "x") == []
        assert stage.drop("x") == [release("north", "x"), release("south", "x"), forget("x"), forget_block("a")]

    def test_a_key_that_was_made_does_not_fail_any_more(self, stage: Stage) -> None:
        stage.submit(block("a", "x"), wanted="x")
        stage.submit(block("b", "y x", sites=("south",)), wanted="y")
        stage.made("a", "x")
        assert stage.failed("b", "x") == [release("south", "x")]
        assert stage.key("x").failed_at == {}

    def test_a_key_that_failed_and_is_made_after_all_is_good_everywhere(self, stage: Stage) -> None:
        stage.submit(block("a", "x w"), wanted="x w")
        stage.submit(block("b", "y x", sites=("south",)), wanted="y")
        assert stage.failed("a", "x") == [told_failed("x")]
        assert stage.made("b", "x") == [release("north", "x"), told("x")]
        d = block("d", "z", "x", sites=("north",))
        assert stage.submit(d, wanted="z") == [run("north", d, Import("x", "south", 8))]

    def test_a_site_that_makes_what_it_is_yet_to_hear_the_error_of_is_to_forget_that_in_the_end(
        self, stage: Stage
    ) -> None:
        stage.submit(block("a", "x w"), wanted="w")
        stage.submit(block("b", "y x", sites=("south",)), block("d", "z", "x", sites=("south",)), wanted="y z")
        assert stage.failed("a", "x") == [run("south", stage.block("d").spec, Import("x", "", 0, failed=True))]
        assert stage.made("b", "x") == [release("north", "x")]
        assert release("south", "x") in stage.lost("b")
        assert stage.key("x").failed_at == {}


class TestTrouble:
    def test_a_block_given_up_by_its_site_is_placed_again(self, stage: Stage) -> None:
        b = block("b", "x y")
        stage.submit(b, wanted="x y")
        stage.made("b", "x")
        assert stage.lost("b") == [cancel("north", "b"), run("north", b, n=2)]
        assert stage.made("b", "y") == [told("y")]
        assert stage.made("b", "x") == [told("x")]

    def test_a_block_that_failed_more_than_once_rests_longer_each_time(self, stage: Stage) -> None:
        b = block("b", "x")
        stage.submit(b, wanted="x")
        assert stage.lost("b") == [cancel("north", "b"), run("north", b, n=2)]
        for n, rest_s in [(2, 0.1), (3, 0.2), (4, 0.4)]:
            assert stage.lost("b") == [cancel("north", "b", n=n)]
            assert stage.later(rest_s - 0.05) == []
            assert "rests" in stage.core.explain("x")["why"]
            assert stage.later(0.06) == [run("north", b, n=n + 1)]

    def test_after_too_many_attempts_all_its_keys_fail_for_one_reason(self, stage: Stage) -> None:
        b = block("b", "x y", label="read")
        stage.submit(b, wanted="x y")
        stage.lost("b")
        for n in range(2, 10):
            assert stage.lost("b") == [cancel("north", "b", n=n)]
            assert stage.later(5.0) == [run("north", b, n=n + 1)]
        stage.made("b", "x")
        reason = "read: given up after 10 attempts: its worker died"
        assert stage.lost("b") == [
            cancel("north", "b", n=10), ev.FailKeys(("x", "y"), "TransferError", reason), told_failed("x y")
        ]  # fmt: skip
        assert stage.drop("x y") == [forget("y x"), forget_block("b")]
        assert stage.empty

    def test_troubles_of_many_kinds_are_borne_longer_than_one(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        commands: Commands = []
        failures = 0
        while not any(isinstance(each, ev.FailKeys) for each in commands):
            failures += 1
            commands = stage.lost("b", f"input {failures % 8} was lost")
            stage.later(60.0)
        assert failures == MAX_FAILURES > 10

    def test_an_import_that_fails_gives_back_what_waits_for_it(self, stage: Stage) -> None:
        stage.join("west")
        stage.scatter("west", "x")
        b, d = (block(name, f"y{name}", "x", sites=("south",)) for name in "bd")
        e = block("e", "z", sites=("south",))
        stage.submit(b, d, e, wanted="yb yd z")
        again = Import("x", "west", 8)
        assert stage.says("south", ImportFailed("x", "west", "cut")) == [
            release("south", "x"), cancel("south", "b"), cancel("south", "d"),
            run("south", b, again, n=2), run("south", d, n=2),
        ]  # fmt: skip
        late = BlockLost("d", Attempt(0, 1), "an input is not here")
        assert stage.says("south", late) == [ev.DropReport("south", "d", Attempt(0, 1))]

    def test_an_import_that_nobody_asked_for_cannot_fail(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        assert stage.says("south", ImportFailed("x", "north", "cut")) == []
        assert stage.says("south", ImportFailed("y", "north", "cut")) == []
        assert stage.says("south", KeyImported("x", "north", 8, 0.1, relayed=False)) == []

    def test_reports_of_an_attempt_that_ended_are_dropped(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.lost("b")
        old, dropped = Attempt(0, 1), [ev.DropReport("north", "b", Attempt(0, 1))]
        assert stage.says("north", BlockStarted("b", old)) == dropped
        assert stage.says("north", BlockRecalled("b", old, given=True)) == dropped
        assert stage.says("north", KeysMade("b", old, (MadeKey("x", 8),))) == dropped
        assert stage.says("north", KeysFailed("b", old, ("x",))) == dropped
        assert stage.says("north", BlockLost("b", old, "late")) == dropped
        assert stage.made("b", "x") == [told("x")]

    def test_reports_of_another_epoch_or_an_unknown_block_are_dropped(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        other = Attempt(7, 1)
        assert stage.says("north", BlockStarted("b", other)) == [ev.DropReport("north", "b", other)]
        assert stage.says("north", BlockStarted("z", other)) == [ev.DropReport("north", "z", other)]

    def test_reports_after_the_end_are_dropped(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.made("b", "x")
        assert stage.made("b", "x") == [ev.DropReport("north", "b", Attempt(0, 1))]

    def test_a_site_that_is_gone_is_not_heard(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.leave("north")
        assert stage.says("north", KeysMade("b", Attempt(0, 1), (MadeKey("x", 8),))) == []

    def test_the_epoch_of_the_hub_is_in_every_attempt(self) -> None:
        stage = Stage()
        stage.core = HubCore(epoch=3)
        stage.join("north")
        stage.submit(block("b", "x"), wanted="x")
        assert stage.attempt("b") == Attempt(3, 1)


class TestWholeGraphs:
    def test_a_whole_graph_is_sent_at_once_however_busy_its_site_is(self, stage: Stage) -> None:
        busy = [block(f"b{n}", f"x{n}", prefixes=(("f", 100),), ntasks=100, sites=("north",)) for n in range(4)]
        stage.submit(*busy, wanted="x0 x1 x2 x3")
        assert not stage.core.sites["north"].has_room(0)
        whole = block("w", "y", kind=BlockKind.WHOLE, sites=("north",))
        assert stage.submit(whole, wanted="y", wait=True) == [run("north", whole)]

    def test_nor_is_it_held_back_by_what_came_before(self, stage: Stage) -> None:
        stage.leave("north")
        early = [block(f"b{n}", f"x{n}", priority=9, sites=("north",)) for n in range(20)]
        whole = block("w", "y", kind=BlockKind.WHOLE, sites=("north",))
        stage.submit(*early, whole, wanted="y " + " ".join(f"x{n}" for n in range(20)), wait=True)
        (first, *_) = stage.join("north")
        assert first == run("north", whole)


def test_the_hub_says_why_a_key_waits_through_its_core(stage: Stage) -> None:
    stage.desire("x")
    assert stage.core.explain("x")["why"] == "a client expects it, and no graph that makes it has arrived"


def test_workers_retries_and_priority_do_not_decide_which_sites_may_run_a_block(stage: Stage) -> None:
    b = block("b", "x", workers=("tcp://nowhere:1",), allow_other_workers=True, retries=3, priority=1)
    assert stage.submit(b, wanted="x") == [run("north", b)]
