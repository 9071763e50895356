"""Cutting: every graph falls into pieces that give its result, in an order without circles, each in its place."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.core import flatten
from dask.order import order
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daskfed.client.contraction import Nodes, Placements
from daskfed.client.cutting import Piece, cut
from daskfed.client.packing import Limits, Packing, Units
from daskfed.dask_private import Alias, DataNode, GraphNode, P2PBarrierTask, Task, TaskRef
from daskfed.errors import ConfigurationError
from daskfed.messages import Constraint, Key

NORTH, SOUTH = Constraint(sites=("north",)), Constraint(sites=("south",))
PLACES = (NORTH, SOUTH, Constraint(resources=(("GPU", 1.0),)), Constraint(priority=5), Constraint(retries=2))
FREE = Constraint()

Graph = dict[Key, GraphNode]


def mix(*values: Any) -> int:
    """Return a number that depends on all values and their order."""
    return zlib.crc32(repr(values).encode())


def task(key: Key, *needs: Key) -> Task:
    return Task(key, mix, str(key), *map(TaskRef, needs))


def barrier(key: Key, *needs: Key) -> P2PBarrierTask:
    return P2PBarrierTask(key, mix, str(key), *map(TaskRef, needs), spec=None)


def graph_of(nodes: Iterable[GraphNode]) -> Graph:
    return {node.key: node for node in nodes}


def opened(collection: Any) -> tuple[Graph, list[Key]]:
    """Return the optimised graph of a collection, and its keys."""
    (collection,) = dask.optimize(collection)
    graph = dask._task_spec.convert_legacy_graph(dict(collection.__dask_graph__()))
    return graph, list(flatten(collection.__dask_keys__()))


def placement(constraint: Constraint) -> Constraint:
    return replace(constraint, retries=0)


def crossing(pieces: list[Piece]) -> set[Key]:
    return {key for piece in pieces for key in piece.inputs}


def homes(pieces: list[Piece]) -> dict[Key, int]:
    """Return the number of the piece that each key is in; for a copied key, of the last one."""
    return {key: number for number, piece in enumerate(pieces) for key in piece.tasks}


def path_length(pieces: list[Piece]) -> int:
    """Return the length of the longest path through the pieces."""
    makers = {key: number for number, piece in enumerate(pieces) for key in piece.outputs}
    length: list[int] = []
    for piece in pieces:  # inputs come first
        length.append(1 + max((length[makers[key]] for key in piece.inputs if key in makers), default=0))
    return max(length)


def depth(graph: Mapping[Key, GraphNode]) -> int:
    """Return how many tasks must run one after the other."""
    length: dict[Key, int] = {}
    for key in sorted(graph, key=order(graph).__getitem__):  # inputs come first
        length[key] = 1 + max((length[need] for need in graph[key].dependencies if need in graph), default=0)
    return max(length.values())


def check(
    graph: Mapping[Key, GraphNode],
    wanted: Collection[Key],
    pieces: list[Piece],
    constraints: Mapping[Key, Constraint],
    cap: int,
) -> None:
    """Fail unless these pieces are a legal cut of the graph."""
    check_keys(graph, wanted, pieces)
    check_edges(graph, pieces)
    for piece in pieces:
        check_place(piece, constraints)
        check_order(piece)
        whole = any(isinstance(node, P2PBarrierTask) for node in piece.tasks.values())
        assert whole or len(piece.tasks) <= cap


def check_keys(graph: Mapping[Key, GraphNode], wanted: Collection[Key], pieces: list[Piece]) -> None:
    copies = Counter(key for piece in pieces for key in piece.tasks)
    assert copies.keys() == graph.keys()
    assert all(isinstance(graph[key], DataNode) for key, count in copies.items() if count > 1)
    assert all(piece.tasks[key] is graph[key] for piece in pieces for key in piece.tasks)
    given_out = Counter(key for piece in pieces for key in piece.outputs)
    assert set(given_out.values()) <= {1}
    assert given_out.keys() == (crossing(pieces) | set(wanted)) & graph.keys()


def check_edges(graph: Mapping[Key, GraphNode], pieces: list[Piece]) -> None:
    makers = {key: piece for piece in pieces for key in piece.outputs}
    for piece in pieces:
        needs = {need for node in piece.tasks.values() for need in node.dependencies}
        assert set(piece.inputs) == needs - piece.tasks.keys()
        assert len(piece.inputs) == len(set(piece.inputs))
        assert set(piece.outputs) <= piece.tasks.keys()
        assert all(key not in graph or makers[key].stage < piece.stage for key in piece.inputs)
    assert [piece.stage for piece in pieces] == sorted(piece.stage for piece in pieces)


def check_place(piece: Piece, constraints: Mapping[Key, Constraint]) -> None:
    """Tasks agree in their place; those without one may only inherit it from an input."""
    own = {key: constraints.get(key, FREE) for key in piece.tasks if not isinstance(piece.tasks[key], DataNode)}
    for key, constraint in own.items():
        assert constraint.priority == piece.constraint.priority
        if placement(constraint) != placement(piece.constraint):
            assert placement(constraint) == Constraint(priority=constraint.priority)
            assert piece.tasks[key].dependencies & piece.tasks.keys()
    assert piece.constraint.retries >= max((one.retries for one in own.values()), default=0)


def check_order(piece: Piece) -> None:
    assert list(piece.tasks) == list(piece.priorities)
    assert list(piece.priorities.values()) == sorted(piece.priorities.values())
    assert piece.rank == min(piece.priorities.values())


def run(pieces: list[Piece], outside: Mapping[Key, Any]) -> dict[Key, Any]:
    """Run the pieces one after the other; each sees only its inputs and gives away only its outputs."""
    known = dict(outside)
    for piece in pieces:
        inputs = {key: DataNode(key, known[key]) for key in piece.inputs}
        known |= zip(piece.outputs, dask.get({**piece.tasks, **inputs}, list(piece.outputs)), strict=True)
    return known


# -- any graph -------------------------------------------------------------------------------------------------------

OUTSIDE: dict[Key, int] = {"held-0": 17, "held-1": 23}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, set[Key]]:
    """Draw a graph and keys that are wanted of it; some nodes are values, aliases, barriers or need held keys."""
    graph: Graph = {}
    barriers = draw(st.booleans())
    for number in range(draw(st.integers(1, 40))):
        key: Key = ("k", number)
        near = draw(st.integers(1, 8))
        kind = draw(st.sampled_from(["task"] * 6 + ["value", "alias", "held", "barrier"]))
        needs = draw(st.sets(st.integers(max(0, number - near), number - 1), max_size=4)) if number else set()
        names: list[Key] = [("k", need) for need in sorted(needs)]
        if kind == "value":
            graph[key] = DataNode(key, number)
        elif kind == "alias" and names:
            graph[key] = Alias(key, names[0])
        elif kind == "barrier" and barriers:
            graph[key] = barrier(key, *names)
        else:
            graph[key] = task(key, *names, *(draw(st.sets(st.sampled_from(list(OUTSIDE)))) if kind == "held" else ()))
    wanted = set(draw(st.sets(st.sampled_from(sorted(graph, key=str)))))
    return graph, wanted | sinks(graph)


def sinks(graph: Graph) -> set[Key]:
    return graph.keys() - {need for node in graph.values() for need in node.dependencies}


def places(graph: Graph) -> st.SearchStrategy[dict[Key, Constraint]]:
    if any(isinstance(node, P2PBarrierTask) for node in graph.values()):
        return st.just({})  # see test_a_shuffle_bound_to_two_places_is_an_error
    return st.dictionaries(st.sampled_from([*graph, *OUTSIDE]), st.sampled_from(PLACES))


@settings(max_examples=120)
@given(graph=graphs(), slabs=st.integers(1, 6), cap=st.integers(1, 30), data=st.data())
def test_any_cut_is_legal_and_gives_the_result(
    graph: tuple[Graph, set[Key]], slabs: int, cap: int, data: st.DataObject
) -> None:
    tasks, wanted = graph
    constraints = data.draw(places(tasks))
    pieces = cut(tasks, wanted, constraints, slabs=slabs, cap=cap)
    check(tasks, wanted, pieces, constraints, cap)
    assert path_length(pieces) <= 1 + pieces[-1].stage
    assert path_length(pieces) <= 1 + depth(tasks)  # what many need may go before everything else
    held: Graph = {key: DataNode(key, value) for key, value in OUTSIDE.items()}
    keys = sorted(wanted, key=str)
    found = run(pieces, OUTSIDE)
    assert [found[key] for key in keys] == list(dask.get({**tasks, **held}, keys))


@given(graph=graphs(), data=st.data())
def test_cutting_again_gives_the_same(graph: tuple[Graph, set[Key]], data: st.DataObject) -> None:
    tasks, wanted = graph
    constraints = data.draw(places(tasks))
    rank = order(tasks)
    assert cut(tasks, wanted, constraints, rank=rank) == cut(dict(tasks), list(wanted), constraints, rank=rank)


@given(width=st.integers(1, 40), sources=st.integers(1, 40), cap=st.integers(1, 40))
@example(width=5, sources=20, cap=9)
def test_copies_count_in_the_cap(width: int, sources: int, cap: int) -> None:
    values = [DataNode(("v", one), one) for one in range(sources)]
    users = [task(("t", one), *(value.key for value in values)) for one in range(width)]
    graph = graph_of([*values, *users])
    check(graph, sinks(graph), cut(graph, sinks(graph), cap=cap), {}, cap)


# -- what the pieces look like ---------------------------------------------------------------------------------------


def test_a_tree_is_cut_below_its_top() -> None:
    graph, keys = opened(da.ones((4000, 4000), chunks=100).mean())
    pieces = cut(graph, keys)
    check(graph, keys, pieces, {}, 1000)
    stages = Counter(piece.stage for piece in pieces)
    assert stages.keys() == {0, 1} and stages[0] >= 12 and stages[1] == 1
    assert len(crossing(pieces)) <= 30  # of 3,700: results near the top of the tree


@pytest.mark.parametrize("name", ["columns", "own columns", "transposed", "rechunk"])
def test_independent_parts_exchange_nothing(name: str) -> None:
    y = da.random.random((2000, 2000), chunks=100)
    collection = {
        "columns": y.mean(axis=0),
        "own columns": (y - y.mean(0)) / y.std(0),
        "transposed": y + y.T,
        "rechunk": y.rechunk((2000, 20), method="tasks"),
    }[name]
    graph, keys = opened(collection)
    pieces = cut(graph, keys)
    assert not crossing(pieces)
    assert len(pieces) == (16 if name == "transposed" else 20)
    sizes = [len(piece.tasks) for piece in pieces]
    assert max(sizes) <= 1.5 * min(sizes)  # 20 columns fall into 20 pieces, not into 16 of which some are double


def test_what_uses_a_mean_stays_with_its_data() -> None:
    t = da.random.random((365, 40, 40), chunks=(5, 20, 20))
    graph, keys = opened(t - t.mean(axis=0))
    pieces = cut(graph, keys)
    assert 1 + pieces[-1].stage == path_length(pieces) == 3
    home = homes(pieces)
    for piece in (piece for piece in pieces if piece.stage == 2):  # the subtractions
        data = {home[key] for key in piece.inputs if pieces[home[key]].stage == 0}
        assert len(data) <= 2


def test_a_matrix_product_is_cut_by_its_results() -> None:
    y = da.random.random((1200, 1200), chunks=100)
    graph, keys = opened(y @ y.T)
    pieces = cut(graph, keys)
    assert 1 + pieces[-1].stage == 2
    partial = [key for key in crossing(pieces) if graph[key].dependencies]
    assert len(partial) < len(graph) / 10  # most products are summed where they are made


def test_work_is_spread_where_one_task_feeds_many() -> None:
    graph = graph_of([task("load"), *(task(("sim", i), "load") for i in range(1000))])
    pieces = cut(graph, sinks(graph))
    assert len(pieces) >= 12 and max(len(piece.tasks) for piece in pieces) <= 130


def test_steps_of_a_simulation_run_side_by_side() -> None:
    cells, steps = 64, 60
    graph = graph_of(task((0, i)) for i in range(cells))
    for key in itertools.product(range(1, steps), range(cells)):
        before: list[Key] = [(key[0] - 1, i) for i in (key[1] - 1, key[1], key[1] + 1) if 0 <= i < cells]
        graph[key] = task(key, *before)
    pieces = cut(graph, sinks(graph))
    check(graph, sinks(graph), pieces, {}, 1000)
    largest: Counter[int] = Counter()
    for piece in pieces:
        largest[piece.stage] = max(largest[piece.stage], len(piece.tasks))
    assert largest.total() < 0.6 * len(graph)  # tasks one after the other, where every piece has a site of its own


def test_a_long_chain_is_cut_at_the_cap() -> None:
    count = 100_000
    graph = graph_of([task(0), *(task(i, i - 1) for i in range(1, count))])
    pieces = cut(graph, [count - 1], rank={i: i for i in range(count)})
    assert [len(piece.tasks) for piece in pieces] == [1000] * 100
    assert [piece.inputs for piece in pieces] == [(), *((i - 1,) for i in range(1000, count, 1000))]


def test_a_hundred_thousand_independent_tasks() -> None:
    graph = graph_of(task(i) for i in range(100_000))
    pieces = cut(graph, graph.keys())
    assert len(pieces) == 100 and {len(piece.tasks) for piece in pieces} == {1000}


def test_a_wide_fan_in() -> None:
    graph = graph_of([*(task(i) for i in range(20_000)), task("sum", *range(20_000))])
    pieces = cut(graph, ["sum"])
    check(graph, ["sum"], pieces, {}, 1000)
    assert path_length(pieces) == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_graphs(count: int) -> None:
    graph = graph_of([task(0), *(task(i, i - 1) for i in range(1, count))])
    (piece,) = cut(graph, [count - 1])
    assert (piece.inputs, piece.outputs, piece.stage, piece.rank) == ((), (count - 1,), 0, 0)


def test_packing_keeps_to_the_cap() -> None:
    """Two groups of units that fit the goal one by one, but not together."""
    nodes = Nodes([["k"]] * 4, [4, 3, 1, 2], [[]] * 4, [[]] * 4, [False] * 4, [0] * 4, [0] * 4, Placements(), set())
    units = Units(nodes, [0] * 4)
    units.waits = [5, 5, 6, 6]
    limits = Limits(slabs=1, goal=8, least=1, unit=8, cap=8)
    assert list(Packing(units, limits, share=10).run([0, 1, 2, 3])) == [[0, 1], [2, 3]]


def test_nothing_gives_nothing() -> None:
    assert cut({}, []) == []


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        cut({}, [], cap=0)


# -- sources that are shared -----------------------------------------------------------------------------------------


class Hidden:
    """Looks small to dask.sizeof, but is not."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.zeros(nbytes, "u1")

    def __repr__(self) -> str:
        return f"Hidden({self.data.size})"


class Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("not this one")


def reading_from(source: GraphNode, chunks: int = 200) -> Graph:
    """Return a graph in which chunks are read from one source and reduced by tens."""
    reads = [task(("read", i), source.key) for i in range(chunks)]
    means = [task(("mean", i), *(("read", j) for j in range(i, i + 10))) for i in range(0, chunks, 10)]
    return graph_of([source, *reads, *means])


@pytest.mark.parametrize("value", [Hidden(1000), 5, np.zeros(100)])
def test_a_small_source_goes_into_every_piece(value: object) -> None:
    graph = reading_from(DataNode("store", value))
    pieces = cut(graph, sinks(graph))
    assert len(pieces) >= 10 and not crossing(pieces)
    assert all("store" in piece.tasks for piece in pieces)


@pytest.mark.parametrize(
    "source", [DataNode("store", Hidden(10**6)), DataNode("store", np.zeros(10**6)), DataNode("store", Unpicklable())]
)
def test_other_sources_are_made_once(source: GraphNode) -> None:
    graph = reading_from(source)
    pieces = cut(graph, sinks(graph))
    assert sum(source.key in piece.tasks for piece in pieces) == 1


def test_a_task_is_not_copied_and_ties_nothing_together() -> None:
    """Two runs of a task may differ; so it goes first, and what also uses data is cut as if it were not there."""
    loads = [task(("load", i)) for i in range(200)]
    graph = graph_of([task("now"), *loads, *(task(("use", i), "now", ("load", i)) for i in range(200))])
    pieces = cut(graph, sinks(graph))
    check(graph, sinks(graph), pieces, {}, 1000)
    assert crossing(pieces) == {"now"} and len(pieces) >= 12


