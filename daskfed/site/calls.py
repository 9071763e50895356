"""The calls of a site that wait for a lane, and what each lane is given. Pure.

A call is a row of a block: *run* names one submission of the block here, so that a late report of an earlier one is not
taken for one of this. A row waits, is with one lane, or is closed: reported, or dropped since nobody wants it any more.

Lanes are given as many rows at a time as take about MESSAGE_S; of a function that nobody knows yet, one. What was with
a lane that died is suspect and goes out one row at a time, so that the row that kills workers is known for certain.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

from daskfed.messages import Key

MESSAGE_S = 0.03  # work that a lane is given at a time
MOST_CALLS = 8192  # in one message
GROWTH = 8  # how many times as many calls as were timed are given next
HEAT_S = 1.0
PATIENCE = 3.0  # calls that take so many times as long as usual do not keep others waiting
WINDOW_S = 0.03  # of work by which it is told how long a call takes


class Chunk(NamedTuple):
    """Rows of one run, from ``start`` up to ``stop``."""

    run: int
    start: int
    stop: int


class Timing:
    """How long calls of one function take, as far as it is known."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of one call
        self.timed = 0  # calls
        self._calls, self._took = 0.0, 0.0  # the last ones, and their seconds

    def add(self, calls: int, seconds: float) -> None:
        """Note that some calls took so long together."""
        self.timed += calls
        self._calls += calls
        self._took += seconds
        self.seconds = self._took / self._calls
        if self._took > WINDOW_S:  # one of many calls that had to wait for its core does not make them all long
            self._calls, self._took = self._calls * WINDOW_S / self._took, WINDOW_S

    def calls_in(self, seconds: float) -> int:
        """Return how many calls may be given for so much time, at least one."""
        if not self.timed:
            return 1
        return max(1, min(int(seconds / max(self.seconds, 1e-7)), GROWTH * self.timed, MOST_CALLS))


class Heat:
    """How many calls of a function came lately: what came HEAT_S ago counts a third."""

    def __init__(self) -> None:
        self._calls = 0.0
        self._at = 0.0

    def add(self, calls: int, now: float) -> float:
        """Note that some came and return how many that makes."""
        self._calls = self._calls * exp((self._at - now) / HEAT_S) + calls
        self._at = now
        return self._calls


@dataclass(slots=True)
class Run:
    """One submission of a block."""

    number: int
    block: str
    keys: tuple[Key, ...]  # by row
    prefix: str
    order: tuple[int, int]  # lower ones go first
    retries: int
    waiting: deque[range]
    open: int  # rows that are not closed
    dropped: set[int] = field(default_factory=set)
    parked: set[int] = field(default_factory=set)  # have run, and are to be reported when that is possible
    deaths: dict[int, int] = field(default_factory=dict)  # row -> lanes that died with it
    failures: dict[int, int] = field(default_factory=dict)  # row -> how often it raised
    queued: bool = False
    _rows: dict[Key, int] | None = None

    def row_of(self, key: Key) -> int | None:
        """Return the row of a key, if it has one."""
        if self._rows is None:
            self._rows = {key: row for row, key in enumerate(self.keys)}
        return self._rows.get(key)


