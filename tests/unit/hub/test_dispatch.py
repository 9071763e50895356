"""Which block goes where, and when: candidates, late binding, recalls, and sites that leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from daskfed.hub import events as ev
from daskfed.hub.dispatch import LEAST_LEFT, LOOKAHEAD, matches, meets, unmet
from daskfed.hub.estimates import LANDING_S
from daskfed.hub.placement import Candidate, RoundRobin
from daskfed.messages import (
    BlockKind,
    BlockSpec,
    CloseSite,
    Constraint,
    CopyKeys,
    Import,
    ImportFailed,
    KeyImported,
    Learned,
    RunBlock,
)
from tests.unit.hub.builders import (
    Commands,
    Stage,
    block,
    forget,
    hello,
    recall,
    release,
    run,
    status,
    told,
)

SECOND = (("f", 10),)  # prefixes of a block that takes a second: 0.1 s are reckoned for a task that never ran


class Chooser:
    """A policy that prefers one site and keeps what it was shown."""

    def __init__(self, favourite: str) -> None:
        self.favourite = favourite
        self.shown: list[list[Candidate]] = []

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return the index of the favourite."""
        self.shown.append(list(candidates))
        return [candidate.site for candidate in candidates].index(self.favourite)


def long(name: str, output: str = "", needs: str = "", **constraint: Any) -> BlockSpec:
    """Return a block that is expected to take a second of one thread."""
    return block(name, output or f"x{name}", needs, ntasks=10, prefixes=SECOND, **constraint)


def outputs(blocks: Sequence[BlockSpec]) -> str:
    return " ".join(str(key) for spec in blocks for key in spec.outputs)


def sent(commands: Commands) -> list[tuple[str, str]]:
    """Return (site, block) of what is sent."""
    orders = [(c.site, c.message) for c in commands if isinstance(c, ev.TellSite)]
    return [(site, order.block.id) for site, order in orders if isinstance(order, RunBlock)]


def copy(site: str, *imports: Import) -> ev.TellSite:
    return ev.TellSite(site, CopyKeys(imports))


def close(site: str) -> ev.TellSite:
    return ev.TellSite(site, CloseSite("drained"))


def imported(key: str, source: str, nbytes: int = 8, seconds: float = 0.1) -> KeyImported:
    return KeyImported(key, source, nbytes, seconds, relayed=False)


