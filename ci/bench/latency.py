"""Round trips over zmq:// while large messages fill a line of 100 Mbit/s and 40 ms, against those of that line idle."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time

import numpy as np
from _common import median, verdict
from distributed.comm import connect, listen
from distributed.comm.core import Comm, CommClosedError
from distributed.protocol import to_serialize

from daskfed.keys import Authorized, KeyFolder, Role
from daskfed.testing.relays import relay

RATE = 12.5e6  # bytes/s
DELAY_S = 0.02  # each way
LARGE = np.ones(150 * 10**6, dtype="u1")


async def echo(comm: Comm) -> None:
    """Send back what comes, of large messages the length."""
    with contextlib.suppress(CommClosedError):
        while True:
            message = await comm.read()
            await comm.write(message if message["op"] == "small" else len(message["data"]))


async def trips(comm: Comm, seconds: float) -> list[float]:
    """Return the seconds of round trips, one after the other."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        await comm.write({"op": "small"})
        await comm.read()
        found.append(time.perf_counter() - start)
        await asyncio.sleep(0.005)
    return found


async def measure(folder: str) -> tuple[list[float], list[float], float]:
    """Return the round trips of the idle line, those beside a large message, and its bytes a second."""
    keys = KeyFolder(folder)
    hub = keys.new("hub")
    keys.authorize(Authorized(keys.new("id").public, frozenset({Role.CLIENT}), "bench"))
    async with listen("zmq://127.0.0.1:0", echo, keys=keys) as listener:
        with relay(int(listener.contact_address.rpartition(":")[2]), rate=RATE, delay_s=DELAY_S) as line:
            address = f"zmq://127.0.0.1:{line.port}"
            keys.trust(address, hub.public)
            small, large = [await connect(address, timeout=20, keys=keys) for _ in range(2)]
            idle = await trips(small, 3)
            start = time.monotonic()
            writing = asyncio.create_task(large.write({"op": "large", "data": to_serialize(LARGE)}))
            busy = await trips(small, 10)
            await writing
            await large.read()
            seconds = time.monotonic() - start
            small.abort()
            large.abort()
    return idle, busy, LARGE.nbytes / seconds


def main() -> int:
    """Measure and print; return 1 where the bar is missed."""
    with tempfile.TemporaryDirectory() as folder:
        idle, busy, rate = asyncio.run(measure(folder))
    busy.sort()
    p99 = busy[int(len(busy) * 0.99)]
    print(f"idle: median {median(idle) * 1e3:.1f} ms")
    print(f"beside {rate / 1e6:.1f} MB/s: median {median(busy) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms of {len(busy)}")
    return not verdict("control latency beside bulk, p99 / round trip", p99 / median(idle), 3.0)


if __name__ == "__main__":
    sys.exit(main())
