"""From a collection's expression to tasks with a constraint each, and from some of these to what a site opens.

:func:`materialise` does on the client what a stock scheduler does when a graph arrives: it makes the tasks, applies the
annotations, drops what nobody needs. It also keeps the constraints that stock Dask would lose
(:mod:`daskfed.client.notes`, :mod:`daskfed.client.fusion`, :mod:`daskfed.client.frames`). :class:`BlockExpr` carries
part of the tasks to a site, whose stock scheduler opens it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dask.utils import ensure_dict

from daskfed.client import fusion
from daskfed.client.constraints import CONSTRAINING, EMPTY, annotations_of, constraint_of
from daskfed.client.keywords import TIMEOUT
from daskfed.client.limits import with_limits
from daskfed.client.notes import Note, Tasks, evaluated, flat_keys, noted_tasks, without_futures
from daskfed.client.plain_keys import with_plain_keys
from daskfed.client.stock import imported, without_annotations
from daskfed.dask_private import (
    Alias,
    AnnotationsTombstone,
    CompositeFinalizeCompute,
    ExprSequence,
    GraphNode,
    HLGExpr,
    HLGExprGroup,
    HLGExprSequence,
    HLGFinalizeCompute,
    LLGExpr,
    Task,
    convert_legacy_graph,
    cull,
)
from daskfed.messages import Constraint, Key
from daskfed.site.bundles import Together, with_bundles

_NO_NOTE: Note = {}


@dataclass(frozen=True)
class MaterialisedGraph:
    """The tasks of one submission, optimised and culled, with what is to be known about each."""

    tasks: Tasks
    wanted: set[Key]  # what the client asked for; a key that is not in ``tasks`` is known to the federation already
    constraints: dict[Key, Constraint] = field(default_factory=dict)  # only of keys that have one
    annotations: dict[str, dict[Key, Any]] = field(default_factory=dict)  # the others: span, names that users made up
    finals: frozenset[Key] = frozenset()  # keys of tasks that only put the parts of a result together for the client
    near: dict[Key, tuple[str, ...]] = field(default_factory=dict)  # of keys, the sites that have what they read
    known: dict[Key, bytes] = field(default_factory=dict)  # packed results that need not be made
    tokens: dict[Key, str] = field(default_factory=dict)  # of keys whose results are to be kept for later runs

    def restricted(self, tasks: Mapping[Key, GraphNode]) -> MaterialisedGraph:
        """Return the graph with other tasks instead, of which only those are kept that the wanted keys need."""
        kept = _needed(tasks, self.wanted)
        return replace(
            self,
            tasks=kept,
            constraints={key: value for key, value in self.constraints.items() if key in kept},
            annotations=_restricted(self.annotations, kept),
            finals=self.finals & kept.keys(),
        )


def materialise(
    expr: Any, keys: Iterable[Key], annotations: Note | None = None, kept: Collection[Key] = ()
) -> MaterialisedGraph:
    """Turn an optimised expression into tasks.

    ``keys`` are the wanted ones. ``annotations`` hold for every task, and give way to the annotations that a collection
    got when it was built. Futures inside tasks become references to their keys. Tasks of the names ``kept`` keep them.

    Raises ConfigurationError where an annotation is of the wrong type, and what Dask raises for a broken expression.
    """
    return without_annotations(_materialise, expr, set(keys), annotations or {}, kept)


def external_futures(graph: MaterialisedGraph) -> set[Key]:
    """Return the keys that a graph needs, or that are wanted from it, and that it does not make itself."""
    return {dep for node in graph.tasks.values() for dep in node.dependencies}.union(graph.wanted) - graph.tasks.keys()


def block_payload(
    graph: MaterialisedGraph,
    tasks: Mapping[Key, GraphNode] | Iterable[Key],
    bundles: Collection[Together] = (),
) -> BlockExpr:
    """Return what carries some tasks of a graph to a site, with their annotations; ready to be pickled.

    Each of ``bundles`` is some of the tasks that are to run as one.
    """
    if not isinstance(tasks, Mapping):
        tasks = {key: graph.tasks[key] for key in tasks}
    by_constraint: dict[Constraint, list[Key]] = {}
    for key in tasks:
        by_constraint.setdefault(graph.constraints.get(key, EMPTY), []).append(key)
    notes = [
        (name, value, keys)
        for constraint, keys in by_constraint.items()
        for name, value in annotations_of(constraint).items()
    ]
    notes += _grouped(_restricted(graph.annotations, tasks))
    return BlockExpr.compact(dict(tasks), notes, bundles)


class BlockExpr(LLGExpr):
    """Tasks with annotations, to be opened by the stock scheduler of a site.

    ``notes`` is a tuple of (name of an annotation, its value, keys that have it or None for all), so that a thousand
    tasks with the same annotation cost little more than one. ``bundles`` says which tasks the scheduler gets as one.
    """

    _parameters = ["dsk", "notes", "bundles"]
    _defaults = {"notes": (), "bundles": ()}

    @classmethod
    def of(cls, tasks: Mapping[Key, GraphNode], annotations: Mapping[str, Mapping[Key, Any]]) -> BlockExpr:
        """Make one from tasks and name of an annotation -> key -> value."""
        return cls.compact(tasks, _grouped(annotations))

    @classmethod
    def compact(
        cls,
        tasks: Mapping[Key, GraphNode],
        notes: Iterable[tuple[str, Any, Collection[Key]]],
        bundles: Iterable[Together] = (),
    ) -> BlockExpr:
        """Make one from tasks and (name of an annotation, value, keys); a token, else Dask would hash every task."""
        short = tuple((name, value, None if len(keys) == len(tasks) else list(keys)) for name, value, keys in notes)
        return cls(dict(tasks), short, tuple(bundles), _determ_token=uuid.uuid4().hex)

    @property
    def tasks(self) -> Tasks:
        """The tasks as they are without bundles."""
        return self.operand("dsk")  # type: ignore[no-any-return]

    def _layer(self) -> Tasks:
        bundles = self.operand("bundles")
        return with_bundles(self.tasks, bundles) if bundles else self.tasks

    def __dask_annotations__(self) -> dict[str, dict[Key, Any]]:
        """Return name of an annotation -> key -> value."""
        found: dict[str, dict[Key, Any]] = {}
        for name, value, keys in self.operand("notes"):
            found.setdefault(name, {}).update(dict.fromkeys(self.operand("dsk") if keys is None else keys, value))
        return found


def _materialise(expr: Any, wanted: set[Key], given: Note, kept: Collection[Key]) -> MaterialisedGraph:
    expr = _with_own_optimisers(expr)
    graph = convert_legacy_graph(ensure_dict(expr.__dask_graph__()))
    tasks, notes = noted_tasks(with_plain_keys(cull(graph, wanted)))
    notes = _with_layer_notes(notes, expr.__dask_annotations__(), tasks)
    tasks, notes = _without_aliases(tasks, notes, wanted.union(kept))
    tasks = {key: _plain(node, tasks) for key, node in tasks.items()}
    constraints, annotations = _sorted_out(tasks, notes, given)
    tasks = with_limits(tasks, annotations.pop(TIMEOUT, {}))
    finals = frozenset(key for key in _final_keys(expr, wanted, tasks) if key in tasks)
    return MaterialisedGraph(tasks, wanted, constraints, annotations, finals)


# -- annotations -----------------------------------------------------------------------------------------------------


def _with_layer_notes(
    notes: dict[Key, Note], by_name: Mapping[str, Mapping[Key, Any]], tasks: Collection[Key]
) -> dict[Key, Note]:
    """Add what Dask itself still knows of a key's annotations; what its task says wins."""
    known: dict[Key, dict[str, Any]] = {}
    for name, values in by_name.items():
        for key, value in values.items():
            if key in tasks and value is not None and not isinstance(value, AnnotationsTombstone):
                known.setdefault(key, {})[name] = value
    return {**known, **{key: {**known.get(key, {}), **note} if key in known else note for key, note in notes.items()}}


