"""Gathering of 10,000 small results, and of 1 GB from one site, over a hub, against a stock scheduler."""

from __future__ import annotations

import sys
from typing import Any

import distributed
import numpy as np
from _common import hub_and_sites, median, stock_cluster, timed, verdict

import daskfed

REPEATS = 5
SMALL = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
CHUNKS, CHUNK_BYTES = 20, 50_000_000
OPTIONS = {"n_workers": 2, "memory_limit": "4GiB"}


def small(client: Any) -> list[Any]:
    """Return futures of many small results, made."""
    futures = client.map(float, range(SMALL))
    return made(client, futures)


def large(client: Any) -> list[Any]:
    """Return futures of 1 GB in all, made; random bytes, so that no compression helps."""
    futures = client.map(np.random.default_rng(1).bytes, [CHUNK_BYTES] * CHUNKS, pure=False)
    return made(client, futures)


def made(client: Any, futures: list[Any]) -> list[Any]:
    """Wait until all are made, and return them."""
    with client.as_current():
        distributed.wait(futures)
    return list(futures)


CASES = {f"{SMALL} small results": small, "1 GB": large}


def main() -> int:
    """Measure in turns and print; return 1 where a bar is missed."""
    passed = []
    with (
        stock_cluster(2) as (scheduler, _),
        hub_and_sites(("north",), **OPTIONS) as (hub, _),
        distributed.Client(scheduler, timeout=60, set_as_default=False) as theirs,
        daskfed.Client(hub, timeout=60, set_as_default=False) as ours,
    ):
        clients = {"stock": theirs, "daskfed": ours}
        for client in clients.values():
            client.wait_for_workers(2, timeout=60)
        for case, make in CASES.items():
            passed.append(compare(case, {name: (client, make(client)) for name, client in clients.items()}))
    return not all(passed)


def compare(case: str, held: dict[str, tuple[Any, list[Any]]]) -> bool:
    """Gather in turns, print medians, and say whether the bar is kept."""
    found: dict[str, list[float]] = {name: [] for name in held}
    for _ in range(REPEATS):
        for name, (client, futures) in held.items():
            found[name].append(timed(lambda client=client, futures=futures: client.gather(futures)))
    for name, times in found.items():
        print(f"{case}, {name}: median {median(times):.2f} s  {[round(t, 2) for t in times]}")
    return verdict(f"gather of {case}, daskfed / stock", median(found["daskfed"]) / median(found["stock"]), 1.2)


if __name__ == "__main__":
    sys.exit(main())
