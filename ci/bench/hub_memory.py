"""Memory of the hub for each held key: how its own pages (USS) grow while tasks are run and their results held."""

from __future__ import annotations

import sys
import time

import distributed
import psutil
from _common import hub_and_sites, uss, verdict

import daskfed

KEYS = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
STEPS = 4
SETTLE_S = 2.0
BAR = 1024.0  # bytes for each key


def settled(hub: psutil.Process) -> int:
    """Return the bytes that only the hub has, once it has done what it was told."""
    time.sleep(SETTLE_S)
    return uss(hub)


def main() -> int:
    """Measure and print; return 1 where the bar is missed."""
    with hub_and_sites(("north", "south")) as (address, processes), daskfed.Client(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
        distributed.wait(client.map(int, range(KEYS // STEPS), pure=False))  # imports, buffers, and room to reuse
        hub = psutil.Process(processes["hub"].pid)
        held, sizes = [], [settled(hub)]
        for _ in range(STEPS):
            held.append(client.map(int, range(KEYS // STEPS), pure=False))
            distributed.wait(held[-1])
            sizes.append(settled(hub))
        grown = [(after - before) / (KEYS // STEPS) for before, after in zip(sizes, sizes[1:], strict=False)]
        print(f"bytes of the hub for each of {KEYS} keys, in {STEPS} steps: {[round(each) for each in grown]}")
        return not verdict("bytes of the hub for each held key", (sizes[-1] - sizes[0]) / KEYS, BAR)


if __name__ == "__main__":
    sys.exit(main())
