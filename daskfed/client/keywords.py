"""Keywords of ``submit`` and ``map`` that stock Dask does not have, and whose they are: a function may have its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from daskfed.dask_private import has_keyword

TIMEOUT = "timeout"  # how long a call may take; also an annotation
CACHE = "cache"  # whether a result is kept for later runs; also an annotation


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, which then gets what is given under it."""
    try:
        return bool(has_keyword(function, name))
    except (TypeError, ValueError):
        return inspect.isclass(function)


def takes_timeout(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter ``timeout`` of its own, or takes keywords of any name; else it is for us."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return inspect.isclass(function)
    return TIMEOUT in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
