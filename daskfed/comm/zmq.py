"""``zmq://``: one outbound connection of a process carries everything, encrypted and authenticated both ways.

Whoever dials an address a second time gets another channel over the same line (:mod:`daskfed.comm.lines`). Both ends
know each other by key (:mod:`daskfed.keys`): who dials knows that of the hub, and a hub whom it lets in. On loopback it
may do without, where the hub has no key.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import Comm, CommClosedError
from distributed.comm.registry import Backend
from distributed.comm.utils import from_frames, to_frames
from distributed.utils import ensure_ip, get_ip, get_ipv6, nbytes

from daskfed.comm import multiplex as mux
from daskfed.comm.lines import PREFIX, Line, ListeningSocket, Reactor, ip_towards
from daskfed.config import check_listen, is_loopback
from daskfed.dask_private import BaseListener, Connector, FatalCommClosedError
from daskfed.errors import KeyFileError
from daskfed.keys import Authorized, KeyFolder, KeyPair

logger = logging.getLogger(__name__)

Handler = Callable[[Comm], Awaitable[Any]]


class Zmq(Comm):
    """A channel, as a Dask comm."""

    def __init__(self, line: Line, channel: mux.Channel, deserialize: bool = True) -> None:
        super().__init__(deserialize)
        self.line = line
        self.channel = channel
        dialled = line.multiplexer.dialled  # that end needs no name of its own
        self._local_addr = f"{PREFIX}{line.local}#{channel.name}" if dialled else PREFIX + line.local
        self._peer_addr = PREFIX + line.peer if dialled else f"{PREFIX}{line.peer}#{channel.name}"
        self._reading: asyncio.Future[None] | None = None
        self._leaving: asyncio.Future[None] | None = None
        channel.arrived = _weak(self._arrived)
        channel.left = _weak(self._left)
        weakref.finalize(self, _forgotten, asyncio.get_running_loop(), line, channel).atexit = False

    @property
    def local_address(self) -> str:
        """The address of this end."""
        return self._local_addr

    @property
    def peer_address(self) -> str:
        """The address of the other end."""
        return self._peer_addr

    @property
    def who(self) -> Authorized | None:
        """Who is at the other end, by key; None where that has none."""
        return self.line.who

    async def read(self, deserializers: Any = None) -> Any:
        """Return the next message; raises CommClosedError when there will be none."""
        frames = await self.read_frames()
        try:
            return await from_frames(
                frames, deserialize=self.deserialize, deserializers=deserializers, allow_offload=self.allow_offload
            )
        except EOFError:
            self.abort()
            raise CommClosedError("a message was cut off") from None

    async def read_frames(self) -> list[mux.Buffer]:
        """Return the frames of the next message; raises CommClosedError."""
        channel = self.channel
        while not channel.messages or channel.closed_here:
            if channel.ended:
                raise CommClosedError(f"{self!r}: {channel.ended}")
            self._reading = asyncio.get_running_loop().create_future()
            await self._reading
        frames = channel.take()
        self.line.pump()
        return frames

    async def write(self, msg: Any, serializers: Any = None, on_error: Any = "message") -> int:
        """Write a message, and wait until the last of it is under way; returns its bytes. Raises CommClosedError."""
        frames = await to_frames(
            msg,
            allow_offload=self.allow_offload,
            serializers=serializers,
            on_error=on_error,
            context={"sender": self.local_info, "recipient": self.remote_info, **self.handshake_options},
        )
        channel = self.channel
        if channel.closed:
            raise CommClosedError(f"{self!r}: {channel.ended}")
        total = int(sum(map(nbytes, frames)))
        channel.send(frames, total)
        self.line.pump()
        if channel.waits:
            await self._all_left()
            if channel.closed:
                raise CommClosedError(f"{self!r}: {channel.ended}")
        return total

    async def _all_left(self) -> None:
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.get_running_loop().create_future()
        try:
            await asyncio.shield(self._leaving)
        except asyncio.CancelledError:
            self.abort()  # half of a message is no message
            raise

    def _arrived(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)

    def _left(self) -> None:
        if self._leaving is not None and not self._leaving.done():
            self._leaving.set_result(None)

    async def close(self) -> None:
        """Close when all that was written is under way."""
        channel = self.channel
        channel.close()
        self.line.pump()
        while channel.waits and self.line.multiplexer.alive:
            await self._all_left()

    def abort(self) -> None:
        """Close at once."""
        if not self.channel.closed or self.channel.waits:
            self.channel.close(at_once=True)
            self.line.pump()

    def closed(self) -> bool:
        """Say whether nothing can be written any more."""
        return self.channel.closed


def _weak(method: Callable[[], None]) -> Callable[[], None]:
    """Return a call of a method that does not keep its object."""
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (method := found()) is not None:
            method()

    return call


def _forgotten(loop: asyncio.AbstractEventLoop, line: Line, channel: mux.Channel) -> None:
    """A comm is gone that nobody closed, as where connecting was given up: close it for them."""

    def close() -> None:
        channel.close(at_once=True)
        line.pump()

    if not (channel.closed and not channel.waits) and not loop.is_closed():
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(close)


class ZmqListener(BaseListener):
    """Listens on ``zmq://``; ``keys`` is the folder of the keys, by default the user's."""

    prefix = PREFIX
    comm_class = Zmq

    def __init__(self, loc: str, handler: Handler, deserialize: bool = True, **connection_args: Any) -> None:
        super().__init__()
        host, self.port = parse_host_port(loc, 0)
        self.host = host or "127.0.0.1"
        self.handler = handler
        self.deserialize = deserialize
        self.keys = _keys(connection_args)
        self._listening: ListeningSocket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to listen; raises ConfigurationError where others could connect and the hub has no key."""
        check_listen(self.listen_address, None, self.keys.has_hub_key)
        where = unparse_host_port(ensure_ip(self.host), self.port or "*")
        self._listening = ListeningSocket(Reactor.running(), where, self.keys, self._opened)
        self.port = int(self._listening.endpoint.rpartition(":")[2])

    def _opened(self, line: Line, channel: mux.Channel) -> None:
        if self._listening is None or self._listening.closing:
            channel.refuse("nobody listens any more")
            return
        comm = self.comm_class(line, channel, self.deserialize)
        task = asyncio.get_running_loop().create_task(self._serve(comm))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, comm: Comm) -> None:
        try:
            await self.on_connection(comm)
        except CommClosedError as exc:
            logger.info("no handshake with %s: %s", comm.peer_address, exc)
            comm.abort()
            return
        except Exception as exc:  # whatever was wrong with what the peer said
            logger.warning("no handshake with %s: %s: %s", comm.peer_address, type(exc).__name__, exc)
            comm.abort()
            return
        await self.handler(comm)

    def stop(self) -> None:
        """Accept no more connections; those that there are go on."""
        if self._listening is not None:
            self._listening.stop()
        self.abort_handshaking_comms()

    @property
    def listen_address(self) -> str:
        """The address that is listened on."""
        return PREFIX + str(unparse_host_port(self.host, self.port))

    @property
    def contact_address(self) -> str:
        """An address by which others may reach it."""
        host = self.host
        if host in ("0.0.0.0", "::"):
            host = get_ip() if host == "0.0.0.0" else get_ipv6()
        return PREFIX + str(unparse_host_port(host, self.port))


class ZmqConnector(Connector):
    """Dials ``zmq://``."""

    comm_class = Zmq

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> Comm:
        """Return a comm over the line to an address, which is dialled if there is none.

        Raises OSError where nobody answers, FatalCommClosedError where a key is missing or refused.
        """
        host, port = parse_host_port(address)
        where = unparse_host_port(ensure_ip(host), port)
        own, hub = _keys_for(address, host, _keys(connection_args))
        line = Reactor.running().line_to(where, own, hub)
        await asyncio.shield(line.ready)
        if not line.multiplexer.alive:
            raise ConnectionRefusedError(f"the connection with {PREFIX}{address} has just ended")
        channel = line.multiplexer.open()
        return self.comm_class(line, channel, deserialize)


