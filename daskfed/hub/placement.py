"""Which site a ready block goes to: the policy Protocol, the cost estimate, and three baselines. Pure.

A policy sees one block and the sites that may run it, each with everything that the estimate needs; it returns the
index of the best site. The hub places the block there at once if that site has room, else the block waits: late
binding keeps the choice open until the site can really start it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from daskfed.messages import BlockSpec

AWAY_GAIN = 0.25  # a block leaves the site that it is near to only for one that finishes it in this share of the time,
AWAY_LEAST_S = 10.0  # and so many seconds earlier


@dataclass(frozen=True, slots=True)
class Candidate:
    """One site as a choice for one block; times in seconds, sizes in bytes."""

    site: str
    threads: int  # 0 while the site has no workers yet
    backlog_s: float  # seconds of one thread that its unfinished blocks will still take
    bring_nbytes: int  # inputs of the block that are not there
    bring_s: float  # estimated time to bring them, from measured bandwidth and latency
    run_s: float  # estimated seconds of one thread for the block itself
    guessed: bool = False  # some of its functions never ran, so that run_s is a guess
    round_trip_s: float = 0.0  # between hub and site
    cold_start_s: float = 0.0  # to start a worker in the block's environment
    queue_wait_s: float = 0.0  # for a batch job, if the site has no workers
    walltime_left_s: float = float("inf")  # of the site's allocations
    near: bool = False  # most of the block's data is bound to this site, or goes there


@runtime_checkable
class Policy(Protocol):
    """How a site is chosen."""

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return the index of the best of ``candidates`` (never empty) for ``block``."""
        ...


def finish_s(block: BlockSpec, candidate: Candidate) -> float:
    """Return the estimated seconds until ``block`` would be finished at ``candidate``."""
    threads = max(1, candidate.threads)
    wait = candidate.queue_wait_s if candidate.threads == 0 else 0.0
    drain = candidate.backlog_s / threads
    run = candidate.run_s / min(threads, max(1, block.ntasks))
    return max(drain, wait) + candidate.bring_s + candidate.cold_start_s + candidate.round_trip_s + run


def worth_moving(block: BlockSpec, source: Candidate, target: Candidate) -> bool:
    """Say whether ``block`` finishes so much sooner at ``target`` that it should go there rather than to ``source``.

    Away from the data that it is near to, it draws more than its own inputs along: its results are needed where that
    data is, and what comes after it is drawn away as well. So there must be much to gain, and not by a mere guess.
    """
    there, here = finish_s(block, source), finish_s(block, target)
    if not source.near or target.near:
        return here < there
    guessed = source.guessed and source.threads > 0
    return not guessed and here < AWAY_GAIN * there and there - here > AWAY_LEAST_S


@dataclass(slots=True)
class LowestCost:
    """The default: lowest estimated time to finish, near the block's data unless another site is much sooner.

    Ties go to fewer bytes, then to the name.
    """

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return the index of the candidate that would finish ``block`` first, or is near its data."""
        costs = sorted((finish_s(block, c), c.bring_nbytes, c.site, i) for i, c in enumerate(candidates))
        best = costs[0][-1]
        near = next((i for *_, i in costs if candidates[i].near), best)
        return best if worth_moving(block, candidates[near], candidates[best]) else near


@dataclass(slots=True)
class DataOnly:
    """A baseline: fewest bytes to bring, then the shortest backlog."""

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return the index of the candidate that lacks the fewest bytes."""
        return min((c.bring_nbytes, c.backlog_s / max(1, c.threads), c.site, i) for i, c in enumerate(candidates))[-1]


@dataclass(slots=True)
class RoundRobin:
    """A baseline: each site in turn."""

    turn: int = 0

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return the index of the next candidate in turn."""
        self.turn += 1
        return self.turn % len(candidates)


@dataclass(slots=True)
class Random:
    """A baseline: any site, from a seed that is passed in."""

    seed: int = 0
    _state: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._state = self.seed * 2 + 1

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return a pseudo-random index (a linear congruential generator, constants of Knuth's MMIX)."""
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self._state >> 33) % len(candidates)


POLICIES: dict[str, Callable[[], Policy]] = {
    "lowest-cost": LowestCost,
    "data-only": DataOnly,
    "round-robin": RoundRobin,
    "random": Random,
}
