"""CPU seconds of client, hub, agents and schedulers for a 10,000-task array graph cut over two sites, against stock."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import dask.array as da
import distributed
import psutil
from _common import cpu_s, hub_and_sites, median, roles_of_site, stock_cluster, verdict, wait_for
from _graph import SIDE, graph, materialised, print_size

import daskfed
from daskfed.client.cutting import cut

REPEATS = 5
CHUNKS = int(sys.argv[1]) if len(sys.argv) > 1 else SIDE  # along each side


def spent(roles: dict[str, psutil.Process], client: Any) -> dict[str, float]:
    """Return the CPU seconds that each role spends on the graph, after a warm-up on a small one."""
    for site in client.sites() if isinstance(client, daskfed.Client) else (None,):
        with daskfed.at(site) if site else contextlib.nullcontext():
            (da.random.random((100, 100), chunks=10).mean(axis=0) + 1).sum().compute()
    x = graph(CHUNKS)
    before = {role: cpu_s(process) for role, process in roles.items()}
    x.compute()
    return {role: cpu_s(process) - before[role] for role, process in roles.items()}


def ours() -> dict[str, float]:
    """Run the graph on a federation of two sites."""
    with hub_and_sites(("north", "south")) as (address, processes), connected(daskfed.Client, address) as client:
        wait_for(lambda: ready(client), "two sites with workers")
        roles = {"client": psutil.Process(), "hub": psutil.Process(processes["hub"].pid)}
        for site in ("north", "south"):
            roles |= {f"{site} {role}": process for role, process in roles_of_site(processes[site]).items()}
        return spent(roles, client)


def stock() -> dict[str, float]:
    """Run the graph on a stock scheduler with two workers."""
    with stock_cluster(2) as (address, scheduler), connected(distributed.Client, address) as client:
        client.wait_for_workers(2)
        return spent({"client": psutil.Process(), "scheduler": psutil.Process(scheduler.pid)}, client)


@contextlib.contextmanager
def connected(make_client: Any, address: str) -> Any:
    """Yield a client of ``address``."""
    with make_client(address, timeout=60) as client:
        yield client


def ready(client: Any) -> bool:
    """Say whether both sites have a worker."""
    sites = client.sites()
    return len(sites) == 2 and all(site["workers"] for site in sites.values())


def largest_block() -> int:
    """Return how many tasks the largest of the graph's blocks has."""
    whole = materialised(graph(CHUNKS))
    return max(len(piece.tasks) for piece in cut(whole.tasks, whole.wanted, whole.constraints))


def table(name: str, runs: list[dict[str, float]]) -> None:
    """Print the medians of each role."""
    medians = {role: median([run[role] for run in runs]) for role in runs[0]}
    print(f"{name}: " + ", ".join(f"{role} {seconds:.2f}" for role, seconds in medians.items()), "CPU s (medians)")


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    print_size(graph(CHUNKS))
    pairs = [(stock(), ours()) for _ in range(REPEATS)]
    table("stock", [theirs for theirs, _ in pairs])
    table("daskfed", [mine for _, mine in pairs])
    hub = median([mine["hub"] / theirs["scheduler"] for theirs, mine in pairs])
    everything = median([sum(mine.values()) / sum(theirs.values()) for theirs, mine in pairs])
    passed = [
        verdict("hub / stock scheduler, median of the pairs", hub, 0.1),
        verdict("all of daskfed / all of stock, median of the pairs", everything, 1.3),
        verdict("largest block, tasks", largest_block(), 1000),
    ]
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
