"""What a user is told of a key, and that every broken invariant is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from daskfed.hub.inspection import progress_of, running_at
from daskfed.hub.keytable import KeyState
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import Constraint, Key
from tests.unit.hub.builders import Stage, block, hello


@pytest.fixture
def stage() -> Stage:
    return Stage("north", "south")


def why(stage: Stage, key: Key) -> str:
    return str(stage.core.explain(key)["why"])


class TestExplain:
    def test_all_facts_of_a_key_that_was_made(self, stage: Stage) -> None:
        stage.submit(block("b", "x y", ntasks=3), wanted="x y")
        stage.made("b", "x", nbytes=50)
        assert stage.core.explain("x") == {
            "key": "x", "phase": "held", "why": "in memory at north; made at north", "sites": ["north"], "nbytes": 50,
            "block": "b", "site": "north", "tasks": 3, "attempt": 1, "block_phase": "placed",
            "story": ["inputs exist", "place"],
        }  # fmt: skip

    def test_a_key_that_is_unknown(self, stage: Stage) -> None:
        assert stage.core.explain(("x", 0)) == {
            "key": ("x", 0), "phase": "unknown", "sites": [],
            "why": "no client wants this key and no block needs it",
        }  # fmt: skip

    def test_a_promise(self, stage: Stage) -> None:
        stage.desire("x")
        assert stage.core.explain("x") == {
            "key": "x", "phase": "pending", "sites": [], "nbytes": 0,
            "why": "a client expects it, and no graph that makes it has arrived",
        }  # fmt: skip

    def test_a_block_that_waits_for_inputs(self, stage: Stage) -> None:
        stage.scatter("north", "a")
        stage.submit(block("p", "x z"), block("b", "y", "a x z"), wanted="y")
        assert why(stage, "y") == "its block waits for 2 input(s), first 'x'"
        assert stage.core.explain("y")["waits_for"] == ["x", "z"]

    def test_a_block_that_no_site_may_run(self, stage: Stage) -> None:
        stage.submit(block("b", "x", sites=("west",)), wanted="x", wait=True)
        assert why(stage, "x") == "no site matches 'west'; sites are north, south"

    def test_a_block_whose_resources_no_site_has(self, stage: Stage) -> None:
        stage.submit(block("b", "x", resources=(("GPU", 1.0),)), wanted="x")
        assert why(stage, "x") == "its block is ready; no site may run it"

    def test_a_block_that_waits_for_a_busy_site(self, stage: Stage) -> None:
        blocks = [block(f"b{n}", f"x{n}", ntasks=9, prefixes=(("f", 100),), sites=("north",)) for n in range(3)]
        stage.submit(*blocks, wanted="x0 x1 x2")
        assert why(stage, "x2") == "its block is ready; north may run it and is busy"

    def test_a_block_at_a_site(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        assert why(stage, "x") == "its block is at north, not started yet"
        stage.started("b")
        assert why(stage, "x") == "its block is at north, with the scheduler"

    def test_data_that_was_scattered(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        stage.scatter("south", "x")
        assert why(stage, "x") == "in memory at north, south; placed there by a client"

    def test_a_failure(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.failed("b", "x")
        assert why(stage, "x") == "its task failed at north"
        stage.submit(block("d", "y", sites=("west",)), wanted="y")
        assert why(stage, "y") == "its task failed"


class TestProgress:
    def test_tasks_of_all_blocks_behind_the_keys_and_of_those_unfinished(self, stage: Stage) -> None:
        load = block("a", "x", prefixes=(("load", 4), ("mean", 1)))
        total = block("b", "y", "x", prefixes=(("mean", 2),))
        stage.submit(load, total, block("other", "z", prefixes=(("f", 1),)), wanted="y z")
        everything = {"load": 4, "mean": 3}
        ledger = stage.core.ledger
        assert progress_of(ledger, ["y", "y"]) == {"all": everything, "remaining": everything}
        stage.made("a", "x")
        assert progress_of(ledger, ["y"]) == {"all": everything, "remaining": {"load": 0, "mean": 2}}
        stage.made("b", "y")
        assert progress_of(ledger, ["y"]) == {"all": everything, "remaining": {"load": 0, "mean": 0}}

    def test_unknown_keys_and_data_are_no_work(self, stage: Stage) -> None:
        stage.scatter("north", "x")
        assert progress_of(stage.core.ledger, ["x", "nowhere"]) == {"all": {}, "remaining": {}}


def disown(stage: Stage) -> None:
    """Block b is to make y, which fails behind its back."""
    stage.key("y").phase = KeyPhase.FAILED
    stage.block("b").pending = 0


def unwanted(stage: Stage) -> None:
    """Nobody but the heirs of w is left, and nobody has released it."""
    stage.key("w").wanted_by.clear()
    del stage.core.ledger.wants["c"]["w"]


Corruption = Callable[[Stage], object]
CORRUPTIONS: dict[str, Corruption] = {
    "key 'x' lives though nobody needs it": lambda s: s.core.ledger.keys.update(x=KeyState("x", "ann")),
    "key 'y' is KeyPhase.HELD at {}": lambda s: setattr(s.key("y"), "phase", KeyPhase.HELD),
    "key 'd' is brought to north, which holds it": lambda s: s.key("d").importing.update(north=1),
    "key 'd' is at mars, which is gone": lambda s: s.key("d").holders.update(mars=("data",)),
    "key 'd' is kept for ended, which ended": lambda s: s.key("d").consumers.update(ended=None),
    "key 'd' is wanted by e, who does not know it": lambda s: s.key("d").wanted_by.update(e=None),
    "e wants a key that does not know it": lambda s: s.core.ledger.wants["e"].update(d=None),
    "key 'z' waits for a, which ended": lambda s: setattr(s.block("a"), "phase", BlockPhase.DONE),
    "block f is gone and still known": lambda s: setattr(s.block("f"), "phase", BlockPhase.GONE),
    "block b counts 7 live outputs of 1": lambda s: setattr(s.block("b"), "live", 7),
    "block b counts 0 pending outputs of 1": lambda s: setattr(s.block("b"), "pending", 0),
    "key 'w' is kept for b, which is not finished": lambda s: s.key("w").heirs.update(b=None),
    "key 'w' is KeyPhase.HELD though nobody needs its value": unwanted,
    "block h is done and no heir of its input 'w'": lambda s: s.key("w").heirs.clear(),
    "block b is no consumer of its input 'd'": lambda s: s.key("d").consumers.clear(),
    "block b counts 0 missing inputs of 1": lambda s: setattr(s.block("b"), "missing", 0),
    "block b is unfinished though nothing of it is needed": disown,
    "block b is ready and lacks inputs": lambda s: setattr(s.block("b"), "phase", BlockPhase.READY),
    "block a is placed at north, which does not count it": lambda s: s.core.sites["north"].blocks.clear(),
    "block a is placed and has nothing left to make": lambda s: s.block("a").open_outputs.clear(),
    "north counts blocks it lacks": lambda s: s.core.sites["north"].blocks.update(b=None),
    "north miscounts its tasks": lambda s: setattr(s.core.sites["north"].backlog.total, "ntasks", 7),
}


class TestCheck:
    @pytest.fixture
    def running(self, stage: Stage) -> Stage:
        """Data d; block f made w, and block h made v of it; block a runs and makes z, for which block b waits to make y."""
        stage.scatter("north", "d")
        stage.submit(block("f", "w"), wanted="w")
        stage.made("f", "w")
        stage.submit(block("h", "v", "w"), wanted="v")
        stage.made("h", "v")
        stage.submit(block("a", "z"), block("b", "y", "z d"), wanted="y")
        return stage

    @pytest.mark.parametrize("complaint", CORRUPTIONS)
    def test_what_is_broken_is_named(self, running: Stage, complaint: str) -> None:
        CORRUPTIONS[complaint](running)
        with pytest.raises(AssertionError) as failed:
            running.core.check()
        assert str(failed.value) == complaint


def test_eligible_sites_follow_who_is_there() -> None:
    stage = Stage("north")
    north = Constraint(sites=("north", "disk=fast"))
    names = [site.name for site in stage.core.dispatcher.eligible(north)]
    stage.join("west", hello("west", labels=(("disk", "fast"),)))
    names += [site.name for site in stage.core.dispatcher.eligible(north)]
    stage.leave("north")
    names += [site.name for site in stage.core.dispatcher.eligible(north)]
    assert names == ["north", "north", "west", "west"]


class TestRunningAt:
    def test_a_key_runs_where_its_block_is(self, stage: Stage) -> None:
        stage.submit(block("b", "x y"), wanted="x y")
        assert running_at(stage.core.ledger, ["x"]) == {"north": ["x"]}

    def test_of_a_key_that_waits_what_it_waits_for_runs(self, stage: Stage) -> None:
        stage.submit(block("p", "x z"), block("b", "y", "x"), wanted="y")
        assert running_at(stage.core.ledger, ["y"]) == {"north": ["x"]}

    def test_what_is_made_or_unknown_does_not_run(self, stage: Stage) -> None:
        stage.submit(block("b", "x"), wanted="x")
        stage.made("b", "x")
        stage.scatter("north", "data")
        assert running_at(stage.core.ledger, ["x", "data", "unknown"]) == {}
