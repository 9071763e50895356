"""The site's core: whole lists of commands for each event."""

from __future__ import annotations

import random
from typing import Any

import pytest

from daskfed.errors import IllegalTransition
from daskfed.messages import (
    Attempt,
    BlockKind,
    BlockLost,
    BlockRecalled,
    BlockSpec,
    BlockStarted,
    CancelBlock,
    CloseSite,
    Constraint,
    CopyKeys,
    Import,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    MadeKey,
    RecallBlock,
    ReleaseKeys,
    RunBlock,
)
from daskfed.site.core import FETCH_TRIES, SiteCore
from daskfed.site.events import (
    Command,
    DropBytes,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    ForgetPayload,
    KeysErred,
    KeysForgotten,
    KeysMissing,
    KeysReady,
    KeysScattered,
    Load,
    ReleaseAtScheduler,
    StopSite,
    SubmitBlock,
    SubmitImport,
    TellHub,
)
from daskfed.site.states import BLOCK_MOVES, KEY_MOVES, BlockPhase, KeyPhase, next_block_phase, next_key_phase

FIRST, SECOND = Attempt(1, 1), Attempt(1, 2)


class Site:
    """A core that is checked after every event."""

    def __init__(self, **options: Any) -> None:
        self.core = SiteCore(**options)

    def __call__(self, *events: Event) -> list[Command]:
        commands: list[Command] = []
        for event in events:
            commands += self.core.handle(event, now=0.0)
            self.core.check()
        return commands

    def phases(self) -> dict[Key, str]:
        return {key: state.phase.value for key, state in self.core.keys.items()}


@pytest.fixture
def site() -> Site:
    return Site()


def block(
    name: str, outputs: tuple[Key, ...], inputs: tuple[Key, ...] = (), *, ntasks: int = 1, **how: Any
) -> BlockSpec:
    return BlockSpec(
        id=name, client="c", owner="u", kind=BlockKind.GRAPH, inputs=inputs, outputs=outputs, ntasks=ntasks,
        prefixes=(), constraint=Constraint(**how),
    )  # fmt: skip


def run(spec: BlockSpec, *imports: Import, attempt: Attempt = FIRST, expected_s: float = 1.0) -> RunBlock:
    return RunBlock(spec, attempt, imports, expected_s)


def submitted(name: str, *outputs: Key, attempt: Attempt = FIRST) -> list[Command]:
    return [SubmitBlock(name, attempt, outputs), TellHub(BlockStarted(name, attempt))]


def made(name: str, *keys: Key, attempt: Attempt = FIRST, nbytes: int = 8) -> TellHub:
    return TellHub(KeysMade(name, attempt, tuple(MadeKey(key, nbytes) for key in keys)))


def ready(*keys: Key, nbytes: int = 8) -> KeysReady:
    return KeysReady(tuple(MadeKey(key, nbytes) for key in keys))


def arrived(key: Key, source: str = "north", nbytes: int = 100) -> Fetched:
    return Fetched(key, source, nbytes, seconds=0.5, relayed=False)


def imported(key: Key, source: str = "north", nbytes: int = 100) -> TellHub:
    return TellHub(KeyImported(key, source, nbytes, 0.5, False))


