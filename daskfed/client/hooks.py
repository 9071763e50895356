"""The one place where daskfed changes anything of Dask: five small hooks, all put in by :func:`install`.

- The optimisers of ``dask.array``, ``dask.bag`` and ``dask.delayed`` are ours (:mod:`daskfed.client.fusion`), which are
  Dask's own for every graph without annotations. Dask has an official setting for this (``array_optimize``), but a
  function in Dask's configuration breaks ``SSHCluster`` and nannies, which send the configuration as JSON; and a
  user's own setting has to win. So the default behind that setting is replaced.
- A dataframe collection that is built inside ``dask.annotate`` or ``at`` gets a pinned expression
  (:mod:`daskfed.client.frames`); stock Dask warns there that it ignores the annotations.
- ``dd.from_dask_array`` flattens the layers of its array before anybody could read their annotations: what it
  flattens with first puts the annotations into the tasks.
- What is named inside ``at`` gets a name that depends on the place. Names come from functions and arguments, so one
  path opened at two sites, or a pure function called at both, would be one key to Dask, and one site's data would
  pass for the other's. (Expressions of dataframes carry their place themselves, and name what they remember of files
  by tokens.)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from dask.base import get_annotations
from dask.utils import ensure_dict

from daskfed.client import fusion
from daskfed.client.notes import bake
from daskfed.client.stock import dataframes, flattening_for_from_dask_array, imported, tokens, without_annotations

PLACES = ("sites", "environment")  # annotations that decide what a task finds where it runs
FRAMES = ("dask.dataframe", "dask._expr", "dask._collections")  # modules whose names are to stay as they are

_frames_hooked = False


def install() -> None:
    """Put the hooks in. May be called again at any time; does nothing the second time."""
    _hook_frames()
    _hook_tokens()
    _hook_optimiser("dask.array.core", "Array", fusion.optimise_array)
    _hook_optimiser("dask.bag.core", "Bag", fusion.optimise_bag)
    _hook_optimiser("dask.bag.core", "Item", fusion.optimise_bag)
    _hook_optimiser("dask.delayed", "Delayed", fusion.optimise_delayed)


def _hook_optimiser(module: str, name: str, optimiser: Callable[..., Any]) -> None:
    """Replace the default optimiser of a class of collections, if that was imported."""
    found = imported(module)
    if found is not None:
        getattr(found, name).__dict__["__dask_optimize__"]._default = optimiser


def _hook_frames() -> None:
    global _frames_hooked
    if _frames_hooked or not all(map(importlib.util.find_spec, ("pandas", "pyarrow"))):
        return
    from daskfed.client.frames import pinned_new

    stock_init = dataframes().FrameBase.__init__

    def __init__(self: Any, expr: Any) -> None:
        note = get_annotations()
        if note:
            expr = pinned_new(expr, note)
        without_annotations(stock_init, self, expr)

    dataframes().FrameBase.__init__ = __init__
    flattening_for_from_dask_array().ensure_dict = _flattened
    _frames_hooked = True


def _hook_tokens() -> None:
    module = tokens()
    stock_tokenize = module._tokenize
    if getattr(stock_tokenize, "of_daskfed", False):
        return

    def _tokenize(*args: object, **kwargs: object) -> str:
        token: str = stock_tokenize(*args, **kwargs)
        note = get_annotations()
        place = [note[name] for name in PLACES if name in note]
        if not place or sys._getframe(2).f_globals.get("__name__", "").startswith(FRAMES):  # 1 is dask.tokenize
            return token
        return stock_tokenize(token, place)  # type: ignore[no-any-return]

    _tokenize.of_daskfed = True  # type: ignore[attr-defined]
    module._tokenize = _tokenize


def _flattened(graph: Any, **kwargs: Any) -> Any:
    return ensure_dict(bake(graph), **kwargs)
