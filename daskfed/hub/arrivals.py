"""The order in which blocks arrived, and which of them are new. Pure.

A block only needs keys that earlier blocks make, and of the blocks that can make a key the first is its producer: so
lineage never closes a circle. Where the producer of a key is gone, with a client that died while the hub was away, a
later block may take its place. Then those that need the key, directly or through others, are numbered anew, behind it;
what the later blocks make as well, they make from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from daskfed.hub.events import BlocksArrived, ForgetBlock
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import BlockState, Ledger
from daskfed.hub.states import KeyPhase
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

    def brought_back(self, client: str, blocks: Sequence[tuple[BlockSpec, int]]) -> tuple[list[BlockState], list[Key]]:
        """Register blocks that a client had submitted before, inputs first, with their numbers; 0: they had none.

        Return those that are new here, and keys that are known again. A client may have missed that some of its blocks
        were forgotten: then these need keys again that were forgotten with them. Once the hub waits for nobody any
        more, such blocks come last: what others make meanwhile these go on making.
        """
        added: list[BlockState] = []
        revived: list[Key] = []
        arrivals = {spec.id: arrival for spec, arrival in blocks}
        for spec in inputs_first([spec for spec, _ in blocks], self._exists):
            arrival = arrivals[spec.id]
            if (known := self.ledger.blocks.get(spec.id)) is not None:
                revived += self.ledger.revive_outputs(known)
                if known.order[-1] != arrival:  # it was asleep when it was told, and brings the number to the next hub
                    self.ledger.command(BlocksArrived(client, spec.id, known.order[-1]))
                continue
            if not arrival or not self.ledger.patient:
                arrival = self._next(client, spec.id)
            self._let_pass(spec.outputs, arrival)
            added += self._added(client, [spec], [arrival], wait=True)
        return added, revived

    def _exists(self, key: Key) -> bool:
        """Whether a key is made, or being made, by whomever: it need not wait for a block that makes it too."""
        state = self.ledger.keys.get(key)
        return state is not None and not self.ledger.lacks_producer(state)

    def _next(self, client: str, block: str) -> int:
        self._last += 1
        self.ledger.command(BlocksArrived(client, block, self._last))
        return self._last

    def _added(self, client: str, specs: Iterable[BlockSpec], arrivals: Iterable[int], wait: bool) -> list[BlockState]:
        added = []
        for spec, arrival in zip(specs, arrivals, strict=True):
            if spec.id in self.ledger.blocks:
                continue
            if not self.ledger.patient and all(self._is_made(key, arrival) for key in spec.outputs):
                self.ledger.command(ForgetBlock(spec.id, client))
                continue
            order = (spec.kind is not BlockKind.WHOLE, -spec.constraint.priority, arrival)
            added.append(self.ledger.add_block(spec, order, wait))
        return added

    def _is_made(self, key: Key, arrival: int) -> bool:
        """Whether a key is made, failed, or being made already, by a block that arrived before."""
        maker = _maker(self.ledger, key)
        return maker.order[-1] < arrival if maker is not None else self._exists(key)

    # -- circles -----------------------------------------------------------------------------------------------------

    def _maker_after(self, key: Key, arrival: int) -> BlockState | None:
        """Return the block that makes a key, if it came after ``arrival``."""
        maker = _maker(self.ledger, key)
        return maker if maker is not None and maker.order[-1] > arrival else None

    def _let_pass(self, outputs: Iterable[Key], arrival: int) -> None:
        """Number earlier blocks anew that need what only a block with this number will make."""
        if self.ledger.patient:  # whoever made it may be back yet
            return
        states = (state for key in outputs if (state := self.ledger.keys.get(key)) is not None)
        orphans = [state for state in states if self.ledger.lacks_producer(state)]
        late = _closure(self.ledger, (block for block in _users(self.ledger, orphans) if block.order[-1] < arrival))
        for block in sorted(late, key=lambda block: block.order[-1]):
            self._renumber(block)

    def _renumber(self, block: BlockState) -> None:
        block.order = (*block.order[:2], self._next(block.spec.client, block.spec.id))

    def prefer_sound(self) -> None:
        """Once all are back: what comes from a key that nobody can make is made by a block that can do without, if any.

        A client may have missed that blocks of its were forgotten, and another client knows no more how to make what
        these need: but those that were submitted later, instead of them, have all that they need.
        """
        makers = _all_makers(self.ledger)
        sound = _sound_blocks(self.ledger)
        for state in list(self.ledger.keys.values()):
            if state.producer in self.ledger.blocks and state.producer not in sound:
                other = next((block for name, block in makers[state.key].items() if name in sound), None)
                if other is not None:
                    self.ledger.hand_over(state, other)

    def straighten(self, blocks: Iterable[BlockState]) -> list[KeyState]:
        """Where one of ``blocks`` needs a later one, number all anew; return keys that nobody is to make any more.

        A circle is opened at a key that a block outside can make as well: two clients may have cut the same graph
        differently. Where there is none, since a client holds a future of what was made from a lost key, and makes the
        lost key from that, the circle is cut, at a key that exists if there is one.
        """
        if self.ledger.patient:
            return []
        if not any(self._maker_after(key, block.order[-1]) for block in blocks for key in block.spec.inputs):
            return []
        cut = []
        others = _Others(self.ledger)
        ordered, circle = _walk(self.ledger)
        while circle:
            if not others.take_over(circle):
                state = next((state for state in circle if state.phase is KeyPhase.HELD), circle[0])
                self.ledger.orphan(state)
                cut.append(state)
            ordered, circle = _walk(self.ledger)
        for block in ordered:
            self._renumber(block)
        return cut


class _Others:
    """Blocks that can make keys which another block makes; each is tried once."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._makers = _all_makers(ledger)

    def take_over(self, states: Iterable[KeyState]) -> bool:
        """Have another block make one of these keys; returns False where there is none that was not tried."""
        for state in states:
            makers = self._makers[state.key]
            makers.pop(str(state.producer), None)
            if makers:
                self.ledger.hand_over(state, next(iter(makers.values())))
                return True
        return False


