"""Reading the hub's state: the invariants that always hold, and answers to a user's questions. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from daskfed.hub.dispatch import Dispatcher, unmet
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import AT_SITE, BlockState, Ledger
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import Key

UNFINISHED = (BlockPhase.WAITING, BlockPhase.READY, *AT_SITE)
WAITS_FOR = 8  # missing inputs that are told of


def check(ledger: Ledger, dispatcher: Dispatcher) -> None:
    """Verify every invariant of the hub; raises AssertionError naming the first that is broken."""
    unfinished = {name for name, block in ledger.blocks.items() if block.phase in UNFINISHED}
    live, pending = dict.fromkeys(ledger.blocks, 0), dict.fromkeys(ledger.blocks, 0)
    for state in ledger.keys.values():
        _check_key(ledger, dispatcher, state, unfinished)
        if state.producer in live:
            live[state.producer] += 1
            pending[state.producer] += state.phase is KeyPhase.PENDING
    for name, block in ledger.blocks.items():
        assert block.live == live[name], f"block {name} counts {block.live} live outputs of {live[name]}"
        assert block.live or ledger.patient, f"block {name} is kept though nothing of it lives"
        assert block.pending == pending[name], f"block {name} counts {block.pending} pending outputs of {pending[name]}"
        if block.phase is BlockPhase.DONE:
            _check_recipe(ledger, block)
        assert block.phase is not BlockPhase.GONE, f"block {name} is gone and still known"
        _check_arrival(ledger, block)
    for name in unfinished:
        _check_block(ledger, dispatcher, ledger.blocks[name])
    for client, keys in ledger.wants.items():
        assert all(client in ledger.keys[key].wanted_by for key in keys), f"{client} wants a key that does not know it"
    for site in dispatcher.sites.values():
        placed = [ledger.blocks[name] for name in site.blocks]
        assert all(b.site == site.name and b.phase in AT_SITE for b in placed), f"{site.name} counts blocks it lacks"
        assert site.backlog.total.ntasks == sum(b.spec.ntasks for b in placed), f"{site.name} miscounts its tasks"


def _check_key(ledger: Ledger, dispatcher: Dispatcher, state: KeyState, unfinished: set[str]) -> None:
    key = state.key
    assert state.needed or state.heirs or state.shielded, f"key {key!r} lives though nobody needs it"
    if not (state.needed or state.shielded):
        retired = state.phase in (KeyPhase.RETIRED, KeyPhase.FAILED)
        assert retired and not state.importing, f"key {key!r} is {state.phase} though nobody needs its value"
    assert bool(state.holders) == (state.phase is KeyPhase.HELD), f"key {key!r} is {state.phase} at {state.holders}"
    for places in (state.holders, state.importing, state.failed_at):
        for place in places:
            assert place in dispatcher.sites, f"key {key!r} is at {place}, which is gone"
    for place in state.importing:
        assert place not in state.holders, f"key {key!r} is brought to {place}, which holds it"
    for consumer in state.consumers:
        assert consumer in unfinished, f"key {key!r} is kept for {consumer}, which ended"
    for heir in state.heirs:
        finished = heir in ledger.blocks and heir not in unfinished
        assert finished, f"key {key!r} is kept for {heir}, which is not finished"
    for client in state.wanted_by:
        assert key in ledger.wants[client], f"key {key!r} is wanted by {client}, who does not know it"
    if state.phase is KeyPhase.PENDING and state.producer is not None:
        assert state.producer in unfinished, f"key {key!r} waits for {state.producer}, which ended"


def _check_arrival(ledger: Ledger, block: BlockState) -> None:
    if ledger.patient:
        return
    for key in block.spec.inputs:
        producer = ledger.blocks.get(ledger.keys[key].producer or "")
        earlier = producer is None or producer.order[-1] < block.order[-1]
        assert earlier, f"block {block.spec.id} needs {key!r} of {producer and producer.spec.id}, which came later"


def _check_recipe(ledger: Ledger, block: BlockState) -> None:
    name = block.spec.id
    assert not block.pending, f"block {name} is done and has outputs to make"
    for key in block.spec.inputs:
        assert name in ledger.keys[key].heirs, f"block {name} is done and no heir of its input {key!r}"


def _check_block(ledger: Ledger, dispatcher: Dispatcher, block: BlockState) -> None:
    name, missing = block.spec.id, 0
    for key in block.spec.inputs:
        state = ledger.keys[key]
        missing += state.phase is KeyPhase.PENDING
        assert name in state.consumers, f"block {name} is no consumer of its input {key!r}"
    assert block.missing == missing, f"block {name} counts {block.missing} missing inputs of {missing}"
    assert block.pending or block.phase in AT_SITE, f"block {name} is unfinished though nothing of it is needed"
    if block.phase is BlockPhase.READY:
        assert missing == 0, f"block {name} is ready and lacks inputs"
    if block.phase in AT_SITE:
        site = dispatcher.sites[str(block.site)]
        assert name in site.blocks, f"block {name} is placed at {site.name}, which does not count it"
        assert block.open_outputs, f"block {name} is placed and has nothing left to make"


def explain(ledger: Ledger, dispatcher: Dispatcher, key: Key) -> dict[str, Any]:
    """Return, for one key: ``phase``, ``why`` in words, ``sites`` that hold it, ``nbytes``, and its block's facts.

    Among these are, of a block that waits, the first inputs that do not exist: ``waits_for``.
    """
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
        if block.phase is BlockPhase.WAITING:
            found["waits_for"] = _missing(ledger, block)[:WAITS_FOR]
    return found


def _why(ledger: Ledger, dispatcher: Dispatcher, state: KeyState, block: BlockState | None) -> str:
    if state.phase is KeyPhase.HELD:
        made = f"made at {block.site}" if block is not None and block.site else "placed there by a client"
        return f"in memory at {', '.join(state.holders)}; {made}"
    if state.phase is KeyPhase.FAILED:
        return f"its task failed{f' at {block.site}' if block is not None and block.site else ''}"
    if state.phase is KeyPhase.RETIRED:
        heir = next(iter(state.heirs), "a client that is not back yet")
        return f"its value was released; it would be made again for {heir}"
    if block is None:
        return "a client expects it, and no graph that makes it has arrived"
    return _why_not_yet(ledger, dispatcher, block)


def _why_not_yet(ledger: Ledger, dispatcher: Dispatcher, block: BlockState) -> str:
    if block.phase is BlockPhase.WAITING:
        missing = _missing(ledger, block)
        return f"its block waits for {len(missing)} input(s), first {missing[0]!r}"
    if block.phase in AT_SITE:
        return f"its block is at {block.site}, {'with the scheduler' if block.started else 'not started yet'}"
    if (rest_s := block.rests_until - ledger.now) > 0:
        return f"{block.failures} sites could not run its block, which rests for {rest_s:.1f} s before the next tries"
    hellos = [site.hello for site in dispatcher.sites.values()]
    if (problem := unmet(block.spec.constraint, hellos)) is not None:
        return problem
    eligible = dispatcher.eligible(block.spec.constraint)
    names = ", ".join(f"{site.name} (away)" if site.away else site.name for site in eligible)
    return f"its block is ready; {names or 'no site'} may run it" + (" and is busy" if eligible else "")


def _missing(ledger: Ledger, block: BlockState) -> list[Key]:
    return [key for key in block.spec.inputs if ledger.keys[key].phase is KeyPhase.PENDING]


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


def running_at(ledger: Ledger, keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Return site -> those of ``keys``, and of what they wait for, that blocks at that site are to make."""
    found: dict[str, list[Key]] = {}
    stack, seen = list(keys), set()
    while stack:
        key = stack.pop()
        state = ledger.keys.get(key)
        block = ledger.blocks.get(state.producer or "") if state is not None else None
        if block is None or key in seen or block.phase not in UNFINISHED:
            continue
        seen.add(key)
        if block.phase in AT_SITE and block.site:
            found.setdefault(block.site, []).append(key)
        else:
            stack.extend(block.spec.inputs)
    return found
