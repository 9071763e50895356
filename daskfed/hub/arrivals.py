"""The order in which blocks arrived, and which of them are new. Pure.

A block only needs keys that earlier blocks make, and of the blocks that can make a key the first is its producer: so
lineage never closes a circle. Where the producer of a key is gone, with a client that died while the hub was away, a
later block may take its place. Then those that need the key, directly or through others, are numbered anew, behind it;
what the later blocks make as well, they make from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from graphlib import TopologicalSorter

from daskfed.hub.events import BlocksArrived, ForgetBlock
from daskfed.hub.ledger import BlockState, KeyState, Ledger
from daskfed.messages import BlockKind, BlockSpec, Key

EPOCH_BITS = 20  # arrival numbers begin at the epoch (milliseconds) times two to this power: they always grow


class Arrivals:
    """Numbers blocks as they arrive."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._last = ledger.epoch << EPOCH_BITS

    def submitted(self, client: str, specs: Sequence[BlockSpec], wait: bool) -> list[BlockState]:
        """Register blocks that a client submits; return those that make something that nobody makes."""
        first = self._last + 1
        ordered = inputs_first(specs)
        if ordered == list(specs):
            self._last += len(specs)
            if specs:
                self.ledger.command(BlocksArrived(client, specs[0].id, first, len(specs)))
        else:
            for spec in ordered:
                self._next(client, spec.id)
        self._let_pass((key for spec in specs for key in spec.outputs), first)
        return self._added(client, ordered, range(first, first + len(specs)), wait)

    def brought_back(self, client: str, blocks: Iterable[tuple[BlockSpec, int]]) -> list[BlockState]:
        """Register blocks that a client had submitted before, inputs first, with their numbers; 0: they had none."""
        added = []
        for spec, arrival in blocks:
            if not arrival or self._needs_later(spec, arrival):
                arrival = self._next(client, spec.id)
            self._let_pass(spec.outputs, arrival)
            added += self._added(client, [spec], [arrival], wait=True)
        return added

    def _next(self, client: str, block: str) -> int:
        self._last += 1
        self.ledger.command(BlocksArrived(client, block, self._last))
        return self._last

    def _added(
        self, client: str, specs: Iterable[BlockSpec], arrivals: Iterable[int], wait: bool
    ) -> list[BlockState]:
        added = []
        for spec, arrival in zip(specs, arrivals, strict=True):
            if spec.id in self.ledger.blocks:
                continue
            if all(self._is_made(self.ledger.keys.get(key), arrival) for key in spec.outputs):
                self.ledger.command(ForgetBlock(spec.id, client))
                continue
            order = (spec.kind is not BlockKind.WHOLE, -spec.constraint.priority, arrival)
            added.append(self.ledger.add_block(spec, order, wait))
        return added

    def _is_made(self, state: KeyState | None, arrival: int) -> bool:
        """Whether a key is made, failed, or being made already, by a block that arrived before."""
        if state is None:
            return False
        producer = self.ledger.blocks.get(state.producer or "")
        return producer.order[-1] < arrival if producer is not None else not self.ledger.lacks_producer(state)

    # -- circles -----------------------------------------------------------------------------------------------------

    def _needs_later(self, spec: BlockSpec, arrival: int) -> bool:
        return any(self._made_later(self.ledger.keys.get(key), arrival) for key in spec.inputs)

    def _made_later(self, state: KeyState | None, arrival: int) -> bool:
        producer = self.ledger.blocks.get(state.producer or "") if state is not None else None
        return producer is not None and producer.order[-1] > arrival

    def _let_pass(self, outputs: Iterable[Key], arrival: int) -> None:
        """Number earlier blocks anew that need what only a block with this number will make."""
        states = (state for key in outputs if (state := self.ledger.keys.get(key)) is not None)
        orphans = [state for state in states if self.ledger.lacks_producer(state)]
        for block in sorted(self._dependents(orphans, arrival), key=lambda block: block.order[-1]):
            block.order = (*block.order[:2], self._next(block.spec.client, block.spec.id))

    def _dependents(self, states: Iterable[KeyState], arrival: int) -> list[BlockState]:
        """Return blocks before ``arrival`` that need any of these keys, and whatever needs those in turn."""
        users = [self.ledger.blocks[name] for state in states for name in (*state.consumers, *state.heirs)]
        stack = [block for block in users if block.order[-1] < arrival]
        found: dict[str, BlockState] = {}
        while stack:
            block = stack.pop()
            if block.spec.id not in found:
                found[block.spec.id] = block
                made = self.ledger.produced_by(block)
                stack += [self.ledger.blocks[name] for state in made for name in (*state.consumers, *state.heirs)]
        return list(found.values())

    def cut_circles(self, blocks: Iterable[BlockState]) -> list[KeyState]:
        """Have no new block need a later one; return the keys that nobody is to make any more.

        That is left where a client holds a future of what was made from a lost key, and makes the lost key from it.
        """
        inputs = ((block, self.ledger.keys.get(key)) for block in blocks for key in block.spec.inputs)
        cut = [state for block, state in inputs if state is not None and self._made_later(state, block.order[-1])]
        for state in cut:
            self.ledger.orphan(state)
        return cut


def inputs_first(specs: Sequence[BlockSpec]) -> list[BlockSpec]:
    """Return blocks so that each comes after those that make its inputs: as they are, if that is so already."""
    makers: dict[Key, int] = {}
    for n, spec in enumerate(specs):
        for key in spec.outputs:
            makers.setdefault(key, n)
    needs = {n: [makers[key] for key in spec.inputs if key in makers] for n, spec in enumerate(specs)}
    if all(maker < n for n, makers_of in needs.items() for maker in makers_of):
        return list(specs)
    return [specs[n] for n in TopologicalSorter(needs).static_order()]
