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

The hooks of a kind of collections go in once Dask's module of that kind is imported: those modules take two seconds
to import, with pandas and xarray, which a program that only submits calls need not wait for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from dask.base import get_annotations
from dask.utils import ensure_dict

from daskfed.client import fusion
from daskfed.client.notes import bake
from daskfed.client.stock import dataframes, flattening_for_from_dask_array, tokens, without_annotations

PLACES = ("sites", "environment")  # annotations that decide what a task finds where it runs
FRAMES = ("dask.dataframe", "dask._expr", "dask._collections")  # modules whose names are to stay as they are

_installing = threading.RLock()
_installed = False


def install() -> None:
    """Put the hooks in, those of modules that are not imported yet as soon as they are. May be called at any time."""
    global _installed
    with _installing:
        if _installed:
            return
        _hook_tokens()
        _once_imported("dask.array", lambda module: _hook_optimiser(module.Array, fusion.optimise_array))
        _once_imported("dask.bag", _hook_bags)
        _once_imported("dask.delayed", lambda module: _hook_optimiser(module.Delayed, fusion.optimise_delayed))
        _once_imported("dask.dataframe", _hook_frames)
        _installed = True


def _hook_optimiser(kind: Any, optimiser: Callable[..., Any]) -> None:
    """Replace the default optimiser of a class of collections."""
    kind.__dict__["__dask_optimize__"]._default = optimiser


def _hook_bags(module: Any) -> None:
    for kind in (module.Bag, module.Item):
        _hook_optimiser(kind, fusion.optimise_bag)


def _hook_frames(module: Any) -> None:
    if importlib.util.find_spec("pyarrow") is None:  # then there are no expressions to pin
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


def _hook_tokens() -> None:
    module = tokens()
    stock_tokenize = module._tokenize

    def _tokenize(*args: object, **kwargs: object) -> str:
        token: str = stock_tokenize(*args, **kwargs)
        note = get_annotations()
        place = [note[name] for name in PLACES if name in note]
        if not place or sys._getframe(2).f_globals.get("__name__", "").startswith(FRAMES):  # 1 is dask.tokenize
            return token
        return stock_tokenize(token, place)  # type: ignore[no-any-return]

    module._tokenize = _tokenize


def _flattened(graph: Any, **kwargs: Any) -> Any:
    return ensure_dict(bake(graph), **kwargs)


# -- modules that are imported later -----------------------------------------------------------------------------------


def _once_imported(name: str, hook: Callable[[Any], None]) -> None:
    """Call ``hook`` with the module of that name, now if it was imported, else as soon as it is."""
    if name in sys.modules:
        hook(importlib.import_module(name))  # which waits where another thread is at it
    else:
        sys.meta_path.insert(0, _Watch(name, hook))


class _Watch(MetaPathFinder):
    """Finds one module as the other finders do, and has it hooked when it has been executed."""

    def __init__(self, name: str, hook: Callable[[Any], None]) -> None:
        self._name = name
        self._hook: Callable[[Any], None] | None = hook
        self._searching = threading.local()  # other finders may ask all finders, this one included

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            spec = self._found(fullname, path, target)
        finally:
            self._searching.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(spec.loader, self._done)
        return spec

    def _found(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        finders = [find for each in sys.meta_path if each is not self and (find := getattr(each, "find_spec", None))]
        return next((spec for find in finders if (spec := find(fullname, path, target)) is not None), None)

    def _done(self, module: ModuleType) -> None:
        with suppress(ValueError):  # somebody has put other finders in the place of all
            sys.meta_path.remove(self)
        hook, self._hook = self._hook, None
        if hook is not None:
            hook(module)


class _HookedLoader(Loader):
    """Loads as another loader does, which takes its place, and says so when a module has been executed."""

    def __init__(self, loader: Loader, done: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._done = done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # for whoever asks it for sources or data
        self._loader.exec_module(module)
        self._done(module)
