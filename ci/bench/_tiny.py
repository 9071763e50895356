"""Graphs of about 10,000 tasks that take less than a millisecond each, with other keys each time."""

from __future__ import annotations

import itertools
import random
from typing import Any

import dask.dataframe as dd
import pandas as pd
from _graph import graph
from _work import combine, leaf
from dask.delayed import Delayed

TASKS = 10_000
FAN = 4  # of the tree
PARTS = 1_000  # of the dataframe
NEAR = 200  # tasks back that one of a random graph may need

_numbers = itertools.count()


def array() -> Any:
    """The mean of an array without the means of its columns."""
    return graph()


def groupby() -> Any:
    """The mean of a column by another one, of a frame in many small parts, without a shuffle."""
    frame = pd.DataFrame({"a": range(4 * PARTS), "b": range(4 * PARTS)}).assign(b=lambda f: f.b % 7)
    lazy = dd.from_pandas(frame, npartitions=PARTS)
    number = next(_numbers)
    return lazy.assign(a=lazy.a + number)[lazy.b != number % 7].groupby("b").a.mean(split_out=1)


def _combined(level: list[str], tasks: dict[Any, Any], number: int) -> Delayed:
    """Combine tasks, FAN at a time, until one is left."""
    for depth in itertools.count():
        if len(level) == 1:
            return Delayed(level[0], tasks)
        groups = [level[n : n + FAN] for n in range(0, len(level), FAN)]
        level = [f"combine-{number}-{depth}-{n}" for n in range(len(groups))]
        tasks |= {key: (combine, own) for key, own in zip(level, groups, strict=True)}
    raise AssertionError


def tree() -> Delayed:
    """A sum in many steps."""
    number = next(_numbers)
    count = TASKS * (FAN - 1) // FAN
    level = [f"leaf-{number}-{n}" for n in range(count)]
    tasks: dict[Any, Any] = {key: (leaf, n) for n, key in enumerate(level)}
    return _combined(level, tasks, number)


def dag(seed: int = 0) -> Delayed:
    """Tasks that need one to three of those shortly before them, as it happens; and the sum of what is left over."""
    number = next(_numbers)
    rng = random.Random(seed)
    tasks: dict[Any, Any] = {}
    names = [f"mix-{number}-{n}" for n in range(TASKS)]
    used: set[str] = set()
    for n, name in enumerate(names):
        near = names[max(0, n - NEAR) : n]
        needs = rng.sample(near, min(len(near), rng.choice((0, 1, 1, 1, 2, 2, 3))))
        used.update(needs)
        tasks[name] = (combine, needs) if needs else (leaf, n)
    left = [name for name in names if name not in used]
    return _combined(left, tasks, number)


GRAPHS = {"array": array, "dataframe groupby": groupby, "tree reduction": tree, "random DAG": dag}
