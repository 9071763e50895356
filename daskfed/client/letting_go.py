"""Futures that are let go of at little cost.

Each stock future that is garbage has the event loop called, which wakes it; a list of thousands keeps thread and loop
busy for longer than it took to make their results. These are put aside, and the loop is called once for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed.client import Future

from daskfed.messages import Key

AT_A_TIME = 2048  # keys that are released in one turn of the loop


class LightFuture(Future):
    """A future of daskfed's client."""

    client: Any
    _generation: int
    _cleared: bool

    def release(self) -> None:
        """Let the key go, from any thread."""
        self._verify_initialized()
        if not self._cleared and self.client.generation == self._generation:
            self._cleared = True
            with suppress(TypeError):  # as of a stock future: the interpreter ends
                self.client.let_go.put(self.key)


class LetGo:
    """Keys of futures that are no more; ``release`` releases one on the loop, ``later`` has something called there."""

    def __init__(self, later: Callable[[Callable[[], None]], Any], release: Callable[[Key], None]) -> None:
        self._later = later
        self._release = release
        self._keys: deque[Key] = deque()
        self._due = False

    def put(self, key: Key) -> None:
        """Release a key soon; from any thread, also while its collector runs, so without a lock."""
        self._keys.append(key)
        if not self._due:
            self._due = True
            self._later(self._some)

    def _some(self) -> None:
        self._due = False
        for _ in range(min(len(self._keys), AT_A_TIME)):
            self._release(self._keys.popleft())
        if self._keys and not self._due:
            self._due = True
            self._later(self._some)

    def all(self) -> None:
        """Release now what has been let go of; on the loop."""
        while self._keys:
            self._release(self._keys.popleft())
