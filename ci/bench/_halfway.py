"""A job of short tasks that writes down what it does, and what half of it takes: for benchmarks that kill something."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
from _common import Diary, wait_for

import daskfed

NAP_S = 0.25
THREADS = 2  # of each site's one worker
SITES = ("north", "south")


def work(number: int, diary: str, *_: Any) -> int:
    """Take a while, and write down that it began and ended."""
    book = Diary(diary)
    book.note("began", number)
    time.sleep(NAP_S)
    book.note("ended", number)
    return number


@dataclass(frozen=True)
class Job:
    """Tasks for ``seconds`` of two undisturbed sites: two thirds on their own, one third from two of these each."""

    seconds: float

    @property
    def ntasks(self) -> int:
        """How many tasks it has."""
        return 3 * round(self.seconds * THREADS * len(SITES) / NAP_S / 3)

    def graph(self, diary: str) -> Any:
        """Return the graph; its result is the sum of the numbers of the last third."""
        nap = dask.delayed(work, pure=False)
        roots = 2 * self.ntasks // 3
        first = [nap(number, diary) for number in range(roots)]
        pairs = zip(first[::2], first[1::2], strict=True)
        return dask.delayed(sum)([nap(roots + i, diary, *pair) for i, pair in enumerate(pairs)])

    def result(self) -> int:
        """Return what it should give."""
        return sum(range(2 * self.ntasks // 3, self.ntasks))

    def run(self, client: daskfed.Client, diary: Diary, disturb: Callable[[], None] | None = None) -> float:
        """Run it and return the wall seconds; ``disturb`` is called when half of the tasks have begun."""
        start = time.perf_counter()
        future = client.compute(self.graph(diary.path))
        helper = threading.Thread(target=self._at_half, args=(diary, disturb))
        helper.start()
        if (got := future.result()) != self.result():
            raise SystemExit(f"the job gave {got} instead of {self.result()}")
        seconds = time.perf_counter() - start
        helper.join()
        return seconds

    def _at_half(self, diary: Diary, disturb: Callable[[], None] | None) -> None:
        if disturb is not None:
            while len(diary.entries("began")) < self.ntasks / 2:
                time.sleep(0.1)
            disturb()


def all_workers(client: daskfed.Client) -> None:
    """Wait until both sites have their worker."""
    wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == len(SITES), "the sites' workers")


def seconds_given(default: float = 120.0) -> float:
    """Return how long the undisturbed job is to take, as given on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=default, help="of the undisturbed job")
    return float(parser.parse_args().seconds)
