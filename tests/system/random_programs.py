"""Random graphs of small tasks, some of them bound to sites, and what they should give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask
from hypothesis import strategies as st

from daskfed import at


@dataclass(frozen=True)
class Program:
    """A graph: for each task the numbers of earlier ones that it takes, and the site that it is bound to, if any."""

    sites: tuple[str, ...]  # any of which may run what is not bound
    tasks: tuple[tuple[tuple[int, ...], str | None], ...]
    wanted: tuple[int, ...]  # whose results are asked for

    def lazy(self, salt: int, nap_s: float = 0.0) -> list[Any]:
        """Return the wanted results as delayed objects; each task sleeps for ``nap_s``."""
        made: list[Any] = []
        for number, (inputs, site) in enumerate(self.tasks):
            with at(site or list(self.sites)):
                task = dask.delayed(mixed, pure=True)(number, salt, *(made[i] for i in inputs), nap_s=nap_s)
            made.append(task)
        return [made[i] for i in self.wanted]

    def expected(self, salt: int) -> list[int]:
        """Return the wanted results as stock Dask gives them."""
        graph = {f"t{i}": (mixed, i, salt, *(f"t{j}" for j in inputs)) for i, (inputs, _) in enumerate(self.tasks)}
        return list(dask.get(graph, [f"t{i}" for i in self.wanted]))


@st.composite
def programs(draw: st.DrawFn, names: Sequence[str], least: int = 1) -> Program:
    """Draw a program of at least ``least`` tasks over one or more of the sites with these names."""
    sites = tuple(names[: draw(st.integers(1, len(names)))])
    size = draw(st.integers(least, 30))
    where = st.sampled_from((None, *sites))
    tasks = []
    for i in range(size):
        inputs = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        tasks.append((tuple(inputs), draw(where)))
    wanted = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4, unique=True))
    return Program(sites, tuple(tasks), tuple(wanted))


def mixed(number: int, salt: int, *values: int, nap_s: float = 0.0) -> int:
    """Return a number that depends on all arguments and their order; the salt keeps examples apart."""
    time.sleep(nap_s)
    total = number + salt + 1
    for value in values:
        total = (total * 31 + value) % 1_000_003
    return total