def test_a_wanted_source_is_given_out_once() -> None:
    graph = reading_from(DataNode("store", 5))
    pieces = cut(graph, sinks(graph) | {"store"})
    assert len(pieces) > 1
    assert [piece.outputs.count("store") for piece in pieces] == [1] + [0] * (len(pieces) - 1)


def test_a_wanted_source_keeps_its_place() -> None:
    graph = reading_from(DataNode("store", 5))
    pieces = cut(graph, sinks(graph) | {"store"}, {"store": NORTH})
    (piece,) = (piece for piece in pieces if "store" in piece.outputs)
    assert piece.constraint == NORTH


def test_a_bound_source_is_copied_to_the_tasks_that_are_bound() -> None:
    graph = reading_from(DataNode("store", 5))
    pieces = cut(graph, sinks(graph), dict.fromkeys(graph, NORTH))
    assert not crossing(pieces) and all(piece.constraint == NORTH for piece in pieces)


# -- aliases and futures ---------------------------------------------------------------------------------------------


def test_aliases_may_be_wanted_and_crossed() -> None:
    graph = graph_of([*(task(i) for i in range(100)), *(Alias(("a", i), i) for i in range(100))])
    graph |= graph_of([task("all", *(("a", i) for i in range(100)))])
    wanted: set[Key] = {("a", 3), "all", 7}
    pieces = cut(graph, wanted)
    check(graph, wanted, pieces, {}, 1000)
    found = run(pieces, {})
    assert found[("a", 3)] == mix("3")


