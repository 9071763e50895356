"""Bundles at a site: several tasks as one, on the way from the client to a worker, and apart again where one fails.

The client says which tasks of a block make bundles (:mod:`daskfed.client.bundling`), and sends the tasks as they are.
The site's scheduler, which opens the block, makes a :class:`Bundle` of each; a worker gets it as a plain task that runs
the tasks in it one after another. Where one of them fails, or the worker dies, the scheduler gets the tasks themselves
instead (:func:`take_apart`). Then they run under their own keys, so errors, retries and blame are as ever.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from dask.utils import apply, key_split
from distributed import get_worker

from daskfed.dask_private import GraphNode, Task, TaskList, TaskRef
from daskfed.data.fetch import by_value
from daskfed.messages import Key

OVERDUE_S = 5.0  # a bundle that has run so long is taken apart: its tasks may run side by side
SPARE_RETRIES = 1  # that a bundle has beside those of its tasks: with it, it is taken apart
INHERITED = (
    "priority", "retries", "worker_restrictions", "host_restrictions", "resource_restrictions", "loose_restrictions"
)  # fmt: skip


def run_bundle(*values: Any, needs: Sequence[Any], tasks: Sequence[Any], results: Sequence[Any]) -> Any:
    """Run tasks, inputs first, and return what the last gives, or ``results`` of them by their keys.

    ``values`` are what they need from elsewhere; where it is not said what a value is (None), it is results of another
    bundle. What no later task needs is let go at once. Raises RuntimeError where the worker is not to go on with it.
    """
    began = time.monotonic()
    last: dict[Any, int] = {}
    for number, task in enumerate(tasks):
        for key in task.dependencies:
            last[key] = number
    last.update(dict.fromkeys(results, len(tasks)))
    found: dict[Any, Any] = {}
    for need, value in zip(needs, values, strict=True):
        if need is None:
            found.update((key, each) for key, each in value.items() if key in last)
        else:
            found[need] = value
    result = None
    for number, task in enumerate(tasks):
        if time.monotonic() - began > 1.0 and is_given_up():
            raise RuntimeError("these tasks are run elsewhere, or nobody wants them any more")
        inputs = {key: found.pop(key) if last[key] == number else found[key] for key in task.dependencies}
        found[task.key] = result = task(inputs)
        del inputs
    return {key: found[key] for key in results} if results else result


def is_given_up() -> bool:
    """Whether the worker in whose thread this runs was told to forget its task."""
    try:
        worker = get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
    except (ValueError, KeyError):  # no worker, or a thread that has left its pool
        return False
    return task is None or task.state in ("cancelled", "released")


RUN = by_value(run_bundle)


class Together(NamedTuple):
    """The names of tasks that run as one."""

    key: Key  # of the one task
    tasks: tuple[Key, ...]  # inputs first
    results: tuple[Key, ...] = ()  # of those that others need; none: it gives what the last gives, whose key it has


class Bundle(Task):
    """Tasks, inputs first, that run as one; it is pickled as a plain task.

    ``results`` are the keys of what it gives, in a dict; none: it gives what its last task gives, and has the key of
    that. ``sources`` says of what it needs in which other bundle's results that is, if it is in one's.
    """

    def __init__(
        self,
        key: Key,
        tasks: Sequence[GraphNode],
        results: Sequence[Key] = (),
        sources: Mapping[Key, Key] | None = None,
    ) -> None:
        made = {task.key for task in tasks}
        needs = {need: None for task in tasks for need in task.dependencies if need not in made}
        self.sources = {need: sources[need] for need in needs if need in sources} if sources else {}
        self.needs = tuple(need for need in needs if need not in self.sources)
        producer = not needs and any(task.data_producer for task in tasks)
        super().__init__(key, apply, *map(TaskRef, (*self.needs, *self._places())), _data_producer=producer)
        self.tasks = tuple(tasks)
        self.results = tuple(results)
        self.retries: int | None = None  # at the scheduler: what its task had when that took it in
        self.overdue = False

    def _places(self) -> Iterable[Key]:
        """Return the other bundles that it needs results of."""
        return dict.fromkeys(self.sources.values())

    @cached_property
    def prefixes(self) -> Mapping[str, int]:
        """How many tasks there are of each prefix."""
        return Counter(key_split(task.key) for task in self.tasks)

    def parts(self) -> dict[Key, GraphNode]:
        """Return the tasks in it by their keys; the last has that of the bundle, if it gives what the last gives."""
        tasks = {task.key: task for task in self.tasks}
        if not self.results:
            tasks[self.key] = tasks.pop(self.tasks[-1].key).substitute({}, key=self.key)
        return {key: unpacking(task, self.sources) for key, task in tasks.items()}

    def without(self, source: Key) -> GraphNode:
        """Return what runs its tasks where the results of another bundle are tasks by themselves."""
        left = {need: place for need, place in self.sources.items() if place != source}
        if len(self.tasks) == 1 and not left:
            return self.tasks[0].substitute({}, key=self.key)
        other = Bundle(self.key, self.tasks, self.results, left)
        other.retries, other.overdue = self.retries, self.overdue
        return other

    def plain(self) -> Task:
        """Return the task that a worker runs, which needs no daskfed there."""
        places = tuple(self._places())
        values = TaskList(*map(TaskRef, (*self.needs, *places)))
        how = {"needs": self.needs + (None,) * len(places), "tasks": self.tasks, "results": self.results}
        task = Task(self.key, apply, Task(None, pickle.loads, RUN), values, how, _data_producer=self.data_producer)
        task._repr = f"<Task {self.key!r}, {len(self.tasks)} tasks run as one>"
        return task

    def copy(self) -> Bundle:
        """Return another one of the same tasks."""
        return Bundle(self.key, self.tasks, self.results, self.sources)

    def substitute(self, subs: Mapping[Key, Any], key: Key | None = None) -> GraphNode:
        """Return the bundle under another key, or, where something is replaced, a plain task."""
        if subs:
            return self.plain().substitute(subs, key)
        return Bundle(self.key if key is None else key, self.tasks, self.results, self.sources)

    def __call__(self, values: Any = ()) -> Any:
        """Run the tasks."""
        return self.plain()(values)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(1)  # of the older protocols, which do not say of which type it is


def unpacking(task: GraphNode, sources: Mapping[Key, Key]) -> GraphNode:
    """Return a task, so that it finds what it needs also where that is among the results of a bundle."""
    return task if sources.keys().isdisjoint(task.dependencies) else Bundle(task.key, [task], (), sources)


def with_bundles(tasks: Mapping[Key, GraphNode], together: Iterable[Together]) -> dict[Key, GraphNode]:
    """Return tasks with bundles in place of those that are in one."""
    together = list(together)
    sources = {result: each.key for each in together for result in each.results}
    made = {
        each.tasks[-1]: Bundle(each.key, [tasks[key] for key in each.tasks], each.results, sources) for each in together
    }
    inner = {key for each in together for key in each.tasks}
    found: dict[Key, GraphNode] = {}
    for key, node in tasks.items():
        if key in made:
            found[made[key].key] = made[key]
        elif key not in inner:
            found[key] = unpacking(node, sources)
    return found


# -- at the scheduler --------------------------------------------------------------------------------------------------


def expect_failures(tasks: Iterable[Any]) -> None:
    """Have the bundles among tasks that the scheduler has just taken in run once more where they fail."""
    for task in tasks:
        bundle = task.run_spec
        if isinstance(bundle, Bundle) and bundle.retries is None and len(bundle.tasks) > 1:
            task.retries += SPARE_RETRIES
            bundle.retries = task.retries


def has_failed(task: Any) -> bool:
    """Whether a task of the scheduler is a bundle that has raised something, or killed a worker, or runs too long."""
    bundle = task.run_spec
    if not isinstance(bundle, Bundle) or bundle.retries is None:
        return False
    return bundle.overdue or bool(task.suspicious) or task.retries < bundle.retries


def end_overdue(scheduler: Any) -> None:
    """Have workers give up bundles that have run too long: they count as failed."""
    running = ((task, seconds) for each in scheduler.workers.values() for task, seconds in each.executing.items())
    for task in [task for task, seconds in running if seconds > OVERDUE_S and isinstance(task.run_spec, Bundle)]:
        if task.state == "processing":
            task.run_spec.overdue = True
            scheduler.transitions({task.key: "released"}, "daskfed-overdue")


def take_apart(scheduler: Any, task: Any) -> None:
    """Put the tasks in a bundle in its place, when it has just been released and is to run again.

    They have what the bundle has: priority, restrictions, annotations, and the retries that the user gave.
    """
    if not (task.waiters or task.who_wants):
        return
    bundle = task.run_spec
    task.retries = bundle.retries - SPARE_RETRIES
    parts = bundle.parts()
    if not bundle.results:
        task.run_spec = parts.pop(task.key)
    made = {key: each for key, node in parts.items() if (each := _made(scheduler, task, key, node)) is not None}
    left = _unlinked(task)
    for each in made.values() if bundle.results else (*made.values(), task):
        for key in each.run_spec.dependencies:
            _link(each, scheduler.tasks[key])
    if (spans := scheduler.extensions.get("spans")) is not None:
        spans.observe_tasks(made.values(), code=(), span_metadata={})
    if bundle.results:
        _dissolve(scheduler, task)
    scheduler.loop.add_callback(_let_go, scheduler, left)


def _dissolve(scheduler: Any, task: Any) -> None:
    """Have those that need results of a bundle depend on the tasks that make them, and the scheduler forget the bundle.

    It forgets what has lost something that it depends on, though it was about to run again.
    """
    needed: set[Key] = set()
    for user in list(task.dependents):
        user.dependencies.discard(task)
        if user.waiting_on:
            user.waiting_on.discard(task)
        if not isinstance(user.run_spec, Bundle):  # it is data by now
            continue
        user.run_spec = user.run_spec.without(task.key)
        for need in (scheduler.tasks[key] for key in user.run_spec.dependencies):
            if need not in user.dependencies:
                user.add_dependency(need)
                if user.state == "waiting":
                    _await(user, need)
                    needed.add(need.key)
        if user.state == "waiting" and not user.waiting_on:
            needed.add(user.key)
    task.dependents.clear()
    task.waiters = None
    task.has_lost_dependencies = True
    scheduler.loop.add_callback(_go_on, scheduler, needed)


def _await(user: Any, need: Any) -> None:
    need.waiters = {*(need.waiters or ()), user}
    if not need.who_has:
        user.waiting_on.add(need)


def _go_on(scheduler: Any, keys: Iterable[Key]) -> None:
    """Run what can run now, and what is waited for."""
    tasks = [task for key in keys if (task := scheduler.tasks.get(key)) is not None]
    ready = {task.key: "processing" for task in tasks if task.state == "waiting" and not task.waiting_on}
    asked = {task.key: "waiting" for task in tasks if task.state == "released" and task.waiters}
    scheduler.transitions({**ready, **asked}, "daskfed-bundle")


def _made(scheduler: Any, bundle: Any, key: Key, node: GraphNode) -> Any:
    """Return the scheduler's new task of this key; None where it has a task or a value of that key."""
    known = scheduler.tasks.get(key)
    if known is None:
        known = scheduler.new_task(key, node, "released", (scheduler.computations or (None,))[-1])
    elif known.run_spec is not None or known.who_has:
        return None
    known.run_spec = node
    for name in INHERITED:
        setattr(known, name, getattr(bundle, name))
    known.annotations = dict(bundle.annotations or {})
    return known


def _unlinked(task: Any) -> list[Key]:
    """Have a task depend on nothing any more, and return what it did depend on."""
    needs = list(task.dependencies)
    for each in needs:
        each.dependents.discard(task)
        if each.waiters:
            each.waiters.discard(task)
    task.dependencies.clear()
    return [each.key for each in needs]


def _link(task: Any, need: Any) -> None:
    task.add_dependency(need)
    if need.state != "released":
        need.waiters = {*(need.waiters or ()), task}


def _let_go(scheduler: Any, keys: Iterable[Key]) -> None:
    """Release those values that nobody waits for any more, since their users were made by others already."""
    there = (task for key in keys if (task := scheduler.tasks.get(key)) is not None and task.state == "memory")
    unneeded = [task.key for task in there if not (task.waiters or task.who_wants)]
    if unneeded:
        scheduler.transitions(dict.fromkeys(unneeded, "released"), "daskfed-bundle")
