"""Whole graphs, which nobody cut and whose inputs are unknown, stay together: each client has one home site. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from daskfed.hub.dispatch import Dispatcher, serves
from daskfed.hub.ledger import Ledger
from daskfed.hub.states import BlockPhase
from daskfed.messages import BlockKind


class Homes:
    """The home sites of clients that send whole graphs."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher, owners: Mapping[str, str]) -> None:
        self.ledger = ledger
        self.dispatcher = dispatcher
        self._owners = owners  # of connected clients
        self._homes: dict[str, str] = {}  # client -> site; empty where there was none

    def home_of(self, client: str) -> str | None:
        """Return the site that runs the whole graphs of a client; None where there is no site."""
        self._homes.setdefault(client, "")
        self.find()
        return self._homes[client] or None

    def forget(self, client: str) -> None:
        """A client is gone."""
        self._homes.pop(client, None)

    def find(self) -> None:
        """Give the clients whose home is gone another one, and have their graphs run there."""
        staying = [site for site in self.dispatcher.sites.values() if not site.leaving]
        for client in [client for client, home in self._homes.items() if home not in self.dispatcher.sites]:
            sites = [site for site in staying if serves(site.hello, self._owners.get(client, ""))]
            if sites:
                self._homes[client] = best = max(sites, key=lambda site: site.threads).name
                self._move(client, best)

    def _move(self, client: str, home: str) -> None:
        for block in self.ledger.blocks.values():
            if block.spec.kind is BlockKind.WHOLE and block.spec.client == client:
                block.spec = replace(block.spec, constraint=replace(block.spec.constraint, sites=(home,)))
                if block.phase is BlockPhase.READY:
                    self.ledger.ready.append(block)