def test_a_future_is_known_outside() -> None:
    graph = graph_of([Alias("held", "held"), task("next", "held")])
    (piece,) = cut(graph, ["next", "held"])
    assert (tuple(piece.tasks), piece.inputs, piece.outputs) == (("next",), ("held",), ("next",))


def test_a_cycle_is_an_error() -> None:
    graph = graph_of([task("a", "b"), task("b", "a")])
    with pytest.raises(RuntimeError, match="Cycle"):
        cut(graph, ["a"])


# -- P2P shuffles ----------------------------------------------------------------------------------------------------


def shuffled(kind: str) -> Any:
    frame = dd.from_pandas(pd.DataFrame({"b": np.arange(4000) % 50, "c": np.arange(4000.0)}), npartitions=40)
    other = dd.from_pandas(pd.DataFrame({"b": np.arange(4000) % 50, "d": np.arange(4000.0)}), npartitions=30)
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        collection = {
            "rechunk": lambda: da.ones((2000, 2000), chunks=100).rechunk((2000, 20), method="p2p"),
            "shuffle": lambda: frame.shuffle("b", npartitions=20),
            "merge": lambda: frame.merge(other, on="b").c.sum(),
        }[kind]()
        return dask.optimize(collection)[0] if kind == "rechunk" else collection.optimize()