class TestBlocks:
    def test_a_block_without_inputs_is_submitted_at_once_and_each_output_is_reported_once(self, site: Site) -> None:
        assert site(run(block("b", ("x", "y")))) == submitted("b", "x", "y")
        assert site(ready("x")) == [made("b", "x")]
        assert site(ready("x")) == []
        assert site(ready("y", nbytes=16)) == [made("b", "y", nbytes=16)]
        assert site.core.blocks["b"].phase is BlockPhase.DONE
        assert site.core.holds("x") and not site.core.holds("z")

    def test_outputs_that_come_together_are_reported_together_per_block(self, site: Site) -> None:
        site(run(block("a", ("x", "y"))), run(block("b", ("z",))))
        assert site(ready("x", "z", "y")) == [made("a", "x", "y"), made("b", "z")]

    def test_the_same_attempt_again_is_ignored(self, site: Site) -> None:
        site(run(block("b", ("x",))))
        assert site(run(block("b", ("x",)))) == []

    def test_failed_outputs_are_reported_and_stay_until_released(self, site: Site) -> None:
        site(run(block("b", ("x", "y", "z"))))
        assert site(KeysErred(("x", "y"))) == [TellHub(KeysFailed("b", FIRST, ("x", "y")))]
        site(ready("z"))
        assert site.phases() == {"x": "failed", "y": "failed", "z": "held"}
        assert site(ReleaseKeys(("x", "y", "z"))) == [ReleaseAtScheduler(("x", "y", "z"))]
        assert site.core.blocks == {} and site.core.keys == {}

    def test_reports_of_keys_that_nobody_asked_for_are_ignored(self, site: Site) -> None:
        assert site(ready("x"), KeysErred(("x",)), KeysForgotten(("x",)), ReleaseKeys(("x",))) == []

    def test_a_block_whose_input_is_not_here_is_lost(self, site: Site) -> None:
        assert site(run(block("b", ("y",), ("x",)))) == [
            TellHub(KeysLost(("x",))),
            TellHub(BlockLost("b", FIRST, "its input 'x' is not here")),
            ForgetPayload("b", FIRST),
        ]
        assert site.core.blocks == {}

    def test_a_block_that_the_scheduler_refuses_is_lost(self, site: Site) -> None:
        site(run(block("b", ("x", "y"))))
        assert site(KeysForgotten(("x", "y"))) == [
            TellHub(BlockLost("b", FIRST, "'x': the site's scheduler has lost it")),
            ReleaseAtScheduler(("x", "y")),
        ]

    def test_blocks_that_share_an_output_are_joined(self, site: Site) -> None:
        site(run(block("a", ("x",))), run(block("b", ("x", "y"))))
        assert site(ready("x")) == [made("a", "x"), made("b", "x")]
        assert site(CancelBlock("a", FIRST)) == []
        assert site(CancelBlock("b", FIRST)) == [ReleaseAtScheduler(("x", "y"))]


class TestOrder:
    def test_the_scheduler_gets_little_and_the_rest_by_priority_then_arrival(self, site: Site) -> None:
        site(Load(0, threads=1, submitted=0))
        first = site(*(run(block(name, (name,), ntasks=10)) for name in "ab"))
        assert first == submitted("a", "a") + submitted("b", "b")
        assert site(*(run(block(name, (name,), ntasks=10, priority=p)) for name, p in (("c", -1), ("d", 0)))) == []
        assert site(ready("a")) == [made("a", "a"), *submitted("d", "d")]
        assert site(ready("b")) == [made("b", "b"), *submitted("c", "c")]

    def test_a_higher_priority_waits_only_for_its_like(self, site: Site) -> None:
        site(Load(0, threads=1, submitted=0), *(run(block(name, (name,), ntasks=10)) for name in "ab"))
        high = (run(block(name, (name,), ntasks=10, priority=5)) for name in "cde")
        assert site(*high) == submitted("c", "c") + submitted("d", "d")

    def test_the_count_of_the_scheduler_makes_room(self, site: Site) -> None:
        site(Load(0, threads=2, submitted=0), *(run(block(name, (name,), ntasks=10)) for name in "abc"))
        assert site(Load(12, threads=2, submitted=1)) == []  # plus ten of b, which it has not seen
        assert site(Load(12, threads=2, submitted=2)) == []
        assert site(Load(7, threads=2, submitted=2)) == submitted("c", "c")

    def test_short_blocks_are_submitted_well_ahead(self, site: Site) -> None:
        site(Load(0, threads=1, submitted=0))
        commands = site(*(run(block(str(i), (i,), ntasks=100), expected_s=0.01) for i in range(50)))
        assert sum(isinstance(command, SubmitBlock) for command in commands) == 20  # SECONDS_AHEAD


