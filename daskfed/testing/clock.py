"""A virtual clock: time passes only from one planned action to the next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class VirtualClock:
    """Runs planned actions in the order of their times; those of one time run in the order of planning."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now  # seconds
        self.steps = 0  # actions run so far
        self._order = count()
        self._planned: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []

    def call_later(self, delay_s: float, action: Callable[..., object], *args: Any) -> None:
        """Plan ``action(*args)`` for ``delay_s`` seconds from now."""
        self.call_at(self.now + delay_s, action, *args)

    def call_at(self, when: float, action: Callable[..., object], *args: Any) -> None:
        """Plan ``action(*args)`` for the time ``when``, or for now if that has passed."""
        heappush(self._planned, (max(when, self.now), next(self._order), action, args))

    def step(self) -> bool:
        """Run the next action; return whether there was one."""
        if not self._planned:
            return False
        self.now, _, action, args = heappop(self._planned)
        self.steps += 1
        action(*args)
        return True

    def run_until(self, when: float, most_steps: int = 100_000) -> None:
        """Run all actions up to and including the time ``when``; the clock then shows ``when``.

        Raises RuntimeError where that takes more than ``most_steps`` actions: they plan each other in circles.
        """
        limit = self.steps + most_steps
        while self._planned and self._planned[0][0] <= when:
            if self.steps >= limit:
                raise RuntimeError(f"at {self.now} s: {most_steps} actions, and no end")
            self.step()
        self.now = max(self.now, when)
