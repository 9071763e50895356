"""who_has, has_what and scheduler_info with 100,000 keys held, over a hub with two sites, against a stock scheduler."""

from __future__ import annotations

import sys
from typing import Any

import distributed
from _common import hub_and_sites, median, stock_cluster, timed, verdict, wait_for

import daskfed

REPEATS = 5
BATCH = 5000
SITES = ("north", "south")
KEYS = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
LOOKUPS = {
    "who_has": lambda client: client.who_has(),
    "has_what": lambda client: client.has_what(),
    "scheduler_info": lambda client: client.scheduler_info(n_workers=-1),
}


def hold(client: Any) -> list[Any]:
    """Put keys at all workers and return their futures; scattering takes a tenth of the time that tasks would."""
    held = []
    for start in range(0, KEYS, BATCH):
        where = {"site": SITES[start // BATCH % 2]} if isinstance(client, daskfed.Client) else {}
        batch = {f"x-{i}": i for i in range(start, min(start + BATCH, KEYS))}
        held += client.scatter(batch, **where).values()
    return held


def main() -> int:
    """Measure in turns and print; return 1 where a bar is missed."""
    with (
        stock_cluster(2) as (scheduler, _),
        hub_and_sites(SITES) as (hub, _),
        distributed.Client(scheduler, timeout=60, set_as_default=False) as theirs,
        daskfed.Client(hub, timeout=60, set_as_default=False) as ours,
    ):
        clients = {"stock": theirs, "daskfed": ours}
        for client in clients.values():
            client.wait_for_workers(2, timeout=60)
        held = [hold(client) for client in clients.values()]
        wait_for(
            lambda: all(len(client.who_has()) >= KEYS for client in clients.values()), f"{len(held)} x {KEYS} keys"
        )
        return not all([compare(name, lookup, clients) for name, lookup in LOOKUPS.items()])


def compare(name: str, lookup: Any, clients: dict[str, Any]) -> bool:
    """Look up in turns, print medians, and say whether the bar is kept."""
    found: dict[str, list[float]] = {who: [] for who in clients}
    for _ in range(REPEATS):
        for who, client in clients.items():
            found[who].append(timed(lambda client=client: lookup(client)))
    for who, times in found.items():
        print(f"{name} with {KEYS} keys, {who}: median {median(times) * 1e3:.0f} ms")
    return verdict(f"{name}, daskfed / stock", median(found["daskfed"]) / median(found["stock"]), 2.0)


if __name__ == "__main__":
    sys.exit(main())
