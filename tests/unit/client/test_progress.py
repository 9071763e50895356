"""What a progress bar shows when the hub forgets blocks that are done."""

from __future__ import annotations

from daskfed.client.progress import completed


def test_forgotten_tasks_are_done() -> None:
    seen: dict[str, int] = {}
    first = {"all": {"read": 4, "add": 2}, "remaining": {"read": 1, "add": 2}}
    assert completed(first, seen) == first
    later = {"all": {"add": 2}, "remaining": {"add": 1}}
    assert completed(later, seen) == {"all": {"read": 4, "add": 2}, "remaining": {"read": 0, "add": 1}}


def test_tasks_that_come_later_count() -> None:
    seen = {"read": 4}
    assert completed({"all": {"read": 6}, "remaining": {"read": 5}}, seen)["all"] == {"read": 6}
