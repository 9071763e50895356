"""Comms that carry what users put into messages without ever opening it.

Stock distributed opens pickles in many places: ``protocol.loads`` unpickles ``ToPickle`` values even with
``deserialize=False`` and imports modules for enums, ``send_recv`` unpickles the exception of an error reply, and an
in-process comm unwraps ``ToPickle``. The hub and the agents use what is here instead:

===================  ==================================================================================================
:func:`loads_opaque` frames of one message -> the message, with every payload as ``Serialized`` or ``Pickled``
:class:`OpaqueTCP`   (and ``OpaqueTLS``, ``OpaqueInProc``) comms that read with it; written again, a payload leaves as
                     it came, byte for byte, its compression included
listen, connect      :func:`listen_opaque`, :func:`connect_opaque`: like distributed's, for ``tcp``, ``tls``, ``inproc``
calls                :func:`call_opaque` on one comm, :class:`OpaquePool` by address; an error reply raises
                     :class:`OpaqueError`, which holds the pickled exception unopened and can be passed on
:class:`OpaqueServer` a ``distributed.core.Server`` that listens and dials with the above
===================  ==================================================================================================

What a peer sends is not trusted: a message that is malformed, too large, too deep, or that names one payload twice (so
that passing it on would multiply it) raises :class:`MalformedMessage` and ends that one connection.

In one process (``inproc``) Python objects pass by reference. Between two opaque ends nothing is touched. A stock peer
(the client, or the site's scheduler, both of which may open payloads) is given what it can read: see :func:`settle`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import copy
import functools
import logging
import random
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from ssl import SSLError
from typing import Any, ParamSpec, TypeAlias, cast

import dask
import msgpack
from dask.utils import parse_timedelta
from distributed.comm.addressing import unparse_host_port
from distributed.comm.core import CommClosedError
from distributed.core import ConnectionPool, Server, Status
from tornado.iostream import IOStream, StreamClosedError

from daskfed.comm.zmq import Zmq, ZmqConnector, ZmqListener
from daskfed.config import largest_message
from daskfed.dask_private import (
    INPROC_EOF,
    TCP,
    TLS,
    Comm,
    Connector,
    FatalCommClosedError,
    InProc,
    InProcConnector,
    InProcListener,
    Listener,
    Pickled,
    Serialize,
    Serialized,
    TCPConnector,
    TCPListener,
    TLSConnector,
    TLSListener,
    ToPickle,
    convert_stream_closed_error,
    decompress_frames,
    host_array_from_buffers,
    inproc_manager,
    merge_memoryviews,
    msgpack_decode_default,
    parse_address,
    pickle_loads,
    read_bytes_rw,
    unpack_frames,
)
from daskfed.errors import DaskfedError
from daskfed.messages import PLAIN

logger = logging.getLogger(__name__)

Frame: TypeAlias = bytes | bytearray | memoryview
P = ParamSpec("P")
Handler: TypeAlias = Callable[[Comm], Awaitable[None]]

MAX_FRAMES = 2**20
"""Most frames in one message; a payload takes two or more."""
MAX_DEPTH = 256
"""Deepest nesting in one message; passing it on wraps it further, and msgpack writes only 511 levels or so."""
HANDSHAKE_BYTES = 2**16
"""Largest message that is read before the peer has said who it is."""
HANDSHAKE_TIMEOUT_S = 60.0
"""How long a peer that has connected may take to say who it is."""
MOST_CALLS = 2**16
"""Most calls that a pool for whatever tasks ask lets wait at once: a task that waits for a Lock holds one connection,
and must not keep the one that would release it from being heard."""
COPY_BYTES = 2**16
"""Frames up to this size are copied out of the buffer that they came in, so that a kept one does not hold it all."""


class MalformedMessage(DaskfedError, CommClosedError):
    """A peer sent frames that are no message, or one that is too large to accept; its connection was ended.

    It is a ``CommClosedError``, so every distributed server takes it for what it is: a peer that is gone.
    """


class OpaqueError(DaskfedError):
    """The called side raised; the exception itself stays pickled, for somebody who may open it.

    ``exception`` and ``traceback`` are what the reply held, unopened (``traceback`` may be None); ``exception_text``
    and ``traceback_text`` say the same in words. To pass the error on to one's own caller, return :meth:`reply` from
    the handler, or decorate it with :func:`relays_errors`.
    """

    def __init__(self, reply: Mapping[str, Any]) -> None:
        self.exception: Any = reply.get("exception")
        self.traceback: Any = reply.get("traceback")
        self.exception_text = str(reply.get("exception_text", "the called side gave no reason"))
        self.traceback_text = str(reply.get("traceback_text", ""))
        super().__init__(self.exception_text)

    def reply(self) -> dict[str, Any]:
        """Return the error reply as it came: a stock caller that gets it raises the original exception."""
        return {
            "status": "uncaught-error",
            "exception": self.exception,
            "traceback": self.traceback,
            "exception_text": self.exception_text,
            "traceback_text": self.traceback_text,
        }


class UnopenedEnum(dict[str, Any]):
    """An enum member by name; it is written again as it came, and nothing is imported for it."""


# -- reading frames --------------------------------------------------------------------------------------------------


def loads_opaque(frames: Sequence[Frame]) -> Any:
    """Return the message in ``frames`` with every payload unopened.

    Payloads come as ``Serialized`` and ``Pickled``, tuples for sequences, sets as sets (one that holds payloads stays a
    plain dict, which is written again as it came), enum members as :class:`UnopenedEnum`.
    Raises MalformedMessage where the frames are no message of distributed, and nothing else.
    """
    if not frames:
        raise MalformedMessage("a message without frames")
    return _unpack(frames[0], _Decoder(frames).decode)


class _Decoder:
    """Turns the markers in the first frame of a message into payloads that hold the other frames."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = frames
        self.next_frame = 1  # each payload comes behind the one before: no frame belongs to two

    def decode(self, obj: dict[Any, Any]) -> Any:
        if "__Serialized__" in obj:
            return Serialized(*self._payload(obj, "__Serialized__"))
        if "__Pickled__" in obj:
            header, frames = self._payload(obj, "__Pickled__")
            if not isinstance(header.get("pickled-obj"), bytes):
                raise MalformedMessage("a pickled payload without its pickle")
            return Pickled(header, frames)
        if "__Enum__" in obj:
            return UnopenedEnum(obj)
        if "__Set__" in obj:
            return _plain_set(obj)
        return obj

    def _payload(self, marker: dict[Any, Any], name: str) -> tuple[dict[str, Any], list[Frame]]:
        offset = marker[name]
        if type(offset) is not int or len(marker) != 1 or not self.next_frame <= offset < len(self.frames):
            raise MalformedMessage(f"{name} marks frame {offset!r} of {len(self.frames)}, expected {self.next_frame}")
        # Without a hook the header is written again byte for byte: markers inside it stay plain dicts.
        header = _unpack(self.frames[offset], None)
        count = header.get("num-sub-frames") if isinstance(header, dict) else None
        if type(count) is not int or not 0 <= count < len(self.frames) - offset:
            raise MalformedMessage(f"{name} at frame {offset} of {len(self.frames)} claims {count!r} frames")
        self.next_frame = offset + 1 + count
        return header, [_owned(frame) for frame in self.frames[offset + 1 : self.next_frame]]