class TestCandidates:
    def test_all_that_sites_report_reaches_the_policy(self) -> None:
        policy = Chooser("south")
        stage = Stage(policy=policy)
        cold = (("default", 3.0), ("torch", 30.0))
        stage.join("north", threads=4, round_trip_s=0.1, queue_wait_s=60.0, cold_start_s=cold, walltime_left_s=600.0)
        stage.join("south", threads=0)
        stage.scatter("south", "a", nbytes=4 * 10**6)
        b = long("b", needs="a")
        assert stage.submit(b, wanted="xb") == [run("south", b, expected_s=1.0)]
        assert policy.shown == [
            [
                Candidate(
                    "north", threads=4, backlog_s=0.0, bring_nbytes=4 * 10**6, bring_s=0.05 + LANDING_S / 4,
                    run_s=1.0, guessed=True, round_trip_s=0.1, cold_start_s=3.0, queue_wait_s=60.0,
                    walltime_left_s=600.0,
                ),
                Candidate("south", threads=0, backlog_s=0.0, bring_nbytes=0, bring_s=0.0, run_s=1.0, guessed=True),
            ]
        ]  # fmt: skip

    def test_the_cold_start_is_that_of_the_environment_of_the_block(self) -> None:
        policy = Chooser("north")
        stage = Stage(policy=policy)
        for site in ("north", "south"):
            both = hello(site, environments=("default", "torch"))
            stage.join(site, both, cold_start_s=(("default", 3.0), ("torch", 30.0)))
        stage.submit(block("b", "x", environment="torch"), block("d", "y"), wanted="x y")
        assert [shown[0].cold_start_s for shown in policy.shown] == [30.0, 3.0]

    def test_what_is_on_its_way_or_failed_need_not_be_brought(self) -> None:
        policy = Chooser("south")
        stage = Stage("north", "south", policy=policy)
        stage.scatter("north", "a", nbytes=10**6)
        stage.submit(block("f", "bad", sites=("north",)), wanted="bad")
        stage.failed("f", "bad")
        stage.submit(block("b", "x", "a bad"), block("d", "y", "a bad"), wanted="x y")
        brought = [[(c.site, c.bring_nbytes) for c in shown] for shown in policy.shown]
        assert brought == [[("north", 0), ("south", 10**6)], [("north", 0), ("south", 0)]]

    def test_the_backlog_grows_with_what_is_placed_and_shrinks_with_what_ends(self) -> None:
        policy = Chooser("north")
        stage = Stage("north", "south", policy=policy)
        stage.submit(long("b"), long("d"), wanted="xb xd")
        assert stage.core.sites["north"].backlog_s == 2.0
        stage.made("b", "xb")
        assert stage.core.sites["north"].backlog_s == 1.0
        stage.drop("xd")
        assert stage.core.sites["north"].backlog_s == 0.0
        assert [shown[0].backlog_s for shown in policy.shown] == [0.0, 1.0]

    def test_what_was_probably_done_of_a_block_does_not_count(self) -> None:
        stage = Stage("north", threads=1)
        stage.later(7)
        stage.submit(long("b"), long("d"), wanted="xb xd")
        north, left = stage.core.sites["north"], []
        for seconds in (0.0, 0.5, 0.25):
            stage.later(seconds)
            left.append(north.left_s(stage.now))
        assert left == [2.0, 1.5, 1.25]
        stage.made("b", "xb")
        assert north.left_s(stage.now) == 1.0
        stage.later(60)
        assert north.left_s(stage.now) == LEAST_LEFT

    def test_a_policy_is_not_asked_where_there_is_no_choice(self) -> None:
        policy = Chooser("north")
        stage = Stage("north", "south", policy=policy)
        b = block("b", "x", sites=("south",))
        assert stage.submit(b, wanted="x") == [run("south", b)]
        stage.drain("south")
        d = block("d", "y")
        assert stage.submit(d, wanted="y") == [run("north", d)]
        assert policy.shown == []

    def test_sites_that_may_not_run_a_block_are_not_shown(self) -> None:
        policy = Chooser("west")
        stage = Stage("north", "south", "west", policy=policy)
        stage.submit(block("b", "x", sites=("north", "west")), wanted="x")
        assert [[c.site for c in shown] for shown in policy.shown] == [["north", "west"]]

    def test_a_block_goes_near_its_data_and_does_not_hold_up_what_belongs_elsewhere(self) -> None:
        stage = Stage("north")
        many = [long(f"n{n}", near=("north",)) for n in range(20)]
        other = [long(f"s{n}", near=("in=south", "west")) for n in range(2)]
        stage.join("south", hello("south", labels=(("in", "south"),)))
        assert sorted(sent(stage.submit(*many, *other, wanted=outputs([*many, *other])))) == [
            ("north", "n0"), ("north", "n1"), ("south", "s0"), ("south", "s1")
        ]  # fmt: skip

    def test_round_robin_takes_turns(self) -> None:
        stage = Stage("north", "south", policy=RoundRobin())
        blocks = [block(f"b{n}", f"x{n}") for n in range(4)]
        commands = stage.submit(*blocks, wanted=outputs(blocks))
        assert sent(commands) == [("south", "b0"), ("north", "b1"), ("south", "b2"), ("north", "b3")]

    def test_a_key_is_brought_from_where_it_comes_soonest(self) -> None:
        stage = Stage("near", "far", "here")
        big = 10**8
        stage.scatter("far", "a p q", nbytes=big)
        stage.scatter("near", "a r", nbytes=big)
        stage.submit(block("warm", "w", "q r", sites=("here",)), wanted="w")
        stage.says("here", imported("q", "far", nbytes=big, seconds=10.0))
        stage.says("here", imported("r", "near", nbytes=big, seconds=0.1))
        b = block("b", "x", "a", sites=("here",))
        assert stage.submit(b, wanted="x") == [run("here", b, Import("a", "near", big))]


