"""zmq:// with CURVE against tls://, between two processes: round trips, messages a second, bytes a second, in turns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from _common import median, verdict
from distributed import Security
from distributed.comm import connect, listen
from distributed.comm.core import Comm, CommClosedError
from distributed.protocol import to_serialize

from daskfed.keys import Authorized, KeyFolder, Role

ROUNDS = 5
TRIPS = 2000
MESSAGES = 20_000
LARGE = np.random.default_rng(0).integers(0, 255, 100 * 2**20, dtype="u1")  # bytes, which do not compress


async def answer(comm: Comm) -> None:
    """Send back each small message, but of a stream only the last; of a large one its length."""
    with contextlib.suppress(CommClosedError):
        while True:
            message = await comm.read()
            if message["op"] == "trip":
                await comm.write(message)
            elif message["op"] == "large":
                await comm.write(len(message["data"]))
            elif message["op"] == "last":
                await comm.write("seen")


async def serve(how: dict[str, Any]) -> None:
    """Listen at all addresses, and say where."""
    addresses = {}
    security = Security(**how["tls"])
    args = {"tcp": {}, "tls": security.get_listen_args("scheduler"), "zmq": {"keys": KeyFolder(how["keys"])}}
    for scheme, own in args.items():
        listener = await listen(f"{scheme}://127.0.0.1:0", answer, **own)
        addresses[scheme] = listener.contact_address
    print(json.dumps(addresses), flush=True)
    await asyncio.Event().wait()


def certificates(folder: str) -> dict[str, Any]:
    """Make a certificate for both ends; returns the arguments of a Security."""
    key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key]
    subprocess.run(["openssl", "req", "-x509", *options, "-out", certificate], check=True, capture_output=True)
    files = {"cert": certificate, "key": key}
    ends = {f"tls_{role}_{what}": file for role in ("client", "scheduler") for what, file in files.items()}
    return {"tls_ca_file": certificate, "require_encryption": True, **ends}


@contextlib.contextmanager
def serving(keys: KeyFolder, tls: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Run the other end; yields its addresses by scheme."""
    hub = keys.new("hub")
    keys.authorize(Authorized(keys.new("id").public, frozenset({Role.CLIENT}), "bench"))
    how = {"keys": str(keys.path), "tls": tls}
    process = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(how).encode() + b"\n")
        process.stdin.flush()
        addresses = json.loads(process.stdout.readline())
        keys.trust(addresses["zmq"], hub.public)
        yield addresses
    finally:
        process.kill()
        process.wait()


async def trip_s(comm: Comm) -> float:
    """Return seconds of a round trip of a small message."""
    start = time.perf_counter()
    for number in range(TRIPS):
        await comm.write({"op": "trip", "n": number})
        await comm.read()
    return (time.perf_counter() - start) / TRIPS


async def message_s(comm: Comm) -> float:
    """Return seconds for each of a stream of small messages."""
    start = time.perf_counter()
    for number in range(MESSAGES):
        await comm.write({"op": "n", "n": number})
        if not number % 100:
            await asyncio.sleep(0)
    await comm.write({"op": "last"})
    await comm.read()
    return (time.perf_counter() - start) / MESSAGES


async def byte_s(comm: Comm) -> float:
    """Return seconds for each byte of a large message."""
    start = time.perf_counter()
    await comm.write({"op": "large", "data": to_serialize(LARGE)})
    await comm.read()
    return (time.perf_counter() - start) / LARGE.nbytes


async def measure(addresses: dict[str, str], keys: KeyFolder, tls: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the median seconds of each kind, by scheme."""
    args = {"tcp": {}, "tls": Security(**tls).get_connection_args("client"), "zmq": {"keys": keys}}
    comms = {scheme: await connect(address, **args[scheme]) for scheme, address in addresses.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for kind in (trip_s, message_s, byte_s):
            for scheme, comm in comms.items():
                found.setdefault(kind.__name__, {}).setdefault(scheme, []).append(await kind(comm))
    for comm in comms.values():
        comm.abort()
    return {kind: {scheme: median(times) for scheme, times in each.items()} for kind, each in found.items()}


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    with tempfile.TemporaryDirectory() as folder:
        keys, tls = KeyFolder(folder), certificates(folder)
        with serving(keys, tls) as addresses:
            found = asyncio.run(measure(addresses, keys, tls))
    for scheme in found["trip_s"]:
        trip, message, byte = (found[kind][scheme] for kind in ("trip_s", "message_s", "byte_s"))
        print(f"{scheme}: round trip {trip * 1e6:.0f} µs, {1 / message:.0f} messages/s, {1e-6 / byte:.0f} MB/s")
    names = {"trip_s": "round trip", "message_s": "time of a message", "byte_s": "time of a byte"}
    passed = [verdict(f"{names[kind]}, zmq / tls", each["zmq"] / each["tls"], 1.1) for kind, each in found.items()]
    return not all(passed)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve(json.loads(sys.stdin.readline())))
    else:
        sys.exit(main())
