"""What ``client.open`` does at the site: open something, and make it usable where the files are out of sight.

A lazy object must not look at its files again when it is unpickled, optimised or turned into tasks on the client; only
its tasks may, and they run at the site. Its keys must differ from those of an object that another site opened under
the same relative path. So, by kind:

- arrays, delayed objects, bags, and xarray objects of arrays: keys get new tokens, layers stay and are annotated
  (:mod:`daskfed.client.rekeying`);
- variables of xarray objects that read their file on first use: become arrays, in the chunks of the file;
- dataframes: readers of Parquet, which look at the files when they are optimised, become readers of the partitions
  that they found (columns are still chosen by the planner, filters no longer); other readers stay, with what they know
  about their data; a frame with anything else inside becomes its tasks. Readers are pinned.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cloudpickle
import dask
from dask.base import is_dask_collection
from dask.utils import funcname

from daskfed.client.notes import Note
from daskfed.client.rekeying import rekeyed
from daskfed.client.stock import imported, without_annotations
from daskfed.dask_private import Expr


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
        from daskfed.client.portable_frames import portable_frame  # imports dask.dataframe

        return portable_frame(value, note)
    return rekeyed(value, note)


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
