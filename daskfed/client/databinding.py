"""Tasks that read below what a site declares as its ``data`` go to that site.

The sites say in their hello what they have and whether that binds: ``strict`` sites get the tasks by constraint, as
``at`` would do it; to the others they are drawn, as the site that they are *near*. Looked at are the roots of a graph,
and the stores that lie in it as values count for the tasks that use them. What ``at`` or ``workers=`` has bound stays
as it is. Without sites that declare data nothing is looked for at all.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from daskfed.client.calls import Calls, call_of_submit, calls_of_map
from daskfed.client.constraints import EMPTY
from daskfed.client.graphs import MaterialisedGraph
from daskfed.client.notes import Tasks, taken_apart
from daskfed.client.reading import Finder, Reads
from daskfed.dask_private import DataNode, GraphNode, MapExpr, Task, execute_subgraph
from daskfed.errors import ConfigurationError
from daskfed.locations import with_parents
from daskfed.messages import Constraint, Key

STRICT = "strict"
SHOWN = 3  # paths that an error names
KNOWN = 10_000  # paths of which it is remembered who has them


class Place(NamedTuple):
    """Where a task belongs by what it reads."""

    sites: tuple[str, ...]  # any of these
    strict: bool  # it must run there

    def of(self, constraint: Constraint) -> tuple[Constraint, tuple[str, ...]]:
        """Return the constraint of a task that belongs here, and near what it is."""
        return (replace(constraint, sites=self.sites), ()) if self.strict else (constraint, self.sites)


@dataclass
class DataSites:
    """Which sites have which data, by location."""

    sites: dict[str, dict[str, bool]] = field(default_factory=dict)  # location -> site -> whether it is strict
    strict: tuple[str, ...] = ()  # sites whose data binds
    _known: dict[str, dict[str, bool]] = field(default_factory=dict)  # what was looked up, which many tasks share

    @classmethod
    def of(cls, facts: Mapping[str, Mapping[str, Any]]) -> DataSites:
        """Make it from what ``client.sites()`` returns."""
        found = cls(strict=tuple(name for name, each in facts.items() if each.get("data_binding") == STRICT))
        for name, each in facts.items():
            for where in each.get("data", ()):
                found.sites.setdefault(where, {})[name] = name in found.strict
        return found

    def __bool__(self) -> bool:
        return bool(self.sites)

    def place(self, paths: Iterable[str]) -> Place | None:
        """Return where a task belongs that reads these locations.

        None where no site has any of them, or sites that are strict have different ones.
        """
        held = self._held(paths)
        if bound := [holders for holders in held if any(holders.values())]:
            sites = set(bound[0]).intersection(*bound[1:])
            return Place(tuple(sorted(sites)), strict=True) if sites else None
        counts = Counter(site for holders in held for site in holders)
        most = max(counts.values(), default=0)
        return Place(tuple(sorted(site for site in counts if counts[site] == most)), strict=False) if held else None

    def divides(self, paths: Iterable[str]) -> bool:
        """Whether sites have some of these locations, and no site has all of those."""
        held = self._held(paths)
        return bool(held) and not set(held[0]).intersection(*held[1:])

    def _held(self, paths: Iterable[str]) -> list[dict[str, bool]]:
        return [holders for path in paths if (holders := self._holders(path))]

    def _holders(self, path: str) -> dict[str, bool]:
        if (known := self._known.get(path)) is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            known = self._known[path] = {}
            for where in with_parents(path):
                known |= self.sites.get(where, {})
        return known


# -- graphs ------------------------------------------------------------------------------------------------------------


def bound_to_data(graph: MaterialisedGraph, data: DataSites) -> MaterialisedGraph:
    """Return a graph whose tasks are bound to the sites of what they read, or near them.

    Raises ConfigurationError where a site is strict, and a task reads what cannot be told, or from two such sites.
    """
    return _Binding(graph, data).run() if data else graph


class _Binding:
    def __init__(self, graph: MaterialisedGraph, data: DataSites) -> None:
        self.graph = graph
        self.data = data
        self.tasks: Tasks = dict(graph.tasks)
        self.constraints = dict(graph.constraints)
        self.annotations = {name: dict(values) for name, values in graph.annotations.items()}
        self.near: dict[Key, tuple[str, ...]] = {}
        self._finder = Finder()
        self._stores: dict[Key, Reads] = {}  # what the values in the graph read
        self._placed: dict[tuple[int, Place], Constraint] = {}  # by id of the constraint before; shared, as those were

    def run(self) -> MaterialisedGraph:
        todo = list(self.tasks)
        while todo:
            key = todo.pop()
            if not is_bound(self.constraints.get(key, EMPTY)) and self._is_root(node := self.tasks[key]):
                todo += self._bind(key, node)
        return replace(
            self.graph, tasks=self.tasks, constraints=self.constraints, annotations=self.annotations, near=self.near
        )

    def _is_root(self, node: GraphNode) -> bool:
        return all(isinstance(self.tasks.get(need), DataNode) for need in node.dependencies)

    def _bind(self, key: Key, node: GraphNode) -> Collection[Key]:
        """Bind a root; return the keys of its parts if it had to be taken apart."""
        reads = self._reads(key, node)
        if len(reads.paths) > 1 and _is_fused(node) and self.data.divides(reads.paths):
            return self._take_apart(key, node)
        if (place := self.data.place(reads.paths)) is not None:
            self._put(key, place)
        elif not isinstance(node, DataNode):
            check(key, reads, self.data)
        return ()

    def _reads(self, key: Key, node: GraphNode) -> Reads:
        if isinstance(node, DataNode):
            return self._store(key)
        reads = self._finder.reads(node)
        for need in node.dependencies:
            reads.add(self._store(need))
        return reads

    def _store(self, key: Key) -> Reads:
        if key not in self._stores:
            self._stores[key] = self._finder.reads(self.tasks[key])
        return self._stores[key]

    def _put(self, key: Key, place: Place) -> None:
        before = self.constraints.get(key, EMPTY)
        if not place.strict:
            self.near[key] = place.sites
            return
        if (id(before), place) not in self._placed:
            self._placed[id(before), place] = place.of(before)[0]
        self.constraints[key] = self._placed[id(before), place]

    def _take_apart(self, key: Key, node: GraphNode) -> Collection[Key]:
        """Replace a task in which Dask has fused what reads at different sites by the tasks in it."""
        parts = taken_apart(key, node)
        self.tasks |= parts
        for values in (self.constraints, *self.annotations.values()):
            if key in values:
                values.update(dict.fromkeys(parts, values[key]))
        return list(parts)


def is_bound(constraint: Constraint) -> bool:
    """Whether the user said where a task is to run."""
    return bool(constraint.sites or constraint.workers)


def check(key: Key, reads: Reads, data: DataSites) -> None:
    """Raise ConfigurationError where a site is strict and the task ``key``, which belongs nowhere, may read there."""
    if not data.strict:
        return
    sites = ", ".join(map(repr, data.strict))
    todo = f'say where it is to run, as in "with at({data.strict[0]!r}):" around what builds it'
    if data.divides(reads.paths):
        shown = ", ".join(list(reads.paths)[:SHOWN])
        raise ConfigurationError(
            f"task {key!r} reads {shown}, which are at different sites, and the data of {sites} binds "
            f"(data-binding: strict): read them in tasks of their own, or {todo}"
        )
    if reads.unclear and not reads.paths:
        raise ConfigurationError(
            f"task {key!r} reads files ({reads.unclear[0]}), and from what path cannot be told, while the data of "
            f"{sites} binds (data-binding: strict): give it an absolute path or a URL, or {todo}"
        )


def _is_fused(node: GraphNode) -> bool:
    return isinstance(node, Task) and node.func is execute_subgraph


# -- calls -------------------------------------------------------------------------------------------------------------


def calls_by_place(
    expr: Any, constraint: Constraint, data: DataSites, size: int
) -> Iterator[tuple[Calls, Constraint, tuple[str, ...]]]:
    """Yield the batches of calls of an expression of ``submit`` or ``map``, their constraint, and near what they are.

    At most ``size`` calls are in a batch, and those belong to the same sites. Raises ConfigurationError as
    :func:`bound_to_data` does.
    """
    free = bool(data) and not is_bound(constraint)
    if not isinstance(expr, MapExpr):
        place = _place_of_call(expr, data) if free else None
        yield call_of_submit(expr), *(place.of(constraint) if place else (constraint, ()))
        return
    keys, columns = list(expr.keys), list(expr.iterables)
    groups = _rows_by_place(expr, keys, columns, data) if free else {None: []}
    for place, rows in groups.items():
        some = (keys, columns) if len(groups) == 1 else _selected(keys, columns, rows)
        for calls in calls_of_map(expr.func, some[1], some[0], expr.kwargs, size=size):
            yield calls, *(place.of(constraint) if place else (constraint, ()))


def _selected(keys: list[Key], columns: list[Any], rows: Collection[int]) -> tuple[list[Key], list[Any]]:
    lists = map(list, columns)
    return [keys[row] for row in rows], [[column[row] for row in rows] for column in lists]


def _place_of_call(expr: Any, data: DataSites) -> Place | None:
    ((key, task),) = expr.operand("dsk").items()
    return _place(key, Finder().reads(task), data)


def _rows_by_place(expr: Any, keys: list[Key], columns: list[Any], data: DataSites) -> dict[Place | None, list[int]]:
    finder, found = Finder(), dict[Place | None, list[int]]()
    fixed = list(expr.kwargs.values())
    total = min([len(keys), *map(len, columns)])
    telling = [column for column in columns if not _is_numeric(column)]
    rows = zip(*telling, strict=False) if telling else itertools.repeat(())
    for number, (key, row) in enumerate(itertools.islice(zip(keys, rows, strict=False), total)):
        place = _place(key, finder.call(expr.func, [*row, *fixed]), data)
        found.setdefault(place, []).append(number)
    return found


def _place(key: Key, reads: Reads, data: DataSites) -> Place | None:
    place = data.place(reads.paths)
    if place is None and not reads.has_inputs:
        check(key, reads, data)
    return place


def _is_numeric(column: Any) -> bool:
    return isinstance(column, range) or getattr(getattr(column, "dtype", None), "kind", "O") in "biufcmM"
