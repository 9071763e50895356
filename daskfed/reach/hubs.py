"""What those who start a site ask of its hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from distributed.comm.core import Comm

from daskfed.comm.opaque import call_opaque, connect_opaque
from daskfed.errors import ConnectionRefused
from daskfed.keys import KeyFolder, written

CONNECT_TIMEOUT_S = 10.0
LOOK_S = 0.5


async def sites_of(hub: str, security: Any = None, keys: KeyFolder | None = None) -> dict[str, Any]:
    """Return the sites that a hub has; raises OSError where nobody answers, ConnectionRefused where it is no hub."""
    async with connected(hub, security, keys) as comm:
        return await call_opaque(comm, "fed_sites")  # type: ignore[no-any-return]


async def check_hub(hub: str, security: Any, name: str, keys: KeyFolder | None = None, patience_s: float = 0.0) -> None:
    """Find out what the hub would refuse before a cluster is started, which may be dear; raises ConnectionRefused.

    A site of that name is waited for to be gone: of one that was killed the hub may not know it at once.
    """
    deadline = time.monotonic() + patience_s
    while (known := (await sites_of(hub, security, keys)).get(name)) is not None and known["status"] != "away":
        if time.monotonic() >= deadline:  # else its place may be taken
            raise ConnectionRefused(f"a site named {name!r} is connected to {hub} already: give this one another name")
        await asyncio.sleep(LOOK_S)


async def enrol(hub: str, public: bytes, keys: KeyFolder | None = None) -> dict[str, Any]:
    """Have a hub let in the key of a site, for the owner of ``keys``; these may be a token's.

    Returns the site's name and options where they are. Raises ConnectionRefused where it refuses.
    """
    async with connected(hub, None, keys) as comm:
        told: dict[str, Any] = await call_opaque(comm, "enrol", public=written(public))
    if "error" in told:
        raise ConnectionRefused(f"the hub at {hub}: {told['error']}")
    return told


@asynccontextmanager
async def connected(hub: str, security: Any = None, keys: KeyFolder | None = None) -> AsyncIterator[Comm]:
    """Connect to a hub; raises OSError where nobody answers, ConnectionRefused where it is no hub."""
    connection_args = security.get_connection_args("client") if security is not None else {}
    if keys is not None:
        connection_args["keys"] = keys
    comm = await connect_opaque(hub, timeout=CONNECT_TIMEOUT_S, **connection_args)
    try:
        identity = await call_opaque(comm, "identity", n_workers=0)
        if identity.get("type") != "Hub":
            raise ConnectionRefused(f"{hub} is a {identity.get('type')}, no daskfed hub")
        yield comm
    finally:
        await comm.close()
