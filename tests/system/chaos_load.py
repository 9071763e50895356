"""The work that the chaos tests do while processes are killed: every kind of graph, and tasks that share a Lock."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Lock

from daskfed import Client

CALLS = 24
CHUNKS = 4
LOCKED = 6
LOCK_EVERY = 3  # rounds: a Lock is free again only some time after its holder was killed
NAP_S = 0.04
STOCK = {"scheduler": "threads", "num_workers": 2}


def nap(value: Any, *_: Any) -> Any:
    """Return a value after a while."""
    time.sleep(NAP_S)
    return value


def slow_add(one: int, other: int) -> int:
    """Return a sum after a while."""
    return nap(one + other)


def squares(client: Client, seed: int) -> tuple[list[Any], list[int]]:
    """Submit calls that depend on each other; return their futures and what they should give."""
    first = client.map(nap, range(seed, seed + CALLS), pure=False)
    second = client.map(slow_add, first[: CALLS // 2], first[CALLS // 2 :], pure=False)
    total = client.submit(sum, second, pure=False)
    pairs = [2 * seed + 2 * i + CALLS // 2 for i in range(CALLS // 2)]
    return [total, *second], [sum(pairs), *pairs]


def chunked(seed: int) -> da.Array:
    """Return an array of several stages, each of which takes a while."""
    side = 20 * CHUNKS
    x = da.from_array(np.random.default_rng(seed).random((side, side)), chunks=20).map_blocks(nap, dtype=float)
    return (x + x.T - x.mean(axis=0)).sum(axis=1)


def shuffled(seed: int) -> Any:
    """Return a dataframe that is merged with another and then grouped, by a shuffle over tasks."""
    draw = np.random.default_rng(seed)
    left = pd.DataFrame({"a": draw.integers(0, 40, 300), "b": draw.random(300)})
    right = pd.DataFrame({"a": np.arange(40), "c": draw.random(40)})
    slow = dd.from_pandas(left, npartitions=6, sort=False).map_partitions(nap, meta=left)
    merged = slow.merge(dd.from_pandas(right, npartitions=3), on="a", shuffle_method="tasks")
    return merged.groupby("a").agg({"b": "sum", "c": "max"}, split_out=2, shuffle_method="tasks")


@dataclass(frozen=True)
class Ward:
    """A folder in which tasks watch that a lock is held by one of them at a time, and a counter that it guards."""

    folder: Path

    def enter(self) -> None:
        """Note that this process holds the lock, and that somebody else does too."""
        self.note("attempts")
        marker = self.folder / "held"
        try:
            marker.symlink_to(str(os.getpid()))
        except FileExistsError:
            holder = int(os.readlink(marker))
            if holder == os.getpid() or _alive(holder):
                self.note("violations", f"{holder} and {os.getpid()}")
            marker.unlink()
            marker.symlink_to(str(os.getpid()))

    def leave(self) -> None:
        """Note that this process will let the lock go."""
        (self.folder / "held").unlink()

    def count(self) -> None:
        """Add one to the counter, slowly enough that two at a time would be seen."""
        before = self.number("counter")
        time.sleep(NAP_S)
        fresh = self.folder / f"counter-{os.getpid()}"
        fresh.write_text(str(before + 1))
        fresh.rename(self.folder / "counter")
        self.note("done")

    def number(self, name: str) -> int:
        """Return the number in a file."""
        path = self.folder / name
        return int(path.read_text()) if path.exists() else 0

    def lines(self, name: str) -> list[str]:
        """Return the lines of a file."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def note(self, name: str, line: str = ".") -> None:
        """Add a line to a file."""
        with open(self.folder / name, "a") as file:
            file.write(f"{line}\n")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def counted(number: int, folder: Path) -> int:
    """Count one up under a lock of the whole federation."""
    ward = Ward(folder)
    with Lock(f"counter-{folder.name}"):
        ward.enter()
        ward.count()
        ward.leave()
    return number


class Load:
    """The work of one round: futures, and what they should give."""

    def __init__(self, client: Client, seed: int, folder: Path) -> None:
        self.client = client
        folder.mkdir()
        self.ward = Ward(folder)
        lazy = (chunked(seed), shuffled(seed))
        self.expected_lazy = [each.compute(**STOCK) for each in lazy]
        self.calls, self.expected_calls = squares(client, seed)
        self.locked = client.map(counted, range(0 if seed % LOCK_EVERY else LOCKED), folder=folder, pure=False)
        self.lazy = [client.compute(each) for each in lazy]

    @property
    def futures(self) -> list[Any]:
        """All futures."""
        return [*self.calls, *self.locked, *self.lazy]

    def check(self, timeout_s: float) -> None:
        """Wait for all results and compare them; raises TimeoutError, AssertionError."""
        gathered = self.client.sync(self.client._gather, self.futures, callback_timeout=timeout_s)
        calls, rest = gathered[: len(self.calls)], gathered[len(self.calls) :]
        assert calls == self.expected_calls
        assert rest[: len(self.locked)] == list(range(len(self.locked)))
        array, frame = rest[len(self.locked) :]
        np.testing.assert_allclose(array, self.expected_lazy[0])
        pd.testing.assert_frame_equal(frame.sort_index(), self.expected_lazy[1].sort_index())
        self._check_lock()

    def _check_lock(self) -> None:
        assert not self.ward.lines("violations"), "a lock was held twice"
        done, attempts = len(self.ward.lines("done")), len(self.ward.lines("attempts"))
        assert len(self.locked) <= done <= self.ward.number("counter") <= attempts
