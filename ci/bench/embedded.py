"""Client() with its one site against a stock LocalCluster: a 10,000-task array graph, alternating."""

from __future__ import annotations

import sys

import distributed
from _common import median, timed, verdict
from _graph import graph, print_size

import daskfed

REPEATS = 5
OPTIONS = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": ":0"}


def run(make_client: type[distributed.Client]) -> float:
    """Return the wall seconds of one computation on a fresh client."""
    with make_client(**OPTIONS) as client:
        client.submit(int, 1).result()
        x = graph()
        return timed(lambda: x.compute())


def main() -> int:
    """Measure and print; return 1 where the bar is missed."""
    print_size(graph())
    ours, stock = [], []
    for _ in range(REPEATS):
        stock.append(run(distributed.Client))
        ours.append(run(daskfed.Client))
    print(f"stock LocalCluster: median {median(stock):.2f} s  {[round(t, 2) for t in stock]}")
    print(f"daskfed Client():   median {median(ours):.2f} s  {[round(t, 2) for t in ours]}")
    return not verdict("embedded / stock, time of the graph", median(ours) / median(stock), 1.1)


if __name__ == "__main__":
    sys.exit(main())
