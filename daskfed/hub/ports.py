"""How the hub reaches a site: over links that the site dialled, or in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Collection, Mapping
from contextlib import suppress
from typing import Any, Protocol

from distributed.comm.core import Comm, CommClosedError

from daskfed.comm.control import ControlStream
from daskfed.comm.opaque import call_opaque
from daskfed.messages import Key, Message, SiteHello

AFTER_MESSAGES = ("scatter_keys",)  # calls that must not overtake what was sent on the control stream before
CHANNEL_TIMEOUT_S = 30.0  # how long a call waits for a site to park a channel


async def answers(calls: Mapping[str, Awaitable[Any]], kept: tuple[type[Exception], ...] = ()) -> dict[str, Any]:
    """Make calls to several sites at once and return site -> answer; a site that is gone is left out.

    Raises what else a call raises, unless it is one of ``kept``: then that is the answer.
    """
    replies = await asyncio.gather(*calls.values(), return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, (OSError, *kept)):
            raise reply
    return {site: reply for site, reply in zip(calls, replies, strict=True) if not isinstance(reply, OSError)}


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

    def stream_keys(self, keys: Collection[Key], token: str, checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages with these keys, up to the one that ends them; without checksums if not ``checked``."""
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
        self._idle.put_nowait(None)

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the site's agent and return its reply, unopened; raises OpaqueError as it raised."""
        if op in AFTER_MESSAGES:
            kwargs["after"] = self.stream.link.accepted
        comm = await self.take()
        try:
            return await call_opaque(comm, op, **kwargs)
        finally:
            if not comm.closed():
                await self.park(comm)

    async def stream_keys(
        self, keys: Collection[Key], token: str, checked: bool = True
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages with these keys, up to the one that ends them; each is read when the last was taken."""
        channel, ended = await self.take(), False
        try:
            await channel.write({"op": "get_keys", "keys": keys, "token": token, "checked": checked, "reply": False})
            while not ended:
                message = await channel.read()
                ended = bool(message.get("end"))
                yield message
        finally:
            if ended:
                await self.park(channel)
            else:
                channel.abort()  # a half-read stream is of no use to the next call

    async def close(self) -> None:
        """End the control stream and all channels."""
        with suppress(OSError):
            await self.stream.comm.close()
        while not self._idle.empty():
            if (comm := self._idle.get_nowait()) is not None:
                comm.abort()
        self.give_up()
