"""``client.open``: call a function at a site and get the lazy object that it opened there.

The function runs as a task at the site, in the working directory of a worker. What it returns is made portable there
(:mod:`daskfed.client.portable`) and pickled; unpickling and computing it needs no file that only the site can see.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

from dask.base import annotate, get_annotations
from dask.utils import funcname

from daskfed.client.constraints import at, site_selectors
from daskfed.client.portable import open_and_pack
from daskfed.errors import ConfigurationError


def open_at(client: Any, function: Callable[..., Any], *args: Any, site: str, **kwargs: Any) -> Any:
    """Call ``function(*args, **kwargs)`` at a site and return what it opened, with every task of it bound to the site.

    ``site`` is a name; a label or several names will do where all of these sites see the same files. Other constraints
    come from the ``at`` around the call. Lazy objects are Dask collections and xarray objects, also in lists, tuples
    and dicts; a Dataset that was opened without chunks comes in the chunks of its file. Anything else is returned as a
    value.

    An asynchronous client returns an awaitable. Raises what ``function`` raises there, with a note that says where it
    ran, and ConfigurationError where the object cannot be unpickled here.
    """
    sites = site_selectors(site)
    with at(sites):
        note = get_annotations()
        with annotate(cache=None):  # files may have changed since another run
            future = client.submit(open_and_pack, by_name(function), args, kwargs, dict(note), pure=False)
    return client.sync(_fetch, client, future, funcname(function), sites)


class Named:
    """A function that is looked up by its name where it is called."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.__name__ = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return getattr(importlib.import_module(self.module), self.__name__)(*args, **kwargs)


def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for a function that can be found by its name but not pickled by it, such as ``dd.read_csv``."""
    try:
        pickle.dumps(function)
    except Exception:
        name = getattr(function, "__name__", "")
        for module in (getattr(function, "__module__", None), "dask.array", "dask.dataframe"):
            if module != "__main__" and getattr(sys.modules.get(module or ""), name, None) is function:
                return Named(str(module), name)
    return function


async def _fetch(client: Any, future: Any, name: str, sites: tuple[str, ...]) -> Any:
    packed = await client.gather(future, asynchronous=True)
    try:
        return pickle.loads(packed)
    except Exception as exc:
        raise ConfigurationError(
            f"what {name} opened at {', '.join(sites)} cannot be unpickled here ({type(exc).__name__}: {exc}); "
            "install the same packages here as at the site"
        ) from exc
