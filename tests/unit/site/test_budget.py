"""The byte budget of imports, and how far ahead the scheduler is given work."""

from __future__ import annotations

import pytest

from daskfed.messages import BlockKind, BlockSpec
from daskfed.site.budget import MIN_BLOCKS, SECONDS_AHEAD, SMALLEST_CHARGE, TASKS_AHEAD, ImportQueue, Runway


def block(name: str, ntasks: int) -> BlockSpec:
    return BlockSpec(name, "c", "u", BlockKind.GRAPH, (), (name,), ntasks, ())


class TestImportQueue:
    def test_fetches_start_in_order_within_the_budget(self) -> None:
        queue = ImportQueue(budget=3 * SMALLEST_CHARGE)
        for key, charges in (("a", 2), ("b", 2), ("c", 1)):
            queue.want(key, charges * SMALLEST_CHARGE)
        assert list(queue.startable()) == ["a"]  # c would fit, but is not to overtake b
        queue.discharge("a")
        assert list(queue.startable()) == ["b", "c"]

    def test_small_and_unknown_sizes_count_the_least_charge(self) -> None:
        queue = ImportQueue(budget=2 * SMALLEST_CHARGE)
        for key in "abc":
            queue.want(key, 0)
        assert list(queue.startable()) == ["a", "b"]

    def test_one_goes_on_however_large(self) -> None:
        queue = ImportQueue(budget=1)
        queue.want("a", 10**12)
        assert list(queue.startable()) == ["a"]

    def test_what_arrived_counts_what_it_really_takes(self) -> None:
        queue = ImportQueue(budget=4 * SMALLEST_CHARGE)
        queue.want("a", 0)
        assert list(queue.startable()) == ["a"]
        queue.charge("a", 4 * SMALLEST_CHARGE)
        queue.want("b", 0)
        assert list(queue.startable()) == []

    def test_wrong_books_are_found(self) -> None:
        queue = ImportQueue(budget=1)
        queue.want("a", 1)
        with pytest.raises(AssertionError, match="are not the wanted keys"):
            queue.check(wanted=set(), landing=set())
        with pytest.raises(AssertionError, match="nothing is on its way"):
            queue.check(wanted={"a"}, landing=set())


class TestRunway:
    def test_some_blocks_always_fit(self) -> None:
        runway = Runway()
        for i in range(MIN_BLOCKS):
            assert runway.has_room(0)
            runway.submit(block(str(i), 1000), expected_s=100.0)
        assert not runway.has_room(0)
        runway.end("0")
        assert runway.has_room(0)

    def test_few_tasks_are_not_enough_for_many_threads(self) -> None:
        runway = Runway()
        runway.report(0, threads=100, submitted=0)
        for i in range(MIN_BLOCKS):
            runway.submit(block(str(i), TASKS_AHEAD * 50 - 1), expected_s=10.0**6)
        assert runway.has_room(0)
        runway.submit(block("more", 2), expected_s=10.0**6)
        assert not runway.has_room(0)

    def test_a_report_replaces_what_was_submitted_before_it_and_keeps_what_came_later(self) -> None:
        runway = Runway()
        for i in range(3):
            runway.submit(block(str(i), 10), expected_s=1.0)
        runway.report(unfinished=4, threads=1, submitted=2)
        assert runway.tasks() == 4 + 10
        runway.report(unfinished=12, threads=1, submitted=3)
        assert runway.tasks() == 12

    def test_a_stale_report_is_not_believed_more_than_the_blocks_that_are_left(self) -> None:
        runway = Runway()
        runway.submit(block("a", 10), expected_s=1.0)
        runway.submit(block("b", 10), expected_s=1.0)
        runway.report(unfinished=20, threads=1, submitted=2)
        runway.end("a")
        assert runway.tasks() == 10

    def test_short_work_is_given_for_some_time_ahead(self) -> None:
        runway = Runway()
        runway.report(0, threads=2, submitted=0)
        blocks = 0
        while runway.has_room(0):
            blocks += 1
            runway.submit(block(str(blocks), 100), expected_s=0.01)
        assert blocks == round(2 * SECONDS_AHEAD / 0.01)

    def test_a_higher_priority_does_not_wait_for_a_lower_one(self) -> None:
        runway = Runway()
        for i in range(MIN_BLOCKS):
            runway.submit(block(str(i), 1000), expected_s=100.0)
        assert runway.has_room(1) and not runway.has_room(0) and not runway.has_room(-1)