class TestRecall:
    def test_a_queued_block_is_given_back_and_a_submitted_one_is_not(self, site: Site) -> None:
        site(*(run(block(name, (name,), ntasks=100)) for name in "abc"))
        assert site(RecallBlock("c", FIRST)) == [
            ForgetPayload("c", FIRST),
            TellHub(BlockRecalled("c", FIRST, given=True)),
        ]
        assert site(RecallBlock("a", FIRST)) == [TellHub(BlockRecalled("a", FIRST, given=False))]
        assert site(RecallBlock("c", FIRST), RecallBlock("b", SECOND)) == []

    def test_a_recalled_block_is_not_submitted_later(self, site: Site) -> None:
        site(*(run(block(name, (name,), ntasks=100)) for name in "abc"), RecallBlock("c", FIRST))
        assert site(ready("a", "b")) == [made("a", "a"), made("b", "b")]

    def test_a_block_that_comes_back_is_submitted_once(self, site: Site) -> None:
        site(*(run(block(name, (name,), ntasks=100)) for name in "abc"), RecallBlock("c", FIRST))
        site(run(block("c", ("c",), ntasks=100), attempt=SECOND))
        assert site(ready("a", "b")) == [made("a", "a"), made("b", "b"), *submitted("c", "c", attempt=SECOND)]

    def test_the_import_of_a_recalled_block_goes_on(self, site: Site) -> None:
        site(run(block("b", ("y",), ("x",)), Import("x", "north", 100)), RecallBlock("b", FIRST))
        assert site(arrived("x"), ready("x")) == [SubmitImport("x", "north"), DropBytes("x"), imported("x")]

    def test_what_an_earlier_attempt_made_stays_when_a_later_one_is_recalled(self, site: Site) -> None:
        site(run(block("b", ("x",))), ready("x"), *(run(block(name, (name,), ntasks=9)) for name in "cd"))
        site(run(block("b", ("x", "y")), attempt=SECOND), RecallBlock("b", SECOND))
        assert site.core.holds("x")
        assert site(CancelBlock("b", SECOND)) == [ReleaseAtScheduler(("x",))]


class TestCancel:
    def test_a_cancelled_block_takes_all_its_outputs_with_it(self, site: Site) -> None:
        site(run(block("b", ("x", "y"))), ready("x"))
        assert site(CancelBlock("b", FIRST)) == [ReleaseAtScheduler(("x", "y"))]
        assert site.core.keys == {} and site.core.blocks == {}

    def test_so_does_one_that_was_done_here_before_the_hub_knew(self, site: Site) -> None:
        site(run(block("b", ("x",))), ready("x"))
        assert site(CancelBlock("b", FIRST)) == [ReleaseAtScheduler(("x",))]

    def test_failures_that_go_with_it_are_told(self, site: Site) -> None:
        site(run(block("b", ("x", "y"))), KeysErred(("x",)))
        assert site(CancelBlock("b", FIRST)) == [TellHub(KeysLost(("x",))), ReleaseAtScheduler(("x", "y"))]

    def test_an_unsubmitted_block_only_loses_its_payload(self, site: Site) -> None:
        site(*(run(block(name, (name,), ntasks=100)) for name in "abc"))
        assert site(CancelBlock("c", FIRST)) == [ForgetPayload("c", FIRST)]

    def test_an_old_attempt_is_not_meant(self, site: Site) -> None:
        site(run(block("b", ("x",)), attempt=SECOND))
        assert site(CancelBlock("b", FIRST), RecallBlock("b", FIRST)) == []

    def test_a_new_attempt_ends_the_old_one(self, site: Site) -> None:
        site(run(block("b", ("x",))))
        assert site(run(block("b", ("x",)), attempt=SECOND)) == [
            ReleaseAtScheduler(("x",)),
            *submitted("b", "x", attempt=SECOND),
        ]
        assert site(ready("x")) == [made("b", "x", attempt=SECOND)]

    def test_a_block_that_runs_again_reports_what_is_still_here(self, site: Site) -> None:
        site(run(block("b", ("x", "y"))), ready("x", "y"), KeysForgotten(("y",)))
        assert site(run(block("b", ("x", "y")), attempt=SECOND)) == submitted("b", "x", "y", attempt=SECOND)
        assert site(ready("x"), ready("y")) == [made("b", "x", attempt=SECOND), made("b", "y", attempt=SECOND)]

    def test_a_failed_output_is_released_before_it_is_made_again(self, site: Site) -> None:
        site(run(block("b", ("x", "y"))), KeysErred(("x",)), ready("y"))
        assert site(run(block("b", ("x", "y")), attempt=SECOND)) == [
            ReleaseAtScheduler(("x",)),
            *submitted("b", "x", "y", attempt=SECOND),
        ]