class TestLateBinding:
    def test_a_site_gets_two_long_blocks_and_the_next_when_one_ends(self) -> None:
        stage, blocks = Stage("north"), [long(name) for name in "abde"]
        a, b, d, e = blocks
        assert stage.submit(*blocks, wanted=outputs(blocks)) == [
            run("north", a, expected_s=1.0), run("north", b, expected_s=1.0)
        ]  # fmt: skip
        assert stage.made("a", "xa") == [told("xa"), run("north", d, expected_s=1.0)]

    def test_short_blocks_are_sent_for_half_a_second_ahead(self) -> None:
        stage = Stage("north")
        blocks = [block(f"b{n}", f"x{n}", ntasks=2, prefixes=(("f", 2),)) for n in range(5)]
        assert len(sent(stage.submit(*blocks, wanted=outputs(blocks)))) == 3  # 0.2 s each

    def test_and_for_longer_where_the_round_trip_is_long(self) -> None:
        stage = Stage("north", round_trip_s=1.0)
        blocks = [long(f"b{n}") for n in range(5)]
        assert len(sent(stage.submit(*blocks, wanted=outputs(blocks)))) == 3  # 1 s each, 2.5 s ahead

    def test_every_thread_has_some_tasks_ahead_however_long_they_are(self) -> None:
        stage = Stage("north", threads=4)
        blocks = [block(f"b{n}", f"x{n}", ntasks=2, prefixes=(("f", 100),)) for n in range(10)]
        assert len(sent(stage.submit(*blocks, wanted=outputs(blocks)))) == 8  # 16 tasks for 4 threads

    def test_a_site_without_workers_yet_gets_work_too(self) -> None:
        stage = Stage("north", threads=0)
        blocks = [long(name) for name in "abd"]
        assert len(sent(stage.submit(*blocks, wanted=outputs(blocks)))) == 2

    def test_a_site_that_has_not_reported_gets_none(self) -> None:
        stage, b = Stage(), block("b", "x")
        stage(ev.SiteJoined(hello("north")))
        assert stage.submit(b, wanted="x") == []
        assert stage(ev.Tick()) == []
        assert stage(ev.FromSite("north", status())) == [run("north", b)]

    def test_a_block_waits_for_the_best_site_and_others_pass_it(self) -> None:
        stage = Stage("north", "south")
        stage.scatter("north", "a", nbytes=10**10)  # 100 s away from south
        local = [long(f"n{n}", needs="a") for n in range(4)]
        free = long("free")
        commands = stage.submit(*local, free, wanted=outputs([*local, free]))
        assert sent(commands) == [("north", "n0"), ("north", "n1"), ("south", "free")]
        assert sent(stage.made("n0", "xn0")) == [("north", "n2")]

    def test_only_so_many_blocks_are_looked_at_beyond_the_first(self) -> None:
        stage = Stage("north", "south")
        stage.scatter("north", "a", nbytes=10**10)
        local = [long(f"n{n}", needs="a") for n in range(2 + LOOKAHEAD)]
        free = long("free")
        commands = stage.submit(*local, free, wanted=outputs([*local, free]))
        assert sent(commands) == [("north", "n0"), ("north", "n1")]
        assert sent(stage.made("n0", "xn0")) == [("north", "n2"), ("south", "free")]

    def test_higher_priorities_go_first_and_then_who_came_first(self) -> None:
        stage = Stage()
        low, high, late, north = long("low"), long("high", priority=5), long("late"), long("n", sites=("north",))
        blocks = [low, late, north, high]
        stage.submit(*blocks, wanted=outputs(blocks))
        assert sent(stage.join("north")) == [("north", "high"), ("north", "low")]
        assert sent(stage.made("high", "xhigh")) == [("north", "late")]
        assert sent(stage.made("low", "xlow")) == [("north", "n")]

    def test_priorities_count_between_blocks_of_different_constraints_too(self) -> None:
        stage = Stage()
        low, high = (
            [long(f"low{n}") for n in range(2)],
            [long(f"high{n}", sites=("north",), priority=1) for n in range(2)],
        )
        stage.submit(*low, *high, wanted=outputs([*low, *high]))
        assert sent(stage.join("north")) == [("north", "high0"), ("north", "high1")]

    def test_a_late_block_of_higher_priority_waits_only_for_its_like(self) -> None:
        stage, blocks = Stage("north"), [long(name) for name in "abd"]
        stage.submit(*blocks, wanted=outputs(blocks))
        urgent = long("urgent", priority=1)
        assert sent(stage.submit(urgent, wanted="xurgent")) == [("north", "urgent")]
        more = [long(f"more{n}", priority=1) for n in range(2)]
        assert sent(stage.submit(*more, wanted=outputs(more))) == [("north", "more0")]
        assert sent(stage.made("a", "xa")) == []
        assert sent(stage.made("urgent", "xurgent")) == [("north", "more1")]