def _plain_set(obj: dict[Any, Any]) -> Any:
    items = obj.get("as-list")
    if not isinstance(items, tuple):
        raise MalformedMessage("a set without its items")
    try:
        return set(items)
    except TypeError:  # it holds payloads, which cannot be hashed unopened
        return obj


def _owned(frame: Frame) -> Frame:
    """Return a small frame as bytes of its own, a large one as it is."""
    return bytes(frame) if memoryview(frame).nbytes <= COPY_BYTES else frame


_NOT_CONTAINERS = bytes(set(range(256)) - {*range(0x80, 0xA0), *range(0xDC, 0xE0)})  # msgpack's maps and arrays


def _unpack(frame: Frame, hook: Callable[[dict[Any, Any]], Any] | None) -> Any:
    """Decode one msgpack frame; raises MalformedMessage, and never takes much more memory than the frame holds."""
    try:
        packed = bytes(frame)
        _scan(packed)
        return msgpack.unpackb(packed, object_hook=hook, use_list=False, raw=False, strict_map_key=False)
    except MalformedMessage:
        raise
    except Exception as exc:  # msgpack raises a dozen types, hashing what came as a map's key any other
        raise MalformedMessage(f"not a message of distributed: {type(exc).__name__}: {exc}") from exc


def _scan(packed: bytes) -> None:
    """Raise unless ``packed`` is whole and at most MAX_DEPTH deep, without building anything.

    The decoder allocates what a length claims before it looks whether the items are there, at each level of nesting;
    once this has passed, every claimed item exists.
    """
    if len(packed.translate(None, _NOT_CONTAINERS)) > MAX_DEPTH:  # else there are not even that many containers
        packed = _DEPTH_TO_SPARE + packed
    _skip(packed)


