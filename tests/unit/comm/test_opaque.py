"""Frames are read without opening payloads, written again as they came, and garbage ends one connection only."""

from __future__ import annotations

import asyncio
import logging
import pickle
import ssl
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from pathlib import Path
from typing import Any

import dask
import msgpack
import numpy as np
import pytest
from distributed.comm.core import CommClosedError, connect
from distributed.core import Status, rpc
from distributed.protocol import core as stock
from distributed.protocol.serialize import Pickled, Serialize, Serialized, ToPickle
from hypothesis import given
from hypothesis import strategies as st

from daskfed.comm import opaque
from daskfed.comm.opaque import (
    MAX_DEPTH,
    MalformedMessage,
    OpaqueError,
    OpaquePool,
    OpaqueServer,
    UnopenedEnum,
    call_opaque,
    connect_opaque,
    listen_opaque,
    loads_opaque,
    relays_errors,
    settle,
)
from daskfed.dask_private import inproc_manager


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


class Bomb:
    """Cannot be unpickled without noticing."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('opened')",)


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    def __hash__(self) -> int:
        return hash(self.x)


BIG = b"daskfed " * 10_000
ARRAY = np.arange(20_000)

MESSAGES: dict[str, Any] = {
    "plain": {"op": "x", "keys": (("a", 0), "b", 1.5, None, b"raw"), "deep": {"a": {"b": (1, {"c": 2})}}},
    "numbers": (2**64 - 1, -(2**63), 1e300, float("inf"), True),
    "a set": {"keys": {("x", 1)}},
    "an enum": {"status": Status.running},
    "a pickle": {"code": ToPickle(Point(1)), "more": (ToPickle(BIG), ToPickle(ARRAY))},
    "serialised": {"data": Serialize(Point(2)), "arrays": [Serialize(ARRAY), Serialize({"y": ARRAY, "z": [BIG]})]},
    "what msgpack cannot write": {"value": Point(3), "values": {Point(4)}, "in a batch": [{"event": (1.5, 1j)}]},
}


def packed(message: Any) -> list[bytes]:
    """The frames of ``message`` as a stock end writes them, with every payload compressed and cut."""
    frames = stock.dumps(message, context={"compression": "zlib"}, frame_split_size=30_000)
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_a_message_leaves_byte_for_byte_as_it_came(message: Any) -> None:
    frames = packed(message)
    assert [bytes(frame) for frame in stock.dumps(loads_opaque(frames))] == frames


def test_the_messages_above_do_have_compressed_and_cut_payloads() -> None:
    headers = [loads_opaque(packed({"v": kind(ARRAY)}))["v"].header for kind in (Serialize, ToPickle)]
    assert all("zlib" in header["compression"] for header in headers)
    assert headers[0]["num-sub-frames"] == headers[0]["split-num-sub-frames"][0] == 6


@pytest.mark.parametrize("wrap", [Serialize, ToPickle, lambda value: value], ids=["serialised", "pickled", "bare"])
def test_no_payload_is_opened(wrap: Callable[[Any], Any]) -> None:
    frames = packed({"op": "x", "value": wrap(Bomb())})
    message = loads_opaque(frames)
    assert isinstance(message["value"], (Serialized, Pickled))
    with pytest.raises(AssertionError, match="opened"):  # the control: the payload is live
        stock.loads(frames)


def test_an_enum_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "daskfed_enum_canary.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    colour = {"__Enum__": True, "name": "RED", "__module__": "daskfed_enum_canary", "__name__": "Colour"}
    frames = [msgpack.packb({"value": colour})]
    value = loads_opaque(frames)["value"]
    assert isinstance(value, UnopenedEnum) and value["name"] == "RED"
    assert stock.dumps({"value": value}) == frames
    allowed = dask.config.set({"distributed.scheduler.allowed-imports": ["daskfed_enum_canary"]})
    with allowed, pytest.raises(AssertionError, match="imported"):  # the control
        stock.loads(frames)


def test_markers_in_a_header_stay_as_they_are() -> None:
    class Colour(Enum):
        RED = 1

    payload = Serialized({"serializer": "pickle", "tags": {1}, "colour": Colour.RED}, [b"x"])
    frames = packed({"value": payload})
    assert [bytes(frame) for frame in stock.dumps(loads_opaque(frames))] == frames


def test_a_small_payload_does_not_hold_the_buffer_that_it_came_in() -> None:
    buffer = bytearray(b"".join(frames := packed({"value": ToPickle(np.arange(100))})))
    views, start = [], 0
    for frame in frames:
        views.append(memoryview(buffer)[start : start + len(frame)])
        start += len(frame)
    payload = loads_opaque(views)["value"]
    assert payload.frames and all(isinstance(frame, bytes) for frame in payload.frames)


# -- what is no message ----------------------------------------------------------------------------------------------

HEADER = msgpack.packb({"num-sub-frames": 1})
PICKLED = msgpack.packb({"num-sub-frames": 1, "pickled-obj": b"x"})


def marked(**marks: Any) -> bytes:
    return bytes(msgpack.packb([{f"__{name}__": value} for name, value in marks.items()]))


@pytest.mark.parametrize(
    "frames",
    {
        "no frames": [],
        "an empty frame": [b""],
        "cut off": [packed(MESSAGES["plain"])[0][:-1]],
        "something behind the end": [packed(MESSAGES["plain"])[0] + b"\xc0"],
        "a string that is no UTF-8": [b"\xa1\xff"],
        "a map as key": [b"\x81\x80\xc0"],
        "a payload as key": [b"\x81" + msgpack.packb({"__Serialized__": 1}) + b"\xc0", HEADER, b""],
        "a payload at frame 0": [marked(Serialized=0), HEADER, b""],
        "behind the last frame": [marked(Serialized=3), HEADER, b""],
        "a negative frame": [marked(Serialized=-1), HEADER, b""],
        "a frame that is no number": [marked(Serialized=True), HEADER, b""],
        "a marker with more": [msgpack.packb({"__Serialized__": 1, "data": ()}), HEADER, b""],
        "one frame for two payloads": [msgpack.packb([{"__Serialized__": 1}, {"__Pickled__": 1}]), PICKLED, b""],
        "a frame inside another's": [msgpack.packb([{"__Serialized__": 1}, {"__Serialized__": 2}]), HEADER, HEADER],
        "a header that is no map": [marked(Serialized=1), msgpack.packb([1]), b""],
        "a header that is garbage": [marked(Serialized=1), b"\xc1", b""],
        "no number of frames": [marked(Serialized=1), msgpack.packb({}), b""],
        "too many frames": [marked(Serialized=1), msgpack.packb({"num-sub-frames": 2}), b""],
        "fewer than no frames": [marked(Serialized=1), msgpack.packb({"num-sub-frames": -1}), b""],
        "frames that are no number": [marked(Serialized=1), msgpack.packb({"num-sub-frames": None}), b""],
        "a pickle without its pickle": [marked(Pickled=1), HEADER, b""],
        "a set without its items": [msgpack.packb({"__Set__": True})],
        "deeper than can be written": [b"\x91" * 600 + b"\xc0"],
        "deeper than can be read": [b"\x91" * 5000 + b"\xc0"],
        "a deep header": [marked(Serialized=1), b"\x82\xaenum-sub-frames\x01\xa1x" + b"\x91" * 400 + b"\xc0", b""],
        "claims without items": [(b"\xdd" + struct.pack(">I", 2**28)) * 500],
    }.values(),
)
def test_what_is_no_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        loads_opaque(frames)


def test_claims_without_items_take_no_memory() -> None:
    """Nested lengths are allocated before they are read: here 200 times 80 MB, if nobody looks first."""
    items = 10_000_000
    bomb = (b"\xdd" + struct.pack(">I", items)) * 200 + bytes(items)
    tracemalloc.start()
    with pytest.raises(MalformedMessage):
        loads_opaque([bomb])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(bomb)


def test_the_deepest_message_that_is_read_can_be_wrapped_and_written() -> None:
    deep: Any = [1]
    for _ in range(MAX_DEPTH - 1):
        deep = [deep, (), ()]
    message = loads_opaque([msgpack.packb(deep)])
    assert stock.dumps([{"op": "event", "event": (1.0, {"wrapped": [message]})}])
    with pytest.raises(MalformedMessage):
        loads_opaque([msgpack.packb([deep])])


@pytest.mark.parametrize("wrap", [Serialize, ToPickle], ids=["serialised", "pickled"])
def test_a_decompression_bomb_passes_compressed(wrap: Callable[[Any], Any]) -> None:
    """Only who opens a payload pays for what it grows to."""
    size = 50_000_000
    frames = packed({"value": wrap(np.zeros(size, "u1"))})
    assert sum(map(len, frames)) < size / 100
    tracemalloc.start()
    written = stock.dumps(loads_opaque(frames))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [bytes(frame) for frame in written] == frames and peak < size / 10


def only_refuses(frames: list[bytes]) -> None:
    """Whatever is read must also be writable, and read the same again."""
    try:
        message = loads_opaque(frames)
    except MalformedMessage:
        return
    stock.dumps(loads_opaque(stock.dumps(message)))


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_random_frames_are_read_or_refused(frames: list[bytes]) -> None:
    only_refuses(frames)


SCALARS = st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3) | st.binary(max_size=3)
MARKERS = st.sampled_from(["__Serialized__", "__Pickled__", "__Set__", "__Enum__", "as-list", "data", "op"])
HEADERS = st.dictionaries(st.sampled_from(["num-sub-frames", "pickled-obj", "compression"]), SCALARS).map(msgpack.packb)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(MARKERS, inner, max_size=3), max_leaves=12
)


@given(TREES, st.lists(HEADERS | st.binary(max_size=4), max_size=6))
def test_random_markers_are_read_or_refused(tree: Any, rest: list[bytes]) -> None:
    only_refuses([msgpack.packb(tree), *rest])


@given(st.sampled_from(list(MESSAGES.values())), st.data())
def test_damaged_messages_are_read_or_refused(message: Any, data: st.DataObject) -> None:
    frames = packed(message)
    which = data.draw(st.integers(0, len(frames) - 1))
    where = data.draw(st.integers(0, min(200, len(frames[which]) - 1)))
    damaged = frames[which][:where] + data.draw(st.binary(min_size=1, max_size=2)) + frames[which][where + 1 :]
    only_refuses([*frames[:which], damaged, *frames[which + 1 :]])


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=9))
def test_plain_messages_read_as_in_stock_distributed(message: Any) -> None:
    frames = stock.dumps(message)
    assert loads_opaque(frames) == stock.loads(frames, deserialize=False)


# -- over sockets ----------------------------------------------------------------------------------------------------


class Shelf(OpaqueServer):
    """Keeps one value and gives it back."""

    def __init__(self, next_address: str | None = None, **kwargs: Any) -> None:
        super().__init__({"put": self.put, "get": self.get, "fail": self.fail, "ask": self.ask}, **kwargs)
        self.value: Any = None
        self.next_address = next_address

    def put(self, value: Any) -> str:
        self.value = value
        return type(value).__name__

    def get(self) -> dict[str, Any]:
        return {"value": self.value}

    def fail(self, text: str) -> None:
        raise LookupError(text)

    @relays_errors
    async def ask(self, text: str) -> Any:
        return await self.rpc.call(str(self.next_address), "fail", text=text)


VALUES: list[Any] = [
    1,
    {"a": {"b": "c"}},
    {1, 2},
    Point(1),
    {Point(1), Point(2)},
    {"in": {"a": {"dict": Point(5)}}},
    ToPickle(Point(3)),
    ToPickle(BIG),
    Serialize(Point(4)),
    Serialize({"y": [Point(6)], "z": BIG}),
    Serialize(ARRAY),
]


def opened(value: Any) -> Any:
    return value.data if isinstance(value, (ToPickle, Serialize)) else value


SCHEMES = ["tcp://127.0.0.1:0", "inproc://", "zmq://127.0.0.1:0"]


@pytest.mark.parametrize("writer", SCHEMES)
@pytest.mark.parametrize("reader", SCHEMES)
def test_stock_ends_exchange_every_kind_of_value_through_an_opaque_server(writer: str, reader: str) -> None:
    async def main() -> None:
        async with Shelf() as shelf:
            await shelf.listen(writer)
            await shelf.listen(reader)
            here, there = (listener.contact_address for listener in shelf.listeners)
            async with rpc(here) as out, rpc(there) as back:
                for value in VALUES:
                    kind = await out.put(value=value)
                    assert kind in ("Serialized", "Pickled", "Serialize", "ToPickle") or not isinstance(
                        value, (Serialize, ToPickle)
                    )
                    for _ in range(2):  # reading must not use it up
                        assert same((await back.get())["value"], opened(value))

    run(main)


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(b, np.ndarray) else bool(a == b)


def test_an_opaque_caller_gets_replies_and_errors_unopened() -> None:
    async def main() -> None:
        async with Shelf() as shelf, OpaquePool() as pool:
            await shelf.listen("tcp://127.0.0.1:0")
            comm = await connect_opaque(shelf.address)
            await call_opaque(comm, "put", value=ToPickle(Bomb()))
            assert isinstance((await call_opaque(comm, "get"))["value"], Pickled)
            assert await call_opaque(comm, "put", reply=False, value=2) is None
            await comm.close()
            with pytest.raises(OpaqueError, match="no such thing") as failure:
                await pool.call(shelf.address, op="fail", text="no such thing")
            assert isinstance(failure.value.exception, Serialized)
            assert "in fail" in failure.value.traceback_text
            assert pool.open == 1 and pool.active == 0

    run(main)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_error_passes_two_opaque_servers_and_arrives_as_what_it_was(scheme: str) -> None:
    async def main() -> None:
        async with Shelf() as far:
            await far.listen(scheme)
            async with Shelf(far.address) as near:
                await near.listen(scheme)
                async with rpc(near.address) as stock_caller:
                    with pytest.raises(LookupError, match="nowhere"):
                        await stock_caller.ask(text="nowhere")

    run(main)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cancelled_call_does_not_leave_its_reply_to_the_next(scheme: str) -> None:
    async def main() -> None:
        async with Shelf() as shelf, OpaquePool() as pool:
            started = asyncio.Event()

            async def slow() -> str:
                started.set()
                await asyncio.sleep(0.05)
                return "late"

            shelf.handlers["slow"] = slow
            await shelf.listen(scheme)
            call = asyncio.create_task(pool.call(shelf.address, "slow"))
            await started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert pool.open == 0
            assert await pool.call(shelf.address, "put", value=1) == "int"

    run(main)


def hello(**fields: Any) -> bytes:
    """A handshake on the wire."""
    return wire([msgpack.packb({"compression": None, "python": (3, 11), "pickle-protocol": 5, **fields})])


def wire(frames: list[bytes]) -> bytes:
    prelude = struct.pack(f"{1 + len(frames)}Q", len(frames), *map(len, frames))
    return struct.pack("Q", len(prelude) + sum(map(len, frames))) + prelude + b"".join(frames)


GARBAGE = {
    "nothing": b"",
    "a web browser": b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n",
    "a handshake that is too large": struct.pack("Q", 2**30),
    "a handshake that is a list": wire([msgpack.packb([1, 2])]),
    "a handshake that is a number": wire([msgpack.packb(1)]),
    "a handshake without its fields": wire([msgpack.packb({})]),
    "a handshake with a pickle": hello(**{"pickle-protocol": "high"}),
    "a message of no size": hello() + struct.pack("Q", 0),
    "a message larger than memory": hello() + struct.pack("Q", 2**62),
    "more frames than there is room for": hello() + struct.pack("QQ", 8, 2**40),
    "frames larger than memory": hello() + struct.pack("QQQ", 16, 1, 2**62),
    "a frame that is cut off": hello() + struct.pack("QQQQ", 24, 1, 9, 0),
    "a remainder": hello() + struct.pack("QQQQ", 24, 1, 7, 0),
    "no frames": hello() + struct.pack("QQ", 8, 0),
    "a payload that is not there": hello() + wire([marked(Serialized=7)]),
    "a payload named twice": hello() + wire([msgpack.packb([{"__Pickled__": 1}] * 2), PICKLED, b""]),
}
NOT_FOR_A_SERVER = {
    "a message that is no dict": hello() + wire([msgpack.packb([1])]),
    "an op that is a payload": hello() + wire([msgpack.packb({"op": {"__Pickled__": 1}}), PICKLED, b""]),
}


@pytest.mark.parametrize("garbage", (GARBAGE | NOT_FOR_A_SERVER).values(), ids=GARBAGE | NOT_FOR_A_SERVER)
def test_garbage_ends_its_own_connection_only(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)

    async def main() -> None:
        async with Shelf() as shelf:
            await shelf.listen("tcp://127.0.0.1:0")
            async with rpc(shelf.address) as good:
                await good.put(value=1)
                reader, writer = await asyncio.open_connection(shelf.host, shelf.port)
                writer.write(garbage)
                if not garbage:
                    writer.write_eof()
                await asyncio.wait_for(reader.read(), 5)  # the server hangs up
                writer.close()
                assert await good.get() == {"value": 1}
            async with rpc(shelf.address) as late:
                assert await late.get() == {"value": 1}

    run(main)


TRUNCATED = {
    "in the length": hello() + b"\x08",
    "in the lengths of frames": hello() + struct.pack("QQ", 1000, 1),
    "in a frame": hello() + wire(packed(MESSAGES["serialised"]))[:-100],
}


@pytest.mark.parametrize("start", TRUNCATED.values(), ids=TRUNCATED)
@pytest.mark.parametrize("end", ["hangs up", "stays"])
def test_a_message_that_does_not_end_keeps_nobody_waiting(start: bytes, end: str) -> None:
    async def main() -> None:
        async with Shelf() as shelf:
            await shelf.listen("tcp://127.0.0.1:0")
            reader, writer = await asyncio.open_connection(shelf.host, shelf.port)
            writer.write(start)
            await writer.drain()
            if end == "hangs up":
                writer.write_eof()
                await asyncio.wait_for(reader.read(), 5)
            async with rpc(shelf.address) as good:
                assert await asyncio.wait_for(good.put(value=1), 5) == "int"
            writer.close()

    run(main)


def test_the_largest_message_is_as_configured() -> None:
    async def main() -> None:
        with dask.config.set({"daskfed.comm.largest-message": "100 kB"}):
            async with Shelf() as shelf:
                await shelf.listen("tcp://127.0.0.1:0")
                async with rpc(shelf.address) as good:
                    assert await good.put(value=bytes(90_000)) == "bytes"
                async with rpc(shelf.address) as large:
                    with pytest.raises(CommClosedError):
                        await large.put(value=bytes(110_000))

    run(main)


@pytest.mark.parametrize("what", [what for what, garbage in GARBAGE.items() if garbage.startswith(hello())])
def test_what_is_no_message_is_reported_as_that(what: str) -> None:
    failures: asyncio.Queue[Exception] = asyncio.Queue()

    async def handler(comm: Any) -> None:
        comm.max_message_bytes = 2**20
        try:
            await comm.read()
        except Exception as exc:
            failures.put_nowait(exc)
            assert comm.closed()

    async def main() -> None:
        listener = await listen_opaque("tcp://127.0.0.1:0", handler)
        port = int(listener.contact_address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GARBAGE[what])
        await asyncio.wait_for(reader.read(), 5)
        assert isinstance(failures.get_nowait(), MalformedMessage)
        writer.close()
        listener.stop()

    run(main)


def test_a_server_lets_nobody_speak_for_others_or_supply_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    path = [folder for folder in sys.path if "dask-scratch-space" not in folder]  # of stock servers in this process
    monkeypatch.setattr(sys, "path", list(path))

    async def main() -> None:
        async with Shelf() as shelf:
            assert "connection_stream" not in shelf.handlers
            assert sys.path == path

    run(main)


def test_a_peer_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with Shelf() as shelf:
            await shelf.listen("tcp://127.0.0.1:0")
            reader, writer = await asyncio.open_connection(shelf.host, shelf.port)
            await asyncio.wait_for(reader.read(), 5)
            writer.close()

    run(main)


def test_the_dialling_side_does_not_trust_whom_it_dials() -> None:
    async def evil(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            wire(packed({"compression": ToPickle(Bomb()), "python": (3,), "pickle-protocol": ToPickle(Bomb())}))
        )
        await reader.read()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(evil, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(CommClosedError, match="no handshake"):
            await connect_opaque(f"tcp://127.0.0.1:{port}", timeout=5)
        server.close()

    run(main)


def test_dialling_fails_as_in_stock_distributed() -> None:
    async def main() -> None:
        async with Shelf() as shelf:
            await shelf.listen("tcp://127.0.0.1:0")
            address = shelf.address
        for dial in (connect, connect_opaque):
            with pytest.raises(OSError, match="Timed out trying to connect to tcp://127.0.0.1:.* after 0.2 s"):
                await dial(address, timeout=0.2)
            with pytest.raises(ValueError, match="unknown address scheme 'carrier-pigeon'"):
                await dial("carrier-pigeon://coop", timeout=0.2)
            with pytest.raises(OSError, match="Timed out"):
                await dial(f"inproc://{inproc_manager.new_address()}", timeout=0.2)

    run(main)


def test_encryption_that_is_required_is_required() -> None:
    async def handler(comm: Any) -> None:
        raise AssertionError("nobody can have connected")

    async def main() -> None:
        with pytest.raises(RuntimeError, match="encryption required"):
            await listen_opaque("tcp://127.0.0.1:0", handler, require_encryption=True)
        with pytest.raises(RuntimeError, match="encryption required"):
            await connect_opaque("tcp://127.0.0.1:1", timeout=1, require_encryption=True)

    run(main)


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a server and of a client that trusts it."""
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", cert]
    subprocess.run(["openssl", "req", "-x509", *options], check=True, capture_output=True, timeout=30)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    client = ssl.create_default_context(cafile=cert)
    client.check_hostname = False
    return server, client


