"""Which workers hold which keys, told by groups: there are few workers, and may be very many keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

from daskfed.messages import Key

Holders: TypeAlias = Sequence[tuple[Sequence[str], Sequence[Key]]]
"""Pairs (addresses of workers, keys that just these hold)."""


def by_key(holders: Holders) -> dict[Key, tuple[str, ...]]:
    """Return key -> workers, where each key is in one group."""
    found: dict[Key, tuple[str, ...]] = {}
    for workers, keys in holders:
        found.update(dict.fromkeys(keys, tuple(workers)))
    return found


def of_all(told: Iterable[tuple[Sequence[str], Sequence[Key]]], asked: Collection[Key]) -> Holders:
    """Return one answer of those of several sites: each of the keys that were asked for is in one group.

    Those that nobody holds are in a group without workers.
    """
    told, wanted = list(told), set(asked)
    seen: set[Key] = set()
    again: set[Key] = set()
    for _, keys in told:
        there = wanted.intersection(keys)
        again |= seen & there
        seen |= there
    single = wanted - again
    groups = [(tuple(workers), [key for key in keys if key in single]) for workers, keys in told]
    several: dict[Key, tuple[str, ...]] = dict.fromkeys(again, ())
    for workers, keys in told:
        for key in again.intersection(keys):
            several[key] += tuple(workers)
    groups += [(workers, [key]) for key, workers in several.items()]
    return [*groups, ((), list(wanted - seen))]