def _all_makers(ledger: Ledger) -> dict[Key, dict[str, BlockState]]:
    """Return for each key that blocks can make those blocks, by their names."""
    makers: dict[Key, dict[str, BlockState]] = {}
    for name, block in ledger.blocks.items():
        for key in block.spec.outputs:
            makers.setdefault(key, {})[name] = block
    return makers


def _sound_blocks(ledger: Ledger) -> set[str]:
    """Return the blocks that can run though all values are lost, but for data that a client has a copy of."""
    made = {key for key, state in ledger.keys.items() if state.keeper is not None}
    users: dict[Key, list[BlockState]] = {}
    missing: dict[str, int] = {}
    sound: set[str] = set()
    ready: list[BlockState] = []
    for name, block in ledger.blocks.items():
        lacks = set(block.spec.inputs) - made
        missing[name] = len(lacks)
        for key in lacks:
            users.setdefault(key, []).append(block)
        if not lacks:
            ready.append(block)
    while ready:
        block = ready.pop()
        sound.add(block.spec.id)
        for key in block.spec.outputs:
            if key in made:
                continue
            made.add(key)
            for user in users.get(key, ()):
                missing[user.spec.id] -= 1
                if not missing[user.spec.id]:
                    ready.append(user)
    return sound


def _maker(ledger: Ledger, key: Key) -> BlockState | None:
    state = ledger.keys.get(key)
    return ledger.blocks.get(state.producer or "") if state is not None else None


def _users(ledger: Ledger, states: Iterable[KeyState]) -> Iterable[BlockState]:
    return (ledger.blocks[name] for state in states for name in (*state.consumers, *state.heirs))


def _closure(ledger: Ledger, blocks: Iterable[BlockState]) -> list[BlockState]:
    """Return blocks and whatever needs what they make, directly or through others."""
    stack, found = list(blocks), dict[str, BlockState]()
    while stack:
        block = stack.pop()
        if block.spec.id not in found:
            found[block.spec.id] = block
            stack += _users(ledger, ledger.produced_by(block))
    return list(found.values())


def _walk(ledger: Ledger) -> tuple[list[BlockState], list[KeyState]]:
    """Return all blocks, each after those that it needs; or the keys along a circle, if there is one."""
    done: dict[str, BlockState] = {}
    path: dict[str, Key] = {}  # blocks that are being looked at, each needed by the one before it -> for which key
    for root in sorted(ledger.blocks.values(), key=lambda block: block.order[-1]):
        stack: list[tuple[BlockState, Key | None]] = [(root, root.spec.outputs[0])]
        while stack:
            block, key = stack.pop()
            name = block.spec.id
            if key is None:
                done[name] = block
                del path[name]
            elif name in path:
                return [], [ledger.keys[each] for each in (key, *list(path.values())[list(path).index(name) + 1 :])]
            elif name not in done:
                path[name] = key
                stack.append((block, None))
                needs = [(_maker(ledger, each), each) for each in reversed(block.spec.inputs)]
                stack += [(maker, each) for maker, each in needs if maker is not None]
    return list(done.values()), []


def inputs_first(specs: Sequence[BlockSpec], exists: Callable[[Key], bool] = lambda key: False) -> list[BlockSpec]:
    """Return blocks so that each comes after those that make its inputs: as they are, if that is so already.

    Inputs that exist before are left out of account.
    """
    makers: dict[Key, int] = {}
    for n, spec in enumerate(specs):
        for key in spec.outputs:
            makers.setdefault(key, n)
    needs = [[makers[key] for key in spec.inputs if key in makers and not exists(key)] for spec in specs]
    if all(maker < n for n, own in enumerate(needs) for maker in own):
        return list(specs)
    ordered: dict[int, None] = {}
    entered: set[int] = set()
    stack = [(n, False) for n in reversed(range(len(specs)))]
    while stack:
        n, done = stack.pop()
        if done:
            ordered[n] = None
        elif n not in entered:  # where they form a circle, it is broken somewhere
            entered.add(n)
            stack.append((n, True))
            stack += [(maker, False) for maker in reversed(needs[n])]
    return [specs[n] for n in ordered]
