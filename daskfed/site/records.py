"""What a site's core remembers of each key and block. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from daskfed.messages import Attempt, BlockSpec, Key
from daskfed.site.events import Fetched
from daskfed.site.states import BlockPhase, KeyPhase


@dataclass(slots=True)
class KeyState:
    """One key at this site."""

    key: Key
    phase: KeyPhase = KeyPhase.ABSENT
    nbytes: int = 0  # as the hub or the scheduler said; 0 if unknown
    source: str = ""  # site to import it from
    number: int = 0  # of the hub's latest order to import it
    tries: int = 0  # how often it was fetched for that order, in vain
    hub: bool = False  # the hub asked for it, or put it here
    announce: bool = False  # the hub waits for a KeyImported
    arrival: Fetched | None = None  # how it was fetched
    unopened: bool = False  # it exists elsewhere, and failed here since its value could not be opened
    makers: set[str] = field(default_factory=set)  # submitted blocks that are to report it
    made_by: dict[str, int] = field(default_factory=dict)  # blocks that have reported it -> number of the report
    users: set[str] = field(default_factory=set)  # unfinished blocks that need it


@dataclass(slots=True)
class BlockState:
    """One block at this site."""

    spec: BlockSpec
    attempt: Attempt
    expected_s: float
    order: tuple[int, int]  # blocks are submitted in this order: (-priority, arrival)
    phase: BlockPhase = BlockPhase.WAITING
    missing: set[Key] = field(default_factory=set)  # inputs that are still to be fetched
    open: dict[Key, None] = field(default_factory=dict)  # outputs that were not reported yet
    kept: dict[Key, None] = field(default_factory=dict)  # outputs that were reported and are still here
