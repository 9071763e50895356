"""Which tiny tasks run as one: the result is the same, and nothing that others need disappears."""

from __future__ import annotations

import itertools
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed.protocol import deserialize
from hypothesis import given, settings
from hypothesis import strategies as st

from daskfed.client.bundling import LONGEST_S, Bundling, Fact, Learned, Limits, bundled
from daskfed.client.graphs import MaterialisedGraph
from daskfed.client.submission import Submission, plan_graph
from daskfed.dask_private import Alias, DataNode, GraphNode, P2PBarrierTask, Task, TaskRef
from daskfed.messages import Constraint, Key
from daskfed.site.bundles import Bundle, Together
from tests.unit.client.graph_tools import opened

ALWAYS = Bundling(always=True)
NO_LIMITS = Limits(1000.0, 1000, float("inf"), 1000)
TINY = Learned(0.0001, 8)
KINDS = (Constraint(), Constraint(sites=("north",)), Constraint(retries=2))
SPANS = (None, {"name": ("a",), "ids": ("1",)}, {"name": ("b",), "ids": ("2",)})


def add(*values: Any) -> tuple[Any, ...]:
    """Return what tells from what it was made."""
    return values


def blocks(submission: Submission) -> list[dict[Key, GraphNode]]:
    """Return what the scheduler of a site has of each block."""
    payloads = (payload["expr"] for payload in submission.payloads)
    return [deserialize(expr.header, expr.frames).__dask_graph__() for expr in payloads]


def planned(graph: MaterialisedGraph, bundling: Bundling | None = ALWAYS) -> Submission:
    """Return the blocks of a graph."""
    return plan_graph(graph, map(str, itertools.count()), (), bundling)


def members(block: dict[Key, GraphNode]) -> list[list[Key]]:
    """Return the tasks of each bundle in a block."""
    return [[task.key for task in node.tasks] for node in block.values() if isinstance(node, Bundle)]


def bundles_of(tasks: dict[Key, GraphNode], *outputs: Key, seconds: float = 0.001, limits: Limits = NO_LIMITS) -> Any:
    """Return the bundles of tasks that are all alike."""
    facts = {key: Fact(None, seconds) for key in tasks}
    return [each.tasks for each in bundled(tasks, outputs, facts, lambda key: 8, limits)]


def chain(length: int) -> dict[Key, GraphNode]:
    """Return tasks each of which needs the one before."""
    names = [f"t-{n}" for n in range(length)]
    first = Task(names[0], add, 1)
    return {names[0]: first, **{b: Task(b, add, TaskRef(a)) for a, b in itertools.pairwise(names)}}


def tree(leaves: int, fan: int) -> dict[Key, GraphNode]:
    """Return a tree of sums, leaves first."""
    level: list[Key] = [f"leaf-{n}" for n in range(leaves)]
    tasks: dict[Key, GraphNode] = {key: Task(key, add, number) for number, key in enumerate(level)}
    for depth in itertools.count():
        if len(level) == 1:
            return tasks
        groups = [level[n : n + fan] for n in range(0, len(level), fan)]
        level = [f"sum-{depth}-{n}" for n in range(len(groups))]
        tasks |= {key: Task(key, add, *map(TaskRef, own)) for key, own in zip(level, groups, strict=True)}
    raise AssertionError


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_one() -> None:
    assert bundles_of(chain(5), "t-4") == [("t-0", "t-1", "t-2", "t-3", "t-4")]


def test_what_is_wanted_ends_a_bundle() -> None:
    assert bundles_of(chain(5), "t-1", "t-4") == [("t-0", "t-1"), ("t-2", "t-3", "t-4")]


def test_a_tree_is_one() -> None:
    ((*keys, last),) = bundles_of(tree(8, 2), "sum-2-0")
    assert last == "sum-2-0" and len(keys) == 14


def test_a_diamond_is_one() -> None:
    """Two tasks need the first, and nobody else does."""
    tasks: dict[Key, GraphNode] = {
        "a": Task("a", add),
        "b": Task("b", add, TaskRef("a")),
        "c": Task("c", add, TaskRef("a")),
        "d": Task("d", add, TaskRef("b"), TaskRef("c")),
    }
    assert bundles_of(tasks, "d") == [("a", "b", "c", "d")]


def test_what_two_bundles_need_is_in_neither() -> None:
    users: dict[Key, GraphNode] = {key: Task(key, add, TaskRef("a")) for key in ("b", "c")}
    tasks = {"a": Task("a", add), **users}
    assert bundles_of(tasks, "b", "c") == []


def test_a_bundle_is_no_longer_than_told() -> None:
    found = bundles_of(chain(50), "t-49", seconds=0.004, limits=NO_LIMITS._replace(seconds=0.009))
    assert {len(keys) for keys in found} == {2}


