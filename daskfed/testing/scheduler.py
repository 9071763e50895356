"""A small stand-in for the scheduler of a site and its workers, in virtual time.

It keeps the rules of Dask's scheduler (``distributed.scheduler``, 2026.8.0) that an agent must live with:

- only keys that were asked for (*wanted*) are kept, all others go when their last dependent has run;
- a graph that depends on a key that is neither in it nor known is cancelled as a whole ("lost dependencies");
- a released key with known dependents is not forgotten: it keeps its old task, and a later graph with the same key runs
  *that* again, from its old inputs;
- a key that erred stays so as long as it is known;
- a running task cannot be stopped: its thread is free only when it ends.

The agent's plugin in that scheduler adds rules: a fetch task that has reached memory or was released is pure data
(never run again, and forgotten as soon as it is released); one that comes for a known key which is not there takes the
place of that key's old task; and a graph leaves no tasks behind that nobody will ever need.

A task's value is a checksum of its key and its inputs' values, so that any mix-up shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush
from typing import TypeAlias
from zlib import crc32

from daskfed.messages import Key
from daskfed.testing.clock import VirtualClock


@dataclass(frozen=True, slots=True)
class FakeTask:
    """One task of a graph."""

    key: Key
    deps: tuple[Key, ...] = ()
    seconds: float = 0.01  # of one thread
    nbytes: int = 8
    fails: bool = False
    fetch: Callable[[], int | Failure] | None = None  # brings the value instead of computing it: an import


@dataclass(frozen=True, slots=True)
class Failure:
    """The value of a key whose task, or an ancestor of it, raised."""

    origin: Key  # the task that raised
    transfer: bool = False  # an import could not be brought to a worker: no fault of the tasks


@dataclass(frozen=True, slots=True)
class InMemory:
    """A wanted key is in memory."""

    key: Key
    nbytes: int


@dataclass(frozen=True, slots=True)
class Erred:
    """A wanted key failed."""

    key: Key
    failure: Failure


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Wanted keys will not come."""

    keys: tuple[Key, ...]
    reason: str


SchedulerEvent: TypeAlias = InMemory | Erred | Cancelled


class State(Enum):
    """Where a task stands; the names are Dask's."""

    RELEASED = auto()
    WAITING = auto()
    PROCESSING = auto()
    MEMORY = auto()
    ERRED = auto()
    FORGOTTEN = auto()


UNDER_WAY = (State.WAITING, State.PROCESSING)
ABSENT = (State.RELEASED, State.ERRED)


@dataclass(slots=True, eq=False)
class FakeTaskState:
    """What the scheduler knows of one task."""

    key: Key
    spec: FakeTask | None  # None: pure data, which cannot be made again
    priority: tuple[int, ...]  # (): data that was never to be computed
    state: State = State.RELEASED
    deps: dict[Key, FakeTaskState] = field(default_factory=dict)
    dependents: dict[Key, FakeTaskState] = field(default_factory=dict)
    waiters: dict[Key, FakeTaskState] = field(default_factory=dict)  # dependents that wait for it
    waiting_on: dict[Key, FakeTaskState] = field(default_factory=dict)
    wanted: bool = False
    value: int | Failure | None = None
    nbytes: int = 0
    lost_deps: bool = False
    run: int = 0  # which run of the task is the valid one

    @property
    def is_useless(self) -> bool:
        """Whether nobody wants it and nothing can be made from it."""
        return not (self.wanted or self.dependents)


def value_of(key: Key, inputs: Iterable[int]) -> int:
    """Return the value of a task that does not fail: a checksum of its key and its inputs' values."""
    return crc32(repr((key, *inputs)).encode())


