"""1,000,000 calls by ``map``, gathered: calls per second; memory and CPU time of each, by process.

Beside it ProcessPoolExecutor with chunks of 1,000, which sends a thousand calls as one: its calls have no key, no error
and no life of their own.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor

import psutil
from _calls import WORKERS, nothing
from _common import cpu_s, hub_and_sites, uss, verdict

import daskfed

CALLS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
CHUNK = 1000
CLIENT_BAR, HUB_BAR = 1024.0, 300.0  # bytes for each call


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    with ProcessPoolExecutor(WORKERS) as pool:
        list(pool.map(nothing, range(CHUNK * WORKERS), chunksize=CHUNK))
        start = time.perf_counter()
        assert list(pool.map(nothing, range(CALLS), chunksize=CHUNK)) == list(range(CALLS))
        print(f"ProcessPoolExecutor with chunks of {CHUNK}: {CALLS / (time.perf_counter() - start):,.0f} calls/s")
    roles = hub_and_sites(("north",), n_workers=WORKERS)
    with roles as (address, processes), daskfed.Client(address, timeout=60) as client:
        client.wait_for_workers(WORKERS)
        client.gather(client.map(nothing, range(5000), pure=False))
        time.sleep(2)
        watched = {"client": psutil.Process(), **{name: psutil.Process(each.pid) for name, each in processes.items()}}
        below = watched["north"].children(recursive=True)

        def all_cpu_s() -> list[float]:
            return [*map(cpu_s, watched.values()), sum(map(cpu_s, below))]

        before = {name: uss(process) for name, process in watched.items()}
        spent = all_cpu_s()
        start = time.perf_counter()
        futures = client.map(nothing, range(CALLS), pure=False)
        mapped = time.perf_counter() - start
        values = client.gather(futures)
        took = time.perf_counter() - start
        spent = [now - then for now, then in zip(all_cpu_s(), spent, strict=True)]
        grown = {name: (uss(process) - before[name]) / CALLS for name, process in watched.items()}
        assert values == list(range(CALLS))
    print(f"daskfed: {CALLS / took:,.0f} calls/s; {took:.1f} s, of which {mapped:.1f} s in map")
    hops = zip((*watched, "its scheduler and workers"), spent, strict=True)
    print("CPU µs for each call: " + ", ".join(f"{name} {each / CALLS * 1e6:.1f}" for name, each in hops))
    print("bytes for each call, held: " + ", ".join(f"{name} {each:,.0f}" for name, each in grown.items()))
    passed = verdict("bytes of the client for each call", grown["client"], CLIENT_BAR)
    return not (verdict("bytes of the hub for each call", grown["hub"], HUB_BAR) and passed)


if __name__ == "__main__":
    sys.exit(main())
