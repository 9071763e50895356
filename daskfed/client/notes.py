"""Constraints that travel inside the tasks they are about.

Dask keeps annotations on the layers of a graph and forgets them wherever it turns layers into plain tasks: in the
optimisation of arrays and bags, in ``delayed(f)(array)``, in ``from_dask_array``, and for dataframes everywhere. So a
note (the annotations of one task) is put into the task itself, by wrapping its function in :class:`Noted`. It then goes
where the task goes, through fusion, renaming and copying, until the client takes it out again with :func:`take_notes`.
A graph that never meets a daskfed client runs as it is: the wrapper just calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from dask.base import tokenize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.utils import ensure_dict, funcname, key_split

from daskfed.dask_private import (
    Alias,
    AnnotationsTombstone,
    DataNode,
    GraphNode,
    NestedContainer,
    Task,
    TaskRef,
    convert_legacy_graph,
    execute_subgraph,
)
from daskfed.messages import Key

Note: TypeAlias = Mapping[str, Any]  # annotations of one task
Tasks: TypeAlias = dict[Key, GraphNode]

T = TypeVar("T")


class Noted:
    """A function together with the note of the task that calls it."""

    __slots__ = ("func", "note")
    ever = False  # whether there was any in this process: if not, nobody needs to look for them

    def __init__(self, func: Callable[..., Any], note: Note) -> None:
        Noted.ever = True
        self.func = func
        self.note = dict(note)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.func(*args, **kwargs)

    def __reduce__(self) -> Any:
        return Noted, (self.func, self.note)

    def __dask_tokenize__(self) -> Any:
        return "noted", tokenize(self.func), tokenize(sorted(self.note.items()))

    @property
    def __name__(self) -> str:
        return funcname(self.func)  # type: ignore[no-any-return]


def put_note(node: Any, note: Note) -> Any:
    """Return a task with a note in it; one that has a note, or runs nothing (an alias), is returned as it is."""
    if not note or has_note(node):
        return node
    if isinstance(node, DataNode):
        return Task(node.key, Noted(_give, note), DataNode(None, node.value), _data_producer=True)
    if type(node) is Task:
        return _rebuilt(node, Noted(node.func, note), node.args, node.kwargs)
    if type(node) is tuple and node and callable(node[0]):  # how Dask used to write a task, and sometimes still does
        return (Noted(node[0], note), *node[1:])
    return node


def has_note(node: Any) -> bool:
    """Whether a task has a note in it, or a task inside it has."""
    if not Noted.ever or not isinstance(node, Task):
        return type(node) is tuple and bool(node) and isinstance(node[0], Noted)
    return isinstance(node.func, Noted) or any(map(has_note, _inner(node)))


def take_notes(node: Any) -> tuple[Any, list[Note]]:
    """Return a task without the notes in it, and the different notes."""
    if not has_note(node):
        return node, []
    found: list[Note] = []
    node = _take(node, found)
    return node, [note for i, note in enumerate(found) if note not in found[:i]]


def noted_tasks(graph: Mapping[Key, Any]) -> tuple[Tasks, dict[Key, Note]]:
    """Return the tasks of a graph without notes, and the note of each that has one.

    Notes are those in the tasks, and the annotations of layers. A task in which others with different notes were fused
    is taken apart again.
    """
    layered = layer_notes(graph) if isinstance(graph, HighLevelGraph) else {}
    tasks: Tasks = convert_legacy_graph(ensure_dict(graph))
    notes = {key: note for key, note in layered.items() if key in tasks}
    if not Noted.ever:
        return tasks, notes
    for key in [key for key, node in tasks.items() if has_note(node)]:
        node, found = take_notes(tasks[key])
        if len(found) == 1:
            tasks[key], notes[key] = node, found[0]
        else:
            _take_apart(key, tasks, notes)
    return tasks, notes


def layer_notes(graph: HighLevelGraph) -> dict[Key, Note]:
    """Return the note that each key has from the annotations of its layer."""
    notes: dict[Key, Note] = {}
    for layer in graph.layers.values():
        if layer.annotations:
            notes.update(_notes_of_layer(layer))
    return notes


def has_notes(graph: Any) -> bool:
    """Whether a graph has an annotated layer or a task with a note."""
    if not isinstance(graph, HighLevelGraph):
        return Noted.ever and any(map(has_note, graph.values()))
    return any(layer.annotations or has_notes_inside(layer) for layer in graph.layers.values())


def has_notes_inside(layer: Layer) -> bool:
    """Whether the tasks of a layer that Dask made from plain tasks have notes."""
    return Noted.ever and isinstance(layer, MaterializedLayer) and any(map(has_note, layer.values()))


def put_notes(tasks: Mapping[Key, Any], notes: Mapping[Key, Note]) -> Tasks:
    """Return the tasks with their notes in them."""
    return {key: put_note(node, notes[key]) if key in notes else node for key, node in tasks.items()}


def bake(graph: Any) -> Any:
    """Return a layered graph with the annotations of its layers also in the tasks, so that they outlive the layers."""
    if not isinstance(graph, HighLevelGraph) or not any(layer.annotations for layer in graph.layers.values()):
        return graph
    keys = graph.get_all_external_keys() if any(layer.has_legacy_tasks for layer in graph.layers.values()) else set()
    layers = {name: _baked(layer, keys) for name, layer in graph.layers.items()}
    return HighLevelGraph(layers, graph.dependencies)


def flat_keys(keys: Any) -> list[Key]:
    """Return a flat list of one key, or of keys nested in lists."""
    return list(flatten(keys if isinstance(keys, (list, set, frozenset)) else [keys]))


def without_futures(node: Any) -> Any:
    """Return a task whose references to futures are references to their keys: a future must not be pickled along."""
    if isinstance(node, TaskRef):
        return node if type(node) is TaskRef else TaskRef(node.key)
    if type(node) is not Task and not isinstance(node, NestedContainer):
        return node
    return _mapped(node, without_futures)


def _baked(layer: Layer, keys: Iterable[Key]) -> Layer:
    if not layer.annotations:
        return layer
    tasks = convert_legacy_graph(dict(layer), {*keys, *layer})
    return MaterializedLayer(put_notes(tasks, _notes_of_layer(layer)), annotations=layer.annotations)


def _notes_of_layer(layer: Layer) -> dict[Key, Note]:
    if not any(map(callable, layer.annotations.values())):
        return dict.fromkeys(layer, dict(layer.annotations))
    return {key: note for key in layer if (note := evaluated(layer.annotations, key))}


def evaluated(annotations: Note, key: Key) -> dict[str, Any]:
    """Return the annotations that one key has: some may be functions of the key, which may give none."""
    values = {name: value(key) if callable(value) else value for name, value in annotations.items()}
    return {name: v for name, v in values.items() if v is not None and not isinstance(v, AnnotationsTombstone)}


def _give(value: T) -> T:
    return value


def _inner(node: Task) -> Iterable[Any]:
    """Yield the tasks inside a task."""
    if _function(node) is execute_subgraph:
        yield from node.args[0].values()
    for arg in node.args:
        if isinstance(arg, Task):
            yield arg
    for arg in node.kwargs.values():
        if isinstance(arg, Task):
            yield arg


def _function(node: Task) -> Any:
    return node.func.func if isinstance(node.func, Noted) else node.func


def _take(node: Any, found: list[Note]) -> Any:
    if isinstance(node, Task) and isinstance(node.func, Noted):
        found.append(node.func.note)
        if node.func.func is _give:
            return DataNode(node.key, node.args[0].value)
        node = _rebuilt(node, node.func.func, node.args, node.kwargs)
    return _mapped(node, lambda inner: _take(inner, found)) if isinstance(node, Task) else node


def _mapped(node: Task, function: Callable[[Any], Any]) -> Task:
    """Return a task with a function applied to everything inside it; the same object where nothing changes."""
    args = list(map(function, node.args))
    if node.func is execute_subgraph:
        inner = {key: function(value) for key, value in node.args[0].items()}
        if any(inner[key] is not value for key, value in node.args[0].items()):
            args[0] = inner
    kwargs = {name: function(value) for name, value in node.kwargs.items()}
    pairs = [*zip(args, node.args, strict=True), *zip(kwargs.values(), node.kwargs.values(), strict=True)]
    if all(new is old for new, old in pairs):
        return node
    if isinstance(node, NestedContainer):
        return type(node)(args) if node.klass is dict else type(node)(*args)
    return _rebuilt(node, node.func, args, kwargs)


def _rebuilt(node: Task, func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Task:
    return Task(node.key, func, *args, _data_producer=node.data_producer, **kwargs)


def taken_apart(key: Key, node: Task) -> Tasks:
    """Return the tasks of a fused one: the last has its key, the others new ones."""
    inner, out, inkeys, *given = node.args
    renamed: dict[Key, Any] = dict(zip(inkeys, given, strict=True))
    renamed |= {name: f"{key_split(name)}-{tokenize(key, name)}" for name in inner if name != out}
    parts: Tasks = {}
    for name, part in inner.items():
        own: Key = key if name == out else renamed[name]
        part = part.substitute(renamed, key=own)
        parts[own] = Alias(own, part.target) if isinstance(part, Alias) else part
    return parts


def _take_apart(key: Key, tasks: Tasks, notes: dict[Key, Note]) -> None:
    """Replace a fused task by the tasks in it, under new keys, each with its own note."""
    node = tasks.pop(key)
    if _function(node) is not execute_subgraph:
        tasks[key], found = take_notes(node)
        notes[key] = found[0]
        return
    for own, part in taken_apart(key, node).items():
        tasks[own], found = take_notes(part)
        if found:
            notes[own] = found[0]
