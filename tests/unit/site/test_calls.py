"""Which calls lanes get: none is lost, none is reported twice, and the one that kills workers is found."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from daskfed.site.calls import MESSAGE_S, CallQueue, Chunk, Timing, ranges

KEYS = tuple(f"inc-{n}" for n in range(100))


def queue_with(rows: int = 100, *lanes: str, **how: Any) -> CallQueue:
    """Return a queue with one block of calls of ``inc``, and lanes."""
    queue = CallQueue()
    for lane in lanes or ("a",):
        queue.open_lane(lane)
    queue.submit("block", KEYS[:rows], range(rows), "inc", **how)
    return queue


def rows_of(chunks: list[Chunk]) -> list[int]:
    """Return the rows of chunks."""
    return [row for chunk in chunks for row in range(chunk.start, chunk.stop)]


def test_calls_that_nobody_has_timed_go_out_one_by_one() -> None:
    queue = queue_with()
    assert rows_of(queue.give("a")) == [0]


def test_a_message_is_as_long_as_it_should_be() -> None:
    queue = queue_with()
    (first,) = queue.give("a")
    queue.done("a", first, seconds=MESSAGE_S / 5)
    assert rows_of(queue.give("a")) == [1, 2, 3, 4, 5]


def test_no_more_is_given_than_a_few_times_what_was_timed() -> None:
    queue = queue_with()
    (first,) = queue.give("a")
    queue.done("a", first, seconds=1e-6)
    assert len(rows_of(queue.give("a"))) == 8


def test_one_call_that_waited_for_its_core_does_not_make_all_of_them_long() -> None:
    timing = Timing()
    timing.add(1, 0.00001)
    timing.add(2000, 0.02)
    timing.add(1, 0.03)  # another process had the core
    assert timing.seconds < 0.00004 and timing.calls_in(MESSAGE_S) > 700


def test_calls_that_become_longer_are_soon_known_to_be() -> None:
    timing = Timing()
    timing.add(10_000, 0.1)
    for _ in range(20):
        timing.add(2, 0.02)  # as a lane tells while they run
    assert timing.seconds > 0.005 and timing.calls_in(MESSAGE_S) <= 6


def test_calls_of_a_second_are_known_from_two() -> None:
    timing = Timing()
    timing.add(100, 0.001)
    timing.add(1, 1.0)
    assert timing.seconds > 0.009
    timing.add(1, 1.0)
    assert timing.seconds > 0.2


def test_lanes_share_what_is_left() -> None:
    queue = queue_with(10, "a", "b")
    (first,) = queue.give("a", lanes=2)
    queue.done("a", first, seconds=1e-6)
    assert len(rows_of(queue.give("a", lanes=2))) == 5  # of nine
    assert len(rows_of(queue.give("b", lanes=2))) == 4


def test_higher_priority_goes_first() -> None:
    queue = queue_with()
    queue.submit("urgent", ("now",), range(1), "other", priority=1)
    (first,) = queue.give("a")
    assert queue.runs[first.run].block == "urgent"


def test_what_is_given_back_waits_again_before_the_rest() -> None:
    queue = queue_with(5)
    (first,) = queue.give("a")
    queue.returned("a", first)
    assert rows_of(queue.give("a")) == [0]


def test_a_late_report_of_an_earlier_run_counts_for_nothing() -> None:
    queue = queue_with(1)
    (first,) = queue.give("a")
    queue.submit("block", KEYS[:1], range(1), "inc")
    assert list(queue.done("a", first)) == []
    (second,) = queue.give("a")
    assert list(queue.done("a", second)) == [0]
    assert not queue.runs


def test_a_dropped_call_is_neither_given_nor_reported() -> None:
    queue = queue_with(3)
    (first,) = queue.give("a")
    assert queue.drop(["inc-0", "inc-1", "unknown"]) == {"inc-0", "inc-1"}
    assert queue.in_vain == {"a"}  # that is to give back what it has not begun
    assert list(queue.done("a", first)) == []
    assert rows_of(queue.give("a")) == [2]


def test_only_some_rows_of_a_block() -> None:
    queue = CallQueue()
    queue.open_lane("a")
    queue.submit("block", KEYS, [3, 4, 9], "inc")
    queue.time("inc", 100, 1e-4)
    assert rows_of(queue.give("a")) == [3, 4, 9]
    assert queue.open == 3


def test_a_failure_is_told_after_the_retries() -> None:
    queue = queue_with(1, retries=2)
    told = []
    for _ in range(3):
        (chunk,) = queue.give("a")
        told.append(queue.failed("a", chunk))
    assert told == [False, False, True]
    assert not queue.runs


def test_what_was_with_a_lane_that_died_goes_out_one_by_one_until_the_killer_is_found() -> None:
    queue = queue_with(20)
    queue.time("inc", 100, 1e-4)
    assert len(rows_of(queue.give("a"))) == 20
    lane, convicted, done = 0, [], set()
    assert queue.close_lane("a", died=True) == []
    while queue.runs:
        lane += 1
        queue.open_lane(str(lane))
        while chunks := queue.give(str(lane)):
            assert len(rows_of(chunks)) == 1
            if chunks[0].start == 7:
                break
            done.update(queue.done(str(lane), chunks[0]))
        convicted += [row for _, row in queue.close_lane(str(lane), died=bool(chunks))]
    assert convicted == [7]
    assert done == set(range(20)) - {7}
    assert lane == 2 + queue.allowed_deaths  # the last one runs the others


def test_a_lane_that_ends_its_turn_is_not_held_against_its_calls() -> None:
    queue = queue_with(20)
    queue.time("inc", 100, 1e-4)
    queue.give("a")
    assert queue.close_lane("a", died=False) == []
    queue.open_lane("b")
    assert len(rows_of(queue.give("b"))) == 20


def test_held_calls_wait_until_they_may_go_or_are_withdrawn() -> None:
    queue = queue_with(5, held=True)
    assert queue.give("a") == [] and not queue.waiting
    queue.drop(["inc-1"])
    queue.resume("inc")
    assert rows_of(queue.give("a")) == [0]
    queue.submit("other", KEYS[:3], range(3), "slow", held=True)
    queue.drop(["inc-2"])
    ((run, rows),) = queue.withdraw("slow")
    assert (run.block, rows) == ("other", [0, 1])
    assert "other" not in {each.block for each in queue.runs.values()}


def test_a_large_result_is_closed_when_it_is_registered_whatever_becomes_of_the_lane() -> None:
    queue = queue_with(2)
    (chunk,) = queue.give("a")
    queue.park("a", chunk)
    queue.close_lane("a", died=True)
    assert queue.parked_done(chunk.run, 0) and not queue.parked_done(chunk.run, 0)
    queue.open_lane("b")
    (chunk,) = queue.give("b")
    queue.park("b", chunk)
    queue.unpark(chunk.run, 1)
    assert rows_of(queue.give("b")) == [1]


def test_a_lane_gets_more_before_it_has_nothing_if_there_is_enough() -> None:
    queue = queue_with(100)
    queue.time("inc", 10, 10 * MESSAGE_S / 6)  # six make a message
    (chunk,) = queue.give("a")
    assert not queue.wants_more("a", 1)
    queue.done("a", Chunk(chunk.run, 0, 4), seconds=4 * MESSAGE_S / 6)
    assert queue.wants_more("a", 1) and not queue.wants_more("a", 95)
    assert queue.patience_s("a") > MESSAGE_S / 6


def test_of_calls_that_nobody_has_timed_a_lane_has_one() -> None:
    queue = queue_with(100)
    queue.give("a")
    assert not queue.wants_more("a", 1)


def test_ranges() -> None:
    assert list(ranges([1, 2, 3, 7, 9, 10])) == [range(1, 4), range(7, 8), range(9, 11)]
    assert list(ranges([])) == []


class Lanes(RuleBasedStateMachine):
    """Lanes come, work, give back, die; blocks come and are dropped: each call is closed once, and none is forgotten."""

    lanes = Bundle("lanes")

    def __init__(self) -> None:
        super().__init__()
        self.queue = CallQueue()
        self.given: dict[str, list[Chunk]] = {}
        self.closed: Counter[str] = Counter()
        self.submitted: set[str] = set()
        self.numbers = iter(range(10**6))

    @rule(target=lanes)
    def lane_comes(self) -> str:
        name = f"lane-{next(self.numbers)}"
        self.queue.open_lane(name)
        self.given[name] = []
        return name

    @rule(rows=st.integers(1, 40), retries=st.integers(0, 2), priority=st.integers(-1, 1))
    def block_comes(self, rows: int, retries: int, priority: int) -> None:
        block = f"block-{next(self.numbers)}"
        keys = tuple(f"{block}-{row}" for row in range(rows))
        self.submitted.update(keys)
        self.queue.submit(block, keys, range(rows), "f", priority=priority, retries=retries)

    @rule(lane=lanes, share=st.integers(1, 4))
    def is_given(self, lane: str, share: int) -> None:
        if not self.queue.has(lane):
            self.given[lane] = self.queue.give(lane, share)

    @rule(lane=lanes, seconds=st.floats(1e-7, 0.1))
    def runs(self, lane: str, seconds: float) -> None:
        if self.given[lane]:
            chunk = self.given[lane].pop(0)
            run = self.queue.runs.get(chunk.run)
            for row in self.queue.done(lane, chunk, seconds):
                assert run is not None
                self.closed[str(run.keys[row])] += 1

    @rule(lane=lanes)
    def one_fails(self, lane: str) -> None:
        if self.given[lane]:
            chunk = self.given[lane].pop(0)
            if chunk.stop > chunk.start + 1:
                self.given[lane].insert(0, Chunk(chunk.run, chunk.start + 1, chunk.stop))
            run = self.queue.runs.get(chunk.run)
            if self.queue.failed(lane, Chunk(chunk.run, chunk.start, chunk.start + 1)):
                assert run is not None
                self.closed[str(run.keys[chunk.start])] += 1

    @rule(lane=lanes)
    def gives_back(self, lane: str) -> None:
        while self.given[lane]:
            self.queue.returned(lane, self.given[lane].pop())

    @rule(lane=consumes(lanes), died=st.booleans())
    def lane_goes(self, lane: str, died: bool) -> None:
        del self.given[lane]
        for run, row in self.queue.close_lane(lane, died):
            self.closed[str(run.keys[row])] += 1

    @rule(data=st.data())
    def is_dropped(self, data: st.DataObject) -> None:
        if self.submitted:
            key = data.draw(st.sampled_from(sorted(self.submitted)))
            for dropped in self.queue.drop([key]):
                self.closed[str(dropped)] += 1

    @invariant()
    def once(self) -> None:
        assert not [key for key, times in self.closed.items() if times > 1]
        assert self.queue.open == len(self.submitted) - len(self.closed)
        for run in self.queue.runs.values():
            waiting = {row for rows in run.waiting for row in rows}
            held = [rows.get(run.number, set()) for rows in self.queue._with.values()]
            everywhere = waiting.union(*held) - run.dropped
            assert len(everywhere) == run.open, "an open call waits, or is with a lane"

    def teardown(self) -> None:
        self.queue.open_lane("last")
        while chunks := self.queue.give("last"):
            for chunk in chunks:
                run = self.queue.runs[chunk.run]
                for row in self.queue.done("last", chunk):
                    self.closed[str(run.keys[row])] += 1
        for lane in self.given:
            self.queue.close_lane(lane, died=False)
        while chunks := self.queue.give("last"):
            for chunk in chunks:
                run = self.queue.runs[chunk.run]
                for row in self.queue.done("last", chunk):
                    self.closed[str(run.keys[row])] += 1
        assert set(self.closed) == self.submitted


TestLanes = Lanes.TestCase
TestLanes.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
