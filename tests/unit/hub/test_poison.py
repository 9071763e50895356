"""Tasks that kill workers or sites are found and given up; what ran beside them finishes."""

from __future__ import annotations

from daskfed.hub import events as ev
from daskfed.hub.states import KeyPhase
from daskfed.hub.suspicion import Suspicion, choose, is_convicted, on_trial
from daskfed.messages import BlockKind, BlockSpec
from tests.unit.hub.builders import Stage, block, hello, lost_for_good, release, run, told, told_failed


def crash(stage: Stage, site: str, n: int) -> list[ev.Command]:
    """A site dies for the ``n``-th time, and another comes up under its name."""
    left = stage(ev.SiteLeft(site, f"{site}-{n}"))
    return left + stage.join(site, hello(site, incarnation=f"{site}-{n + 1}"))


def killed(name: str, why: str) -> ev.FailKeys:
    return ev.FailKeys((name,), "KilledSite", why)


class TestChoice:
    def test_without_suspicion_all_that_is_pending_is_made(self) -> None:
        assert choose({}, ["x", "y"], 2) == ("x", "y")
        assert not on_trial({}, ["x"]) and not on_trial({"x": Suspicion(9)}, [])

    def test_one_death_changes_nothing(self) -> None:
        assert choose({"x": Suspicion(1)}, ["x", "y"], 2) == ("x", "y")

    def test_what_is_not_suspect_is_made_first(self) -> None:
        suspects = {"x": Suspicion(2), "y": Suspicion(1)}
        assert choose(suspects, ["x", "y", "z"], 3) == ("y", "z")
        assert not on_trial(suspects, ["x", "y"])

    def test_groups_shrink_from_death_to_death_and_those_with_the_fewest_go_first(self) -> None:
        pending = [f"k{n}" for n in range(512)]
        for deaths, size in ((2, 64), (3, 8), (4, 1), (9, 1)):
            suspects = {key: Suspicion(deaths) for key in pending}
            assert choose(suspects, pending, 512) == tuple(pending[:size])
            assert choose(suspects | {"k5": Suspicion(2)}, pending, 64)[0] == ("k5" if deaths > 2 else "k0")

    def test_only_who_was_alone_is_convicted(self) -> None:
        assert is_convicted(Suspicion(4), alone=True)
        assert not is_convicted(Suspicion(9), alone=False) and not is_convicted(Suspicion(3), alone=True)


class TestSites:
    def test_a_task_that_kills_four_sites_is_given_up(self) -> None:
        stage = Stage("north")
        stage.submit(poison := block("p", "x"), wanted="x")
        for n in range(1, 4):
            stage.started("p")
            assert crash(stage, "north", n) == [run("north", poison, n=n + 1)]
        stage.started("p")
        why = "'x': 4 sites died while they made it, the last was 'north'"
        assert crash(stage, "north", 4) == [killed("x", why), told_failed("x")]

    def test_a_block_that_was_not_started_is_not_suspect(self) -> None:
        stage = Stage("north")
        stage.submit(block("p", "x"), wanted="x")
        for n in range(1, 6):
            crash(stage, "north", n)
        assert not stage.block("p").suspects

    def test_a_site_that_was_only_away_speaks_against_nobody(self) -> None:
        stage = Stage("north", "south")
        stage.submit(block("p", "x", sites=("north",)), wanted="x")
        for _ in range(6):
            stage.started("p")
            stage.leave("north")
            assert stage.block("p").suspects == {"x": Suspicion(1)}
            stage.join("north")
            assert stage.block("p").suspects == {"x": Suspicion(0)}

    def test_suspects_of_two_blocks_are_not_tried_at_one_site_at_once(self) -> None:
        stage = Stage("north")
        stage.submit(one := block("p", "x"), two := block("q", "y"), wanted="x y")
        for n in (1, 2):
            stage.started("p")
            stage.started("q")
            commands = crash(stage, "north", n)
        assert commands == [run("north", one, n=3)]
        assert stage.made("p", "x") == [told("x"), run("north", two, n=3)]

    def test_a_large_block_is_split_until_the_culprit_is_alone(self) -> None:
        names = " ".join(f"k{n}" for n in range(64))
        stage = Stage("north")
        stage.submit(block("p", names, kind=BlockKind.CALLS, ntasks=64), wanted=names)
        deaths, failed = 0, None
        for _ in range(200):
            if not stage.core.ledger.pending_of(stage.block("p")):
                break
            asked = stage.block("p").open_outputs
            stage.started("p")
            if "k13" not in asked:
                stage.made("p", " ".join(map(str, asked)))
                continue
            deaths += 1
            commands = crash(stage, "north", deaths)
            failed = next((each for each in commands if isinstance(each, ev.FailKeys)), failed)
        assert deaths == 4 and failed is not None and failed.keys == ("k13",)
        assert all(stage.key(f"k{n}").phase is KeyPhase.HELD for n in range(64) if n != 13 and n not in (13,))


