"""The policy keeps the contract of policies, and is green without being slow."""

from __future__ import annotations

from importlib.metadata import entry_points

import dask
from daskfed_policy_greenest import Greenest

from daskfed.hub.placement import Candidate, Policy
from daskfed.messages import BlockKind, BlockSpec
from daskfed.testing.policies import PolicyContract

BLOCK = BlockSpec("b", "client", "owner", BlockKind.GRAPH, inputs=(), outputs=("k",), ntasks=8, prefixes=(("inc", 8),))


class TestGreenest(PolicyContract):
    def make(self) -> Policy:
        return Greenest({"north": 30, "south": 400})


def site(name: str, backlog_s: float) -> Candidate:
    return Candidate(name, threads=4, backlog_s=backlog_s, bring_nbytes=0, bring_s=0.0, run_s=40.0)


def test_a_greener_site_that_is_fast_enough_wins() -> None:
    policy = Greenest({"north": 30, "south": 400})
    assert policy.choose(BLOCK, [site("south", 0.0), site("north", 30.0)]) == 1


def test_a_green_site_that_is_far_too_slow_does_not() -> None:
    policy = Greenest({"north": 30, "south": 400})
    assert policy.choose(BLOCK, [site("south", 0.0), site("north", 3000.0)]) == 0


def test_an_unknown_site_counts_as_the_world_does() -> None:
    policy = Greenest({"coal": 900, "hydro": 20})
    assert policy.choose(BLOCK, [site("coal", 0.0), site("nowhere", 0.0)]) == 1
    assert policy.choose(BLOCK, [site("hydro", 0.0), site("nowhere", 0.0)]) == 0


def test_the_hub_finds_it_by_name_and_it_reads_dasks_configuration() -> None:
    (found,) = entry_points(group="daskfed.policies", name="greenest")
    with dask.config.set({"daskfed.greenest.intensity": {"north": 12}}):
        policy = found.load()()
    assert policy.intensity == {"north": 12}