def _sorted_out(
    tasks: Collection[Key], notes: Mapping[Key, Note], given: Note
) -> tuple[dict[Key, Constraint], dict[str, dict[Key, Any]]]:
    """Return the constraint of each key, and its other annotations; keys that share a note are worked out once."""
    constraints: dict[Key, Constraint] = {}
    annotations: dict[str, dict[Key, Any]] = {}
    per_key = any(map(callable, given.values()))
    cache: dict[int, tuple[Constraint, Note]] = {}
    for key in tasks:
        note = notes.get(key, _NO_NOTE)
        found = None if per_key else cache.get(id(note))
        if found is None:
            both = {**evaluated(given, key), **note}
            other = {name: value for name, value in both.items() if name not in CONSTRAINING}
            found = cache[id(note)] = constraint_of(both), other
        constraint, other = found[0], dict(found[1])
        if constraint != EMPTY:
            constraints[key] = constraint
        for name, value in other.items():
            annotations.setdefault(name, {})[key] = value
    return constraints, annotations


def _grouped(annotations: Mapping[str, Mapping[Key, Any]]) -> list[tuple[str, Any, list[Key]]]:
    groups: dict[tuple[str, type, str], tuple[str, Any, list[Key]]] = {}
    for name, values in annotations.items():
        for key, value in values.items():
            groups.setdefault((name, type(value), repr(value)), (name, value, []))[2].append(key)
    return list(groups.values())


def _restricted(annotations: Mapping[str, Mapping[Key, Any]], keys: Collection[Key]) -> dict[str, dict[Key, Any]]:
    kept = {name: {key: value for key, value in values.items() if key in keys} for name, values in annotations.items()}
    return {name: values for name, values in kept.items() if values}


# -- tasks -----------------------------------------------------------------------------------------------------------


