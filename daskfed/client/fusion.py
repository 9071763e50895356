"""Dask's optimisations of arrays, bags and delayed objects, kept from fusing tasks with different constraints.

Stock Dask fuses the layers of an array whatever their ``workers`` or ``retries`` are, and forgets all annotations when
it then fuses tasks. The functions here run the same passes of Dask and stand in their way where a task would be fused
into one with another note (see :mod:`daskfed.client.notes`). A task without a note may be fused into one that has one,
and the result has that note: it was allowed anywhere, so also there. Only what uses a result that is to be kept for
later runs (``cache``) is not fused with what makes it. A graph without any note goes through stock Dask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dask
from dask.blockwise import Blockwise, fuse_roots, optimize_blockwise
from dask.core import reverse_dict, toposort
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.utils import ensure_dict

from daskfed.client.keywords import CACHE
from daskfed.client.notes import (
    Note,
    Tasks,
    bake,
    flat_keys,
    has_notes,
    has_notes_inside,
    noted_tasks,
    put_notes,
)
from daskfed.client.stock import array_optimisation, bag_optimise, delayed_optimise, without_annotations
from daskfed.dask_private import GraphNode, Task, execute_subgraph, fuse_linear_task_spec
from daskfed.messages import Key


def optimise_array(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Optimise the graph of arrays; as ``dask.array.optimization.optimize``."""
    if not has_notes(dsk):
        return array_optimisation().optimize(dsk, keys, **kwargs)
    return without_annotations(_optimise_array, dsk, flat_keys(keys))


def optimise_bag(dsk: Any, keys: Any, fuse_keys: Iterable[Key] | None = None, **kwargs: Any) -> Any:
    """Optimise the graph of bags; as ``dask.bag.core.optimize``."""
    fuse_keys = list(fuse_keys or ())
    if not has_notes(dsk):
        return bag_optimise()(dsk, keys, fuse_keys=fuse_keys, **kwargs)
    tasks, notes = noted_tasks(dsk)
    tasks = bag_optimise()(tasks, flat_keys(keys), fuse_keys=fuse_keys + barriers(tasks, notes), **kwargs)
    return _with_notes(tasks, notes)


