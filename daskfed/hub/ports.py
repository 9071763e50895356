"""How the hub reaches a site: over links that the site dialled, or in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from typing import Any, Protocol

from distributed.comm.core import Comm, CommClosedError

from daskfed.comm.control import ControlStream
from daskfed.comm.opaque import call_opaque
from daskfed.messages import Key, Message, SiteHello

AFTER_MESSAGES = ("scatter_keys",)  # calls and answers that must not overtake what was sent on the control stream
POLL_S = 0.005
CHANNEL_TIMEOUT_S = 30.0  # how long a call waits for a site to park a channel


class SitePort(Protocol):
    """One site, as the hub's shell sees it."""

    @property
    def hello(self) -> SiteHello:
        """What the site said of itself when it joined."""
        ...

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; one that broke may come back."""
        ...

    def send(self, message: Message, payload: Any = None) -> None:
        """Queue a message on the control stream."""
        ...

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the site's agent and return its reply, unopened."""
        ...

    def stream_keys(self, keys: Collection[Key], token: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages with these keys, up to the one that ends them."""
        ...

    async def close(self) -> None:
        """End the connection."""
        ...


class RemoteSite:
    """A site whose agent dialled the hub: one control stream, and channels that it parked for the hub's calls."""

    def __init__(self, hello: SiteHello, stream: ControlStream) -> None:
        self.hello = hello
        self.stream = stream
        self.ended = False  # it said that it ends
        self.gone = False  # the hub waits for it no more
        self.detached = asyncio.Event()  # its control stream has no connection
        self.detached.set()
        self._idle: asyncio.Queue[Comm | None] = asyncio.Queue()  # None: there will be no more

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return not self.detached.is_set()

    async def serve(self) -> None:
        """Move messages until the connection ends."""
        comm = self.stream.comm
        self.detached.clear()
        try:
            with suppress(CommClosedError):
                await self.stream.serve()
        finally:
            comm.abort()
            self.detached.set()

    async def detach(self) -> None:
        """End the present connection, if there is one: the site has dialled another."""
        self.stream.comm.abort()
        await self.detached.wait()

    def send(self, message: Message, payload: Any = None) -> None:
        """Queue a message on the control stream."""
        self.stream.send(message, payload)

    async def park(self, comm: Comm) -> None:
        """Take in a channel that the site dialled."""
        self._idle.put_nowait(comm)

    async def take(self) -> Comm:
        """Return an idle channel, waiting for the site to park one; raises CommClosedError if none comes."""
        while True:
            try:
                comm = await asyncio.wait_for(self._idle.get(), CHANNEL_TIMEOUT_S)
            except TimeoutError:
                raise CommClosedError(f"site {self.hello.site!r} parked no channel for the hub's call") from None
            if comm is None:
                self.give_up()  # for whoever else waits
                raise CommClosedError(f"site {self.hello.site!r} is gone")
            if not comm.closed():
                return comm

    def give_up(self) -> None:
        """The site is gone: whoever waits for a channel of it need not wait any longer."""
        self.gone = True
        self._idle.put_nowait(None)

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the site's agent and return its reply, unopened; raises OpaqueError as it raised."""
        if op in AFTER_MESSAGES:
            kwargs["after"] = self.stream.link.accepted
        comm = await self.take()
        try:
            reply = await call_opaque(comm, op, **kwargs)
        finally:
            if not comm.closed():
                await self.park(comm)
        if op in AFTER_MESSAGES:
            await self._heard(reply.pop("after"))
        return reply

    async def _heard(self, count: int) -> None:
        """Return once so many messages of the site have arrived; raises CommClosedError where it is gone before."""
        while self.stream.received < count:
            if self.gone:
                raise CommClosedError(f"site {self.hello.site!r} is gone")
            await asyncio.sleep(POLL_S)

    async def stream_keys(self, keys: Collection[Key], token: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages with these keys, up to the one that ends them; each is read when the last was taken."""
        channel = await self.take()
        try:
            await channel.write({"op": "get_keys", "keys": keys, "token": token, "reply": False})
            ended = False
            while not ended:
                message = await channel.read()
                ended = bool(message.get("end"))
                yield message
        except BaseException:
            channel.abort()  # a half-read stream is of no use to the next call
            raise
        await self.park(channel)

    async def close(self) -> None:
        """End the control stream and all channels."""
        with suppress(OSError):
            await self.stream.comm.close()
        while not self._idle.empty():
            if (comm := self._idle.get_nowait()) is not None:
                comm.abort()
        self.give_up()