class TestRelease:
    def test_a_key_that_an_unfinished_block_needs_stays_until_it_is_done(self, site: Site) -> None:
        site(run(block("a", ("x",))), ready("x"), run(block("b", ("y",), ("x",))))
        assert site(ReleaseKeys(("x",))) == []
        assert site(ready("y")) == [made("b", "y"), ReleaseAtScheduler(("x",))]

    def test_an_output_that_is_still_open_is_reported_all_the_same(self, site: Site) -> None:
        site(run(block("b", ("x",))))
        assert site(ReleaseKeys(("x",))) == []
        assert site(ready("x")) == [made("b", "x")]
        assert site(ReleaseKeys(("x",))) == [ReleaseAtScheduler(("x",))]

    def test_what_was_reported_after_the_hub_sent_the_release_stays(self, site: Site) -> None:
        site(run(block("a", ("x",))), ready("x"), run(block("b", ("x",))), ready("x"))  # two reports of x
        assert site(ReleaseKeys(("x",), seen=1)) == []
        assert site(ReleaseKeys(("x",), seen=2)) == [ReleaseAtScheduler(("x",))]

    def test_a_key_that_is_imported_again_while_it_is_still_here_is_announced_at_once(self, site: Site) -> None:
        site(run(block("a", ("x",))), ready("x"), run(block("b", ("y",), ("x",))), ReleaseKeys(("x",)))
        assert site(CopyKeys((Import("x", "north", 8),))) == [TellHub(KeyImported("x", "", 8, 0.0, False))]
        assert site(ready("y")) == [made("b", "y")]

    def test_release_and_import_again_releases_first(self, site: Site) -> None:
        site(CopyKeys((Import("x", "north", 100),)), arrived("x"), ready("x"))
        assert site(ReleaseKeys(("x",)), CopyKeys((Import("x", "south", 100),))) == [
            ReleaseAtScheduler(("x",)),
            Fetch("x", "south", 100),
        ]
        assert site(arrived("x", "south")) == [SubmitImport("x", "south")]


