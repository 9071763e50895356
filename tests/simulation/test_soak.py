"""A soak tells how far it is and what it finds, goes on, and ends when it should."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from daskfed.hub.states import KeyPhase
from tests.simulation import soak
from tests.simulation.federation import Result


def result(seed: int = 0) -> Result:
    rows = {"hub key": Counter({(KeyPhase.PENDING, "made"): 3})}
    return Result(seed, sites=3, tasks=200, events=300, seconds=9.0, rows=rows, faults=Counter({"site crash": 2}))


class TestTally:
    def test_a_line_of_progress_comes_now_and_then_and_a_violation_at_once(self) -> None:
        lines: list[str] = []
        times = iter([0.0, 29.0, 29.5, 31.0, 31.0, 31.0])
        tally = soak.Tally(lines.append, lambda: next(times))
        tally.take(result())
        tally.take("seed 7: broken")
        assert lines == ["seed 7: broken"]
        tally.take(result())
        assert lines[1:] == ["3 histories in 31 s, 0.1/s, 1 violations"]

    def test_it_counts_rows_and_faults(self) -> None:
        tally = soak.Tally(lambda line: None, lambda: 0.0)
        tally.take(result())
        tally.take(result())
        assert (tally.rows["hub key"], tally.faults) == ({(KeyPhase.PENDING, "made"): 6}, {"site crash": 4})
        assert [count.times for count in tally.seldom()] == [0] * soak.SELDOM


def test_seeds_go_on_until_there_are_enough_or_the_time_is_over() -> None:
    assert list(soak.seeds_until(end=9.0, first=5, histories=3, now=lambda: 0.0)) == [5, 6, 7]
    times = iter([0.0, 8.9, 9.0])
    assert list(soak.seeds_until(end=9.0, first=5, histories=None, now=lambda: next(times))) == [5, 6]
    assert len(list(islice(soak.seeds_until(float("inf"), 0, None, lambda: 0.0), 99))) == 99


@pytest.mark.parametrize(("played", "status"), [(result(), 0), ("seed 0: broken", 1)])
def test_the_status_says_whether_a_rule_was_broken(played: Result | str, status: int) -> None:
    lines: list[str] = []
    tally = soak.Tally(lines.append, lambda: 0.0)
    assert soak.take_all([played], tally) == status
    assert lines[-1].endswith(f"{status} violations")
