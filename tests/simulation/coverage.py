"""What the histories went through: rows of the transition tables, from the stories that the cores keep, and faults."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from daskfed.hub import states as hub_states
from daskfed.site import states as site_states
from tests.simulation.faults import FAULTS

TABLES = (
    ("hub block", hub_states.BLOCK_MOVES),
    ("hub key", hub_states.KEY_MOVES),
    ("site block", site_states.BLOCK_MOVES),
    ("site key", site_states.KEY_MOVES),
)

Row = tuple[Enum, str]
Table = Mapping[Any, Any]  # (phase, move) -> phase


@dataclass(slots=True)
class Follower:
    """Replays the moves of many subjects through one table and counts the rows they used."""

    name: str
    table: Table
    start: Enum
    rows: Counter[Row] = field(default_factory=Counter)
    phases: dict[object, Enum] = field(default_factory=dict)
    _going_on: frozenset[Enum] = frozenset()

    def __post_init__(self) -> None:
        self._going_on = frozenset(phase for phase, _ in self.table)

    def follow(self, subject: object, move: str) -> None:
        """Take in one move; raises KeyError where the table does not have it.

        A subject that begins anew without having ended is recognised by its first move.
        """
        row = (self.phases.get(subject, self.start), move)
        if row not in self.table:
            row = (self.start, move)
        self.rows[row] += 1
        phase = self.table[row]
        if phase in self._going_on:
            self.phases[subject] = phase
        else:
            self.phases.pop(subject, None)  # it ended; should it come again, it starts anew


@dataclass(frozen=True, slots=True)
class Count:
    """How often something that can happen did."""

    name: str
    times: int

    def __str__(self) -> str:
        return f"{self.name:<50} {self.times:>9}"


def count_all(rows: Mapping[str, Mapping[Any, int]], faults: Mapping[str, int]) -> list[Count]:
    """Return how often each row of each table was used, and how often each kind of fault happened.

    Raises ValueError where a fault is of a kind that :data:`tests.simulation.faults.FAULTS` does not name.
    """
    if unknown := faults.keys() - set(FAULTS):
        raise ValueError(f"not among the kinds of faults: {', '.join(unknown)}")
    of_rows = [
        Count(f"{name}: {phase.value} {move!r}", rows.get(name, {}).get((phase, move), 0))
        for name, table in TABLES
        for phase, move in table
    ]
    return of_rows + [Count(f"fault: {kind}", faults.get(kind, 0)) for kind in FAULTS]


def merge(counts: Iterable[Mapping[str, Counter[Row]]]) -> dict[str, Counter[Row]]:
    """Add up the counts of many histories."""
    total: defaultdict[str, Counter[Row]] = defaultdict(Counter)
    for each in counts:
        for name, rows in each.items():
            total[name] += rows
    return dict(total)
