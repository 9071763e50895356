"""Idle round trips, submit().result(), embedded and over a hub in its own process, against stock Dask, in turns."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import distributed
from _common import free_port, hub_and_sites, median, stock_cluster, verdict

import daskfed

ROUNDS = 3
TRIPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200  # of each kind, in each round
OPTIONS: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}


def trips(client: distributed.Client) -> list[float]:
    """Return the wall seconds of calls that are submitted one after the other, each when the one before is done."""
    for i in range(20):
        client.submit(int, -i - 1, pure=False).result()
    found = []
    for i in range(TRIPS):
        start = time.perf_counter()
        client.submit(int, i, pure=False).result()
        found.append(time.perf_counter() - start)
    return found


@contextlib.contextmanager
def apart(make_client: type[distributed.Client]) -> Iterator[distributed.Client]:
    """Yield a client of a hub with one site, or of a stock scheduler, in processes of their own."""
    with contextlib.ExitStack() as stack:
        if make_client is daskfed.Client:
            address, _ = stack.enter_context(hub_and_sites(("north",)))
        else:
            address, _ = stack.enter_context(stock_cluster(1))
        client = stack.enter_context(make_client(address, timeout=60))
        client.wait_for_workers(1, timeout=60)
        yield client


def compare(kind: str, clients: dict[str, distributed.Client]) -> float:
    """Measure in turns, print medians, and return the ratio of ours to stock."""
    found: dict[str, list[float]] = {"stock": [], "daskfed": []}
    for _ in range(ROUNDS):
        for name, client in clients.items():
            found[name] += trips(client)
    for name, times in found.items():
        p90 = sorted(times)[int(len(times) * 0.9)]
        print(f"{kind}, {name}: median {median(times) * 1e3:.1f} ms, nine of ten under {p90 * 1e3:.1f} ms")
    return median(found["daskfed"]) / median(found["stock"])


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    quiet = {**OPTIONS, "set_as_default": False}
    with distributed.Client(**quiet, scheduler_port=free_port()) as stock, daskfed.Client(**quiet) as ours:
        embedded = compare("embedded", {"stock": stock, "daskfed": ours})
    with apart(distributed.Client) as stock, apart(daskfed.Client) as ours:
        hub = compare("hub in its own process", {"stock": stock, "daskfed": ours})
    passed = verdict("round trip, embedded / stock", embedded, 1.3)
    return not (verdict("round trip over a hub in its own process / stock", hub, 2.0) and passed)


if __name__ == "__main__":
    sys.exit(main())
