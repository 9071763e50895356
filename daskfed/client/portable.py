"""What ``client.open`` does at the site: open something, and make it usable where the files are out of sight.

A lazy object must not look at its files again when it is unpickled, optimised or turned into tasks on the client; only
its tasks may, and they run at the site. Its keys must differ from those of an object that another site opened under
the same relative path. So, by kind:

- arrays, delayed objects, bags, and xarray objects of arrays: keys get new tokens, layers stay and are annotated;
- variables of xarray objects that read their file on first use: become arrays, in the chunks of the file;
- dataframes: readers of Parquet, which look at the files when they are optimised, become readers that open the
  original one in the task; other readers stay, with what they know about their data; a frame with anything else inside
  becomes its tasks. Readers are pinned.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cloudpickle
import dask
from dask.base import clone_key, flatten, get_name_from_key, is_dask_collection
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.utils import funcname

from daskfed.client.notes import Note, Tasks
from daskfed.client.stock import imported, without_annotations
from daskfed.dask_private import Expr, GraphNode, convert_legacy_graph
from daskfed.messages import Key


def open_and_pack(function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any], note: Note) -> bytes:
    """Call a function here and return what it gives, made portable, bound by ``note``, and pickled.

    Raises what the function raises, with a note that says where that was.
    """
    try:
        with dask.config.set(scheduler="synchronous"):  # what it computes on the way needs no other worker
            opened = function(*args, **kwargs)
            return without_annotations(_pack, opened, note)
    except Exception as exc:
        where = ", ".join(note.get("sites", ())) or "a site"
        exc.add_note(f"while {funcname(function)} opened something at {where}, in {os.getcwd()}")
        raise


def portable(value: Any, note: Note) -> Any:
    """Return a lazy object, or lists, tuples and dicts of them, made portable; anything else is returned as it is."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(portable(item, note) for item in value)
    if type(value) is dict:
        return {name: portable(item, note) for name, item in value.items()}
    value = _chunked(value)
    if not is_dask_collection(value):
        return value
    if isinstance(getattr(value, "expr", None), Expr):
        from daskfed.client import portable_frames

        return portable_frames.portable_frame(value, note)
    return _rekeyed(value, note)


def _pack(opened: Any, note: Note) -> bytes:
    return cloudpickle.dumps(portable(opened, note), protocol=pickle.HIGHEST_PROTOCOL)  # type: ignore[no-any-return]


# -- xarray ----------------------------------------------------------------------------------------------------------


def _chunked(value: Any) -> Any:
    """Return an xarray object without variables that would read their file on first use, wherever that is."""
    xarray = imported("xarray")
    if xarray is None or not isinstance(value, (xarray.Dataset, xarray.DataArray)):
        return value
    value = value.copy(deep=False)
    value.set_close(None)  # the file is open here, not where the object goes
    dataset = value if isinstance(value, xarray.Dataset) else value._to_temp_dataset()
    if all(is_dask_collection(variable) or variable._in_memory for variable in dataset.variables.values()):
        return value
    return value.chunk({})


# -- arrays, delayed objects, bags -----------------------------------------------------------------------------------


def _rekeyed(collection: Any, note: Note) -> Any:
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
    renamed = {key: _cloned(key, seed) for key in keys}
    return {renamed[key]: node.substitute(renamed, key=renamed[key]) for key, node in tasks.items()}


def _cloned(key: Any, seed: str) -> Any:
    return clone_key(key if isinstance(key, (str, tuple)) else str(key), seed)