def _skip(packed: bytes) -> None:
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(packed)), strict_map_key=False)
    unpacker.feed(packed)
    unpacker.skip()


def _is_too_deep(depth: int) -> bool:
    try:
        _skip(b"\x91" * depth + b"\xc0")
    except Exception:
        return True
    return False


_DEPTH_TO_SPARE = b"\x91" * (bisect.bisect_left(range(4096), True, key=_is_too_deep) - 1 - MAX_DEPTH)
"""So many lists, one in the other, that msgpack can skip just MAX_DEPTH levels more."""


# -- comms over a socket ---------------------------------------------------------------------------------------------


class _OpaqueStream(TCP):
    """Reads with :func:`loads_opaque` whatever the peer sends."""

    max_message_bytes = HANDSHAKE_BYTES  # until the handshake
    stream: Any
    _closed: bool

    async def read(self, deserializers: Any = None) -> Any:
        """Return the next message, unopened; ``deserializers`` is there for the interface.

        Raises CommClosedError when the peer is gone, MalformedMessage (one of these) when it had to be cut off.
        """
        if self.stream is None:
            raise CommClosedError()
        try:
            return loads_opaque(await _read_frames(self.stream, self.max_message_bytes))
        except (StreamClosedError, SSLError) as exc:
            self.stream, self._closed = None, True
            convert_stream_closed_error(self, exc)
        except MalformedMessage as exc:
            logger.warning("Ended the connection with %s: %s", self._peer_addr, exc)
            self.abort()
            raise
        except BaseException:  # part of a message may have been read: the rest would be taken for a new one
            self.abort()
            raise


class OpaqueTCP(_OpaqueStream):
    """A ``tcp://`` comm that opens nothing."""


class OpaqueTLS(_OpaqueStream, TLS):
    """A ``tls://`` comm that opens nothing."""


class OpaqueZmq(Zmq):
    """A ``zmq://`` comm that opens nothing."""

    @property
    def max_message_bytes(self) -> float:
        """The most bytes that a message may have."""
        return self.channel.max_bytes

    @max_message_bytes.setter
    def max_message_bytes(self, limit: float) -> None:
        self.channel.max_bytes = limit

    async def read(self, deserializers: Any = None) -> Any:
        """Return the next message, unopened, as :meth:`_OpaqueStream.read` does."""
        frames = await self.read_frames()
        try:
            return loads_opaque(frames)
        except MalformedMessage as exc:
            logger.warning("Ended the connection with %s: %s", self._peer_addr, exc)
            self.abort()
            raise


async def _read_frames(stream: IOStream, limit: int) -> list[Frame]:
    """Read the frames of one message of at most ``limit`` bytes; see ``distributed.comm.tcp`` for the layout."""
    (nbytes,) = struct.unpack("Q", await stream.read_bytes(8))
    if not 8 <= nbytes <= limit:
        raise MalformedMessage(f"a message starts with {nbytes} bytes, the limit is {limit}")
    first = await read_bytes_rw(stream, nbytes)
    _check_prelude(first, limit)
    frames, missing = unpack_frames(first, partial=True)
    for nbytes in missing:
        frames.append(await read_bytes_rw(stream, nbytes))
    return list(frames)