class TestImports:
    def test_a_block_waits_for_its_imports_and_is_submitted_behind_them(self, site: Site) -> None:
        wanted = (Import("x", "north", 100), Import("y", "north", 50))
        assert site(run(block("b", ("z",), ("x", "y")), *wanted)) == [Fetch("x", "north", 100), Fetch("y", "north", 50)]
        assert site(arrived("x")) == [SubmitImport("x", "north")]
        assert site(arrived("y")) == [SubmitImport("y", "north"), *submitted("b", "z")]
        assert site(ready("x")) == [DropBytes("x"), imported("x")]
        assert site.phases() == {"x": "held", "y": "landing", "z": "making"}

    def test_a_key_is_fetched_once_for_several_blocks(self, site: Site) -> None:
        wanted = Import("x", "north", 100)
        assert site(run(block("a", ("y",), ("x",)), wanted)) == [Fetch("x", "north", 100)]
        assert site(run(block("b", ("z",), ("x",)))) == []
        assert site(arrived("x")) == [SubmitImport("x", "north"), *submitted("a", "y"), *submitted("b", "z")]

    def test_a_key_that_a_block_here_makes_is_not_fetched(self, site: Site) -> None:
        site(run(block("a", ("x",))))
        assert site(run(block("b", ("y",), ("x",)), Import("x", "north", 100))) == submitted("b", "y")
        assert site(ready("x")) == [TellHub(KeyImported("x", "", 8, 0.0, False)), made("a", "x")]

    def test_a_key_on_its_way_that_a_block_here_makes_is_joined(self, site: Site) -> None:
        site(run(block("a", ("y",), ("x",)), Import("x", "north", 100)))
        assert site(run(block("b", ("x",)))) == [*submitted("b", "x"), *submitted("a", "y")]
        assert site(arrived("x")) == [DropBytes("x")]
        assert site(ready("x")) == [TellHub(KeyImported("x", "", 8, 0.0, False)), made("b", "x")]

    def test_a_joined_key_that_fails_answers_the_import(self, site: Site) -> None:
        site(run(block("a", ("x",))), CopyKeys((Import("x", "north", 100),)))
        reason = "a block at this site was to make it, and failed"
        assert site(KeysErred(("x",))) == [
            TellHub(ImportFailed("x", "north", reason)),
            TellHub(KeysFailed("a", FIRST, ("x",))),
        ]

    def test_a_failed_input_comes_as_a_task_that_raises(self, site: Site) -> None:
        spec = block("b", ("y",), ("x",))
        failed = Import("x", "", 0, failed=True)
        assert site(run(spec, failed)) == [SubmitImport("x", "", failed=True), *submitted("b", "y")]
        assert site(KeysErred(("x",))) == []
        assert site(KeysErred(("y",))) == [TellHub(KeysFailed("b", FIRST, ("y",)))]
        assert site(ReleaseKeys(("x", "y"))) == [ReleaseAtScheduler(("x", "y"))]

    def test_a_key_whose_error_was_brought_here_and_that_is_made_here_next_is_the_blocks_alone(
        self, site: Site
    ) -> None:
        site(run(block("b", ("y",), ("x",)), Import("x", "", 0, failed=True)), KeysErred(("x",)), KeysErred(("y",)))
        site(run(block("a", ("x",))), ready("x"))
        assert site.core.holds("x")
        site(CancelBlock("b", FIRST))
        assert ReleaseAtScheduler(("x",)) in site(CancelBlock("a", FIRST)) and "x" not in site.phases()

    def test_a_key_that_is_made_here_is_not_kept_for_its_error_that_comes(self, site: Site) -> None:
        site(run(block("a", ("x",))), run(block("b", ("y",), ("x",)), Import("x", "", 0, failed=True)))
        site(CancelBlock("b", FIRST))
        assert site(CancelBlock("a", FIRST)) == [ReleaseAtScheduler(("x",))] and site.phases() == {}

    def test_a_failed_key_that_another_block_makes_anew_is_that_blocks_alone(self, site: Site) -> None:
        site(run(block("a", ("x",))), KeysErred(("x",)), run(block("b", ("x", "y"))))
        assert [each.block for each in site.core.holdings().blocks] == ["b"]
        assert site(CancelBlock("b", FIRST)) == [ReleaseAtScheduler(("x", "y"))] and site.phases() == {}

    def test_the_byte_budget_holds_imports_back(self) -> None:
        site = Site(import_budget=250_000)
        wanted = tuple(Import(key, "north", 100_000) for key in "abc")
        assert site(CopyKeys(wanted)) == [Fetch("a", "north", 100_000), Fetch("b", "north", 100_000)]
        assert site(arrived("a", nbytes=100_000)) == [SubmitImport("a", "north")]  # still in memory until it landed
        assert site(ready("a"))[-1] == Fetch("c", "north", 100_000)

    def test_an_import_larger_than_the_budget_goes_alone(self) -> None:
        site = Site(import_budget=1000)
        wanted = (Import("a", "north", 10**9), Import("b", "north", 10**9))
        assert site(CopyKeys(wanted)) == [Fetch("a", "north", 10**9)]
        assert site(FetchFailed("a", "north", "gone", missing=True)) == [
            TellHub(ImportFailed("a", "north", "gone")),
            Fetch("b", "north", 10**9),
        ]

    def test_a_failed_fetch_gives_back_the_blocks_that_wait_for_it(self, site: Site) -> None:
        site(run(block("b", ("y",), ("x",)), Import("x", "north", 100)))
        for _ in range(FETCH_TRIES - 1):
            assert site(FetchFailed("x", "north", "no route")) == [Fetch("x", "north", 100)]
        assert site(FetchFailed("x", "north", "no route")) == [
            TellHub(ImportFailed("x", "north", "no route")),
            TellHub(BlockLost("b", FIRST, "'x': no route")),
            ForgetPayload("b", FIRST),
        ]
        assert site(ReleaseKeys(("x",)), CancelBlock("b", FIRST)) == []

    def test_a_fetch_that_failed_at_a_former_source_is_made_at_the_new_one(self, site: Site) -> None:
        site(CopyKeys((Import("x", "north", 100),)), ReleaseKeys(("x",)))
        assert site(CopyKeys((Import("x", "east", 100),))) == []  # the first fetch is still on its way
        assert site(FetchFailed("x", "north", "released")) == [Fetch("x", "east", 100)]
        assert site(arrived("x", "east")) == [SubmitImport("x", "east")]

    def test_bytes_of_a_key_that_was_released_meanwhile_are_dropped(self, site: Site) -> None:
        site(CopyKeys((Import("x", "north", 100),)), ReleaseKeys(("x",)))
        assert site(arrived("x")) == [DropBytes("x")]
        site(CopyKeys((Import("x", "north", 100),)), ReleaseKeys(("x",)))
        assert site(FetchFailed("x", "north", "gone")) == []

    def test_a_landing_key_that_is_released_leaves_the_scheduler_and_the_memory(self, site: Site) -> None:
        site(CopyKeys((Import("x", "north", 100),)), arrived("x"))
        assert site(ReleaseKeys(("x",))) == [DropBytes("x"), ReleaseAtScheduler(("x",))]

    def test_a_key_that_cannot_reach_a_worker_is_no_fault_of_the_tasks(self, site: Site) -> None:
        site(run(block("b", ("y",), ("x",)), Import("x", "north", 100)), arrived("x"))
        reason = "it was lost and could not be brought in or made again"
        assert site(KeysErred(("x",), transfer=True), KeysErred(("y",), transfer=True)) == [
            TellHub(ImportFailed("x", "north", reason)),
            DropBytes("x"),
            TellHub(BlockLost("b", FIRST, f"'x': {reason}")),
            ReleaseAtScheduler(("x", "y")),
        ]

    def test_an_output_that_failed_for_want_of_an_import_loses_its_block(self, site: Site) -> None:
        site(run(block("b", ("y", "z"))))
        reason = "it was lost and could not be brought in or made again"
        assert site(KeysErred(("y", "z"), transfer=True)) == [
            TellHub(BlockLost("b", FIRST, f"'y': {reason}")),
            ReleaseAtScheduler(("y", "z")),
        ]

    def test_a_value_that_cannot_be_opened_here_fails_what_uses_it(self, site: Site) -> None:
        site(run(block("b", ("y",), ("x",)), Import("x", "north", 100)), arrived("x"))
        assert site(KeysErred(("x",))) == [DropBytes("x")]
        assert site(KeysErred(("y",))) == [TellHub(KeysFailed("b", FIRST, ("y",)))]

    def test_one_that_cannot_be_opened_is_answered_for_when_it_is_made_here(self, site: Site) -> None:
        """Else the hub would believe for ever that it is on its way, and send blocks here that need it."""
        site(CopyKeys((Import("x", "north", 100, number=7),)), arrived("x"), KeysErred(("x",)))
        answer = TellHub(ImportFailed("x", "north", "its value could not be opened here", number=7))
        assert site(run(block("b", ("x",)))) == [answer, ReleaseAtScheduler(("x",)), *submitted("b", "x")]
        assert site.core.holdings().coming == ()
        assert site(CancelBlock("b", FIRST)) == [ReleaseAtScheduler(("x",))]

    def test_one_that_cannot_be_opened_is_answered_for_when_the_scheduler_forgets_it(self, site: Site) -> None:
        site(CopyKeys((Import("x", "north", 100, number=7),)), arrived("x"), KeysErred(("x",)))
        answer = TellHub(ImportFailed("x", "north", "its value could not be opened here", number=7))
        assert site(KeysForgotten(("x",))) == [answer, ReleaseAtScheduler(("x",))]

    def test_a_failure_that_exists_elsewhere_now_is_brought_in_afresh(self, site: Site) -> None:
        site(run(block("b", ("x",))), KeysErred(("x",)))
        assert site(CopyKeys((Import("x", "north", 100),))) == [Fetch("x", "north", 100), ReleaseAtScheduler(("x",))]


