"""What a client remembers so that its work outlives its connection, and its hub: its blocks and its scattered data.

The hub forgets nothing while it lives, but it may be killed. A client keeps each block that it has submitted until the
hub says that it will never be needed again, and tells them all to a hub that does not know them.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from daskfed.client.submission import Submission
from daskfed.messages import COORDINATION, REQUEST, BlockSpec, Key, encode

PAUSE_S = (0.05, 2.0)  # first and longest pause between attempts to reach a hub that is gone


@dataclass(slots=True)
class Kept:
    """A block that may be needed again."""

    spec: BlockSpec
    payload: dict[str, Any]
    arrival: int = 0  # the number that a hub gave it
    epoch: int = 0  # of that hub


class Memory:
    """The blocks of one client, in the order of submission."""

    def __init__(self) -> None:
        self.blocks: dict[str, Kept] = {}

    def keep(self, submission: Submission) -> None:
        """Keep the blocks of a submission."""
        for spec, payload in zip(submission.blocks, submission.payloads, strict=True):
            self.blocks[spec.id] = Kept(spec, payload)

    def forget(self, block: str) -> None:
        """The hub will never need a block again."""
        self.blocks.pop(block, None)

    def arrived(self, block: str, arrival: int, count: int, epoch: int) -> None:
        """A hub has numbered ``count`` blocks that were submitted together, from ``block`` on."""
        stem, first = block.rsplit("/", 1)
        for n in range(count):
            if (kept := self.blocks.get(f"{stem}/{int(first) + n}")) is not None:
                kept.arrival, kept.epoch = arrival + n, epoch

    def message(self, epoch: int, wanted: Collection[Key], kept: Collection[Key]) -> dict[str, Any]:
        """Return what a client says when it is back at a hub of this epoch."""
        unknown = [block for block in self.blocks.values() if block.epoch != epoch]
        return {
            "op": "fed-back",
            "blocks": [encode(block.spec) for block in unknown],
            "arrivals": [block.arrival for block in unknown],
            "payloads": [block.payload for block in unknown],
            "wanted": list(wanted),
            "kept": list(kept),
        }


class PatientRPC:
    """The calls of a client to its hub: while the hub is gone, and the client tries to reach it, they wait.

    What is asked again then is done once: calls of coordination carry an id of their own.
    ``rpc`` makes a call, ``waiting`` says whether the client still tries.
    """

    def __init__(self, rpc: Any, waiting: Callable[[], bool]) -> None:
        self._rpc = rpc
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._rpc, name)
        if not callable(found) or name.startswith("_"):
            return found

        async def call(**kwargs: Any) -> Any:
            if name.startswith(COORDINATION):
                kwargs[REQUEST] = secrets.token_hex(8)
            for pause in pauses():
                try:
                    return await found(**kwargs)
                except OSError:
                    if not self._waiting():
                        raise
                    await asyncio.sleep(pause)

        return call

    async def close_rpc(self) -> None:
        """End the connections."""
        await self._rpc.close_rpc()


def pauses() -> Any:
    """Yield pauses in seconds, each twice as long as the one before, up to the longest."""
    first, longest = PAUSE_S
    return (min(first * 2**n, longest) for n in itertools.count())


def wanted_keys(futures: Mapping[Key, Any], assemblies: Collection[Key]) -> list[Key]:
    """Return the keys that a client wants of its hub: those of its futures that are not assembled here or cancelled."""
    return [key for key, state in futures.items() if key not in assemblies and state.status != "cancelled"]