class TestRecall:
    @pytest.fixture
    def busy(self) -> Stage:
        """Site north has blocks b and d, of a second each, and d was not started."""
        stage = Stage("north")
        stage.submit(long("b"), long("d"), wanted="xb xd")
        stage.started("b")
        return stage

    def test_a_site_that_joins_gets_what_another_has_not_started(self, busy: Stage) -> None:
        assert busy.join("south") == [recall("north", "d")]
        assert busy.gave_back("d") == [run("south", busy.block("d").spec, n=2, expected_s=1.0)]
        assert busy.made("d", "xd") == [told("xd")]

    def test_only_one_at_a_time_is_asked_back_for_a_site(self, busy: Stage) -> None:
        busy.submit(long("e"), wanted="xe")
        assert sent(busy(ev.FromSite("north", status(threads=6)))) == [("north", "e")]
        assert busy.join("south", threads=10) == [recall("north", "e")]
        assert busy(ev.Tick()) == []
        assert sent(busy.gave_back("e")) == [("south", "e")]

    def test_where_it_is_too_late_the_block_stays(self, busy: Stage) -> None:
        busy.join("south")
        assert busy.gave_back("d", given=False) == []
        assert busy.block("d").started
        assert busy.core.sites["south"].recalled_for is None
        assert busy(ev.Tick()) == []
        assert busy.made("d", "xd") == [told("xd")]

    def test_nothing_is_recalled_from_a_site_that_is_away(self, busy: Stage) -> None:
        busy(ev.SiteReach("north", away=True))
        assert busy.join("south") == []
        busy(ev.SiteReach("north", away=False))
        assert busy(ev.FromSite("south", status())) == [recall("north", "d")]

    def test_a_block_that_ends_while_it_is_recalled_is_done(self, busy: Stage) -> None:
        busy.join("south")
        assert busy.made("d", "xd") == [told("xd")]
        assert busy.core.sites["south"].recalled_for is None

    def test_nothing_is_recalled_that_was_started(self, busy: Stage) -> None:
        busy.started("d")
        assert busy.join("south") == []

    def test_nothing_is_recalled_for_a_site_that_would_not_be_faster(self) -> None:
        stage = Stage("north")
        stage.scatter("north", "a", nbytes=10**9)  # 10 s away
        stage.submit(long("b", needs="a"), long("d", needs="a"), wanted="xb xd")
        assert stage.join("south") == []

    def test_nothing_is_recalled_whose_many_small_inputs_would_take_longer_to_land(self) -> None:
        stage = Stage("north")
        names = " ".join(f"a{n}" for n in range(int(4 / LANDING_S)))
        stage.scatter("north", names)
        stage.submit(long("b", needs=names), long("d", needs=names), wanted="xb xd")
        assert stage.join("south") == []

    def test_nothing_is_recalled_from_a_site_that_has_nothing_else(self) -> None:
        stage = Stage("north")
        stage.submit(long("b"), wanted="xb")
        assert stage.join("south", threads=10) == []

    def test_nothing_is_recalled_for_a_site_that_has_work(self, busy: Stage) -> None:
        short = [block(name, f"x{name}", sites=("south",)) for name in ("s", "t")]
        busy.submit(*short, wanted=outputs(short), wait=True)
        assert busy.join("south", threads=10) == [run("south", spec) for spec in short]

    def test_nothing_is_recalled_for_a_site_that_may_not_run_it(self) -> None:
        stage = Stage("north")
        stage.submit(long("b", sites=("north",)), long("d", sites=("north",)), wanted="xb xd")
        assert stage.join("south") == []

    def test_a_whole_graph_is_never_recalled_and_blocks_no_other_recall(self, busy: Stage) -> None:
        whole = block("w", "y", kind=BlockKind.WHOLE, ntasks=10, prefixes=SECOND)
        busy.submit(whole, wanted="y")
        assert list(busy.core.sites["north"].blocks) == ["b", "d", "w"]
        assert busy.join("south") == [recall("north", "d")]

    def test_nothing_is_recalled_away_from_its_data(self) -> None:
        stage = Stage("north")
        stage.submit(long("b", near=("north",)), long("d", near=("north",)), wanted="xb xd")
        stage.started("b")
        assert stage.join("south") == []

    def test_the_busiest_site_is_asked_first(self) -> None:
        stage = Stage("north", "south", threads=1)
        blocks = [long(f"n{n}", sites=("north", "west")) for n in range(2)]
        blocks += [block(f"s{n}", f"y{n}", prefixes=(("f", 30),), sites=("south", "west")) for n in range(2)]
        stage.submit(*blocks, wanted=outputs(blocks))
        assert stage.join("west") == [recall("south", "s1")]

    def test_a_site_that_leaves_while_a_block_is_recalled_for_it_changes_nothing(self, busy: Stage) -> None:
        busy.join("south")
        assert busy.leave("south") == []
        assert sent(busy.gave_back("d")) == [("north", "d")]

    def test_a_donor_that_leaves_frees_the_one_that_asked(self, busy: Stage) -> None:
        busy.join("south")
        assert sent(busy.leave("north")) == [("south", "b"), ("south", "d")]
        assert busy.core.sites["south"].recalled_for is None