class TestLosses:
    def test_a_held_key_that_is_gone_is_told_and_its_users_are_given_back(self, site: Site) -> None:
        site(run(block("a", ("x",))), ready("x"), run(block("b", ("y",), ("x",))))
        assert site(KeysForgotten(("x",))) == [
            TellHub(KeysLost(("x",))),
            TellHub(BlockLost("b", FIRST, "'x': the site's scheduler has lost it")),
            ReleaseAtScheduler(("x", "y")),
        ]
        assert site.core.blocks == {}

    def test_a_held_key_that_no_worker_has_for_a_while_is_given_up(self, site: Site) -> None:
        site(run(block("a", ("x", "y"))), ready("x"))
        assert site(KeysMissing(("x",))) == [TellHub(KeysLost(("x",))), ReleaseAtScheduler(("x",))]
        assert site.phases() == {"y": "making"}

    def test_a_hub_that_counts_on_a_key_which_is_not_here_is_told(self, site: Site) -> None:
        site(run(block("a", ("x", "y"))), KeysErred(("y",)))
        assert site(KeysMissing(("x", "y", "unknown"))) == [TellHub(KeysLost(("x",))), TellHub(KeysLost(("unknown",)))]
        assert site.phases() == {"x": "making", "y": "failed"}

    def test_a_failure_that_an_import_has_overwritten_is_forgotten(self, site: Site) -> None:
        """Dask has one error for a task: the last one, though that was the fault of no task."""
        site(run(block("a", ("x",))), KeysErred(("x",)), run(block("b", ("y",), ("x",))))
        assert site(KeysErred(("x", "y"), transfer=True)) == [
            TellHub(KeysLost(("x",))),
            TellHub(BlockLost("b", FIRST, "'x': it was lost and could not be brought in or made again")),
            ReleaseAtScheduler(("x", "y")),
        ]
        assert site.core.keys == {}

    def test_a_held_key_that_could_not_be_made_again_is_lost_not_failed(self, site: Site) -> None:
        site(run(block("a", ("x",))), ready("x"))
        assert site(KeysErred(("x",))) == [TellHub(KeysLost(("x",))), ReleaseAtScheduler(("x",))]

    def test_scattered_data_is_held_until_released(self, site: Site) -> None:
        assert site(KeysScattered((MadeKey("x", 8),))) == []
        assert site.core.holds("x")
        assert site(run(block("b", ("y",), ("x",)))) == submitted("b", "y")
        assert site(ready("y"), ReleaseKeys(("x",))) == [made("b", "y"), ReleaseAtScheduler(("x",))]

    def test_closing_releases_everything_and_ends(self, site: Site) -> None:
        site(run(block("a", ("x",))), ready("x"), CopyKeys((Import("y", "north", 100),)))
        assert site(CloseSite("the federation ends")) == [StopSite("the federation ends"), ReleaseAtScheduler(("x",))]
        assert site(run(block("b", ("z",))), arrived("y")) == []