class FakeScheduler:
    """Runs graphs on ``threads`` virtual threads and tells ``tell`` what becomes of the wanted keys."""

    def __init__(self, clock: VirtualClock, threads: int, tell: Callable[[SchedulerEvent], None]) -> None:
        self.tasks: dict[Key, FakeTaskState] = {}
        self.slowness = 1.0  # factor on the duration of tasks
        self.settled = 0  # tasks that reached memory or erred
        self.closed = False
        self._clock = clock
        self._tell = tell
        self._idle_threads = threads
        self._ready: list[tuple[tuple[int, ...], int, FakeTaskState]] = []
        self._todo: dict[Key, tuple[FakeTaskState, State]] = {}  # recommended transitions, as in Dask
        self._orders = 0
        self._put_back: list[FakeTaskState] = []  # tasks that were released just now

    # -- what the agent asks for --------------------------------------------------------------------------------

    def update_graph(self, graph: Mapping[Key, FakeTask], wanted: Iterable[Key], priority: int = 0) -> None:
        """Run what of ``graph`` is needed for the keys ``wanted``; a lower ``priority`` runs first.

        The tasks of a graph must come in topological order, which is also the order of their priorities.
        """
        wanted = tuple(wanted)
        if self._lacks_something(graph, wanted):
            self._tell(Cancelled(wanted, "lost dependencies"))
            self.release(wanted)
            return
        self._renew()
        touched = self._take_in(graph, wanted, priority)
        for key in wanted:
            self.tasks[key].wanted = True
        self._sweep(touched)
        for task in sorted((self.tasks[key] for key in wanted), key=_priority, reverse=True):
            if task.state is State.RELEASED:
                self._recommend(task, State.WAITING)
        for task in touched:
            if task.state is not State.FORGOTTEN:
                self._inherit_failure(task)
        self._transitions()
        self._fail_stuck(touched)
        for task in touched:
            if task.wanted:
                self._report(task)
        self._start()

    def release(self, keys: Iterable[Key]) -> None:
        """Stop wanting keys."""
        keys = tuple(keys)
        for key in keys:
            task = self.tasks.get(key)
            if task is None or not task.wanted:
                continue
            task.wanted = False
            if not task.dependents:
                self._recommend(task, State.FORGOTTEN)
            elif task.state is not State.ERRED and not task.waiters:
                self._recommend(task, State.RELEASED)
        self._transitions()
        for key in keys:
            if (task := self.tasks.get(key)) is not None and task.spec is not None and task.spec.fetch is not None:
                self._strip(task)
        self._transitions()
        self._start()

    def scatter(self, key: Key, value: int, nbytes: int) -> None:
        """Put data on a worker and want it; a task that is known by that name is in memory then, as in Dask."""
        data = self.tasks.setdefault(key, FakeTaskState(key, None, ()))
        data.state, data.value, data.nbytes, data.wanted = State.MEMORY, value, nbytes, True

    def gather(self, key: Key) -> int | Failure:
        """Return the value of a key; raises KeyError where it is not in memory."""
        task = self.tasks[key]
        if task.state is not State.MEMORY or task.value is None:
            raise KeyError(key)
        return task.value

    def lose(self, chosen: Callable[[], bool]) -> None:
        """A worker dies: the tasks that it ran and the values that it held, those that are ``chosen``, are gone."""
        tasks = list(self.tasks.values())
        for state in (State.PROCESSING, State.MEMORY):
            for task in tasks:
                if task.state is state and chosen():
                    self._recommend(task, State.FORGOTTEN if task.spec is None else State.RELEASED)
        self._transitions()
        self._start()

    def add_threads(self, count: int) -> None:
        """A worker with ``count`` threads comes; a negative count goes, as soon as so many threads are idle."""
        self._idle_threads += count
        self._start()

    def state_of(self, key: Key) -> State:
        """Return where a key stands."""
        return self.tasks[key].state if key in self.tasks else State.FORGOTTEN

    # -- taking a graph in --------------------------------------------------------------------------------------

    def _lacks_something(self, graph: Mapping[Key, FakeTask], wanted: Iterable[Key]) -> bool:
        stack, seen = list(wanted), set()
        while stack:
            key = stack.pop()
            if key in seen:
                continue
            seen.add(key)
            if key in graph:
                stack.extend(graph[key].deps)
            elif key not in self.tasks:
                return True
        return False

    def _take_in(self, graph: Mapping[Key, FakeTask], wanted: Iterable[Key], priority: int) -> list[FakeTaskState]:
        stack, touched, collisions = list(wanted), dict[Key, FakeTaskState](), set()
        place = {key: self._orders + n for n, key in enumerate(graph, 1)}
        self._orders += len(graph)
        while stack:
            key = stack.pop()
            if key in touched:
                continue
            task, spec = self.tasks.get(key), graph.get(key)
            if task is None:
                assert spec is not None
                task = self.tasks[key] = FakeTaskState(key, spec, (priority, place[key]))
            elif spec is not None and spec.fetch is not None and not task.wanted and task.state in ABSENT:
                self._exchange(task, spec)
            elif task.spec is None and spec is not None:
                task.spec = spec
                task.priority = task.priority or (priority, place[key])
            elif spec is not None and tuple(task.deps) != spec.deps:
                collisions.add(key)  # Dask warns and keeps the task that it knows
            touched[key] = task
            stack.extend(spec.deps if spec is not None else ())
        for key, spec in graph.items():
            if key in touched and key not in collisions:
                self._add_deps(touched[key], spec)
        return list(touched.values())

    def _exchange(self, task: FakeTaskState, spec: FakeTask) -> None:
        """What the agent's scheduler plugin does with a key that is known, is not there, and is now to be fetched."""
        self._forget_lineage(task)
        task.spec, task.state, task.value = spec, State.RELEASED, None

    def _forget_lineage(self, task: FakeTaskState) -> None:
        for dep in task.deps.values():
            del dep.dependents[task.key]
            if not dep.dependents and not dep.wanted:
                self._recommend(dep, State.FORGOTTEN)
        task.deps, task.lost_deps = {}, False

    def _strip(self, task: FakeTaskState) -> None:
        """A fetch task that is not needed and did not land, but is known for its dependents' sake, is forgotten."""
        if not task.wanted and not task.waiters and task.state in ABSENT:
            self._recommend(task, State.FORGOTTEN)

    def _add_deps(self, task: FakeTaskState, spec: FakeTask) -> None:
        for dep in spec.deps:
            task.deps[dep] = self.tasks[dep]
            self.tasks[dep].dependents[task.key] = task

    def _renew(self) -> None:
        """Let tasks run again that failed from an input which has not failed any more: the agent's plugin does that.

        Imports that nobody wants and that did not land are forgotten first.
        """
        for task in list(self.tasks.values()):
            if task.spec is not None and task.spec.fetch is not None:
                self._strip(task)
        self._transitions()
        stack, lineage = [(task, False) for task in self.tasks.values()], dict[Key, FakeTaskState]()
        while stack:
            task, expanded = stack.pop()
            if task.state is not State.ERRED:
                continue
            if not expanded and task.key not in lineage:
                lineage[task.key] = task
                stack.append((task, True))
                stack.extend((dep, False) for dep in task.deps.values())
            elif expanded and not task.wanted and not self._has_failed_itself(task):
                if task.lost_deps:
                    self._recommend(task, State.FORGOTTEN)
                    self._transitions()
                else:
                    task.state, task.value = State.RELEASED, None
        self._spare_values()

    def _spare_values(self) -> None:
        """Have values stay that were made from a task which has failed since; another thing the agent's plugin does."""
        failed = [task for task in self.tasks.values() if task.state is State.ERRED]
        for value in [each for task in failed for each in task.dependents.values() if each.state is State.MEMORY]:
            self._forget_lineage(value)
            value.spec = None
        self._transitions()

    def _has_failed_itself(self, task: FakeTaskState) -> bool:
        assert isinstance(task.value, Failure)
        return task.value.origin == task.key or any(dep.state is State.ERRED for dep in task.deps.values())

    def _sweep(self, touched: list[FakeTaskState]) -> None:
        """Forget tasks that Dask makes though nobody will ever need them, another thing the agent's plugin does.

        They are ancestors of a key that Dask already knew, with other dependencies than it has in this graph.
        """
        for task in touched:
            if task.state is State.RELEASED and not task.dependents and not task.wanted:
                self._recommend(task, State.FORGOTTEN)
        self._transitions()

    def _inherit_failure(self, task: FakeTaskState) -> None:
        for dep in task.deps.values():
            if dep.state is State.ERRED:
                task.value = dep.value
                self._recommend(task, State.ERRED)
                return

    def _fail_stuck(self, touched: list[FakeTaskState]) -> None:
        """Fail tasks that Dask lets wait for an input that has failed: another thing the agent's plugin does."""
        for task in touched:
            if task.state is State.WAITING:
                self._inherit_failure(task)
        self._transitions()

    # -- transitions --------------------------------------------------------------------------------------------

    def _recommend(self, task: FakeTaskState, state: State) -> None:
        self._todo[task.key] = (task, state)

    def _transitions(self) -> None:
        """Make all recommended moves; the agent's plugin then forgets what is of no use, as Dask does not."""
        self._move_all()
        while useless := [task for task in self._put_back if task.state is State.RELEASED and task.is_useless]:
            self._put_back = []
            for task in useless:
                self._recommend(task, State.FORGOTTEN)
            self._move_all()
        self._put_back = []

    def _move_all(self) -> None:
        while self._todo:
            _, (task, target) = self._todo.popitem()  # the last first, as in Dask
            if task.state is State.PROCESSING and target is State.WAITING:
                target = State.RELEASED  # and from there it waits again, if it is needed
            if task.state is not target and task.state is not State.FORGOTTEN:
                self._MOVES[target](self, task)

    def _to_waiting(self, task: FakeTaskState) -> None:
        if task.lost_deps:
            self._recommend(task, State.FORGOTTEN)
            return
        if task.state is not State.RELEASED:
            return
        assert task.spec is not None, f"{task.key!r} is to run and is pure data"
        task.state = State.WAITING
        task.waiting_on = {k: dep for k, dep in task.deps.items() if dep.state is not State.MEMORY}
        for dep in task.deps.values():
            if dep.state is State.RELEASED:
                self._recommend(dep, State.WAITING)
            dep.waiters[task.key] = task
        task.waiters = {k: d for k, d in task.dependents.items() if d.state is State.WAITING}
        if not task.waiting_on:
            self._recommend(task, State.PROCESSING)
        else:
            self._inherit_failure(task)  # Dask would have it wait for ever: the agent's plugin mends that too

    def _to_processing(self, task: FakeTaskState) -> None:
        task.state = State.PROCESSING
        task.run += 1
        heappush(self._ready, (task.priority, task.run, task))

    def _to_memory(self, task: FakeTaskState) -> None:
        task.state = State.MEMORY
        self.settled += 1
        for waiter in task.waiters.values():
            waiter.waiting_on.pop(task.key, None)
            if waiter.state is State.WAITING and not waiter.waiting_on:
                self._recommend(waiter, State.PROCESSING)
        self._leave_deps(task)
        if task.wanted:
            self._report(task)
        elif not task.waiters:
            self._recommend(task, State.RELEASED)

    def _to_erred(self, task: FakeTaskState) -> None:
        heirs = task.waiters
        if task.state is not State.PROCESSING:
            heirs = {key: each for key, each in task.dependents.items() if each.state is not State.MEMORY}
        task.state = State.ERRED
        self.settled += 1
        task.run += 1
        task.waiting_on = {}
        self._leave_deps(task)
        for heir in heirs.values():
            heir.value = task.value
            self._recommend(heir, State.ERRED)
        task.waiters = {}
        if task.wanted:
            self._report(task)

    def _to_released(self, task: FakeTaskState) -> None:
        was_memory = task.state is State.MEMORY
        task.state, task.value = State.RELEASED, None
        self._put_back.append(task)
        task.run += 1
        task.waiting_on = {}
        needed = bool(task.wanted or task.waiters)
        if task.lost_deps or task.spec is None:
            self._recommend(task, State.FORGOTTEN)
        elif needed and was_memory and any(dep.state is State.ERRED for dep in task.deps.values()):
            self._inherit_failure(task)  # Dask would leave it as it is for ever: the agent's plugin mends that too
        elif needed:
            self._recommend(task, State.WAITING)
        if was_memory:
            self._call_back(task)
        elif not needed:
            self._leave_deps(task)

    def _call_back(self, task: FakeTaskState) -> None:
        """Have those wait again that were about to use the value of a task."""
        for waiter in task.waiters.values():
            if waiter.state is State.PROCESSING:
                self._recommend(waiter, State.WAITING)
            elif waiter.state is State.WAITING:
                waiter.waiting_on[task.key] = task

    def _to_forgotten(self, task: FakeTaskState) -> None:
        if task.state in UNDER_WAY:  # by way of released, as in Dask
            self._leave_deps(task)
        task.state, task.value = State.FORGOTTEN, None
        task.run += 1
        for dependent in task.dependents.values():
            dependent.lost_deps = True
            dependent.deps.pop(task.key, None)
            dependent.waiting_on.pop(task.key, None)
            if dependent.state not in (State.MEMORY, State.ERRED):
                self._recommend(dependent, State.FORGOTTEN)
        for dep in task.deps.values():
            dep.dependents.pop(task.key, None)
            dep.waiters.pop(task.key, None)
            if not dep.dependents and not dep.wanted:
                self._recommend(dep, State.FORGOTTEN)
        del self.tasks[task.key]
        if task.wanted:
            self._tell(Cancelled((task.key,), "already forgotten"))

    def _leave_deps(self, task: FakeTaskState) -> None:
        for dep in task.deps.values():
            waited = dep.waiters.pop(task.key, None)
            if waited and not dep.waiters and not dep.wanted and dep.state is not State.ERRED:
                self._recommend(dep, State.RELEASED)

    _MOVES: dict[State, Callable[[FakeScheduler, FakeTaskState], None]] = {
        State.WAITING: _to_waiting,
        State.PROCESSING: _to_processing,
        State.MEMORY: _to_memory,
        State.ERRED: _to_erred,
        State.RELEASED: _to_released,
        State.FORGOTTEN: _to_forgotten,
    }

    # -- running ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        while self._idle_threads > 0 and self._ready:
            _, run, task = heappop(self._ready)
            if task.run == run and task.state is State.PROCESSING and task.spec is not None:
                self._idle_threads -= 1
                inputs = [dep.value for dep in task.deps.values()]
                seconds = task.spec.seconds * self.slowness
                self._clock.call_later(seconds, self._finish, task, task.spec, run, inputs)

    def _finish(self, task: FakeTaskState, spec: FakeTask, run: int, inputs: list[int | Failure | None]) -> None:
        self._idle_threads += 1
        if self.closed:
            return
        if task.run == run and task.state is State.PROCESSING:
            task.value, task.nbytes = _result(spec, inputs), spec.nbytes
            if spec.fetch is not None and not isinstance(task.value, Failure):
                task.spec = None
            self._recommend(task, State.ERRED if isinstance(task.value, Failure) else State.MEMORY)
            self._transitions()
        self._start()

    def _report(self, task: FakeTaskState) -> None:
        if task.state is State.MEMORY:
            self._tell(InMemory(task.key, task.nbytes))
        elif task.state is State.ERRED:
            assert isinstance(task.value, Failure)
            self._tell(Erred(task.key, task.value))


def _priority(task: FakeTaskState) -> tuple[int, ...]:
    return task.priority


def _result(spec: FakeTask, inputs: list[int | Failure | None]) -> int | Failure:
    if spec.fetch is not None:
        return spec.fetch()
    if spec.fails:
        return Failure(spec.key)
    assert all(isinstance(value, int) for value in inputs), f"{spec.key!r} ran without an input"
    return value_of(spec.key, [value for value in inputs if isinstance(value, int)])
