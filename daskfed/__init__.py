"""Ordinary Dask code, run on many sites at once.

``from daskfed import Client`` in place of ``from dask.distributed import Client`` is the only line that changes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskfed.client.backend import get as get
    from daskfed.client.client import Client as Client
    from daskfed.client.constraints import at as at
    from daskfed.client.federation import Federation as Federation

__version__ = "0.1.0.dev0"
__all__ = ["Client", "Federation", "at", "get"]

_HOMES = {  # loaded when first asked for: a hub and a site do without the client
    "Client": "daskfed.client.client",
    "Federation": "daskfed.client.federation",
    "at": "daskfed.client.constraints",
    "get": "daskfed.client.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'daskfed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