def _check_prelude(first: memoryview, limit: int) -> None:
    """Raise MalformedMessage unless ``first`` begins with the lengths of a bearable number of frames."""
    (count,) = struct.unpack_from("Q", first)
    if not 0 < count <= min(MAX_FRAMES, first.nbytes // 8 - 1):
        raise MalformedMessage(f"a message of {count} frames announced in {first.nbytes} bytes")
    lengths = struct.unpack_from(f"{count}Q", first, 8)
    if sum(lengths) > limit:
        raise MalformedMessage(f"a message of {sum(lengths)} bytes, the limit is {limit}")
    inside = first.nbytes - 8 * (count + 1)
    for nbytes in lengths:
        if inside == 0:
            return
        inside -= nbytes
        if inside < 0:
            raise MalformedMessage("a frame is cut off")
    if inside:
        raise MalformedMessage(f"{inside} bytes behind the last frame")


# -- comms inside one process ----------------------------------------------------------------------------------------


class OpaqueInProc(InProc):
    """An ``inproc://`` comm that passes payloads through, wrapped as they are, and opens nothing on reading."""

    _closed: bool

    async def read(self, deserializers: Any = None) -> Any:
        """Return the next message; its dicts and lists are copies, since the sender may hold on to them.

        Raises CommClosedError when the peer is gone.
        """
        if self._closed:
            raise CommClosedError()
        msg = await self._read_q.get()
        if msg is INPROC_EOF:
            self._closed = True
            self._finalizer.detach()
            raise CommClosedError()
        return _copied(msg)

    async def write(self, msg: Any, serializers: Any = None, on_error: Any = None) -> int:
        """Pass ``msg`` to the peer: as it is to an opaque one, made readable by :func:`settle` to a stock one."""
        return cast(int, await super().write(msg if self.remote_info.get("opaque") else settle(msg)))

    def handshake_info(self) -> dict[str, Any]:
        """Tell the peer that this end opens nothing."""
        return {**super().handshake_info(), "opaque": True}


def _copied(obj: Any) -> Any:
    """Return ``obj`` with its dicts and lists copied, and everything inside as it is."""
    if type(obj) is dict:
        return {key: _copied(value) for key, value in obj.items()}
    if type(obj) is not list:
        return obj
    return list(obj) if PLAIN.issuperset(map(type, obj)) else [_copied(value) for value in obj]


def settle(msg: Any) -> Any:
    """Return ``msg`` as a stock peer in this process can read it.

    Stock in-process comms expect payloads as they were before they went over a socket: so ``Pickled`` values are
    opened (they are for that peer, which is in this process), ``Serialized`` ones stay closed but are decompressed and
    joined from the pieces they were cut into, and stand in lists, since a stock peer does not look into tuples.
    """
    return _settled(msg)[0]


def _settled(obj: Any) -> tuple[Any, bool]:
    """Return ``obj`` settled, and whether there is something in it that its reader has yet to open."""
    if isinstance(obj, Serialized):
        return _joined(obj), True
    if isinstance(obj, (Serialize, ToPickle)):
        return obj, True
    if isinstance(obj, Pickled):
        return pickle_loads(obj.header["pickled-obj"], buffers=_decompressed(obj.header, obj.frames)), False
    if isinstance(obj, UnopenedEnum):
        return msgpack_decode_default(obj), False
    if type(obj) is dict and "__Set__" in obj:
        return set(settle(obj["as-list"])), False
    if type(obj) in (dict, list, tuple):
        return _settled_container(obj)
    return obj, False


def _settled_container(obj: Any) -> tuple[Any, bool]:
    if type(obj) is not dict and PLAIN.issuperset(map(type, obj)):
        return (list(obj) if type(obj) is list else obj), False
    settled = [_settled(value) for value in (obj.values() if type(obj) is dict else obj)]
    values = [value for value, _ in settled]
    closed = any(flag for _, flag in settled)
    if type(obj) is dict:
        return dict(zip(obj, values, strict=True)), closed
    if type(obj) is list or closed:
        return values, closed
    changed = any(new is not old for new, old in zip(values, obj, strict=True))
    return (tuple(values) if changed else obj), closed  # a key stays the same object


def _joined(obj: Serialized) -> Serialized:
    """Return ``obj`` as it was before it was compressed and cut for a socket, still closed."""
    header = {name: value for name, value in obj.header.items() if name not in _SOCKET_FIELDS}
    if "is-collection" in header:
        header = copy.deepcopy(header)  # reading one takes its header apart, and it may be read again
    frames = _decompressed(obj.header, obj.frames)
    counts, offsets = obj.header.get("split-num-sub-frames"), obj.header.get("split-offsets")
    if counts is not None and offsets is not None and len(counts) != len(frames):
        frames = [_merged(frames[start : start + count]) for count, start in zip(counts, offsets, strict=True)]
    return Serialized(header, frames)


_SOCKET_FIELDS = frozenset({"compression", "split-num-sub-frames", "split-offsets", "num-sub-frames"})


def _decompressed(header: Mapping[str, Any], frames: Sequence[Any]) -> list[Any]:
    return list(decompress_frames(dict(header), frames)) if any(header.get("compression") or ()) else list(frames)


def _merged(frames: list[Any]) -> Any:
    try:
        return merge_memoryviews(frames)  # without a copy where they lie side by side
    except (TypeError, ValueError):
        return host_array_from_buffers(frames)


# -- listening and dialling ------------------------------------------------------------------------------------------


class _GuardedListener(Listener):
    """Gives a peer little time and little room to say who it is, and drops one that says something else."""

    async def on_connection(self, comm: Comm, handshake_overrides: dict[str, Any] | None = None) -> None:
        """Exchange handshakes with a peer that has just connected; raises CommClosedError if it does not take part."""
        async with _guarded_handshake(comm):
            await super().on_connection(comm, handshake_overrides)


@contextlib.asynccontextmanager
async def _guarded_handshake(comm: Any) -> AsyncIterator[None]:
    comm.max_message_bytes = HANDSHAKE_BYTES
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            yield
    except (CommClosedError, asyncio.CancelledError):
        comm.abort()
        raise
    except Exception as exc:  # whatever was wrong with what the peer said
        comm.abort()
        raise CommClosedError(f"no handshake with {comm.peer_address}: {type(exc).__name__}: {exc}") from exc
    comm.max_message_bytes = largest_message()


class OpaqueTCPListener(_GuardedListener, TCPListener):
    """Listens on ``tcp://`` with comms that open nothing."""

    comm_class = OpaqueTCP


class OpaqueTLSListener(_GuardedListener, TLSListener):
    """Listens on ``tls://`` with comms that open nothing."""

    comm_class = OpaqueTLS


class OpaqueZmqListener(_GuardedListener, ZmqListener):
    """Listens on ``zmq://`` with comms that open nothing."""

    comm_class = OpaqueZmq


class OpaqueInProcListener(_GuardedListener, InProcListener):
    """Listens on ``inproc://`` with comms that open nothing."""

    def __init__(self, address: str, comm_handler: Handler, deserialize: bool = False, **connection_args: Any) -> None:
        super().__init__(address, comm_handler, deserialize=False)

    async def _handle_stream(self, comm: Any) -> None:
        await super()._handle_stream(_made_opaque(comm))


class _OpaqueTCPConnector(TCPConnector):
    comm_class = OpaqueTCP


class _OpaqueTLSConnector(TLSConnector):
    comm_class = OpaqueTLS


class _OpaqueZmqConnector(ZmqConnector):
    comm_class = OpaqueZmq


class _OpaqueInProcConnector(InProcConnector):
    def __init__(self) -> None:
        super().__init__(inproc_manager)

    async def connect(self, address: str, deserialize: bool = False, **connection_args: Any) -> Comm:
        return _made_opaque(await super().connect(address, deserialize=False))


def _made_opaque(comm: Any) -> OpaqueInProc:
    """Return ``comm``, which has not been used yet; distributed makes in-process comms of a fixed class."""
    comm.__class__ = OpaqueInProc
    return cast(OpaqueInProc, comm)


_LISTENERS: dict[str, Any] = {
    "tcp": OpaqueTCPListener,
    "tls": OpaqueTLSListener,
    "zmq": OpaqueZmqListener,
    "inproc": OpaqueInProcListener,
}
_CONNECTORS: dict[str, Any] = {
    "tcp": _OpaqueTCPConnector,
    "tls": _OpaqueTLSConnector,
    "zmq": _OpaqueZmqConnector,
    "inproc": _OpaqueInProcConnector,
}


async def listen_opaque(address: str, handler: Handler, **connection_args: Any) -> Listener:
    """Listen on ``address`` and call ``handler`` with an opaque comm for each connection; returns the started listener.

    ``address`` is like ``tcp://127.0.0.1:0`` (port 0 takes a free one), ``tls://...`` (needs ``ssl_context``) or
    ``inproc://`` (takes a free name); without a scheme it is ``tls`` if there is an ``ssl_context``, else ``tcp``.
    ``connection_args`` are those of a distributed listener. Raises ValueError for another scheme, OSError if the
    address is taken, RuntimeError where encryption is required and the scheme has none.
    """
    if "://" not in address:
        address = ("tls://" if connection_args.get("ssl_context") else "tcp://") + address
    scheme, loc = parse_address(address, strict=True)
    listener: Listener = _known(_LISTENERS, scheme)(loc, handler, deserialize=False, **connection_args)
    await listener.start()
    return listener


async def connect_opaque(address: str, timeout: float | str | None = None, **connection_args: Any) -> Comm:
    """Connect to ``address`` (``tcp``, ``tls`` or ``inproc``), whoever listens there, and return an opaque comm.

    Tries again until ``timeout`` (seconds, or as in "10s"; by default Dask's ``distributed.comm.timeouts.connect``) is
    over. Raises as distributed's own ``connect``: OSError when the time is over, FatalCommClosedError when a
    certificate is refused, CommClosedError when the peer hangs up, ValueError for another scheme.
    """
    if timeout is None:
        timeout = dask.config.get("distributed.comm.timeouts.connect")
    scheme, loc = parse_address(address)
    connector: Connector = _known(_CONNECTORS, scheme)()
    dial = functools.partial(connector.connect, loc, deserialize=False, **connection_args)
    comm = await _dial(dial, address, parse_timedelta(timeout, default="seconds"))
    async with _guarded_handshake(comm):
        await _shake_hands(comm)
    return comm


def _known(table: dict[str, Any], scheme: str) -> Any:
    if scheme not in table:
        raise ValueError(f"unknown address scheme {scheme!r} (known schemes: {sorted(table)})")
    return table[scheme]


async def _dial(dial: Callable[[], Awaitable[Comm]], address: str, timeout_s: float) -> Comm:
    """Dial until it works or the time is over: a short first try, then longer ones with a growing random pause."""
    deadline = time.monotonic() + timeout_s
    patience, pause, failure = timeout_s / 5, 0.01, None
    while (left := deadline - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(min(patience, left)):
                return await dial()
        except FatalCommClosedError:
            raise
        except OSError as exc:  # a TimeoutError too
            failure = exc
        await asyncio.sleep(random.uniform(0, min(pause, left)))
        patience, pause = timeout_s, 2 * pause
    raise OSError(f"Timed out trying to connect to {address} after {timeout_s:g} s") from failure


async def _shake_hands(comm: Any) -> None:
    """Tell the peer which settings this end has, hear its own, and settle on what both can do."""
    local = comm.handshake_info()
    await comm.write(local)
    comm.remote_info = {**await comm.read(), "address": comm.peer_address}
    comm.local_info = {**local, "address": comm.local_address}
    comm.handshake_options = comm.handshake_configuration(comm.local_info, comm.remote_info)


# -- calls -----------------------------------------------------------------------------------------------------------


async def call_opaque(comm: Comm, /, op: str, reply: bool = True, **kwargs: Any) -> Any:
    """Call ``op`` with ``kwargs`` over ``comm``, which nobody else uses meanwhile, and return the unopened reply.

    Returns None at once where ``reply`` is false. Raises OpaqueError where the called side raised, OSError
    (CommClosedError) where the connection broke; then, and when cancelled, ``comm`` is closed.
    """
    try:
        await comm.write({"op": op, "reply": reply, **kwargs}, on_error="raise")
        response = await comm.read() if reply else None
    except (OSError, asyncio.CancelledError):
        comm.abort()  # an answer that comes late must not be taken for that of the next call
        raise
    if isinstance(response, dict) and response.get("status") == "uncaught-error":
        raise OpaqueError(response)
    return response


class OpaquePool(ConnectionPool):
    """A pool of opaque comms, by address; ``await pool.call(address, "op", ...)`` instead of ``pool(address).op(...)``.

    Takes ``limit``, ``timeout`` and ``connection_args`` as its base; must be started (``await pool.start()`` or
    ``async with pool``) and closed.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "deserialize": False})

    async def call(self, address: str, /, op: str, **kwargs: Any) -> Any:
        """Call ``op`` at ``address`` over a pooled comm; see :func:`call_opaque`, and :func:`connect_opaque`."""
        if self.status is not Status.running:
            raise CommClosedError(f"no call of {op!r} at {address}: this end is closed")
        comm = await self.connect(address)
        try:
            return await call_opaque(comm, op, **kwargs)
        finally:
            self.reuse(address, comm)

    async def _connect(self, addr: str, timeout: float | None = None) -> Comm:
        self._pending_count += 1
        try:
            await self.semaphore.acquire()
            return await self._connect_one(addr, timeout)
        finally:
            self._pending_count -= 1

    async def _connect_one(self, addr: str, timeout: float | None) -> Comm:
        self._connecting_count += 1
        try:
            comm = await connect_opaque(addr, timeout or self.timeout, **self.connection_args)
        except BaseException:
            self.semaphore.release()
            raise
        finally:
            self._connecting_count -= 1
        comm.name, comm.allow_offload = "OpaquePool", self.allow_offload
        self._created.add(comm)
        self.occupied[addr].add(comm)
        return comm


def relays_errors(handler: Callable[P, Awaitable[Any]]) -> Callable[P, Coroutine[Any, Any, Any]]:
    """Decorate an async RPC handler: an OpaqueError that it raises becomes its reply: the caller gets the original."""

    @functools.wraps(handler)
    async def relaying(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return await handler(*args, **kwargs)
        except OpaqueError as exc:
            return exc.reply()

    return relaying


class OpaqueServer(Server):
    """A distributed server that opens no payload: neither of those who call it nor of those whom it calls.

    ``self.rpc`` is an :class:`OpaquePool`. Takes the arguments of ``Server``. What its handlers get and return may hold
    ``Serialized`` and ``Pickled`` values. It has no ``connection_stream``: that op lets a caller say in whose name it
    speaks.
    """

    _updated_sys_path: bool

    def __init__(self, handlers: dict[str, Callable[..., Any]], **kwargs: Any) -> None:
        super().__init__(handlers, **{"needs_workdir": False, **kwargs, "deserialize": False})
        self.rpc = OpaquePool(
            limit=kwargs.get("connection_limit", 512),
            connection_args=kwargs.get("connection_args"),
            timeout=kwargs.get("timeout"),
            server=self,
        )
        if "connection_stream" not in handlers:
            del self.handlers["connection_stream"]
        if self._updated_sys_path:  # what others put into a temporary directory is not to be imported here
            sys.path.remove(self.local_directory)
            self._updated_sys_path = False

    async def listen(
        self, port_or_addr: int | str | tuple[str, int] | None = None, allow_offload: bool = True, **kwargs: Any
    ) -> None:
        """Listen on an address, a port, or (host, port); ``kwargs`` as for :func:`listen_opaque`, which says more."""
        where = self.default_port if port_or_addr is None else port_or_addr
        if isinstance(where, int):
            where = (self.default_ip, where)
        address = where if isinstance(where, str) else unparse_host_port(*where)
        listener = await listen_opaque(address, self.handle_comm, allow_offload=allow_offload, **kwargs)
        self.listeners.append(listener)