def test_a_bundle_has_no_more_tasks_than_told() -> None:
    assert {len(keys) for keys in bundles_of(chain(40), "t-39", limits=NO_LIMITS._replace(tasks=10))} == {10}


def test_a_tree_too_large_for_one_falls_into_even_parts() -> None:
    """So that threads have something to share."""
    found = bundles_of(tree(256, 4), "sum-3-0", limits=NO_LIMITS._replace(seconds=0.022))
    sizes = sorted(map(len, found))
    assert sizes[-1] == 21 and sizes.count(21) == 16


def test_results_that_are_large_stay_where_they_are() -> None:
    """A task that makes little of much is not dragged to where another one's input lies."""
    tasks: dict[Key, GraphNode] = {f"part-{n}": Task(f"part-{n}", add, TaskRef(f"x-{n}")) for n in range(8)}
    tasks["sum"] = Task("sum", add, *map(TaskRef, list(tasks)))
    facts = {key: Fact(None, 0.001) for key in tasks}
    sizes: dict[str, int] = {"x": 100_000_000}

    def nbytes(key: Any) -> int:
        return sizes.get(key.split("-")[0], 8)

    few = NO_LIMITS._replace(nbytes=1000)
    (found,) = bundled(tasks, ("sum",), facts, nbytes, few)
    assert found.key == "sum" and len(found.tasks) == 2
    sizes["x"] = 100
    assert [len(each.tasks) for each in bundled(tasks, ("sum",), facts, nbytes, few)] == [9]


def wide(width: int) -> dict[Key, GraphNode]:
    """Return tasks each of which two others need, and the sum of those."""
    tasks: dict[Key, GraphNode] = {f"a-{n}": Task(f"a-{n}", add, n) for n in range(width)}
    pairs = [(f"b-{n}", f"a-{n}", f"a-{(n + 1) % width}") for n in range(width)]
    tasks |= {key: Task(key, add, TaskRef(one), TaskRef(other)) for key, one, other in pairs}
    tasks["end"] = Task("end", add, *(TaskRef(key) for key, *_ in pairs))
    return tasks


def found_in(tasks: dict[Key, GraphNode], *outputs: Key, side: int = 1, slow: str = "") -> list[Together]:
    """Return the bundles of tasks that are all alike, but for those whose keys begin with what is slow."""
    facts = {key: Fact(None, 0.001) for key in tasks if not (slow and str(key).startswith(slow))}
    return bundled(tasks, outputs, facts, lambda key: 8, NO_LIMITS._replace(side=side))


def test_tasks_that_several_need_go_together() -> None:
    (sources,) = found_in(wide(12), "end", slow="end")
    assert sources.tasks == sources.results == tuple(f"a-{n}" for n in range(12))
    assert dask.utils.key_split(sources.key) == "a-bundle"


def test_several_run_side_by_side() -> None:
    """As many as threads are to be kept busy."""
    assert [len(each.tasks) for each in found_in(wide(12), "end", side=4, slow="end")] == [3, 3, 3, 3]
    assert found_in(wide(12), "end", side=12, slow="end") == []


def test_what_others_need_too_is_not_among_several_results() -> None:
    """The user, or a task that nobody has timed."""
    assert [len(each.tasks) for each in found_in(wide(12), "end", "a-3", slow="end")] == [11]
    assert found_in(wide(12), "end", slow="b") == []


# -- graphs ------------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> MaterialisedGraph:
    """Draw a graph with tasks of several kinds, with some wanted results, and with keys known outside."""
    tasks: dict[Key, GraphNode] = {}
    constraints: dict[Key, Constraint] = {}
    spans: dict[Key, Any] = {}
    for number in range(draw(st.integers(1, 40))):
        key = f"{draw(st.sampled_from('abc'))}-{number}"
        known = [*tasks, "outside"]
        needs = draw(st.lists(st.sampled_from(known), max_size=4))
        kind = draw(st.sampled_from(("task", "task", "task", "alias", "data")))
        if kind == "alias" and tasks:
            tasks[key] = Alias(key, draw(st.sampled_from(list(tasks))))
        elif kind == "data":
            tasks[key] = DataNode(key, number)
        else:
            tasks[key] = Task(key, add, number, *map(TaskRef, needs))
        if (constraint := draw(st.sampled_from((*KINDS, KINDS[0])))) != KINDS[0]:
            constraints[key] = constraint
        if span := draw(st.sampled_from(SPANS)):
            spans[key] = span
    ends = set(tasks).difference(*(node.dependencies for node in tasks.values()))
    wanted = ends | draw(st.sets(st.sampled_from(list(tasks))))
    if not draw(st.booleans()):
        constraints, spans = {}, {}
    return MaterialisedGraph(tasks, wanted, constraints, {"span": spans} if spans else {})


