"""What the hub learns of functions and links."""

from __future__ import annotations

import pytest

from daskfed.hub.estimates import (
    DEFAULT_BANDWIDTH_BPS,
    DEFAULT_LATENCY_S,
    MIN_MEASURED_BYTES,
    UNKNOWN_DURATION_S,
    FunctionBook,
    LinkBook,
    LinkTotals,
)
from tests.unit.hub.builders import block

MIXED = block("b", "x", ntasks=12, prefixes=(("load", 2), ("mean", 10)))


class TestFunctions:
    def test_the_first_observation_counts_whole_and_the_next_ones_half(self) -> None:
        book = FunctionBook()
        book.learn_duration("load", 4, 8.0)
        book.learn_size("load", 2, 100)
        assert (book.durations, book.sizes) == ({"load": 2.0}, {"load": 50.0})
        book.learn_duration("load", 1, 4.0)
        book.learn_size("load", 1, 150)
        assert (book.durations, book.sizes) == ({"load": 3.0}, {"load": 100.0})

    def test_an_observation_of_nothing_does_not_divide_by_zero(self) -> None:
        book = FunctionBook()
        book.learn_duration("load", 0, 0.0)
        assert book.durations == {"load": 0.0}

    def test_a_block_takes_what_its_tasks_take(self) -> None:
        book = FunctionBook()
        assert book.block_s(MIXED) == pytest.approx(12 * UNKNOWN_DURATION_S)
        book.learn_duration("load", 1, 3.0)
        assert book.block_s(MIXED) == pytest.approx(6.0 + 10 * UNKNOWN_DURATION_S)
        assert not book.known(MIXED)
        book.learn_duration("mean", 1, 0.5)
        assert book.block_s(MIXED) == 11.0
        assert book.known(MIXED)

    def test_a_block_without_prefixes_is_known_and_takes_nothing(self) -> None:
        assert FunctionBook().block_s(block("b", "x")) == 0
        assert FunctionBook().known(block("b", "x"))


class TestLinks:
    def test_a_link_that_was_never_used_is_average(self) -> None:
        assert LinkBook().transfer_s("a", "b", 10**8) == 10**8 / DEFAULT_BANDWIDTH_BPS + DEFAULT_LATENCY_S

    def test_a_large_movement_tells_the_bandwidth_of_one_direction(self) -> None:
        book = LinkBook()
        book.learn("a", "b", 10**6, 0.5, relayed=False)
        assert book.transfer_s("a", "b", 10**6) == 0.5 + DEFAULT_LATENCY_S
        assert book.transfer_s("b", "a", 10**6) == LinkBook().transfer_s("b", "a", 10**6)
        book.learn("a", "b", 10**6, 0.25, relayed=False)
        assert book.bandwidth_bps == {("a", "b"): 3e6}

    def test_a_small_one_tells_the_latency(self) -> None:
        book = LinkBook()
        book.learn("a", "b", MIN_MEASURED_BYTES - 1, 0.3, relayed=False)
        assert book.bandwidth_bps == {}
        assert book.transfer_s("a", "b", 0) == 0.3

    def test_no_time_at_all_does_not_divide_by_zero(self) -> None:
        book = LinkBook()
        book.learn("a", "b", 10**6, 0.0, relayed=False)
        assert book.transfer_s("a", "b", 10**6) < 0.1

    def test_all_movements_are_added_up(self) -> None:
        book = LinkBook()
        book.learn("a", "b", 10, 0.5, relayed=True)
        book.learn("a", "b", 30, 0.25, relayed=False)
        book.learn("b", "a", 1, 1.0, relayed=False)
        assert book.totals == {
            ("a", "b"): LinkTotals(count=2, nbytes=40, seconds=0.75, relayed=1),
            ("b", "a"): LinkTotals(count=1, nbytes=1, seconds=1.0, relayed=0),
        }