@pytest.mark.needs("openssl")
def test_tls_carries_payloads_unopened(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main() -> None:
        server, client = contexts
        async with Shelf() as shelf, OpaquePool(connection_args={"ssl_context": client}) as pool:
            await shelf.listen("127.0.0.1:0", ssl_context=server, require_encryption=True)
            assert shelf.address.startswith("tls://")
            assert await pool.call(shelf.address, "put", value=ToPickle(Bomb())) == "Pickled"
            assert isinstance((await pool.call(shelf.address, "get"))["value"], Pickled)
            with pytest.raises(OSError, match="certificate"):
                await connect_opaque(shelf.address, timeout=5, ssl_context=ssl.create_default_context())

    run(main)


# -- in one process --------------------------------------------------------------------------------------------------


async def pair(dial: Callable[[str], Awaitable[Any]]) -> tuple[Any, Any]:
    """Two ends of an in-process comm: that of an opaque listener, and one dialled by ``dial``."""
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    listener = await listen_opaque("inproc://", accepted.put)
    dialled = await dial(listener.contact_address)
    listener.stop()
    return await accepted.get(), dialled


def test_between_opaque_ends_payloads_are_not_touched() -> None:
    async def main() -> None:
        a, b = await pair(connect_opaque)
        payload = [Serialize(Bomb()), ToPickle(Bomb()), Pickled({}, []), Serialized({}, []), Bomb()]
        message = {"op": "x", "payload": payload, "key": ("x", 1)}
        await a.write(message)
        read = await b.read()
        assert all(new is old for new, old in zip(read["payload"], payload, strict=True))
        del read["op"], read["payload"][0]
        assert message["op"] == "x" and len(payload) == 5  # the sender's own are not changed
        await b.close()
        with pytest.raises(CommClosedError):
            await a.read()

    run(main)


def test_a_stock_end_reads_what_came_over_a_socket() -> None:
    def came(message: Any) -> Any:
        return loads_opaque(packed(message))

    async def main() -> None:
        ours, stock_end = await pair(connect)
        for value in VALUES:
            message = came([{"op": "x", "value": value, "nested": {"key": ("x", 1), "pair": (1.0, value)}}])
            for _ in range(2):
                await ours.write(message)
                (read,) = await stock_end.read()
                assert same(read["value"], opened(value)) and same(read["nested"]["pair"][1], opened(value))
                assert read["nested"]["key"] == ("x", 1)
        await ours.write(came({"status": Status.running}))
        assert await stock_end.read() == {"status": Status.running}
        await ours.close()

    run(main)


def test_settling_leaves_keys_and_other_values_alone() -> None:
    key, mine = ("x", ("y", 1)), Point(1)
    settled = settle({"keys": {key: (key, mine)}, "wrapped": (1, ToPickle(mine))})
    assert settled == {"keys": {key: (key, mine)}, "wrapped": [1, ToPickle(mine)]}
    assert settled["keys"][key][0] is key


def test_settling_does_not_open_what_is_serialised() -> None:
    (payload,) = settle([loads_opaque(packed({"v": Serialize(Bomb())}))["v"]])
    with pytest.raises(AssertionError, match="opened"):
        pickle.loads(payload.frames[0])
