"""Where a suite runs: a federation of two sites that counts what it does, or the stock LocalCluster to compare with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import distributed
from distributed.deploy import Cluster

import daskfed
from daskfed.messages import BlockStarted, KeyImported, Message

# Taken before anything is redirected.
LocalCluster = distributed.LocalCluster
StockClient = distributed.Client

SITE: dict[str, Any] = {"n_workers": 1, "processes": True}
SITE |= {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}  # it takes a second to import
SITES = ("north", "south")


class Place:
    """A cluster that is started anew when a test has left it in disorder, and counts of what ran on it."""

    client_class: type[distributed.Client]

    def __init__(self, threads: int) -> None:
        self.options = SITE | {"threads_per_worker": threads}
        self.blocks: Counter[str] = Counter()  # site -> blocks that its scheduler got
        self.imported = 0  # keys that one site brought from the other
        self.computations = 0  # that were asked for, in whatever way
        self.cluster: Cluster = self.start_cluster()

    def start_cluster(self) -> Cluster:
        """Start and return a cluster."""
        raise NotImplementedError

    @property
    def scheduler(self) -> Any:
        """What a test is given that wants to look at the scheduler."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return str(self.cluster.scheduler_address)

    def worker_addresses(self) -> list[str]:
        """Return the addresses of the workers."""
        return list(self.cluster.scheduler_info["workers"])

    def restart(self) -> None:
        """Give up the cluster with everything on it, and start another."""
        self.cluster.close()
        self.cluster = self.start_cluster()

    def close(self) -> None:
        """End the cluster."""
        self.cluster.close()


class TwoSites(Place):
    """A federation of two sites that get blocks in turn, so that keys must cross between them."""

    client_class = daskfed.Client
    cluster: daskfed.Federation

    def start_cluster(self) -> daskfed.Federation:
        """Start two sites, and listen to what they tell the hub."""
        federation = daskfed.Federation(sites={name: {"options": self.options} for name in SITES}, policy="round-robin")
        self._listen(federation.hub)
        return federation

    def _listen(self, hub: Any) -> None:
        take = hub.from_site

        def from_site(site: str, message: Message, payload: Any = None) -> None:
            if isinstance(message, BlockStarted):
                self.blocks[site] += 1
            elif isinstance(message, KeyImported):
                self.imported += 1
            take(site, message, payload)

        hub.from_site = from_site

    @property
    def scheduler(self) -> Any:
        """The hub."""
        return self.cluster.hub


class Stock(Place):
    """A stock LocalCluster of as many workers."""

    client_class = StockClient
    cluster: LocalCluster

    def start_cluster(self) -> LocalCluster:
        """Start a cluster of as many workers as the two sites have."""
        return LocalCluster(**self.options | {"n_workers": len(SITES)})

    @property
    def scheduler(self) -> Any:
        """Dask's scheduler."""
        return self.cluster.scheduler