@pytest.mark.parametrize("kind", ["rechunk", "shuffle", "merge"])
def test_a_p2p_shuffle_stays_whole(kind: str) -> None:
    collection = shuffled(kind)
    graph = dask._task_spec.convert_legacy_graph(dict(collection.__dask_graph__()))
    keys = list(flatten(collection.__dask_keys__()))
    pieces = cut(graph, keys, cap=30)
    check(graph, keys, pieces, {}, 30)
    home = homes(pieces)
    barriers = {key for key, node in graph.items() if isinstance(node, P2PBarrierTask)}
    assert barriers
    users = {key for key, node in graph.items() if barriers & node.dependencies}
    for key in barriers:
        transfers = set(graph[key].dependencies)
        transfers |= {node.target for need in transfers if isinstance(node := graph[need], Alias)}
        assert {home[need] for need in transfers} == {home[key]}
    assert all({home[need] for need in graph[key].dependencies & barriers} == {home[key]} for key in users)


def test_a_transfer_behind_an_alias_belongs_to_its_shuffle() -> None:
    graph = graph_of([task("t"), Alias("a", "t"), barrier("b", "a"), task("u", "b")])
    (piece,) = cut(graph, ["u"], cap=2)
    assert len(piece.tasks) == 4


def test_a_shuffle_that_a_path_leaves_and_enters_again() -> None:
    """The second barrier waits for what the first has unpacked, and one task unpacks both: they are one."""
    nodes = [task("t1"), barrier("b1", "t1"), task("u1", "b1"), task("mid", "u1"), barrier("b2", "mid")]
    graph = graph_of([*nodes, task("u2", "b1", "b2"), task("end", "u2")])
    pieces = cut(graph, ["end"], cap=2)
    check(graph, ["end"], pieces, {}, 2)
    assert len({homes(pieces)[node.key] for node in nodes}) == 1