class TestLeaving:
    def test_a_site_finishes_what_it_started_hands_over_and_goes(self) -> None:
        stage = Stage("north", "south")
        stage.submit(long("b", sites=("north",)), wanted="xb")
        stage.started("b")
        assert stage.drain("north") == []
        assert stage.made("b", "xb", nbytes=50) == [told("xb")]
        assert stage(ev.Tick()) == [copy("south", Import("xb", "north", 50))]
        assert stage(ev.Tick()) == []
        assert stage.says("south", imported("xb", "north", nbytes=50)) == [release("north", "xb")]
        assert stage(ev.Tick()) == [close("north")]
        assert stage(ev.Tick()) == []
        assert stage.leave("north") == []
        assert stage.key("xb").holders == {"south": ("data",)}

    def test_what_it_did_not_start_goes_elsewhere(self) -> None:
        stage = Stage("north")
        b, d = long("b"), long("d")
        stage.submit(b, d, wanted="xb xd")
        stage.started("b")
        assert stage.drain("north") == [recall("north", "d")]
        assert stage.drain("north") == []
        assert stage.join("south") == []
        assert stage.gave_back("d") == [run("south", d, n=2, expected_s=1.0)]

    def test_it_gets_nothing_new(self) -> None:
        stage = Stage("north")
        stage.submit(long("b"), wanted="xb")
        stage.started("b")
        stage.drain("north")
        d = block("d", "x")
        assert stage.submit(d, wanted="x") == []
        assert stage.join("south") == [run("south", d)]

    def test_its_keys_are_shared_out(self) -> None:
        stage = Stage("north", "south", "west")
        stage.scatter("north", "x y z")
        assert stage.drain("north") == [
            copy("south", Import("x", "north", 8)), copy("west", Import("y", "north", 8)),
            copy("south", Import("z", "north", 8)),
        ]  # fmt: skip

    def test_it_stays_until_somebody_can_take_its_keys(self) -> None:
        stage = Stage("north")
        stage.scatter("north", "x")
        assert stage.drain("north") == []
        assert stage.join("south") == [copy("south", Import("x", "north", 8))]

    def test_a_copy_that_fails_is_made_again(self) -> None:
        stage = Stage("north", "south")
        stage.scatter("north", "x")
        stage.drain("north")
        assert stage.says("south", ImportFailed("x", "north", "cut")) == [release("south", "x")]
        assert stage(ev.Tick()) == [copy("south", Import("x", "north", 8))]

    def test_a_key_that_is_released_on_its_way_is_not_waited_for(self) -> None:
        stage = Stage("north", "south")
        stage.scatter("north", "x")
        stage.drain("north")
        assert stage.drop("x") == [release("north", "x"), release("south", "x"), forget("x")]
        assert stage(ev.Tick()) == [close("north")]
        assert stage.core.sites["south"].copying == set()

    def test_what_another_site_has_too_is_not_copied_nor_fetched_from_here_any_more(self) -> None:
        stage = Stage("north", "south", "west")
        stage.scatter("north", "x")
        stage.scatter("south", "x")
        assert stage.drain("north") == [close("north")]
        b = block("b", "y", "x", sites=("west",))
        assert stage.submit(b, wanted="y") == [run("west", b, Import("x", "south", 8))]

    def test_two_that_leave_together_do_not_rely_on_each_other(self) -> None:
        stage = Stage("north", "south")
        stage.scatter("north", "x")
        stage.scatter("south", "x")
        stage.submit(long("busy", sites=("north",)), wanted="xbusy")
        stage.started("busy")
        assert stage.drain("north") == []
        assert stage.drain("south") == []
        stage.drop("xbusy")
        assert stage(ev.Tick()) == []
        assert stage.join("west") == [copy("west", Import("x", "north", 8))]
        assert stage.says("west", imported("x", "north")) == [release("north", "x"), release("south", "x")]
        assert stage(ev.Tick()) == [close("north"), close("south")]

    def test_a_site_that_was_told_to_close_may_not_change_its_mind(self) -> None:
        stage = Stage("north")
        assert stage.drain("north") == [close("north")]
        stage(ev.FromSite("north", status()))
        assert stage.submit(block("b", "x"), wanted="x") == []

    def test_before_that_it_may(self) -> None:
        stage = Stage("north")
        stage.submit(long("b"), wanted="xb")
        stage.started("b")
        stage.drain("north")
        d = block("d", "x")
        stage.submit(d, wanted="x")
        assert stage(ev.FromSite("north", status())) == [run("north", d)]