@settings(max_examples=200, deadline=None)
@given(graph=graphs())
def test_a_graph_gives_the_same(graph: MaterialisedGraph) -> None:
    """And what is wanted, or crosses from block to block, has a task of its own."""
    submission = planned(graph)
    together: dict[Key, Any] = {"outside": DataNode("outside", "x")}
    for spec, block in zip(submission.blocks, blocks(submission), strict=True):
        assert set(spec.outputs) <= block.keys() and spec.ntasks == len(block)
        needed = {key for node in block.values() for key in node.dependencies}
        assert needed - block.keys() == set(spec.inputs)
        together |= {key: node for key, node in block.items() if key not in together}
    wanted = sorted(graph.wanted)
    plain = {**graph.tasks, "outside": DataNode("outside", "x")}
    assert dask.get(together, wanted) == dask.get(plain, wanted)


@settings(max_examples=200, deadline=None)
@given(graph=graphs())
def test_tasks_of_a_bundle_are_alike(graph: MaterialisedGraph) -> None:
    spans = graph.annotations.get("span", {})
    for keys in (keys for block in blocks(planned(graph)) for keys in members(block)):
        assert len({graph.constraints.get(key) for key in keys}) == 1
        assert len({str(spans.get(key)) for key in keys}) == 1


def coroutine_graph() -> MaterialisedGraph:
    async def wait(value: Any) -> Any:
        return value

    tasks = {**chain(3), "wait": Task("wait", wait, TaskRef("t-2")), "end": Task("end", add, TaskRef("wait"))}
    return MaterialisedGraph(tasks, {"end"})


def test_coroutines_stay_alone() -> None:
    """A worker awaits them; a bundle could not."""
    (block,) = blocks(planned(coroutine_graph()))
    assert list(block) == ["t-2", "wait", "end"]


def test_actors_stay_alone() -> None:
    """With all that is in their block: they are named to its site."""
    submission = plan_graph(MaterialisedGraph(chain(4), {"t-3"}), map(str, itertools.count()), {"t-1"}, ALWAYS)
    assert not any(map(members, blocks(submission)))


def test_tasks_of_a_shuffle_stay_alone() -> None:
    """Transfers, the barrier, and those that need it."""
    barrier = P2PBarrierTask("barrier", add, TaskRef("transfer"), spec=None)
    tasks: dict[Key, GraphNode] = {
        "source": Task("source", add),
        "part": Task("part", add, TaskRef("source")),
        "transfer": Task("transfer", add, TaskRef("part")),
        "barrier": barrier,
        "unpack": Task("unpack", add, TaskRef("barrier")),
        "next": Task("next", add, TaskRef("unpack")),
        "end": Task("end", add, TaskRef("next")),
    }
    bundles = [keys for block in blocks(planned(MaterialisedGraph(tasks, {"end"}))) for keys in members(block)]
    assert sorted(bundles) == [["next", "end"], ["source", "part"]]


# -- what is known -----------------------------------------------------------------------------------------------------


def test_what_nobody_timed_stays_alone() -> None:
    graph = MaterialisedGraph(tree(64, 8), {"sum-1-0"})
    assert not any(map(members, blocks(planned(graph, Bundling()))))
    assert not any(map(members, blocks(planned(graph, Bundling({"sum": TINY})))))
    timed = Bundling({"sum": TINY, "leaf": TINY})
    assert sum(map(len, blocks(planned(graph, timed)))) == 9


def test_what_takes_long_stays_alone() -> None:
    graph = MaterialisedGraph(tree(64, 8), {"sum-1-0"})
    slow = Bundling({"sum": TINY, "leaf": Learned(0.1, 8)})
    assert sum(map(len, blocks(planned(graph, slow)))) > 64


def test_more_threads_more_bundles() -> None:
    """No thread waits since bundles are long."""
    graph = MaterialisedGraph(tree(4096, 8), {"sum-3-0"})
    counts = [
        sum(map(len, blocks(planned(graph, Bundling({"sum": TINY, "leaf": TINY}, threads))))) for threads in (1, 64)
    ]
    assert counts[1] > 2 * counts[0] > 20


def test_no_bundle_is_expected_to_take_long() -> None:
    graph = MaterialisedGraph(tree(4096, 8), {"sum-3-0"})
    found = blocks(planned(graph, Bundling({"sum": Learned(0.001, 8), "leaf": Learned(0.001, 8)}, 1)))
    assert max(len(keys) for block in found for keys in members(block)) <= LONGEST_S / 0.001


def test_an_array_gives_the_same() -> None:
    x = da.ones((200, 200), chunks=20)
    y = ((x + x.T) * 2 - x.mean(axis=0)).sum(axis=1)
    graph = opened(y, persist=True)
    together = {key: node for block in blocks(planned(graph)) for key, node in block.items()}
    assert len(together) < len(graph.tasks) / 2
    keys = sorted(graph.wanted)
    found = np.concatenate(dask.get(together, keys))
    assert found == pytest.approx(np.asarray(y.compute(scheduler="synchronous")))