def test_a_shuffle_bound_to_two_places_is_an_error() -> None:
    graph = graph_of([task("t1"), task("t2"), barrier("b", "t1", "t2"), task("u", "b")])
    with pytest.raises(ConfigurationError, match="task-based"):
        cut(graph, ["u"], {"t1": NORTH, "t2": SOUTH})
    (piece,) = cut(graph, ["u"], {"t1": NORTH})
    assert piece.constraint == NORTH


# -- places ----------------------------------------------------------------------------------------------------------


def test_what_follows_data_of_one_site_stays_there() -> None:
    reads = [task(("read", i)) for i in range(100)]
    steps = [task(("step", i), ("read", i)) for i in range(100)]
    sums = [task(("sum", i), *(("step", j) for j in range(i, i + 10))) for i in range(0, 100, 10)]
    graph = graph_of([*reads, *steps, *sums])
    constraints: dict[Key, Constraint] = {("read", i): NORTH if i < 50 else SOUTH for i in range(100)}
    pieces = cut(graph, sinks(graph), constraints)
    check(graph, sinks(graph), pieces, constraints, 1000)
    assert not crossing(pieces)
    assert {piece.constraint for piece in pieces} == {NORTH, SOUTH}


def test_a_task_with_data_of_two_sites_is_free() -> None:
    graph = graph_of([task("n"), task("s"), task("both", "n", "s"), task("after", "both")])
    *reads, last = cut(graph, ["after"], {"n": NORTH, "s": SOUTH})
    assert {piece.constraint for piece in reads} == {NORTH, SOUTH}
    assert (tuple(last.tasks), last.constraint, last.stage) == (("both", "after"), FREE, 1)


def test_tasks_of_two_priorities_are_apart_and_retries_are_not() -> None:
    graph = graph_of([task("a"), task("b", "a"), task("c", "b")])
    once, often, soon = Constraint(retries=1), Constraint(retries=3), Constraint(priority=1)
    first, second = cut(graph, ["c"], {"a": once, "b": often, "c": soon})
    assert (tuple(first.tasks), first.constraint) == (("a", "b"), often)
    assert (tuple(second.tasks), second.constraint) == (("c",), soon)


def test_a_bound_task_does_not_bind_what_it_needs() -> None:
    graph = graph_of([task("a"), task("gpu", "a"), task("after", "gpu")])
    gpu = Constraint(resources=(("GPU", 1.0),))
    first, second = cut(graph, ["after"], {"gpu": gpu})
    assert (tuple(first.tasks), first.constraint) == (("a",), FREE)
    assert (tuple(second.tasks), second.constraint) == (("gpu", "after"), gpu)


def test_tasks_near_keys_that_are_held_at_two_sites_are_apart() -> None:
    graph = graph_of(task(("t", i), f"held-{i}") for i in range(40))
    held: dict[Key, Constraint] = {f"held-{i}": NORTH if i % 2 else SOUTH for i in range(40)}
    for piece in cut(graph, graph.keys(), held, slabs=4):
        assert piece.constraint == FREE
        assert {held[key].sites for key in piece.inputs} == {piece.near}
