"""The contract of a placement policy, as tests that every implementation passes, plugins' included.

    class TestMine(PolicyContract):
        def make(self) -> Policy:
            return Mine()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random

from daskfed.hub import events as ev
from daskfed.hub.core import HubCore
from daskfed.hub.placement import Candidate, Policy
from daskfed.messages import BlockKind, BlockSpec, RunBlock, SiteHello, SiteStatus

Choice = tuple[BlockSpec, Sequence[Candidate]]


class PolicyContract(ABC):
    """What the hub relies on; subclass it in a test module and say how a fresh policy is made."""

    @abstractmethod
    def make(self) -> Policy:
        """Return a new policy, as the hub gets it."""

    def test_it_is_a_policy(self) -> None:
        """It has the method that the hub calls."""
        assert isinstance(self.make(), Policy)

    def test_it_names_one_of_the_candidates(self) -> None:
        """Whatever it is shown, it returns an index into that."""
        policy = self.make()
        for block, candidates in choices(seed=1, count=300):
            chosen = policy.choose(block, candidates)
            assert type(chosen) is int and 0 <= chosen < len(candidates), f"{chosen!r} of {len(candidates)} candidates"

    def test_the_same_history_leads_to_the_same_choices(self) -> None:
        """No clock and no randomness of its own: a failure in a simulation replays."""
        one, other = self.make(), self.make()
        for block, candidates in choices(seed=2, count=300):
            assert one.choose(block, candidates) == other.choose(block, candidates)

    def test_a_hub_places_every_block_with_it(self) -> None:
        """In a hub with three idle sites, no block is left waiting and each is sent once."""
        core = HubCore(policy=self.make())
        for name in ("a", "b", "c"):
            core.handle(ev.SiteJoined(_hello(name)), now=0.0)
            core.handle(ev.FromSite(name, _status(threads=4)), now=0.0)
        blocks = tuple(_block(str(n), outputs=(f"k{n}",)) for n in range(6))
        core.handle(ev.ClientJoined("client", "owner"), now=0.0)
        commands = core.handle(ev.BlocksSubmitted("client", blocks, tuple(f"k{n}" for n in range(6))), now=0.0)
        core.check()
        sent = [c.message.block.id for c in commands if isinstance(c, ev.TellSite) and isinstance(c.message, RunBlock)]
        assert sorted(sent) == [block.id for block in blocks]


def choices(seed: int, count: int) -> list[Choice]:
    """Return blocks and what a hub might show a policy for them: busy, idle, far, cold and empty sites."""
    random = Random(seed)
    return [(_random_block(random, n), _random_candidates(random)) for n in range(count)]


def _random_block(random: Random, n: int) -> BlockSpec:
    kind, ntasks = random.choice(list(BlockKind)), random.randint(1, 512)
    return _block(f"block-{n}", outputs=(f"key-{n}",), kind=kind, ntasks=ntasks)


def _random_candidates(random: Random) -> list[Candidate]:
    names = random.sample(["north", "south", "east", "west", "cloud"], random.randint(1, 5))
    return [
        Candidate(
            site=name,
            threads=random.choice([0, 1, 8, 1000]),
            backlog_s=random.choice([0.0, 1.5, 1e6]),
            bring_nbytes=random.choice([0, 1000, 10**12]),
            bring_s=random.choice([0.0, 0.01, 3600.0]),
            run_s=random.choice([0.0, 0.1, 1e5]),
            round_trip_s=random.choice([0.0, 0.2]),
            cold_start_s=random.choice([0.0, 30.0]),
            queue_wait_s=random.choice([0.0, 7200.0]),
            walltime_left_s=random.choice([float("inf"), 60.0]),
        )
        for name in names
    ]


def _block(name: str, outputs: tuple[str, ...], kind: BlockKind = BlockKind.GRAPH, ntasks: int = 4) -> BlockSpec:
    return BlockSpec(
        id=name, client="client", owner="owner", kind=kind, inputs=(), outputs=outputs, ntasks=ntasks,
        prefixes=(("inc", ntasks),),
    )  # fmt: skip


def _hello(site: str) -> SiteHello:
    return SiteHello(
        site=site, incarnation=f"{site}-1", protocol=1, labels=(), environments=("default",), resources=(),
        data_address="", dashboard="", versions=(),
    )  # fmt: skip


def _status(threads: int) -> SiteStatus:
    return SiteStatus(workers=1, threads=threads, memory_limit=10**9, memory_used=0, running=0, queued=0)
