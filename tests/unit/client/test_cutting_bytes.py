"""What cutting costs in bytes between two sites that hold the data: five jobs against the lower bound by max-flow."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from dask.core import flatten
from dask.order import order

from daskfed.client.cutting import Piece, cut
from daskfed.dask_private import GraphNode
from daskfed.messages import Constraint, Key

NORTH, SOUTH = Constraint(sites=("north",)), Constraint(sites=("south",))
BAR = 1.2  # the bar for bytes moved over the lower bound
PARTS = 16


@dataclass
class Job:
    """A graph, where its sources are bound, and the bytes of every result."""

    tasks: dict[Key, GraphNode]
    wanted: list[Key]
    constraints: dict[Key, Constraint]
    nbytes: dict[Key, int]

    def cut(self) -> list[Piece]:
        return cut(self.tasks, self.wanted, self.constraints)


def job(collection: Any, place: Callable[[Key], Constraint | None]) -> Job:
    """Return a job; ``place`` tells where a source is bound."""
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        # Not fused: a client never fuses tasks that are bound with tasks that are not.
        opened = collection.optimize(fuse=False) if hasattr(collection, "expr") else collection
        graph = dask._task_spec.convert_legacy_graph(dict(opened.__dask_graph__()))
    wanted = list(flatten(opened.__dask_keys__()))
    needed = set(wanted)
    todo = list(wanted)
    while todo:
        more = graph[todo.pop()].dependencies - needed
        needed |= more
        todo += more
    tasks = {key: graph[key] for key in needed}
    constraints = {key: where for key in tasks if not tasks[key].dependencies and (where := place(key))}
    assert set(constraints.values()) == {NORTH, SOUTH}
    return Job(tasks, wanted, constraints, sizes(tasks))


def sizes(tasks: Mapping[Key, GraphNode]) -> dict[Key, int]:
    values: dict[Key, Any] = {}
    rank = order(dict(tasks))
    for key in sorted(tasks, key=rank.__getitem__):
        values[key] = tasks[key]({need: values[need] for need in tasks[key].dependencies})
    return {key: len(pickle.dumps(value, protocol=5)) for key, value in values.items()}


def lower_bound(nbytes: Mapping[Key, int], members: Mapping[Key, set[Any]], places: Mapping[Any, Constraint]) -> int:
    """Return the fewest bytes that must cross, each key counted once, where these members may be placed freely.

    A minimum cut of the hypergraph in which each key joins its maker and its users (Lawler 1973).
    """
    net = nx.DiGraph()
    net.add_nodes_from(["north", "south"])
    for key, ends in members.items():
        net.add_edge(("in", key), ("out", key), capacity=nbytes[key])
        net.add_edges_from(pair for end in ends for pair in (((0, end), ("in", key)), (("out", key), (0, end))))
    for end, place in places.items():
        net.add_edge(*(("north", (0, end)) if place == NORTH else ((0, end), "south")))
    return int(nx.minimum_cut_value(net, "north", "south", flow_func=nx.algorithms.flow.boykov_kolmogorov))


def bound_of_tasks(work: Job) -> int:
    members: dict[Key, set[Any]] = {key: {key} for key in work.tasks}
    for key, node in work.tasks.items():
        for need in node.dependencies:
            members[need].add(key)
    return lower_bound(work.nbytes, members, work.constraints)


def bound_of_pieces(work: Job, pieces: list[Piece]) -> int:
    members: dict[Key, set[Any]] = {key: {number} for number, piece in enumerate(pieces) for key in piece.outputs}
    for number, piece in enumerate(pieces):
        for key in piece.inputs:
            members[key].add(number)
    places = {number: piece.constraint for number, piece in enumerate(pieces) if piece.constraint.sites}
    return lower_bound(work.nbytes, members, places)


def moved(work: Job, pieces: list[Piece], choose: Callable[[Piece, dict[str, int]], str]) -> int:
    """Return the bytes that cross where each piece goes to the site that ``choose`` names, as it becomes ready."""
    held: dict[str, set[Key]] = {"north": set(), "south": set()}
    total = 0
    for piece in pieces:
        missing = {site: sum(work.nbytes[key] for key in piece.inputs if key not in held[site]) for site in held}
        site = piece.constraint.sites[0] if piece.constraint.sites else choose(piece, missing)
        total += missing[site]
        held[site].update(piece.inputs, piece.outputs)
    return total


def cheapest(piece: Piece, missing: dict[str, int]) -> str:
    """The site that needs fewest bytes now."""
    return min(missing, key=missing.__getitem__)


def as_hinted(piece: Piece, missing: dict[str, int]) -> str:
    """The site that the cut hints at."""
    return piece.near[0]


# -- the jobs --------------------------------------------------------------------------------------------------------


def arrays(side: int = 600) -> tuple[da.Array, da.Array]:
    x, y = (da.random.default_rng(seed).random((side, side), chunks=100) for seed in range(2))
    return x, y


def frame(names: str, rows: int = 20_000) -> dd.DataFrame:
    rng = np.random.default_rng(len(names))
    columns = {"id": rng.permutation(rows), "g": rng.integers(0, 50, rows)}
    columns |= {name: rng.random(rows) for name in names}
    return dd.from_pandas(pd.DataFrame(columns), npartitions=PARTS, sort=False)


def apart(north: Any, south: Any) -> Callable[[Key], Constraint | None]:
    """Bind all of one array to the north, all of another to the south."""
    places = {north.name: NORTH, south.name: SOUTH}
    return lambda key: places.get(key[0]) if isinstance(key, tuple) else None


def halves(count: int) -> Callable[[Key], Constraint | None]:
    """Bind sources by the first index of their chunk."""
    return lambda key: NORTH if isinstance(key, tuple) and key[1] < count else SOUTH


def product_sum() -> Job:
    x, y = arrays()
    return job((x * y).sum(), apart(x, y))


def matmul() -> Job:
    x, y = arrays()
    return job(x @ y.T, apart(x, y))


def matmul_of_halves() -> Job:
    x, y = arrays()
    return job(x @ y.T, halves(3))


def climatology() -> Job:
    t = da.random.default_rng(0).random((365, 100, 100), chunks=(5, 50, 50))
    return job(t - t.mean(axis=0), halves(37))


def groupby() -> Job:
    return job(frame("ab").groupby("g").a.mean(), halves(PARTS // 2))


def merge() -> Job:
    """All columns; where few are left, an index that the shuffle spells out weighs more."""
    return job(frame("abcd").merge(frame("efgh"), on="id"), halves(PARTS // 2))


# A site chosen piece by piece cannot look ahead; in these jobs it need not.
SIMPLE = [product_sum, matmul, climatology, groupby]


@pytest.mark.parametrize("make", [*SIMPLE, matmul_of_halves, merge], ids=lambda make: make.__name__)
def test_pieces_can_be_placed_near_the_lower_bound(make: Callable[[], Job]) -> None:
    work = make()
    pieces = work.cut()
    bound = bound_of_tasks(work)
    best, hinted, greedy = bound_of_pieces(work, pieces), moved(work, pieces, as_hinted), moved(work, pieces, cheapest)
    assert 0 < best <= BAR * bound
    assert hinted <= BAR * bound
    assert greedy <= BAR * bound or make not in SIMPLE


def test_pieces_of_a_product_agree_on_where_to_go() -> None:
    """Each needs few rows of one array and all of the other, so that the cheapest site is the same for all."""
    x, y = arrays(800)
    work = job(x @ y.T, apart(x, y))
    one_array = sum(work.nbytes[key] for key in work.constraints) / 2
    crossed = moved(work, work.cut(), cheapest)
    assert crossed <= BAR * one_array


def test_work_on_data_of_one_site_is_apart_from_work_on_data_of_two() -> None:
    work = matmul_of_halves()
    pieces = work.cut()
    where = {key: piece.constraint.sites for piece in pieces for key in piece.tasks if piece.constraint.sites}
    for piece in pieces:
        needs = [{where[need] for need in node.dependencies if need in where} for node in piece.tasks.values()]
        assert len({len(sites) for sites in needs if sites}) <= 1