class TestWorkers:
    def poisoned(self) -> tuple[Stage, BlockSpec]:
        stage = Stage("north")
        stage.submit(spec := block("p", "x y z"), block("q", "w"), wanted="x y z w")
        stage.started("p")
        return stage, spec

    def test_what_fails_beside_others_is_tried_again_alone(self) -> None:
        stage, spec = self.poisoned()
        assert stage.failed("p", "x y", blame="t") == [release("north", "x y")]
        assert stage.made("p", "z") == [told("z"), run("north", spec, n=2, only="x")]
        assert stage.made("p", "x") == [told("x"), run("north", spec, n=3, only="y")]
        assert stage.made("p", "y") == [told("y")]

    def test_what_fails_alone_is_given_up_with_all_that_needs_it(self) -> None:
        stage, spec = self.poisoned()
        stage.failed("p", "x y", blame="t")
        stage.made("p", "z")
        why = "'t', which it needs or is, kills workers: 8 or more died of it"
        assert stage.failed("p", "x", blame="t") == [killed("y", why), told_failed("y x")]
        assert stage.key("x").phase is stage.key("y").phase is KeyPhase.FAILED

    def test_another_culprit_of_the_same_block_is_tried_by_itself(self) -> None:
        stage, spec = self.poisoned()
        stage.failed("p", "x", blame="t")
        stage.failed("p", "y", blame="u")
        stage.made("p", "z")
        assert stage.failed("p", "x", blame="t") == [told_failed("x"), run("north", spec, n=3, only="y")]

    def test_a_single_call_with_no_neighbours_is_given_up_at_once(self) -> None:
        stage = Stage("north")
        stage.submit(block("p", "x"), wanted="x")
        stage.started("p")
        assert stage.failed("p", "x", blame="x") == [told_failed("x")]

    def test_a_single_call_with_neighbours_is_tried_again(self) -> None:
        stage = Stage("north")
        stage.submit(spec := block("p", "x"), block("q", "w"), wanted="x w")
        stage.started("p")
        assert stage.failed("p", "x", blame="x") == [release("north", "x"), run("north", spec, n=2)]
        assert stage.failed("p", "x", blame="x") == [told_failed("x")]


class TestWholeGraphs:
    def whole(self, name: str, outputs: str, home: str, stateful: bool = False) -> BlockSpec:
        return block(name, outputs, kind=BlockKind.WHOLE, sites=(home,), stateful=stateful)

    def test_they_move_to_another_home_together(self) -> None:
        stage = Stage("north", "south")
        assert stage.core.homes.home_of("c") == "north"
        stage.submit(self.whole("a", "x", "north"), self.whole("b", "y", "north"), wanted="x y")
        stage.made("a", "x")
        moved = [run("south", self.whole(name, key, "south"), n=2) for name, key in (("a", "x"), ("b", "y"))]
        assert sorted(stage.leave("north"), key=repr) == moved
        assert stage.core.homes.home_of("c") == "south"

    def test_they_wait_for_the_next_site_if_there_is_none(self) -> None:
        stage = Stage()
        assert stage.core.homes.home_of("c") is None
        stage.submit(block("a", "x", kind=BlockKind.WHOLE), wanted="x", wait=True)
        assert stage.join("north") == [run("north", self.whole("a", "x", "north"))]

    def test_an_actor_ends_with_its_site(self) -> None:
        stage = Stage("north", "south")
        stage.core.homes.home_of("c")
        stage.submit(self.whole("a", "x", "north", stateful=True), wanted="x")
        stage.made("a", "x")
        assert stage.leave("north") == [lost_for_good("x", "north", actor=True), told_failed("x")]


class TestPatience:
    def test_work_whose_only_site_is_gone_waits_so_long(self) -> None:
        stage = Stage("north", "south")
        stage.submit(block("b", "x", sites=("north",), patience_s=60.0, label="inc"), wanted="x")
        stage.leave("north")
        assert stage.later(1) == [] == stage.later(59)
        why = "inc: no site matches 'north'; sites are south; waited 60 s (daskfed.client.site-timeout)"
        assert stage.later(2) == [ev.FailKeys(("x",), "UnknownSiteError", why), told_failed("x")]

    def test_a_site_that_comes_back_in_time_takes_it(self) -> None:
        stage = Stage("north", "south")
        stage.submit(spec := block("b", "x", sites=("north",), patience_s=60.0), wanted="x")
        stage.leave("north")
        stage.later(50)
        assert stage.join("north") == [run("north", spec, n=2)]
        stage.leave("north")
        assert stage.later(1) == [] == stage.later(50)

    def test_by_default_it_waits_for_ever(self) -> None:
        stage = Stage("north", "south")
        stage.submit(block("b", "x", sites=("north",)), wanted="x")
        stage.leave("north")
        stage.later(1)
        assert stage.later(1e9) == []
