"""The life of a block and of a key, as the hub sees it: two tables of legal moves.

Anything that is not in a table raises :class:`daskfed.errors.IllegalTransition` and names what was asked of whom.
"""

from __future__ import annotations

from daskfed.errors import IllegalTransition
from daskfed.messages import QuickEnum


class BlockPhase(QuickEnum):
    """Where a block stands."""

    WAITING = "waiting"  # some input does not exist yet
    READY = "ready"  # may be placed
    PLACED = "placed"  # a site has it
    RECALLING = "recalling"  # a site has it and was asked to give it back
    DONE = "done"  # nothing is left to make; it stays as the recipe of its outputs, and of what was made from them
    GONE = "gone"  # nobody wants it any more


class KeyPhase(QuickEnum):
    """Where a key stands."""

    PENDING = "pending"  # some block will make it
    HELD = "held"  # in memory at one site or more
    FAILED = "failed"  # its task raised
    RETIRED = "retired"  # nobody needs its value now, but what was made from it lives: it may be made again
    GONE = "gone"  # nobody wants it any more


BLOCK_MOVES: dict[tuple[BlockPhase, str], BlockPhase] = {
    (BlockPhase.WAITING, "inputs exist"): BlockPhase.READY,
    (BlockPhase.READY, "input lost"): BlockPhase.WAITING,
    (BlockPhase.READY, "place"): BlockPhase.PLACED,
    (BlockPhase.WAITING, "adopt"): BlockPhase.PLACED,
    (BlockPhase.READY, "adopt"): BlockPhase.PLACED,
    (BlockPhase.PLACED, "recall"): BlockPhase.RECALLING,
    (BlockPhase.RECALLING, "given back"): BlockPhase.WAITING,
    (BlockPhase.RECALLING, "too late"): BlockPhase.PLACED,
    (BlockPhase.PLACED, "finished"): BlockPhase.DONE,
    (BlockPhase.RECALLING, "finished"): BlockPhase.DONE,
    (BlockPhase.PLACED, "site lost"): BlockPhase.WAITING,
    (BlockPhase.RECALLING, "site lost"): BlockPhase.WAITING,
    (BlockPhase.DONE, "needed again"): BlockPhase.WAITING,
    (BlockPhase.WAITING, "stand down"): BlockPhase.DONE,
    (BlockPhase.READY, "stand down"): BlockPhase.DONE,
    (BlockPhase.WAITING, "cancel"): BlockPhase.GONE,
    (BlockPhase.READY, "cancel"): BlockPhase.GONE,
    (BlockPhase.PLACED, "cancel"): BlockPhase.GONE,
    (BlockPhase.RECALLING, "cancel"): BlockPhase.GONE,
    (BlockPhase.DONE, "forget"): BlockPhase.GONE,
}

KEY_MOVES: dict[tuple[KeyPhase, str], KeyPhase] = {
    (KeyPhase.PENDING, "made"): KeyPhase.HELD,
    (KeyPhase.PENDING, "failed"): KeyPhase.FAILED,
    (KeyPhase.HELD, "lost"): KeyPhase.PENDING,
    (KeyPhase.FAILED, "made"): KeyPhase.HELD,
    (KeyPhase.FAILED, "retry"): KeyPhase.PENDING,
    (KeyPhase.PENDING, "retire"): KeyPhase.RETIRED,
    (KeyPhase.HELD, "retire"): KeyPhase.RETIRED,
    (KeyPhase.RETIRED, "needed again"): KeyPhase.PENDING,
    (KeyPhase.RETIRED, "made"): KeyPhase.HELD,
    (KeyPhase.PENDING, "release"): KeyPhase.GONE,
    (KeyPhase.HELD, "release"): KeyPhase.GONE,
    (KeyPhase.FAILED, "release"): KeyPhase.GONE,
    (KeyPhase.RETIRED, "release"): KeyPhase.GONE,
}


def next_block_phase(phase: BlockPhase, move: str, name: str) -> BlockPhase:
    """Return where ``move`` leads a block; raises IllegalTransition where the table has no such move."""
    try:
        return BLOCK_MOVES[phase, move]
    except KeyError:
        raise IllegalTransition(f"block {name!r} is {phase.value}: it cannot {move!r}") from None


def next_key_phase(phase: KeyPhase, move: str, name: object) -> KeyPhase:
    """Return where ``move`` leads a key; raises IllegalTransition where the table has no such move."""
    try:
        return KEY_MOVES[phase, move]
    except KeyError:
        raise IllegalTransition(f"key {name!r} is {phase.value}: it cannot {move!r}") from None