def _needed(tasks: Mapping[Key, GraphNode], wanted: Collection[Key]) -> Tasks:
    stack, kept = [key for key in wanted if key in tasks], {}
    while stack:
        key = stack.pop()
        if key not in kept:
            kept[key] = tasks[key]
            stack.extend(dep for dep in tasks[key].dependencies if dep in tasks)
    return {key: node for key, node in tasks.items() if key in kept}


def _without_aliases(tasks: Tasks, notes: dict[Key, Note], wanted: set[Key]) -> tuple[Tasks, dict[Key, Note]]:
    """Let a task take the key of its alias where nothing else refers to it: it saves a task that runs nothing.

    Another alias is bound as its target is, or it would carry a copy to another site.
    """
    aliases = [key for key, node in tasks.items() if isinstance(node, Alias)]
    if not aliases:
        return tasks, notes
    users: dict[Key, int] = {}
    for node in tasks.values():
        for dep in node.dependencies:
            users[dep] = users.get(dep, 0) + 1
    for key in aliases:
        while isinstance(node := tasks.get(key), Alias):
            target = node.target
            if target in wanted or target not in tasks or users[target] != 1 or type(tasks[target]) not in _MOVABLE:
                break
            tasks[key] = _moved(tasks.pop(target), key)
            if target in notes:
                notes[key] = notes.pop(target)
    for key in aliases:
        target = key
        while target not in notes and isinstance(node := tasks.get(target), Alias):
            target = node.target
        if target in notes:
            notes[key] = notes[target]
    return tasks, notes


def _moved(node: GraphNode, key: Key) -> GraphNode:
    return Alias(key, node.target) if isinstance(node, Alias) else node.substitute({}, key=key)


_MOVABLE = (Alias, Task)  # a barrier of a shuffle is known by its key


def _plain(node: GraphNode, tasks: Collection[Key]) -> GraphNode:
    """Return a task without futures in it; one that needs only tasks of the graph cannot have any."""
    return node if all(dep in tasks for dep in node.dependencies) else without_futures(node)


# -- expressions -----------------------------------------------------------------------------------------------------


def _with_own_optimisers(expr: Any) -> Any:
    """Return an expression whose graphs are optimised by us, also where the collection was made before we were there.

    The token stays, since the names of keys are made from it.
    """
    if isinstance(expr, HLGExpr):
        own = _own_optimiser(expr.low_level_optimizer)
        if own is expr.low_level_optimizer:
            return expr
        operands = [own if operand is expr.low_level_optimizer else operand for operand in expr.operands]
        return type(expr)(*operands, _determ_token=expr.deterministic_token)
    if isinstance(expr, (ExprSequence, HLGExprSequence)):
        parts = [_with_own_optimisers(part) for part in expr.operands]
        if any(part is not old for part, old in zip(parts, expr.operands, strict=True)):
            return type(expr)(*parts)
    return expr


def _own_optimiser(optimiser: Callable[..., Any] | None) -> Callable[..., Any] | None:
    if optimiser is None or isinstance(optimiser, fusion.Guarded) or optimiser in _OWN.values():
        return optimiser
    for (module, name), own in _OWN.items():
        if optimiser is getattr(imported(module), name, None):
            return own
    return fusion.Guarded(optimiser)


_OWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("dask.array.optimization", "optimize"): fusion.optimise_array,
    ("dask.bag.core", "optimize"): fusion.optimise_bag,
    ("dask.delayed", "optimize"): fusion.optimise_delayed,
    ("dask.base", "dont_optimize"): fusion.dont_optimise,
}


def _final_keys(expr: Any, wanted: Collection[Key], tasks: Tasks) -> Iterable[Key]:
    """Yield the keys of tasks that call nothing but the function with which a collection puts its result together.

    For arrays, bags and xarray the expression says which they are. A dataframe's is made by repartitioning to one
    partition, like that of a user who asks for that; either way it only concatenates what is wanted here.
    """
    finishing = dict(_finishing(expr))
    concat = getattr(imported("dask.dataframe.core"), "_concat", None)
    for key in wanted:
        node = tasks.get(key)
        if isinstance(node, Task) and (node.func in finishing.get(key, ()) or (concat and node.func is concat)):
            yield key


def _finishing(expr: Any) -> Iterable[tuple[Key, list[Callable[..., Any]]]]:
    """Yield the keys that compute() added to an expression, and the functions that their tasks may call."""
    if isinstance(expr, (ExprSequence, HLGExprSequence)):
        for part in expr.operands:
            yield from _finishing(part)
    elif isinstance(expr, HLGFinalizeCompute) and expr.postcompute:
        yield expr._name, [expr.postcompute[0]]
    elif isinstance(expr, HLGExprGroup):
        functions = [finish[0] for finish in expr.postcompute or () if finish]
        for key in flat_keys(expr.__dask_keys__()):
            if key in expr.hlg.layers:
                yield key, functions
    elif isinstance(expr, CompositeFinalizeCompute):
        yield expr._name, [expr.collection.__dask_postcompute__()[0]]