class CallQueue:
    """All calls of a site that are not closed, and which lane has which of them."""

    def __init__(self, allowed_deaths: int = 3) -> None:
        self.allowed_deaths = allowed_deaths
        self.runs: dict[int, Run] = {}
        self.timings: dict[str, Timing] = {}
        self._of_block: dict[str, int] = {}
        self._held: dict[str, list[int]] = {}
        self._queue: list[tuple[tuple[int, int], int]] = []
        self._with: dict[str, dict[int, set[int]]] = {}  # lane -> run -> rows
        self._numbers = 0
        self.open = 0  # calls that are not closed
        self.in_vain: set[str] = set()  # lanes that have calls which were dropped since

    # -- blocks ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        block: str,
        keys: tuple[Key, ...],
        rows: Iterable[int],
        prefix: str,
        priority: int = 0,
        retries: int = 0,
        held: bool = False,
    ) -> Run:
        """Take in a block, of which some rows are to run; an earlier run of it is dropped.

        Where it is ``held`` no lane gets any of it until :meth:`resume`.
        """
        self.drop_block(block)
        self._numbers += 1
        order, waiting = (-priority, self._numbers), deque(ranges(rows))
        run = Run(self._numbers, block, keys, prefix, order, retries, waiting, sum(map(len, waiting)))
        self.runs[run.number] = run
        self.open += run.open
        self._of_block[block] = run.number
        if held:
            self._held.setdefault(prefix, []).append(run.number)
        else:
            self._enqueue(run)
        return run

    def resume(self, prefix: str) -> None:
        """Let lanes have what was held of a function."""
        for run in self._no_longer_held(prefix):
            self._enqueue(run)

    def withdraw(self, prefix: str) -> list[tuple[Run, list[int]]]:
        """Return what was held of a function, as runs with their rows; it is no longer here."""
        found = []
        for run in self._no_longer_held(prefix):
            found.append((run, [row for rows in run.waiting for row in rows if row not in run.dropped]))
            self.drop_block(run.block)
        return found

    def _no_longer_held(self, prefix: str) -> list[Run]:
        return [self.runs[number] for number in self._held.pop(prefix, ()) if number in self.runs]

    def drop_block(self, block: str) -> None:
        """Forget a block: nobody wants any of it."""
        if (number := self._of_block.pop(block, None)) is not None:
            self.open -= self.runs.pop(number).open

    def drop(self, keys: Collection[Key]) -> set[Key]:
        """Close what nobody wants any more of these keys; return those that were open."""
        dropped = set()
        for run in list(self.runs.values()):
            for key in keys:
                row = run.row_of(key)
                if row is not None and row not in run.dropped and not self._is_closed(run, row):
                    run.dropped.add(row)
                    dropped.add(key)
                    self._close(run, 1)
                    self.in_vain.update(lane for lane, rows in self._with.items() if row in rows.get(run.number, ()))
        return dropped

    def _is_closed(self, run: Run, row: int) -> bool:
        if row in run.parked:
            return False
        with_lanes = (rows.get(run.number, ()) for rows in self._with.values())
        return not any(row in each for each in run.waiting) and not any(row in rows for rows in with_lanes)

    def _close(self, run: Run, rows: int) -> None:
        run.open -= rows
        self.open -= rows
        if run.open == 0:
            self.runs.pop(run.number, None)
            if self._of_block.get(run.block) == run.number:
                del self._of_block[run.block]

    @property
    def waiting(self) -> bool:
        """Whether there are calls that no lane has."""
        self._trim()
        return bool(self._queue)

    def _enqueue(self, run: Run) -> None:
        if not run.queued and run.waiting:
            run.queued = True
            heapq.heappush(self._queue, (run.order, run.number))

    def _trim(self) -> None:
        while self._queue and not self._first_waits():
            heapq.heappop(self._queue)

    def _first_waits(self) -> bool:
        run = self.runs.get(self._queue[0][1])
        if run is None:
            return False
        run.queued = bool(run.waiting)
        return run.queued

    # -- lanes -------------------------------------------------------------------------------------------------------

    def open_lane(self, lane: str) -> None:
        """A lane is there."""
        self._with[lane] = {}

    def give(self, lane: str, lanes: int = 1) -> list[Chunk]:
        """Return what a lane is to run next, of ``lanes`` that share what there is."""
        chunks: list[Chunk] = []
        left, room = max(1, -(-self.open // max(1, lanes))), MESSAGE_S
        budgets: dict[str, int] = {}  # by prefix
        while left > 0 and room > 0 and self.waiting:
            run = self.runs[self._queue[0][1]]
            timing = self.timings.setdefault(run.prefix, Timing())
            budget = budgets.setdefault(run.prefix, timing.calls_in(room))
            alone = bool(run.deaths)
            if budget <= 0 or (alone and chunks):
                break
            chunk = self._take(run, 1 if alone else min(left, budget))
            if chunk is None:
                continue
            count = chunk.stop - chunk.start
            chunks.append(chunk)
            self._with[lane].setdefault(run.number, set()).update(range(chunk.start, chunk.stop))
            left, budgets[run.prefix] = left - count, budget - count
            room = room - timing.seconds * count if timing.timed and not alone else 0.0
        return chunks

    def _take(self, run: Run, most: int) -> Chunk | None:
        """Take some rows that wait, next to each other."""
        rows = run.waiting.popleft()
        while rows and rows.start in run.dropped:
            rows = rows[1:]
        stop = next((row for row in rows if row in run.dropped), rows.stop) if run.dropped else rows.stop
        stop = min(stop, rows.start + most)
        if rest := range(stop, rows.stop):
            run.waiting.appendleft(rest)
        return Chunk(run.number, rows.start, stop) if rows else None

    def has(self, lane: str) -> int:
        """Return how many rows a lane has."""
        return sum(map(len, self._with.get(lane, {}).values()))

    def wants_more(self, lane: str, lanes: int) -> bool:
        """Whether a lane should be given something: it has nothing, or little, and there is enough for all of them."""
        if not (rows := self.has(lane)):
            return True
        expected = sum(self._seconds_of(number) * len(each) for number, each in self._with[lane].items())
        waits = self.open - sum(map(self.has, self._with))
        return waits > lanes and (rows == 1 or expected < MESSAGE_S / 2) and expected > 0

    def seconds_waiting(self) -> float:
        """Return how long what no lane has would take, one call after the other, as far as that is known."""
        waiting = ((self.timings.get(run.prefix), sum(map(len, run.waiting))) for run in self.runs.values())
        return sum(timing.seconds * calls for timing, calls in waiting if timing is not None)

    def patience_s(self, lane: str) -> float:
        """Return after which time a call of those that a lane has takes longer than it should."""
        return PATIENCE * max((self._seconds_of(number) for number in self._with.get(lane, {})), default=0.0)

    def _seconds_of(self, number: int) -> float:
        run = self.runs.get(number)
        timing = self.timings.get(run.prefix) if run is not None and not run.deaths else None
        return timing.seconds if timing is not None else 0.0

    def done(self, lane: str, chunk: Chunk, seconds: float = 0.0) -> range | list[int]:
        """A lane has run rows, which took so long; return those that somebody waits for. They are closed."""
        run = self.runs.get(chunk.run)
        mine = self._with.get(lane, {}).get(chunk.run)
        rows = range(chunk.start, chunk.stop)
        if run is None or mine is None:
            self._forget(lane, chunk)
            return ()  # type: ignore[return-value]
        if seconds and rows:
            self.time(run.prefix, len(rows), seconds)
        wanted: range | list[int] = rows
        if run.dropped or not mine.issuperset(rows):
            wanted = [row for row in rows if row in mine and row not in run.dropped]
        mine.difference_update(rows)
        self._close(run, len(wanted))
        return wanted

    def failed(self, lane: str, chunk: Chunk) -> bool:
        """A row raised; say whether somebody is to hear of it: it may be tried again, or not be wanted any more."""
        run = self.runs.get(chunk.run)
        mine = self._with.get(lane, {}).get(chunk.run, set())
        if run is None or chunk.start not in mine:
            return False
        mine.discard(chunk.start)
        if chunk.start in run.dropped:
            return False
        run.failures[chunk.start] = tries = run.failures.get(chunk.start, 0) + 1
        if tries <= run.retries:
            self._again(run, (chunk.start,))
            return False
        self._close(run, 1)
        return True

    def park(self, lane: str, chunk: Chunk) -> None:
        """A row has run, and will be reported later, whatever becomes of the lane."""
        self._forget(lane, chunk)
        if (run := self.runs.get(chunk.run)) is not None and chunk.start not in run.dropped:
            run.parked.add(chunk.start)

    def parked_done(self, number: int, row: int) -> bool:
        """Close a row that was parked; say whether somebody waits for it."""
        run = self.runs.get(number)
        if run is None or row not in run.parked:
            return False
        run.parked.discard(row)
        if row in run.dropped:
            return False
        self._close(run, 1)
        return True

    def unpark(self, number: int, row: int) -> None:
        """A row that was parked must run again."""
        run = self.runs.get(number)
        if run is not None and row in run.parked:
            run.parked.discard(row)
            if row not in run.dropped:
                self._again(run, (row,))

    def time(self, prefix: str, calls: int, seconds: float) -> None:
        """Note how long calls of a function took."""
        self.timings.setdefault(prefix, Timing()).add(calls, seconds)

    def returned(self, lane: str, chunk: Chunk) -> None:
        """A lane gives rows back that it has not begun."""
        run = self.runs.get(chunk.run)
        mine = self._with.get(lane, {}).get(chunk.run, set())
        rows = [row for row in range(chunk.start, chunk.stop) if row in mine]
        mine.difference_update(rows)
        if run is not None:
            self._again(run, (row for row in rows if row not in run.dropped))

    def close_lane(self, lane: str, died: bool) -> list[tuple[Run, int]]:
        """A lane is gone; what it had waits again. Return the rows that have killed too many; they are closed."""
        convicted = []
        for number, rows in self._with.pop(lane, {}).items():
            run = self.runs.get(number)
            left = sorted(rows) if run is None else sorted(rows - run.dropped)
            if run is None or not left:
                continue
            if died:
                for row in left:
                    run.deaths[row] = run.deaths.get(row, 0) + (1 if len(left) == 1 else 0)
                if len(left) == 1 and run.deaths[left[0]] > self.allowed_deaths:
                    convicted.append((run, left.pop()))
                    self._close(run, 1)
            self._again(run, left)
        return convicted

    def _again(self, run: Run, rows: Iterable[int]) -> None:
        for each in reversed(list(ranges(rows))):
            run.waiting.appendleft(each)
        self._enqueue(run)

    def _forget(self, lane: str, chunk: Chunk) -> None:
        if (mine := self._with.get(lane, {}).get(chunk.run)) is not None:
            mine.difference_update(range(chunk.start, chunk.stop))


def ranges(rows: Iterable[int]) -> Iterator[range]:
    """Yield rows, which come in order, as ranges."""
    if isinstance(rows, range):
        yield rows
        return
    start = stop = -1
    for row in rows:
        if row != stop and stop >= 0:
            yield range(start, stop)
        if row != stop:
            start = row
        stop = row + 1
    if stop >= 0:
        yield range(start, stop)
