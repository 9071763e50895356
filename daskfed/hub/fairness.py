"""Whose block is next where several wait for the same sites: owners share alike, and so do an owner's calls and graphs.

Without it whoever came first would have everything until nothing of theirs waits: a million calls, and then your graph.
Counted are seconds of a thread, as expected when a block is sent. Who begins to wait starts level with those that have
had the least, so that nobody saves up, and nobody pays for the time when nobody else wanted anything. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import NamedTuple

from daskfed.messages import BlockKind, BlockSpec

LEAST_S = 0.001  # that a block counts


class Flow(NamedTuple):
    """Blocks that take turns with others: of one owner, and calls or not."""

    owner: str
    calls: bool

    @classmethod
    def of(cls, spec: BlockSpec) -> Flow:
        """Return the flow of a block."""
        return cls(spec.owner, spec.kind is BlockKind.CALLS)


class Shares:
    """What each flow that waits has had, and each owner, in seconds of a thread."""

    def __init__(self) -> None:
        self._had: dict[Hashable, float] = {}

    def update(self, flows: Collection[Flow]) -> None:
        """These flows have blocks that wait."""
        self._had = {**self._levelled({flow.owner for flow in flows}), **self._levelled(set(flows))}

    def _levelled(self, waiting: Collection[Hashable]) -> dict[Hashable, float]:
        least = min((self._had[name] for name in waiting if name in self._had), default=0.0)
        return {name: self._had.get(name, least) for name in waiting}

    def sent(self, flow: Flow, seconds: float) -> None:
        """A block of a flow was sent to a site."""
        for name in (flow.owner, flow):
            if name in self._had:
                self._had[name] += max(seconds, LEAST_S)

    def turn(self, flow: Flow) -> tuple[float, float]:
        """Return a number for each flow that waits; the least is next."""
        return self._had[flow.owner], self._had[flow]
