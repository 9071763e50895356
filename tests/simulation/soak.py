"""Play histories for as long as you like: ``python -m tests.simulation.soak [--histories N | --minutes M] [--first SEED]``.

A line of progress comes every half minute, every violation at once; the soak goes on after one, and exits with 1 at its
end. At the end it tells what occurred most seldom.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

from tests.simulation.coverage import Count, count_all
from tests.simulation.federation import Result
from tests.simulation.playing import play

PROGRESS_S = 30.0
AHEAD = 4  # histories that wait per process: no more are remembered
SELDOM = 15  # counts that are told at the end


@dataclass(slots=True)
class Tally:
    """What was played so far; it does not grow with the number of histories."""

    tell: Callable[[str], None]
    now: Callable[[], float]  # seconds
    histories: int = 0
    violations: int = 0
    rows: dict[str, Counter[object]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    _started: float = 0.0
    _told: float = 0.0

    def __post_init__(self) -> None:
        self._started = self._told = self.now()

    def take(self, played: Result | str) -> None:
        """Count one history, tell at once how it broke a rule, and now and then how far the soak is."""
        self.histories += 1
        if isinstance(played, str):
            self.violations += 1
            self.tell(played)
        else:
            self.faults.update(played.faults)
            for name, rows in played.rows.items():
                self.rows.setdefault(name, Counter()).update(rows)
        if self.now() - self._told >= PROGRESS_S:
            self._told = self.now()
            self.tell(self.progress())

    def progress(self) -> str:
        """Return one line: histories, rate, violations."""
        seconds = max(self.now() - self._started, 1e-3)
        rate = self.histories / seconds
        return f"{self.histories} histories in {seconds:.0f} s, {rate:.1f}/s, {self.violations} violations"

    def seldom(self) -> list[Count]:
        """Return what occurred most seldom, most seldom first."""
        return sorted(count_all(self.rows, self.faults), key=lambda count: count.times)[:SELDOM]


def played(pool: ProcessPoolExecutor, seeds: Iterable[int], most: int) -> Iterator[Result | str]:
    """Yield each history as it ends, ``most`` of them at a time being played or waiting."""
    under_way: set[Future[Result | str]] = set()
    for seed in seeds:
        under_way.add(pool.submit(play, seed))
        if len(under_way) >= most:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in under_way)


def seeds_until(end: float, first: int, histories: int | None, now: Callable[[], float]) -> Iterator[int]:
    """Yield seeds from ``first`` on: so many ``histories``, or until the time ``end``."""
    for count, seed in enumerate(itertools.count(first)):
        if count == histories or now() >= end:
            return
        yield seed


def take_all(histories: Iterable[Result | str], tally: Tally) -> int:
    """Count all histories, or those until someone interrupts or terminates; return 1 where one broke a rule, else 0."""
    with suppress(KeyboardInterrupt):
        for each in histories:
            tally.take(each)
    tally.tell("\n".join(["the most seldom:", *map(str, tally.seldom()), tally.progress()]))
    return 1 if tally.violations else 0


def main(args: list[str]) -> int:
    """Play and tell; return 1 where a history broke a rule."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.soak", description=__doc__)
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--histories", type=int, help="how many to play (default: until interrupted)")
    limit.add_argument("--minutes", type=float, default=float("inf"), help="for how long to play")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tally = Tally(lambda line: print(line, flush=True), time.monotonic)
    seeds = seeds_until(time.monotonic() + 60 * options.minutes, options.first, options.histories, time.monotonic)
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        status = take_all(played(pool, seeds, AHEAD * options.processes), tally)
        pool.shutdown(cancel_futures=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
