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
from typing import Any

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


def run_bundle(*values: Any, needs: Sequence[Any], tasks: Sequence[Any]) -> Any:
    """Run tasks, inputs first, and return what the last gives; ``values`` are what they need from elsewhere.

    What no later task needs is let go at once. Raises RuntimeError where the worker is not to go on with it.
    """
    began = time.monotonic()
    last: dict[Any, int] = {}
    for number, task in enumerate(tasks):
        for key in task.dependencies:
            last[key] = number
    found = dict(zip(needs, values, strict=True))
    del values
    result = None
    for number, task in enumerate(tasks):
        if time.monotonic() - began > 1.0 and is_given_up():
            raise RuntimeError("these tasks are run elsewhere, or nobody wants them any more")
        inputs = {key: found.pop(key) if last[key] == number else found[key] for key in task.dependencies}
        found[task.key] = result = task(inputs)
        del inputs
    return result


def is_given_up() -> bool:
    """Whether the worker in whose thread this runs was told to forget its task."""
    try:
        worker = get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
    except (ValueError, KeyError):  # no worker, or a thread that has left its pool
        return False
    return task is None or task.state in ("cancelled", "released")


RUN = by_value(run_bundle)


class Bundle(Task):
    """Tasks, inputs first, that run as one under the key of the last; it is pickled as a plain task."""

    def __init__(self, key: Key, tasks: Sequence[GraphNode]) -> None:
        made = {task.key for task in tasks}
        self.needs = tuple({key: None for task in tasks for key in task.dependencies if key not in made})
        producer = not self.needs and any(task.data_producer for task in tasks)
        super().__init__(key, apply, *map(TaskRef, self.needs), _data_producer=producer)
        self.tasks = tuple(tasks)
        self.retries: int | None = None  # at the scheduler: what its task had when that took it in
        self.overdue = False

    @cached_property
    def prefixes(self) -> Mapping[str, int]:
        """How many tasks there are of each prefix."""
        return Counter(key_split(task.key) for task in self.tasks)

    def parts(self) -> dict[Key, GraphNode]:
        """Return the tasks in it by their keys; the last has the key of the bundle, whatever that is."""
        *inner, last = self.tasks
        return {**{task.key: task for task in inner}, self.key: last.substitute({}, key=self.key)}

    def plain(self) -> Task:
        """Return the task that a worker runs, which needs no daskfed there."""
        values = TaskList(*map(TaskRef, self.needs))
        how = {"needs": self.needs, "tasks": self.tasks}
        task = Task(self.key, apply, Task(None, pickle.loads, RUN), values, how, _data_producer=self.data_producer)
        task._repr = f"<Task {self.key!r}, {len(self.tasks)} tasks run as one>"
        return task

    def copy(self) -> Bundle:
        """Return another one of the same tasks."""
        return Bundle(self.key, self.tasks)

    def substitute(self, subs: Mapping[Key, Any], key: Key | None = None) -> GraphNode:
        """Return the bundle under another key; what it needs cannot be replaced."""
        return self.plain().substitute(subs, key) if subs else Bundle(self.key if key is None else key, self.tasks)

    def __call__(self, values: Any = ()) -> Any:
        """Run the tasks."""
        return self.plain()(values)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(1)  # of the older protocols, which do not say of which type it is


def with_bundles(tasks: Mapping[Key, GraphNode], bundles: Iterable[Sequence[Key]]) -> dict[Key, GraphNode]:
    """Return tasks with bundles in place of those that are in one."""
    made = {keys[-1]: Bundle(keys[-1], [tasks[key] for key in keys]) for keys in bundles}
    inner = {task.key for bundle in made.values() for task in bundle.tasks[:-1]}
    return {key: made.get(key, node) for key, node in tasks.items() if key not in inner}


# -- at the scheduler --------------------------------------------------------------------------------------------------


def expect_failures(tasks: Iterable[Any]) -> None:
    """Have the bundles among tasks that the scheduler has just taken in run once more where they fail."""
    for task in tasks:
        if isinstance(task.run_spec, Bundle) and task.run_spec.retries is None:
            task.retries += SPARE_RETRIES
            task.run_spec.retries = task.retries


def has_failed(task: Any) -> bool:
    """Whether a task of the scheduler is a bundle that has raised something, or killed a worker, or runs too long."""
    bundle = task.run_spec
    if not isinstance(bundle, Bundle) or bundle.retries is None:
        return False
    return bundle.overdue or bool(task.suspicious) or task.retries < bundle.retries


def end_overdue(scheduler: Any) -> None:
    """Have workers give up bundles that have run too long; :func:`has_failed` is true of them when they are released."""
    running = ((task, seconds) for each in scheduler.workers.values() for task, seconds in each.executing.items())
    for task in [task for task, seconds in running if seconds > OVERDUE_S and isinstance(task.run_spec, Bundle)]:
        if task.state == "processing":
            task.run_spec.overdue = True
            scheduler.transitions({task.key: "released"}, "daskfed-overdue")


def take_apart(scheduler: Any, task: Any) -> None:
    """Put the tasks in a bundle in its place, when it has just been released and is to run again.

    They have what the bundle has: priority, restrictions, annotations, and the retries that the user gave.
    """
    task.retries = task.run_spec.retries - SPARE_RETRIES
    parts = task.run_spec.parts()
    task.run_spec = parts.pop(task.key)
    made = {key: each for key, node in parts.items() if (each := _made(scheduler, task, key, node)) is not None}
    left = _unlinked(task)
    for each in (*made.values(), task):
        for key in each.run_spec.dependencies:
            _link(each, scheduler.tasks[key])
    if (spans := scheduler.extensions.get("spans")) is not None:
        spans.observe_tasks(made.values(), code=(), span_metadata={})
    scheduler.loop.add_callback(_let_go, scheduler, left)


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
