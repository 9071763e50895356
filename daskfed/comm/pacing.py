"""Writing no faster than the reader reads.

``comm.write`` of Dask returns when a message is in a buffer, which has no bound. Who passes on large things would
gather them all there; so a stream of values is written through a :class:`Paced` comm.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any

from distributed.comm.core import Comm, CommClosedError
from tornado.iostream import StreamClosedError


class Paced:
    """Writes messages to ``comm``, of which at most two wait to be sent: one leaves while the next is written."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._sent: Awaitable[Any] | None = None  # done when the last message has left

    async def write(self, message: Any) -> None:
        """Write a message, and wait until the one before it has left; CommClosedError where the connection broke."""
        await self.comm.write(message)
        before, self._sent = self._sent, self._leaving()
        await self._until(before)

    async def write_all(self, messages: AsyncGenerator[Any]) -> None:
        """Write messages as they come, each of which is asked for when there is room for it, until all have left."""
        async with aclosing(messages):
            async for message in messages:
                await self.write(message)
        await self._until(self._sent)

    def _leaving(self) -> Awaitable[Any] | None:
        try:
            return _all_sent(self.comm)
        except StreamClosedError as exc:
            raise self._broke(exc) from exc

    async def _until(self, sent: Awaitable[Any] | None) -> None:
        if sent is not None:
            try:
                await asyncio.shield(sent)  # tornado logs an error where it is cancelled
            except StreamClosedError as exc:
                raise self._broke(exc) from exc

    def _broke(self, exc: StreamClosedError) -> CommClosedError:
        return CommClosedError(f"the connection with {self.comm.peer_address} broke: {exc}")


def _all_sent(comm: Any) -> Awaitable[Any] | None:
    """Return what is done when all that was written has left; None where nothing is buffered, as within a process."""
    stream = getattr(comm, "stream", None)
    return None if stream is None else stream.write(b"")


def allow_pauses(comm: Any) -> None:
    """Keep a connection whose reader takes nothing for long, but is there; Dask has the system end it after 30 s.

    For a writer that learns otherwise when the reader is gone.
    """
    option, stream = getattr(socket, "TCP_USER_TIMEOUT", None), getattr(comm, "stream", None)
    if option is not None and stream is not None:
        stream.socket.setsockopt(socket.IPPROTO_TCP, option, 0)
