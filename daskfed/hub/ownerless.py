"""Blocks whose client has left for good while somebody else wants what they make: only the hub knows them then.

They are journalled with their payloads, so that a hub that starts anew can have them run again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from daskfed.hub import events as ev
from daskfed.messages import BlockKind, decode_block, encode

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

KIND = "block"


class Ownerless:
    """The blocks of clients that are gone."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.kept: set[str] = set()

    def take_over(self, client: str) -> None:
        """Keep what ``client``, which has just gone, has left that is still needed."""
        for block in self.hub.core.ledger.blocks.values():
            spec = block.spec
            if spec.client == client and spec.kind is not BlockKind.WHOLE:  # those are their home site's
                entry = {"spec": encode(spec), "arrival": block.order[-1], "payload": self.hub.stores.payloads[spec.id]}
                self.hub.journal.keep(KIND, spec.id, entry)
                self.kept.add(spec.id)

    def forget(self, block: str) -> None:
        """A block will never be needed again."""
        if block in self.kept:
            self.kept.discard(block)
            self.hub.journal.forget(KIND, block)

    def restore(self) -> None:
        """Submit the blocks again; what nobody wants of them ends at once."""
        clients: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for name, entry in self.hub.journal.things(KIND):
            spec = decode_block(dict(entry["spec"]))
            self.kept.add(name)
            self.hub.stores.keep_payloads((spec,), (entry["payload"],))
            clients[spec.client, spec.owner].append((spec, entry["arrival"]))
        for (client, owner), blocks in clients.items():
            self.hub.take(ev.ClientBack(client, owner, tuple(blocks), (), ()))
            self.hub.take(ev.ClientLeft(client))