class TestTables:
    def test_a_move_that_is_not_in_a_table_names_who_and_what(self) -> None:
        with pytest.raises(IllegalTransition, match="key 'x' is held: it cannot 'fetch'"):
            next_key_phase(KeyPhase.HELD, "fetch", "x")
        with pytest.raises(IllegalTransition, match="block 'b' is done: it cannot 'submit'"):
            next_block_phase(BlockPhase.DONE, "submit", "b")

    def test_an_illegal_move_tells_the_story(self, site: Site) -> None:
        site(run(block("b", ("x",))), ready("x"))
        with pytest.raises(IllegalTransition, match=r"its story: \['make', 'ready'\]"):
            site.core._move_key(site.core.keys["x"], "fetched")

    def test_random_histories_keep_the_invariants_and_take_every_move(self) -> None:
        taken: set[tuple[Any, str]] = set()
        for seed in range(150):
            taken |= random_history(seed)
        missing = {*KEY_MOVES, *BLOCK_MOVES} - taken
        assert not missing


def random_history(seed: int) -> set[tuple[Any, str]]:
    """Run 200 random events, legal but otherwise without sense, and return the moves that were taken."""
    rng, site = random.Random(seed), Recorder(import_budget=300_000)
    keys: list[Key] = [f"k{i}" for i in range(6)]
    for n in range(200):
        site(random_event(rng, keys, Attempt(1, n), site))
    return site.taken


