"""Getting values from the hub as a stream (see :mod:`daskfed.data.parcels`): one hop need not wait for another.

What has arrived is opened while the rest is on its way, large values in a thread.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from distributed.comm.core import Comm
from distributed.core import Status

from daskfed.comm.opaque import OpaqueError, OpaquePool
from daskfed.config import largest_message
from daskfed.data.fetch import open_frames
from daskfed.data.parcels import Parcel, Unpacker
from daskfed.ending import end_tasks
from daskfed.messages import Key

IN_LOOP = (2**16, 64)  # bytes and number of values that are opened at once without a thread

Open = Callable[[dict[Key, Parcel]], dict[Key, Any]]


class Stream:
    """Gathers from the hub at ``address``, over connections of its own, which are kept for the next time.

    ``deserializers`` are the families that may open values, as for a ``distributed.Client``; None: all.
    """

    def __init__(
        self, address: str, connection_args: Mapping[str, Any], deserializers: Collection[str] | None = None
    ) -> None:
        self.address = address
        self.open = functools.partial(_opened, deserializers)
        self._pool = OpaquePool(limit=8, connection_args=dict(connection_args))

    async def gather(self, keys: Collection[Key], **session: Any) -> dict[Key, Any]:
        """Return the values of those of ``keys`` that can be had.

        ``session`` says who asks. Raises OpaqueError where the hub refuses, OSError where the connection breaks.
        """
        if self._pool.status is Status.init:
            await self._pool.start()
        comm = await self._pool.connect(self.address)
        try:
            await comm.write({"op": "fed_gather", "keys": list(keys), **session})
            return await _received(comm, self.open)
        except BaseException:
            comm.abort()  # a half-read stream is of no use to the next call
            raise
        finally:
            self._pool.reuse(self.address, comm)

    async def close(self) -> None:
        """End the connections."""
        await self._pool.close()


async def _received(comm: Comm, open_all: Open) -> dict[Key, Any]:
    """Return the opened values that a stream brings."""
    unpackers: dict[str, Unpacker] = defaultdict(lambda: Unpacker(largest_message()))  # by site
    values: dict[Key, Any] = {}
    opening: list[asyncio.Task[dict[Key, Any]]] = []
    try:
        ended = False
        while not ended:
            message = await comm.read()
            if message.get("status") == "uncaught-error":
                raise OpaqueError(message)
            parcels = unpackers[message.get("site", "")].take(message)
            if sum(parcel.nbytes for parcel in parcels.values()) <= IN_LOOP[0] and len(parcels) <= IN_LOOP[1]:
                values |= open_all(parcels)
            else:
                opening.append(asyncio.create_task(asyncio.to_thread(open_all, parcels)))
            ended = bool(message.get("end"))
        for each in await asyncio.gather(*opening):
            values |= each
    finally:
        await end_tasks(*opening)
    return values


def _opened(deserializers: Collection[str] | None, parcels: dict[Key, Parcel]) -> dict[Key, Any]:
    """Return the values in parcels, which are emptied one by one."""
    values = {}
    while parcels:
        key, parcel = parcels.popitem()
        values[key] = open_frames(parcel.header, parcel.frames, deserializers)
    return values
