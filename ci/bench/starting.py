"""A site of four workers against a stock LocalCluster of four: until all are there, and until one that was killed is.

Each is started as a process of its own; the hub of the site runs already, as a campus' would. CPU seconds are those of
all processes of the site, agent included, or of the cluster, when the last worker has come.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time

import distributed
import psutil
from _common import (
    WAIT_S,
    cpu_s,
    free_port,
    hub_command,
    median,
    running,
    site_command,
    stock_cluster,
    verdict,
    wait_for,
)

import daskfed

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 3
WORKERS = 4


def measure(ours: bool, address: str) -> dict[str, float]:
    """Start one, kill a worker of it, and return seconds by what they were spent on."""
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        if ours:
            process = stack.enter_context(running(*site_command("north", address, n_workers=WORKERS)))
            client = stack.enter_context(daskfed.Client(address, set_as_default=False))
        else:
            address, process = stack.enter_context(stock_cluster(WORKERS))
            client = stack.enter_context(distributed.Client(address, timeout=WAIT_S, set_as_default=False))
        client.wait_for_workers(WORKERS, timeout=WAIT_S)
        found = {"start": time.perf_counter() - start}
        root = psutil.Process(process.pid)
        found["cpu"] = sum(cpu_s(each) for each in (root, *root.children(recursive=True)))
        before = client.run(os.getpid)
        start = time.perf_counter()
        os.kill(next(iter(before.values())), signal.SIGKILL)
        now = functools.partial(client.run, os.getpid, on_error="ignore")
        wait_for(lambda: bool(set(now().values()) - set(before.values())), "a worker in the place of the one killed")
        found["again"] = time.perf_counter() - start
        return found


def main() -> int:
    """Measure and print; return 1 where ours is not the faster one."""
    address = f"tcp://127.0.0.1:{free_port()}"
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with running(*hub_command(address)):
        for _ in range(ROUNDS):
            for ours in found:
                found[ours].append(measure(ours, address))
    passed = True
    for name, what in {"start": "all there", "cpu": "CPU until then", "again": "a killed one is back"}.items():
        ours, stock = (median([each[name] for each in found[kind]]) for kind in (True, False))
        print(f"{what}: daskfed {ours:.2f} s, stock {stock:.2f} s")
        passed &= verdict(f"{what}, daskfed / stock", ours / stock, 1.0)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