class TestLearning:
    def test_learned_durations_estimate_the_backlog_anew(self) -> None:
        stage = Stage("north")
        stage.submit(long("b"), long("d"), wanted="xb xd")
        assert stage.says("north", Learned(durations=(("f", 4, 8.0),), sizes=())) == []
        assert stage.block("b").expected_s == 20.0
        assert stage.core.sites["north"].backlog_s == 40.0
        stage.made("b", "xb")
        assert stage.core.sites["north"].backlog_s == 20.0

    def test_functions_that_prove_fast_make_room(self) -> None:
        stage = Stage("north")
        blocks = [long(name) for name in "abd"]
        assert len(sent(stage.submit(*blocks, wanted=outputs(blocks)))) == 2
        fast = Learned(durations=(("f", 10, 0.01),), sizes=())
        assert stage.says("north", fast) == [run("north", blocks[2], expected_s=10 * 0.001)]

    def test_sizes_and_links_are_kept(self) -> None:
        stage = Stage("north", "south")
        stage.says("north", Learned(durations=(), sizes=(("f", 2, 100),)))
        stage.scatter("north", "a", nbytes=10**6)
        stage.submit(block("b", "x", "a", sites=("south",)), wanted="x")
        stage.says("south", KeyImported("a", "north", 10**6, 0.5, relayed=True))
        dispatcher = stage.core.dispatcher
        assert dispatcher.functions.sizes == {"f": 50.0}
        assert dispatcher.links.bandwidth_bps == {("north", "south"): 2e6}
        assert dispatcher.links.totals["north", "south"].relayed == 1

    def test_an_import_that_was_there_already_teaches_nothing(self) -> None:
        stage = Stage("north", "south")
        stage.scatter("north", "a")
        stage.submit(block("b", "x", "a", sites=("south",)), wanted="x")
        stage.says("south", imported("a", "", seconds=0.0))
        assert stage.core.dispatcher.links.totals == {}
        assert list(stage.key("a").holders) == ["north", "south"]


