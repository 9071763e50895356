"""Which rows of the transition tables the histories went through, counted from the stories that the cores keep."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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


def uncovered(table: Table, rows: Counter[Row]) -> list[Row]:
    """Return the rows of ``table`` that no history used."""
    return [row for row in table if not rows[row]]


def report(tables: Iterable[tuple[str, Table]], counts: Mapping[str, Counter[Row]]) -> str:
    """Return the counts of all rows as text, the rows not covered marked and listed at the end."""
    lines, missing = [], []
    for name, table in tables:
        rows = counts.get(name, Counter())
        for phase, move in table:
            lines.append(f"{name:<12} {phase.value:<10} {move:<14} {rows[phase, move]:>9}")
        missing += [f"{name}: {phase.value} {move!r}" for phase, move in uncovered(table, rows)]
    return "\n".join([*lines, f"rows not covered: {'; '.join(missing) or 'none'}"])


def merge(counts: Iterable[Mapping[str, Counter[Row]]]) -> dict[str, Counter[Row]]:
    """Add up the counts of many histories."""
    total: defaultdict[str, Counter[Row]] = defaultdict(Counter)
    for each in counts:
        for name, rows in each.items():
            total[name] += rows
    return dict(total)
