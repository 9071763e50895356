"""Virtual time goes from action to action, in order."""

from __future__ import annotations

import pytest

from daskfed.testing.clock import VirtualClock


def test_actions_run_in_order_of_time_then_of_planning() -> None:
    clock, ran = VirtualClock(), list[tuple[float, str]]()
    for name, delay_s in [("late", 2.0), ("first", 1.0), ("second", 1.0)]:
        clock.call_later(delay_s, lambda name=name: ran.append((clock.now, name)))
    clock.run_until(1.5)
    assert ran == [(1.0, "first"), (1.0, "second")]
    assert clock.now == 1.5
    assert clock.step()
    assert not clock.step()
    assert ran[-1] == (2.0, "late")
    assert clock.steps == 3


def test_actions_that_plan_each_other_in_circles_are_found_out() -> None:
    clock = VirtualClock()

    def circle() -> None:
        clock.call_later(0.0, circle)

    circle()
    with pytest.raises(RuntimeError, match="no end"):
        clock.run_until(1.0, most_steps=100)


def test_what_is_planned_for_the_past_runs_now() -> None:
    clock, ran = VirtualClock(now=5.0), list[float]()
    clock.call_at(1.0, lambda: ran.append(clock.now))
    clock.run_until(5.0)
    assert ran == [5.0]