GPU = hello("gpu", labels=(("country", "de"), ("disk", "a=b")), environments=("torch",), resources=(("GPU", 2.0),))


class TestEligibility:
    @pytest.mark.parametrize("selector", ["gpu", "country=de", "disk=a=b"])
    def test_a_selector_is_a_name_or_a_label(self, selector: str) -> None:
        assert matches(GPU, selector)

    @pytest.mark.parametrize("selector", ["cpu", "country=fr", "country", "de", "disk=a"])
    def test_nothing_else_matches(self, selector: str) -> None:
        assert not matches(GPU, selector)

    @pytest.mark.parametrize(
        "constraint",
        [
            Constraint(),
            Constraint(sites=("cpu", "country=de"), environment="torch", resources=(("GPU", 2.0),)),
            Constraint(workers=("tcp://elsewhere:1",)),
        ],
    )
    def test_a_site_that_meets_all_parts_is_eligible(self, constraint: Constraint) -> None:
        assert meets(GPU, constraint)

    @pytest.mark.parametrize(
        "constraint",
        [
            Constraint(sites=("cpu",), environment="torch"),
            Constraint(sites=("gpu",), environment="jax"),
            Constraint(sites=("gpu",), resources=(("GPU", 2.5),)),
            Constraint(resources=(("TPU", 1.0),)),
        ],
    )
    def test_a_site_that_lacks_one_part_is_not(self, constraint: Constraint) -> None:
        assert not meets(GPU, constraint)

    def test_what_no_site_has_is_named(self) -> None:
        sites = [GPU, hello("cpu")]
        assert unmet(Constraint(), sites) is None
        assert unmet(Constraint(sites=("nowhere", "cpu")), sites) is None
        assert unmet(Constraint(sites=("nowhere", "disk=b")), sites) == (
            "no site matches 'nowhere', 'disk=b'; sites are cpu, gpu"
        )
        assert unmet(Constraint(environment="jax"), sites) == (
            "no site offers the environment 'jax'; environments are default, torch"
        )
        assert unmet(Constraint(sites=("x",)), []) == "no site matches 'x'; sites are none so far"


def test_queues_are_forgotten_with_their_last_block() -> None:
    stage = Stage("north")
    blocks = [long(f"b{n}", sites=("north",)) for n in range(4)]
    stage.submit(*blocks, wanted=outputs(blocks))
    assert len(stage.core.dispatcher.queues) == 1
    stage.drop(outputs(blocks))
    assert stage.empty
