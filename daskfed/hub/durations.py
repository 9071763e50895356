"""Telling clients how long tasks take, so that they can have tiny ones run several as one.

A client is told of the prefixes that its own graphs have used, and of all once it has sent a graph that nobody opened.
It is told when what is known of one has changed much, and of many at a time: what it costs does not grow with the
number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distributed.core import Status

from daskfed.messages import BlockKind, BlockSpec

if TYPE_CHECKING:
    from daskfed.hub.clients import ClientSession
    from daskfed.hub.server import Hub

TELL_S = 0.1  # what is learnt within this time is told together
MUCH = 1.5  # a factor; what has changed by less is not told
MOST_PREFIXES = 10_000  # of one client: one that uses more has a name of its own for each task
UNKNOWN = -1  # bytes of a result of which the hub knows only how long it took

Told = tuple[float, int]
"""Seconds of one thread, bytes of the result."""


class Durations:
    """What each client was told."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._news: set[str] = set()  # prefixes

    def used(self, session: ClientSession, specs: Iterable[BlockSpec]) -> None:
        """A client submits blocks."""
        if not session.fuses:
            return
        for spec in specs:
            if spec.kind is BlockKind.GRAPH and len(session.told) < MOST_PREFIXES:
                added = {prefix for prefix, _ in spec.prefixes if prefix not in session.told}
                session.told.update(dict.fromkeys(added))
                self.learnt(added & self.hub.core.dispatcher.functions.durations.keys())

    def used_unseen(self, session: ClientSession) -> None:
        """A client submits a graph of which only the site sees what is in it."""
        if session.fuses and not session.hears_all:
            session.hears_all = True
            self.learnt(self.hub.core.dispatcher.functions.durations)

    def learnt(self, prefixes: Iterable[str]) -> None:
        """Something new is known of tasks of these prefixes."""
        before = bool(self._news)
        self._news.update(prefixes)
        if self._news and not before:
            self.hub.loop.call_later(TELL_S, self._tell)

    def _tell(self) -> None:
        news, self._news = self._news, set()
        if self.hub.status is not Status.running:
            return
        for session in self.hub.sessions.sessions.values():
            if session.fuses and (found := self._new_to(session, news)):
                session.told |= found
                session.send(_message(found))

    def _new_to(self, session: ClientSession, news: set[str]) -> dict[str, Told]:
        books = self.hub.core.dispatcher.functions
        found = {}
        room = MOST_PREFIXES - len(session.told) if session.hears_all else 0
        unheard = list(news - session.told.keys())[: max(0, room)]
        for prefix in (*(news & session.told.keys()), *unheard):
            known = books.durations[prefix], round(books.sizes.get(prefix, UNKNOWN))
            before = session.told.get(prefix)
            if before is None or any(map(_differ, known, before)):
                found[prefix] = known
        return found


def _differ(one: float, other: float) -> bool:
    low, high = sorted((one, other))
    return high > MUCH * low


def _message(found: dict[str, Told]) -> dict[str, Any]:
    return {"op": "fed-learned", "prefixes": {prefix: list(known) for prefix, known in found.items()}}
