"""Many tasks of one site wait for the hub at once, and none keeps another from being heard."""

from __future__ import annotations

import pytest
from distributed import Lock

from daskfed import Client, Federation

pytestmark = pytest.mark.system

CROWD = 70  # more than could wait if there were a few connections for all of them


def in_turn(number: int) -> int:
    """Return a number, once no other task holds the lock."""
    with Lock("crowd"):
        return number


def test_a_crowd_that_waits_for_a_lock_lets_its_holder_release_it() -> None:
    site = {"options": {"n_workers": 1, "threads_per_worker": CROWD}}
    with Federation({"one": site, "two": site}) as federation, Client(federation, set_as_default=False) as client:
        futures = client.map(in_turn, range(CROWD), site="one", pure=False)
        assert client.gather(futures) == list(range(CROWD))
