"""What the tests of client-side graphs share: opening collections as a client does, and looking into tasks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import dask
from dask._expr import FinalizeCompute
from dask.base import collections_to_expr
from dask.core import flatten
from distributed.protocol import deserialize

from daskfed.client.assembly import split_final
from daskfed.client.graphs import MaterialisedGraph, materialise
from daskfed.client.notes import Noted
from daskfed.client.submission import plan_graph
from daskfed.client.versions import PYTHON
from daskfed.dask_private import DataNode, Task
from daskfed.messages import Constraint, Key

NORTH, SOUTH, WEST = ("north",), ("south",), ("west",)
ALL_FIELDS = {  # as given to ``at`` or ``dask.annotate``
    "sites": ["north", "scratch=era5"],
    "environment": "gpu",
    "workers": ["tcp://10.0.0.1:1", "node7"],
    "allow_other_workers": True,
    "resources": {"licence": 2, "GPU": 1},
    "retries": 3,
    "priority": 5,
}
FULL = Constraint(  # what they mean
    sites=("north", "scratch=era5"),
    environment="gpu",
    workers=("tcp://10.0.0.1:1", "node7"),
    allow_other_workers=True,
    resources=(("GPU", 1.0), ("licence", 2.0)),
    retries=3,
    priority=5,
)
ALL_CONSTRAINED = replace(FULL, python=PYTHON)  # what a block says that was given all of it


def computing(*collections: Any) -> tuple[Any, list[Key]]:
    """Return the expression that ``dask.compute`` hands to a client, and its keys."""
    return _optimised(FinalizeCompute(collections_to_expr(collections)))


def persisting(*collections: Any) -> tuple[Any, list[Key]]:
    """Return the expression that ``dask.persist`` hands to a client, and its keys."""
    return _optimised(collections_to_expr(collections))


def _optimised(expr: Any) -> tuple[Any, list[Key]]:
    expr = expr.optimize()
    return expr, list(flatten(expr.__dask_keys__()))


def opened(*collections: Any, persist: bool = False, **annotations: Any) -> MaterialisedGraph:
    """Return the graph of collections as a client opens it."""
    return materialise(*(persisting if persist else computing)(*collections), annotations)


def computed(*collections: Any) -> tuple[Any, ...]:
    """Compute collections as a client does: run the graph, then put the results together here."""
    expr, keys = computing(*collections)
    graph, assemblies = split_final(materialise(expr, keys))
    wanted = list(graph.wanted)
    values = dict(zip(wanted, dask.get(graph.tasks, wanted), strict=True))
    return tuple(assemblies[key].run(values) if key in assemblies else values[key] for key in keys)


def sites_of(graph: MaterialisedGraph, key: Key) -> tuple[str, ...]:
    """Return the sites that a task is bound to; an empty tuple for one that may run anywhere."""
    constraint = graph.constraints.get(key)
    return constraint.sites if constraint else ()


def sites_by_prefix(graph: MaterialisedGraph, prefix: str) -> set[tuple[str, ...]]:
    """Return the different sites of the tasks whose key begins like this; fails where there is no such task."""
    keys = [key for key in graph.tasks if name_of(key).startswith(prefix)]
    assert keys, f"no task {prefix}… in {sorted(map(name_of, graph.tasks))}"
    return {sites_of(graph, key) for key in keys}


def name_of(key: Key) -> str:
    """Return the name in a key."""
    return str(key[0] if isinstance(key, tuple) else key)


def inside(node: Any) -> Iterator[Any]:
    """Yield everything in a task: functions, arguments, tasks in it, values; however deep."""
    if isinstance(node, DataNode):
        yield from inside(node.value)
    elif isinstance(node, Task):
        yield node.func
        yield from inside([*node.args, *node.kwargs.values()])
    elif isinstance(node, dict):
        yield from inside(list(node.values()))
    elif isinstance(node, (list, tuple, set)):
        for item in node:
            yield from inside(item)
    else:
        yield node


def tasks_with(graph: MaterialisedGraph, wanted: Any) -> list[Key]:
    """Return the keys of the tasks in which there is such a thing: a type, or an equal string or function."""
    return [key for key, node in graph.tasks.items() if any(_is(part, wanted) for part in inside(node))]


def assert_bound(graph: MaterialisedGraph, keys: Iterable[Key], sites: tuple[str, ...]) -> None:
    """Assert that these are some tasks, and that each is bound to these sites."""
    keys = list(keys)
    assert keys
    assert {key: sites_of(graph, key) for key in keys} == dict.fromkeys(keys, sites)


def assert_blocks(graph: MaterialisedGraph, keys: Iterable[Key], constraint: Constraint) -> None:
    """Assert that these are some tasks, and that each block with any of them has exactly this constraint."""
    submission = plan_graph(graph, map(str, itertools.count()))
    keys, found = set(keys), set()
    for block, payload in zip(submission.blocks, submission.payloads, strict=True):
        expr = payload["expr"]
        mine = keys.intersection(deserialize(expr.header, expr.frames).__dask_graph__())
        assert not mine or block.constraint == constraint
        found |= mine
    assert keys and found == keys


def assert_clean(graph: MaterialisedGraph) -> None:
    """Assert that the notes with which constraints travel were all taken out of the tasks."""
    assert not [key for key, node in graph.tasks.items() if any(isinstance(part, Noted) for part in inside(node))]


def _is(part: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(part, wanted)
    return part is wanted or (isinstance(wanted, str) and isinstance(part, str) and part == wanted)
