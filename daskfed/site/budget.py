"""How much a site takes on at a time: bytes of imports, and work that its scheduler is given. Pure.

:class:`ImportQueue` keeps the bytes that are on their way or in the agent's memory under a budget;
:class:`Runway` says whether the scheduler should be given another block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from daskfed.backlog import Backlog
from daskfed.messages import BlockSpec, Key

SMALLEST_CHARGE = 64 * 1024  # bytes that an import counts at least: bounds the number of fetches, and unknown sizes
MIN_BLOCKS = 2  # blocks that the scheduler always has, if there are as many
TASKS_AHEAD = 4  # unfinished tasks per thread below which the scheduler is given more
SECONDS_AHEAD = 0.2  # expected seconds of work per thread below which the scheduler is given more


@dataclass(slots=True)
class ImportQueue:
    """Which keys wait to be fetched, and the bytes that the others take.

    A key is charged from the start of its fetch until it has landed on a worker or was dropped. Fetches start in the
    order in which they were asked for, while the sum of charges stays within ``budget`` bytes; one always goes on.
    """

    budget: int
    charges: dict[Key, int] = field(default_factory=dict)
    inflight: set[Key] = field(default_factory=set)  # fetches that were asked for and not answered yet
    _waiting: dict[Key, int] = field(default_factory=dict)
    _charged: int = 0

    def want(self, key: Key, nbytes: int) -> None:
        """Queue a key of ``nbytes`` (0: unknown)."""
        self._waiting[key] = nbytes

    def unwant(self, key: Key) -> None:
        """Take a key that was not started out of the queue."""
        self._waiting.pop(key, None)

    def startable(self) -> Iterator[Key]:
        """Yield the keys whose fetch may start now, charging each; a fetch that is still on its way is joined."""
        while self._waiting:
            key, nbytes = next(iter(self._waiting.items()))
            charge = max(nbytes, SMALLEST_CHARGE)
            if key not in self.inflight and self.charges and self._charged + charge > self.budget:
                return
            del self._waiting[key]
            if key not in self.inflight:
                self.charge(key, charge)
            yield key

    def charge(self, key: Key, nbytes: int) -> None:
        """Count ``nbytes`` for a key, instead of what it counted before."""
        self.discharge(key)
        self.charges[key] = max(nbytes, SMALLEST_CHARGE)
        self._charged += self.charges[key]

    def discharge(self, key: Key) -> None:
        """Stop counting a key."""
        self._charged -= self.charges.pop(key, 0)

    def check(self, wanted: set[Key], landing: set[Key]) -> None:
        """Verify the books against the phases of keys; raises AssertionError."""
        assert set(self._waiting) == wanted, f"queued imports {set(self._waiting)} are not the wanted keys {wanted}"
        assert set(self.charges) == self.inflight | landing, "charged keys are not those in flight or landing"
        assert self._charged == sum(self.charges.values()), "the sum of charges is wrong"
        assert not wanted or self.charges, "imports wait though nothing is on its way"


@dataclass(slots=True)
class Runway:
    """The work that the scheduler has, as far as the site knows.

    The scheduler's own count lags behind; so it is completed by the blocks submitted since, and never trusted to be
    more than the tasks of the unfinished blocks.
    """

    threads: int = 0
    submitted: int = 0  # blocks submitted so far
    pending: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # unfinished block -> priority, tasks, s
    backlog: Backlog = field(default_factory=Backlog)  # of the pending blocks
    _reported: int = 0  # unfinished tasks by the scheduler's last count
    _unseen: deque[tuple[int, int]] = field(default_factory=deque)  # (submission, tasks) after that count
    _unseen_tasks: int = 0

    def submit(self, spec: BlockSpec, expected_s: float) -> None:
        """Count a block that is given to the scheduler."""
        self.submitted += 1
        self.pending[spec.id] = work = (spec.constraint.priority, spec.ntasks, expected_s)
        self.backlog.add(*work)
        self._unseen.append((self.submitted, spec.ntasks))
        self._unseen_tasks += spec.ntasks

    def end(self, block: str) -> None:
        """Stop counting a block, if it was counted."""
        if (work := self.pending.pop(block, None)) is not None:
            self.backlog.remove(*work)

    def report(self, unfinished: int, threads: int, submitted: int) -> None:
        """Take in the scheduler's count, made when it had taken in ``submitted`` blocks."""
        self._reported, self.threads = unfinished, threads
        while self._unseen and self._unseen[0][0] <= submitted:
            self._unseen_tasks -= self._unseen.popleft()[1]

    def tasks(self) -> int:
        """Return the estimated number of unfinished tasks at the scheduler."""
        return min(self.backlog.total.ntasks, self._reported + self._unseen_tasks)

    def has_room(self, priority: int) -> bool:
        """Say whether the scheduler should be given a block of this priority, to keep every thread busy."""
        threads = max(1, self.threads)
        ahead = self.backlog.ahead_of(priority)
        tasks = min(ahead.ntasks, self.tasks())
        if ahead.blocks < MIN_BLOCKS or tasks < TASKS_AHEAD * threads:
            return True
        return ahead.seconds * tasks / max(1, ahead.ntasks) < SECONDS_AHEAD * threads