class Recorder(Site):
    """Remembers the moves that its core made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.taken: set[tuple[Any, str]] = set()
        self.fetching: dict[Key, str] = {}
        for kind in ("_move_key", "_move_block"):
            setattr(self.core, kind, self._recording(getattr(self.core, kind)))

    def _recording(self, move_it: Any) -> Any:
        def recording(state: Any, move: str) -> None:
            self.taken.add((state.phase, move))
            move_it(state, move)

        return recording

    def __call__(self, *events: Event) -> list[Command]:
        for event in events:
            if isinstance(event, Fetched | FetchFailed):
                del self.fetching[event.key]
        commands = super().__call__(*events)
        for command in commands:
            if isinstance(command, Fetch):
                assert command.key not in self.fetching, "fetched twice at once"
                self.fetching[command.key] = command.source
        return commands


def random_event(rng: random.Random, keys: list[Key], attempt: Attempt, site: Recorder) -> Event:
    core, key = site.core, rng.choice(keys)
    some = tuple(rng.sample(keys, rng.randint(1, 2)))
    blocks = [*core.blocks.values()]
    kinds = ["run", "run", "ready", "ready", "erred", "lost", "release", "copy", "scatter", "load"]
    kinds += ["recall", "cancel"] * bool(blocks) + ["arrive"] * 3 * bool(site.fetching)
    match rng.choice(kinds):
        case "run":
            return random_run(rng, keys, attempt, core)
        case "ready":
            return ready(*some)
        case "erred":
            return KeysErred(some, transfer=rng.random() < 0.5)
        case "lost":
            return KeysForgotten((key,))
        case "release":
            return ReleaseKeys(some)
        case "copy":
            return CopyKeys((Import(key, rng.choice(["north", "east"]), 100_000),))
        case "scatter":
            return KeysScattered((MadeKey(key, 8),) if key not in core.keys else ())
        case "load":
            return Load(rng.randint(0, 10), rng.randint(0, 2), core.runway.submitted - rng.randint(0, 1))
        case "arrive":
            key, source = rng.choice([*site.fetching.items()])
            return arrived(key, source, 100_000) if rng.random() < 0.7 else FetchFailed(key, source, "bad luck")
        case other:
            chosen = rng.choice(blocks)
            return (RecallBlock if other == "recall" else CancelBlock)(chosen.spec.id, chosen.attempt)


def random_run(rng: random.Random, keys: list[Key], attempt: Attempt, core: SiteCore) -> RunBlock:
    chosen = rng.sample(keys, 3)
    inputs = tuple(chosen[: rng.randint(0, 2)])
    imports = tuple(
        Import(key, "north", 100_000, failed=rng.random() < 0.2)
        for key in inputs
        if key not in core.keys or rng.random() < 0.2
    )
    return run(block(f"b{rng.randint(0, 9)}", (chosen[2],), inputs, ntasks=9), *imports, attempt=attempt)
