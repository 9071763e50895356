"""The garbage collector in processes that hold hundreds of thousands of small things that live long.

Python looks through the youngest objects whenever 700 more were made than freed, and through all when these have grown
by a quarter. Futures, keys and what is known of them are made by the ten thousand: a third of the time of many short
calls went into looking through them. What is larger here is the number of objects that are made before it looks.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

RELAXED = (20_000, 20, 20)

_usual = gc.get_threshold()
_users = 0
_lock = threading.RLock()  # the collector itself may end one


class Relaxed:
    """Has the collector look less often until it ends, or is gone; where somebody has set that, this counts."""

    def __init__(self) -> None:
        _count(1)
        self.end = weakref.finalize(self, _count, -1)  # with the last one the collector is as it was


def _count(more: int) -> None:
    global _users
    with _lock:
        _users += more
        if _users and gc.get_threshold() == _usual:
            gc.set_threshold(*RELAXED)
        elif not _users and gc.get_threshold() == RELAXED:
            gc.set_threshold(*_usual)


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keep the collector from looking through something again and again while it grows."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