def _keys(connection_args: dict[str, Any]) -> KeyFolder:
    given = connection_args.get("keys")
    return given if isinstance(given, KeyFolder) else KeyFolder(given)


def _keys_for(address: str, host: str, keys: KeyFolder) -> tuple[KeyPair | None, bytes | None]:
    """Return the own key and that of the hub; none of both on loopback, where no key of the hub is known."""
    try:
        hub = keys.hub_at(address)
        if hub is None and is_loopback(host):
            return None, None
        own = keys.own("id")
    except KeyFileError as exc:
        raise FatalCommClosedError(str(exc)) from exc
    if hub is None:
        raise FatalCommClosedError(
            f"the key of the hub at {address} is not known: ask who runs it for the key that daskfed keys show hub "
            f"prints there, and do daskfed keys trust {address} KEY here"
        )
    if own is None:
        raise FatalCommClosedError(
            f"{keys.path} has no key of yours: make one (daskfed keys new), and have the hub let it in"
        )
    return own, hub


class ZmqBackend(Backend):
    """``zmq://`` for Dask."""

    def get_connector(self) -> ZmqConnector:
        """Return what dials."""
        return ZmqConnector()

    def get_listener(self, loc: str, handle_comm: Handler, deserialize: bool, **connection_args: Any) -> ZmqListener:
        """Return what listens."""
        return ZmqListener(loc, handle_comm, deserialize, **connection_args)

    def get_address_host(self, loc: str) -> str:
        """Return the host of an address."""
        return str(_host_port(loc)[0])

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        """Return host and port of an address."""
        return _host_port(loc)

    def resolve_address(self, loc: str) -> str:
        """Return an address with the number of its host."""
        host, port = _host_port(loc)
        return str(unparse_host_port(ensure_ip(host), port))

    def get_local_address_for(self, loc: str) -> str:
        """Return the address of this machine as seen from another."""
        return ip_towards(ensure_ip(_host_port(loc)[0]))


def _host_port(loc: str) -> tuple[str, int]:
    """Return host and port; of the end that dialled, which has none, port 0."""
    host, port = parse_host_port(loc.partition("#")[0], 0)
    return host, int(port)
