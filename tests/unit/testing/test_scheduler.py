"""The stand-in for a site's scheduler keeps Dask's rules."""

from __future__ import annotations

from daskfed.messages import Key
from daskfed.testing.clock import VirtualClock
from daskfed.testing.scheduler import (
    Cancelled,
    Erred,
    Failure,
    FakeScheduler,
    FakeTask,
    InMemory,
    SchedulerEvent,
    State,
    value_of,
)


class Site:
    """A scheduler whose events are written down."""

    def __init__(self, threads: int = 1) -> None:
        self.clock = VirtualClock()
        self.told: list[SchedulerEvent] = []
        self.scheduler = FakeScheduler(self.clock, threads, self.told.append)

    def run(self, *tasks: FakeTask, wanted: tuple[Key, ...], until: float = 100.0) -> list[SchedulerEvent]:
        self.told.clear()
        self.scheduler.update_graph({task.key: task for task in tasks}, wanted)
        self.clock.run_until(self.clock.now + until)
        return list(self.told)


A = FakeTask("a")
B = FakeTask("b", deps=("a",))
C = FakeTask("c", deps=("b",))


def test_only_wanted_keys_are_kept() -> None:
    site = Site()
    assert site.run(A, B, C, wanted=("c",)) == [InMemory("c", 8)]
    assert site.scheduler.gather("c") == value_of("c", [value_of("b", [value_of("a", [])])])
    assert site.scheduler.state_of("a") is State.RELEASED
    site.scheduler.release(["c"])
    assert site.scheduler.tasks == {}


def test_a_graph_with_an_unknown_input_is_cancelled_as_a_whole() -> None:
    site = Site()
    assert site.run(A, C, wanted=("a", "c")) == [Cancelled(("a", "c"), "lost dependencies")]
    assert site.scheduler.tasks == {}


def test_a_graph_may_use_a_key_that_is_known() -> None:
    site = Site()
    site.run(A, wanted=("a",))
    assert site.run(B, wanted=("b",)) == [InMemory("a", 8), InMemory("b", 8)]  # Dask tells of "a" once more


def test_a_wanted_key_that_is_there_is_told_at_once() -> None:
    site = Site()
    site.run(A, wanted=("a",))
    assert site.run(A, wanted=("a",), until=0.0) == [InMemory("a", 8)]


def test_a_failure_reaches_exactly_the_dependents() -> None:
    site = Site()
    bad = FakeTask("a", fails=True)
    events = site.run(bad, B, FakeTask("other"), wanted=("b", "other"))
    assert sorted(events, key=lambda event: str(event)) == [Erred("b", Failure("a")), InMemory("other", 8)]
    assert set(site.run(C, wanted=("c",), until=0.0)) == {Erred("b", Failure("a")), Erred("c", Failure("a"))}


def test_a_released_key_with_dependents_runs_its_old_task_again() -> None:
    site = Site()
    site.run(A, wanted=("a",))
    site.run(B, wanted=("b",))
    site.scheduler.release(["a"])
    assert site.scheduler.state_of("a") is State.RELEASED
    assert site.run(FakeTask("a", deps=("unknown?",)), FakeTask("unknown?"), wanted=("a",)) == [InMemory("a", 8)]
    assert site.scheduler.gather("a") == value_of("a", [])


def test_a_fetch_task_replaces_the_old_task_of_a_released_key() -> None:
    site = Site()
    site.run(A, B, C, wanted=("b", "c"))
    site.scheduler.release(["b"])
    assert site.run(FakeTask("b", fetch=lambda: 42), wanted=("b",)) == [InMemory("b", 8)]
    assert site.scheduler.gather("b") == 42
    assert site.scheduler.state_of("a") is State.FORGOTTEN


def test_an_import_is_forgotten_when_it_is_released_and_may_then_be_made_here() -> None:
    site = Site()
    fetch = FakeTask("a", fetch=lambda: value_of("a", []))
    site.run(fetch, B, wanted=("a", "b"))
    site.scheduler.release(["a"])
    assert site.scheduler.state_of("a") is State.FORGOTTEN
    assert site.scheduler.gather("b") == value_of("b", [value_of("a", [])])
    assert site.run(A, wanted=("a",)) == [InMemory("a", 8)]
    site.scheduler.release(["a", "b"])
    assert site.scheduler.tasks == {}


def test_an_import_that_fails_after_its_release_stands_in_the_way_of_no_later_graph() -> None:
    site = Site()
    fetch = FakeTask("a", seconds=1.0, fetch=lambda: Failure("a", transfer=True))
    site.run(fetch, wanted=("a",), until=0.5)
    site.run(A, B, FakeTask("d", deps=("a",)), wanted=("b", "d"), until=0.1)
    site.scheduler.release(["a"])
    site.clock.run_until(10.0)
    assert site.scheduler.state_of("a") is State.ERRED and site.scheduler.state_of("d") is State.ERRED
    site.scheduler.release(["b"])
    assert InMemory("b", 8) in site.run(A, B, wanted=("b",))
    assert site.scheduler.state_of("d") is State.ERRED  # whoever wants it has heard that


def test_a_running_task_keeps_its_thread_after_release() -> None:
    site = Site(threads=1)
    site.run(FakeTask("slow", seconds=10.0), wanted=("slow",), until=1.0)
    site.scheduler.release(["slow"])
    assert site.run(FakeTask("next", seconds=1.0), wanted=("next",), until=8.0) == []
    site.clock.run_until(11.0)
    assert site.told == [InMemory("next", 8)]


def test_a_key_submitted_again_while_its_old_run_goes_on_counts_once() -> None:
    site = Site(threads=2)
    site.run(FakeTask("slow", seconds=10.0), wanted=("slow",), until=1.0)
    site.scheduler.release(["slow"])
    assert site.run(FakeTask("slow", seconds=10.0), wanted=("slow",), until=9.5) == []
    site.clock.run_until(20.0)
    assert site.told == [InMemory("slow", 8)]


def test_lower_priority_numbers_run_first() -> None:
    site = Site(threads=1)
    site.scheduler.update_graph({"busy": FakeTask("busy")}, ["busy"], priority=9)
    site.scheduler.update_graph({"late": FakeTask("late")}, ["late"], priority=5)
    site.scheduler.update_graph({"soon": FakeTask("soon")}, ["soon"], priority=1)
    site.clock.run_until(10.0)
    assert [event.key for event in site.told if isinstance(event, InMemory)] == ["busy", "soon", "late"]
