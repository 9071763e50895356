"""Reading the hub's state: the invariants that always hold, and answers to a user's questions. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from daskfed.hub.dispatch import Dispatcher, unmet
from daskfed.hub.ledger import BlockState, KeyState, Ledger
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import Key

PLACED = (BlockPhase.PLACED, BlockPhase.RECALLING)
UNFINISHED = (BlockPhase.WAITING, BlockPhase.READY, *PLACED)


def check(ledger: Ledger, dispatcher: Dispatcher) -> None:
    """Verify every invariant of the hub; raises AssertionError naming the first that is broken."""
    for state in ledger.keys.values():
        _check_key(ledger, state)
        places = {*state.holders, *state.importing, *state.failed_at}
        assert places <= dispatcher.sites.keys(), f"key {state.key!r} is at {places}, of which some are gone"
    for block in ledger.blocks.values():
        _check_block(ledger, dispatcher, block)
    for client, keys in ledger.wants.items():
        assert all(client in ledger.keys[key].wanted_by for key in keys), f"{client} wants a key that does not know it"
    for site in dispatcher.sites.values():
        placed = [ledger.blocks[name] for name in site.blocks]
        assert all(b.site == site.name and b.phase in PLACED for b in placed), f"{site.name} counts blocks it lacks"
        assert site.ntasks == sum(b.spec.ntasks for b in placed), f"{site.name} miscounts its tasks"


def _check_key(ledger: Ledger, state: KeyState) -> None:
    name = repr(state.key)
    assert state.wanted_by or state.consumers, f"key {name} lives though nobody needs it"
    assert bool(state.holders) == (state.phase is KeyPhase.HELD), f"key {name} is {state.phase} at {state.holders}"
    assert not state.importing & state.holders.keys(), f"key {name} is brought to a site that holds it"
    for consumer in state.consumers:
        block = ledger.blocks.get(consumer)
        assert block is not None and block.phase in UNFINISHED, f"key {name} is kept for {consumer}, which ended"
    for client in state.wanted_by:
        assert state.key in ledger.wants[client], f"key {name} is wanted by {client}, who does not know it"
    if state.phase is KeyPhase.PENDING and state.producer is not None:
        producer = ledger.blocks.get(state.producer)
        assert producer is not None and producer.phase in UNFINISHED, f"key {name} waits for {state.producer}: ended"


def _check_block(ledger: Ledger, dispatcher: Dispatcher, block: BlockState) -> None:
    name = block.spec.id
    assert block.phase is not BlockPhase.GONE, f"block {name} is gone and still known"
    assert block.live == sum(_is_producer(ledger, block, key) for key in block.spec.outputs), f"block {name}: live"
    if block.phase not in UNFINISHED:
        return
    inputs = [ledger.keys[key] for key in block.spec.inputs]
    assert all(name in state.consumers for state in inputs), f"block {name} is no consumer of an input"
    missing = sum(state.phase is KeyPhase.PENDING for state in inputs)
    assert block.missing == missing, f"block {name} counts {block.missing} missing inputs of {missing}"
    if block.phase is BlockPhase.READY:
        assert missing == 0, f"block {name} is ready and lacks inputs"
    if block.phase in PLACED:
        site = dispatcher.sites[str(block.site)]
        assert name in site.blocks, f"block {name} is placed at {site.name}, which does not count it"
        assert block.open_outputs, f"block {name} is placed and has nothing left to make"


def _is_producer(ledger: Ledger, block: BlockState, key: Key) -> bool:
    state = ledger.keys.get(key)
    return state is not None and state.producer == block.spec.id


def explain(ledger: Ledger, dispatcher: Dispatcher, key: Key) -> dict[str, Any]:
    """Return, for one key: ``phase``, ``why`` in words, ``sites`` that hold it, ``nbytes``, and its block's facts."""
    state = ledger.keys.get(key)
    if state is None:
        return {"key": key, "phase": "unknown", "why": "no client wants this key and no block needs it", "sites": []}
    block = ledger.blocks.get(state.producer or "")
    found: dict[str, Any] = {
        "key": key,
        "phase": state.phase.value,
        "sites": list(state.holders),
        "nbytes": state.nbytes,
        "why": _why(ledger, dispatcher, state, block),
    }
    if block is not None:
        facts = {"block": block.spec.id, "site": block.site, "tasks": block.spec.ntasks, "attempt": block.attempt.n}
        found |= facts | {"block_phase": block.phase.value, "story": ledger.story(block.spec.id)}
    return found


def _why(ledger: Ledger, dispatcher: Dispatcher, state: KeyState, block: BlockState | None) -> str:
    if state.phase is KeyPhase.HELD:
        made = f"made at {block.site}" if block is not None and block.site else "placed there by a client"
        return f"in memory at {', '.join(state.holders)}; {made}"
    if state.phase is KeyPhase.FAILED:
        return f"its task failed{f' at {block.site}' if block is not None and block.site else ''}"
    if block is None:
        return "a client expects it, and no graph that makes it has arrived"
    return _why_not_yet(ledger, dispatcher, block)


def _why_not_yet(ledger: Ledger, dispatcher: Dispatcher, block: BlockState) -> str:
    if block.phase is BlockPhase.WAITING:
        missing = [key for key in block.spec.inputs if ledger.keys[key].phase is KeyPhase.PENDING]
        return f"its block waits for {len(missing)} input(s), first {missing[0]!r}"
    if block.phase in PLACED:
        return f"its block is at {block.site}, {'with the scheduler' if block.started else 'not started yet'}"
    hellos = [site.hello for site in dispatcher.sites.values()]
    if (problem := unmet(block.spec.constraint, hellos)) is not None:
        return problem
    eligible = dispatcher.eligible(block.spec.constraint)
    names = ", ".join(site.name for site in eligible)
    return f"its block is ready; {names or 'no site'} may run it" + (" and is busy" if eligible else "")


def progress_of(ledger: Ledger, keys: Iterable[Key]) -> dict[str, dict[str, int]]:
    """Return ``all`` and ``remaining``: key prefix -> tasks in the blocks behind ``keys``, and of unfinished ones."""
    found: dict[str, dict[str, int]] = {"all": {}, "remaining": {}}
    for block in _behind(ledger, keys):
        for prefix, count in block.spec.prefixes:
            unfinished = 0 if block.phase is BlockPhase.DONE else count
            found["all"][prefix] = found["all"].get(prefix, 0) + count
            found["remaining"][prefix] = found["remaining"].get(prefix, 0) + unfinished
    return found


def _behind(ledger: Ledger, keys: Iterable[Key]) -> Iterable[BlockState]:
    """Return the blocks that make ``keys``, and those that these need, as far as they are remembered."""
    seen: dict[str, BlockState] = {}
    stack = list(keys)
    while stack:
        state = ledger.keys.get(stack.pop())
        block = ledger.blocks.get(state.producer or "") if state is not None else None
        if block is not None and block.spec.id not in seen:
            seen[block.spec.id] = block
            stack.extend(block.spec.inputs)
    return seen.values()
