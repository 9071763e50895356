"""The same collection under other keys: what two sites open under one relative path must not be taken for one thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dask.base import clone_key, flatten, get_name_from_key
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer

from daskfed.client.notes import Note, Tasks
from daskfed.dask_private import GraphNode, convert_legacy_graph
from daskfed.messages import Key


def rekeyed(collection: Any, note: Note) -> Any:
    """Return a collection whose keys have other tokens, that depend on the note, and whose layers are annotated."""
    graph = collection.__dask_graph__()
    if not isinstance(graph, HighLevelGraph):
        graph = HighLevelGraph({"opened": MaterializedLayer(dict(graph))}, {"opened": set()})
    seed = repr(sorted(note.items()))
    names = {name: clone_key(name, seed) for name in graph.layers}
    keys = set(graph.keys())
    layers = {names[name]: _rekeyed_layer(layer, keys, seed, note) for name, layer in graph.layers.items()}
    needs = {names[name]: {names[dep] for dep in deps} for name, deps in graph.dependencies.items()}
    rebuild, state = collection.__dask_postpersist__()
    old = {get_name_from_key(key) for key in flatten(collection.__dask_keys__())}
    renamed = {name: clone_key(name, seed) for name in {*old, *names} if isinstance(name, str)}
    return rebuild(HighLevelGraph(layers, needs), *state, rename=renamed)


def _rekeyed_layer(layer: Layer, keys: set[Key], seed: str, note: Note) -> Layer:
    if layer.is_materialized() or type(layer).clone is Layer.clone:
        own = convert_legacy_graph(dict(layer), keys)
        new: Layer = MaterializedLayer(rekeyed_tasks(own, keys, seed))
    else:
        new, _ = layer.clone(keys, seed)
    new.annotations = {**(layer.annotations or {}), **note}
    return new


def rekeyed_tasks(tasks: Mapping[Key, GraphNode], keys: Iterable[Key], seed: str) -> Tasks:
    """Return tasks with other tokens in their keys; ``keys`` are those that change where they are referred to."""
    renamed: dict[Key, Any] = {key: rekeyed_key(key, seed) for key in keys}
    return {renamed[key]: node.substitute(renamed, key=renamed[key]) for key, node in tasks.items()}


def rekeyed_key(key: Any, seed: str) -> Any:
    """Return a key with another token."""
    return clone_key(key if isinstance(key, (str, tuple)) else str(key), seed)