def optimise_delayed(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Optimise the graph of delayed objects; as ``dask.delayed.optimize``."""
    if not has_notes(dsk):
        return delayed_optimise()(dsk, keys, **kwargs)
    return without_annotations(_optimise_delayed, dsk, flat_keys(keys))


def dont_optimise(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Leave a graph as it is, but keep the annotations of its layers."""
    return bake(dsk)


class Guarded:
    """An optimiser that we do not know: it gets the notes inside the tasks, where it will hardly lose them."""

    def __init__(self, optimiser: Callable[..., Any]) -> None:
        self.optimiser = optimiser

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """Optimise a graph."""
        return without_annotations(self.optimiser, bake(dsk), keys, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guarded) and other.optimiser == self.optimiser

    def __hash__(self) -> int:
        return hash(self.optimiser)


def barriers(tasks: Mapping[Key, GraphNode], notes: Mapping[Key, Note]) -> list[Key]:
    """Return the keys that must not be fused into the one task that uses them.

    A key has the note of its task, or else what its inputs agree on: if they do not, it is like no other. So what
    combines two sites is not dragged to a third.
    """
    values = list(notes.values())
    if all(value == values[0] for value in values[1:]) and not (values and CACHE in values[0]):
        return []
    needs = {key: [dep for dep in node.dependencies if dep in tasks] for key, node in tasks.items()}
    users = reverse_dict(needs)
    belongs: dict[Key, Any] = {}
    found = []
    for key in toposort(needs, dependencies=needs):
        inputs = [belongs[dep] for dep in needs[key] if belongs[dep] is not None]
        own: Any = notes.get(key)
        if own is None and inputs:
            agreed = all(note == inputs[0] for note in inputs[1:]) and not _is_kept(inputs[0])
            own = inputs[0] if agreed else object()
        belongs[key] = own
        if len(needs[key]) == 1 and len(users[needs[key][0]]) == 1 and inputs and inputs[0] != own:
            found.append(needs[key][0])
    return found


def _is_kept(note: Any) -> bool:
    return isinstance(note, Mapping) and CACHE in note


def _optimise_array(dsk: Any, keys: list[Key]) -> Any:
    graph = _fuse_layers(dsk, keys)
    tasks, notes = noted_tasks(graph)
    if dask.config.get("optimization.fuse.active") is not False:
        tasks = fuse_linear_task_spec(tasks, keys=[*keys, *barriers(tasks, notes)])
        tasks = array_optimisation()._optimize_slices(tasks)
    return _with_notes(tasks, notes)


def _optimise_delayed(dsk: Any, keys: list[Key]) -> HighLevelGraph:
    if not dask.config.get("optimization.fuse.delayed"):
        return bake(delayed_optimise()(dsk, keys))
    tasks, notes = noted_tasks(dsk)
    tasks = fuse_linear_task_spec(tasks, [*keys, *barriers(tasks, notes)])
    return HighLevelGraph({"delayed": MaterializedLayer(_with_notes(tasks, notes))}, {"delayed": set()})


def _with_notes(tasks: Tasks, notes: Mapping[Key, Note]) -> Tasks:
    """Put notes into tasks that were fused since the notes were taken: the note of any of its parts is the task's."""
    after = {}
    for key, node in tasks.items():
        parts = [key, *node.args[0]] if isinstance(node, Task) and node.func is execute_subgraph else [key]
        note = next((notes[part] for part in parts if part in notes), None)
        if note is not None:
            after[key] = note
    return put_notes(tasks, after)


# -- fusing whole layers ---------------------------------------------------------------------------------------------


def _fuse_layers(dsk: Any, keys: list[Key]) -> HighLevelGraph:
    if not isinstance(dsk, HighLevelGraph):
        dsk = HighLevelGraph({"tasks": MaterializedLayer(ensure_dict(dsk))}, {"tasks": set()})
    tagged = _tagged(dsk)
    fused = fuse_roots(optimize_blockwise(tagged, keys=keys), keys=keys)
    return _untagged(fused, dsk).cull(set(keys))


def _tagged(graph: HighLevelGraph) -> HighLevelGraph:
    """Annotate each layer with nothing but a number: Dask fuses layers only where their annotations are equal."""
    tags = _shared_tags(graph, _own_tags(graph))
    layers = {name: _annotated(layer, _as_annotation(tags[name])) for name, layer in graph.layers.items()}
    return HighLevelGraph(layers, graph.dependencies)


def _own_tags(graph: HighLevelGraph) -> dict[str, int | None]:
    """Number the different notes of layers; a layer with notes inside its tasks is like no other."""
    different: list[Any] = []
    tags: dict[str, int | None] = {}
    for name, layer in graph.layers.items():
        note = object() if has_notes_inside(layer) else layer.annotations
        if not note:
            tags[name] = None
            continue
        if note not in different:
            different.append(note)
        tags[name] = different.index(note)
    return tags


def _shared_tags(graph: HighLevelGraph, tags: dict[str, int | None]) -> dict[str, int | None]:
    """Give untagged chunkwise layers the tag of their neighbours, where these agree, so that Dask may fuse them."""
    tags = dict(tags)
    ends = {tags[name] for name, layer in graph.layers.items() if CACHE in (layer.annotations or ())}
    order = [name for name in toposort(graph.layers, dependencies=graph.dependencies) if name in graph.layers]
    users = reverse_dict(graph.dependencies)
    for name in order:
        if tags[name] is None and isinstance(graph.layers[name], Blockwise):
            agreed = _agreed(tags[dep] for dep in graph.dependencies[name])
            tags[name] = None if agreed in ends else agreed
    for name in reversed(order):
        needs = graph.dependencies[name]
        if tags[name] is None and len(users[name]) == 1 and (isinstance(graph.layers[name], Blockwise) or not needs):
            (user,) = users[name]
            if {tags[dep] for dep in needs} <= {None, tags[user]}:
                tags[name] = tags[user]
    return tags


def _agreed(tags: Iterable[int | None]) -> int | None:
    different = {tag for tag in tags if tag is not None}
    return different.pop() if len(different) == 1 else None


def _untagged(fused: HighLevelGraph, graph: HighLevelGraph) -> HighLevelGraph:
    """Give each fused layer the annotations of the layers that went into it."""
    layers = {name: _annotated(layer, _note_of_parts(name, fused, graph)) for name, layer in fused.layers.items()}
    return HighLevelGraph(layers, fused.dependencies)


def _note_of_parts(name: str, fused: HighLevelGraph, graph: HighLevelGraph) -> Note | None:
    stack, seen = [name], {name}
    while stack:
        part = stack.pop()
        if graph.layers[part].annotations:
            return graph.layers[part].annotations  # type: ignore[no-any-return]
        gone = {dep for dep in graph.dependencies[part] if dep not in fused.layers} - seen
        stack.extend(gone)
        seen |= gone
    return None


def _annotated(layer: Layer, annotations: Note | None) -> Layer:
    layer = copy.copy(layer)
    layer.annotations = annotations
    return layer


def _as_annotation(tag: int | None) -> Note | None:
    return None if tag is None else {"daskfed": tag}
