"""The private names of Dask's collections that daskfed relies on: an annex to :mod:`daskfed.dask_private`.

The collections are heavy and partly optional, so they are imported only when one of them is needed.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from daskfed.dask_private import current_annotations

T = TypeVar("T")


def without_annotations(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function outside every ``dask.annotate``: a layer that Dask makes anew takes on what is current."""
    context = contextvars.copy_context()
    context.run(current_annotations.set, None)
    return context.run(function, *args, **kwargs)


def imported(name: str) -> ModuleType | None:
    """Return a module if it was imported already."""
    return sys.modules.get(name)


def array_optimisation() -> Any:
    """Return the module with ``optimize`` and ``_optimize_slices``."""
    from dask.array import optimization

    return optimization


def bag_optimise() -> Any:
    """Return the optimiser of bags."""
    from dask.bag.core import optimize

    return optimize


def delayed_optimise() -> Any:
    """Return the optimiser of delayed objects."""
    from dask.delayed import optimize

    return optimize
