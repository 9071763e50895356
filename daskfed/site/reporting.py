"""What the agent wants to know of its site's scheduler, and a stock scheduler does not tell its clients.

:class:`SiteReporter` is a plugin that the agent registers at the stock scheduler. It speaks on the agent's own client
stream, in step with what the scheduler says there:

==============  ====================================================================================================
fed-key         a key that the agent wants is in memory: its ``nbytes``
fed-erred       a key that the agent wants failed because an import could not be brought in, or because workers died:
                ``blame`` is the task that Dask gave up, None for an import
fed-load        unfinished tasks and threads; LOAD_S after they changed, or BUSY_S while there is plenty of work
fed-status      workers, threads, memory, running and queued tasks; every STATUS_S and when workers come and go
fed-learned     durations and sizes of results per key prefix since the last time
==============  ====================================================================================================

It also makes imports behave like scattered data (``fed-import``, sent by the agent before each fetch task, and
``fed-released``, sent after it let go of keys): a key that Dask still knows under another task forgets that task, and a
fetch task that has run, failed, or is no longer wanted is forgotten, so that Dask never fetches again what the agent no
longer has. (Workers forget by themselves, see :mod:`daskfed.data.homing`.) And before a block is submitted
(``fed-renew``), tasks may run again that Dask remembers as failed, though the input that they failed from is mended or
gone: the block may need them.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from distributed.comm.core import CommClosedError

from daskfed.holders import Holders
from daskfed.messages import Key
from daskfed.site.attached import Attached
from daskfed.site.bundles import Bundle, end_overdue, expect_failures, has_failed, take_apart

LOAD_S = 0.05
BUSY_S = 0.25
PLENTY = 32  # unfinished tasks per thread that keep it busy for BUSY_S, unless they take less than 8 ms
STATUS_S = 1.0
LEARNED_S = 0.5
SOUGHT_S = 10.0  # how long a key is held that was looked for before it came; the hub looks for it again sooner
SPREAD = 16  # workers among which imports that come together are spread
UNFINISHED = frozenset({"waiting", "queued", "no-worker", "processing"})
DORMANT = frozenset({"released", "erred"})


class SiteReporter(Attached):
    """Reports to the client ``client`` of the scheduler that it is registered at, until that client goes."""

    kind = "reporter"

    async def start(self, scheduler: Any) -> None:
        """Begin to report; called by the scheduler."""
        self.importing: set[Key] = set()
        self._announced: set[Key] = set()  # imports whose fetch tasks the scheduler has not taken in yet
        self.failed_imports: set[Key] = set()  # that could not be brought to a worker
        self._failed = {key: None for key, task in scheduler.tasks.items() if task.state == "erred"}
        self.unfinished = sum(ts.state in UNFINISHED for ts in scheduler.tasks.values())
        self._sought: dict[Key, float] = {}  # looked for in vain -> until when one that comes is held
        self._came: set[Key] = set()  # of these
        self._load_timer: Any = None
        self._load_is_due_soon = False
        self._durations: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])  # prefix -> tasks, seconds
        self._sizes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # prefix -> results, bytes
        scheduler.stream_handlers["fed-import"] = self.expect_imports
        scheduler.stream_handlers["fed-released"] = self.end_imports
        scheduler.stream_handlers["fed-renew"] = self.renew
        scheduler.stream_handlers["fed-claim"] = self.claim
        scheduler.handlers["fed-find"] = self.find
        scheduler.handlers["fed-holders"] = self.holders
        overdue = lambda: end_overdue(scheduler)  # noqa: E731
        often = ((self._tell_status, STATUS_S), (self._tell_learned, LEARNED_S), (self._end_seeking, STATUS_S))
        self.begin(scheduler, *often, (overdue, STATUS_S))
        self._tell_status()
        self._tell_load()

    def stop(self) -> None:
        """Stop reporting."""
        super().stop()
        self._unplan_load()

    # -- called by the scheduler at each change ----------------------------------------------------------------------

    def transition(self, key: Key, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Note what became of a task: called about five times for each, so most calls end at once."""
        if (start in UNFINISHED) is not (finish in UNFINISHED):
            self.unfinished += 1 if finish in UNFINISHED else -1
            if not self._load_is_due_soon:
                self._plan_load()
        if finish == "memory":
            self._in_memory(key, kwargs.get("startstops") or ())
        elif finish == "erred":
            self._erred(key)
        elif finish == "forgotten":
            self.failed_imports.discard(key)
            self.importing.discard(key)
        elif finish == "released":
            self._released(key, start)
        elif finish == "processing" and key in self.importing:
            _unbind(self.scheduler.tasks[key])
        elif finish == "waiting" and self._failed:
            self._see_to_failed_inputs(key)

    def _in_memory(self, key: Key, startstops: Collection[dict[str, Any]]) -> None:
        task = self.scheduler.tasks[key]
        if key in self.importing:
            self.importing.discard(key)
            task.run_spec = None  # from here on it is data, as if it had been scattered
        elif startstops:
            seconds = sum(each["stop"] - each["start"] for each in startstops if each["action"] == "compute")
            self._learn(task, seconds)
        if self._wanted(task):
            self._send({"op": "fed-key", "key": key, "nbytes": task.nbytes})

    def _learn(self, task: Any, seconds: float) -> None:
        """Note how long a task took, or those of a bundle took on average, and how large its result is."""
        bundle = task.run_spec if isinstance(task.run_spec, Bundle) else None
        counts = bundle.prefixes if bundle is not None else {task.prefix.name: 1}
        tasks = len(bundle.tasks) if bundle is not None else 1
        for prefix, count in counts.items():
            learned = self._durations[prefix]
            learned[0] += count
            learned[1] += seconds * count / tasks
        if bundle is None or not bundle.results:
            sizes = self._sizes[task.prefix.name]
            sizes[0] += 1
            sizes[1] += task.nbytes

    def _erred(self, key: Key) -> None:
        task = self.scheduler.tasks[key]
        self._failed[key] = None
        if key in self.importing and "TransferError" in str(task.exception_text)[:64]:
            self.failed_imports.add(key)
        blame = task.exception_blame
        if blame is None or not self._wanted(task):
            return
        if blame.key in self.failed_imports:
            self._send({"op": "fed-erred", "key": key, "blame": None})
        elif blame.suspicious > self.scheduler.allowed_failures:
            self._send({"op": "fed-erred", "key": key, "blame": blame.key})

    def _released(self, key: Key, start: str) -> None:
        """See to a bundle that failed, to a value that was lost, and to a task of no use.

        The latter Dask keeps where workers die at a bad moment.
        """
        task = self.scheduler.tasks[key]
        if start == "processing" and has_failed(task):
            take_apart(self.scheduler, task)
        if self._failed and start == "memory":
            self._see_to_failed_inputs(key)
        if _is_useless(task):
            self.scheduler.loop.add_callback(self._sweep, [key], ())

    def _wanted(self, task: Any) -> bool:
        return any(client.client_key == self.client for client in task.who_wants or ())

    def update_graph(
        self, scheduler: Any, *, client: str, keys: Collection[Key], tasks: Collection[Key] = (), **kwargs: Any
    ) -> None:
        """Tell the sizes of keys that were in memory before a graph asked for them, and sweep what it left useless."""
        expect_failures(task for key in tasks if (task := scheduler.tasks.get(key)) is not None)
        if client != self.client:
            self._hold_sought(keys)
            return
        self._no_longer_sought(keys)
        self._begin_imports(keys)
        for key in keys:
            task = scheduler.tasks.get(key)
            if task is not None and task.state == "memory":
                self._send({"op": "fed-key", "key": key, "nbytes": task.nbytes})
        self._spread([task for key in self.importing.intersection(keys) if (task := scheduler.tasks.get(key))])
        self._sweep(tasks, keys)
        left = [task for key in tasks if (task := scheduler.tasks.get(key)) is not None]
        if blamed := [task.key for task in left if task.exception_blame is not None]:
            scheduler.loop.add_callback(self._fail_stuck, blamed)

    def _spread(self, imports: Collection[Any]) -> None:
        """Have fetch tasks go to workers at once, those that have least to do.

        Left alone, Dask would queue them, and give each to a worker when another ends, in a message of its own: many
        tasks without inputs might fill the memory. The agent sees to it that imports do not. Where they are bound to
        workers Dask chooses among these, and at once; then they may go elsewhere, should that worker end.
        """
        running = self.scheduler.running if imports else ()
        idlest = heapq.nsmallest(SPREAD, running, key=lambda worker: worker.occupancy / max(1, worker.nthreads))
        addresses = {worker.address for worker in idlest}
        for task in imports:
            if task.state == "released":
                task.worker_restrictions, task.loose_restrictions = addresses, True

    def _see_to_failed_inputs(self, key: Key) -> None:
        """See to a task that an input has failed of, while its value was there: lost now, it would wait for ever."""
        if any(each.state == "erred" for each in self.scheduler.tasks[key].dependencies):
            self.scheduler.loop.add_callback(self._fail_stuck, [key])

    def _fail_stuck(self, keys: Collection[Key]) -> None:
        """Fail tasks that Dask lets wait for an input that has failed.

        It decides that a new task of such an input is to fail, and where a dependent that it takes up first decides
        that the task is to wait, the later decision wins. A task whose value was lost it leaves as it is, or lets wait.
        """
        found = [task for key in keys if (task := self.scheduler.tasks.get(key)) is not None]
        stuck = [task.key for task in found if task.state == "waiting" and task.exception_blame]
        for task in found:
            failed = next((each for each in task.dependencies if each.state == "erred"), None)
            waits = task.state == "waiting" or (task.state == "released" and (task.who_wants or task.waiters))
            if waits and failed is not None and not task.exception_blame:
                task.exception_blame = failed.exception_blame
                stuck.append(task.key)
        if stuck:
            self.scheduler.transitions(dict.fromkeys(stuck, "erred"), "daskfed-stuck")

    def _sweep(self, tasks: Collection[Key], keys: Collection[Key]) -> None:
        """Forget tasks that a graph brought for a key which Dask knows with other dependencies: nobody needs them."""
        known = self.scheduler.tasks
        found = (known.get(key) for key in tasks if key not in keys)
        useless = [task.key for task in found if task is not None and task.state == "released" and _is_useless(task)]
        if useless:
            self.scheduler.transitions(dict.fromkeys(useless, "forgotten"), "daskfed-sweep")

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Report the change at once."""
        self._tell_status()
        self._tell_load()

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Report the change at once."""
        self._tell_status()
        self._tell_load()

    # -- imports -----------------------------------------------------------------------------------------------------

    def expect_imports(self, keys: Collection[Key], client: str) -> None:
        """Prepare for fetch tasks under the names ``keys``, which the agent sends next."""
        if client != self.client:
            return
        self._announced.update(keys)
        for key in keys:
            self.importing.add(key)
            task = self.scheduler.tasks.get(key)
            if task is not None and task.state in DORMANT and not task.who_wants:
                self._forget_lineage(task)

    def _begin_imports(self, keys: Collection[Key]) -> None:
        """Take those of ``keys`` for imports that were announced: what had the name since then may have ended."""
        announced = self._announced.intersection(keys)
        self._announced -= announced
        for key in announced:
            if self.scheduler.tasks[key].state == "memory":
                self.importing.discard(key)
            else:
                self.importing.add(key)

    def end_imports(self, keys: Collection[Key], client: str) -> None:
        """The agent let go of keys: a fetch task that Dask still knows among them must not run or fail again."""
        if client != self.client:
            return
        self._announced.difference_update(keys)
        ended = self.importing.intersection(keys)
        tasks = [task for key in ended if (task := self.scheduler.tasks.get(key)) is not None]
        self.importing -= ended - {task.key for task in tasks if task.waiters}  # these may still fail
        self._forget_fetch_tasks(tasks)

    def _forget_fetch_tasks(self, tasks: Collection[Any]) -> None:
        """Forget those fetch tasks that did not land and that nobody needs; what failed from them stays failed."""
        unused = [task for task in tasks if task.state in DORMANT and not (task.who_wants or task.waiters)]
        for task in unused:
            if task.state == "erred":  # Dask's own way from there would have all that failed from it run again
                for worker in self.scheduler.stream_comms.keys() & (task.erred_on or ()):
                    freed = {"op": "free-keys", "keys": [task.key], "stimulus_id": "daskfed-import"}
                    self.scheduler.worker_send(worker, freed)
                task.exception_blame = task.erred_on = None
                task.state = "released"
        self.scheduler.transitions(dict.fromkeys((task.key for task in unused), "forgotten"), "daskfed-import")

    def renew(self, client: str) -> None:
        """Let tasks that nobody asks for run again where they failed from an input that has not failed any more.

        Imports that did not land, and that nobody asks for any more, are forgotten first.
        """
        if client != self.client:
            return
        known = self.scheduler.tasks
        imports = [task for key in self.importing if (task := known.get(key)) is not None]
        self._forget_fetch_tasks([task for task in imports if task.run_spec is not None])
        for task in self._failed_tasks():
            inherited = task.exception_blame is not task and all(each.state != "erred" for each in task.dependencies)
            if not inherited or task.who_wants or task.state != "erred":
                continue
            if task.has_lost_dependencies:  # what it was made from is forgotten
                self.scheduler.transitions({task.key: "forgotten"}, "daskfed-renew")
            else:
                task.exception_blame = None
                task.state = "released"
        self._spare_values()

    def _spare_values(self) -> None:
        """Have values stay that were made from a key which has failed since: as an import, or when it was made again.

        Dask would take what a graph needs for failed where an input of it has failed, whatever it has in memory. From
        here on such a value is data, as if it had been scattered: where it is lost it is not made again here.
        """
        failed = [task for key in self._failed if (task := self.scheduler.tasks.get(key)) and task.state == "erred"]
        for value in {each for task in failed for each in task.dependents if each.state == "memory"}:
            made_by = value.run_spec
            self._forget_lineage(value)
            if value.actor:
                value.run_spec = made_by

    def _failed_tasks(self) -> list[Any]:
        """Return the failed tasks, inputs first."""
        known = self.scheduler.tasks
        self._failed = {key: None for key in self._failed if key in known and known[key].state == "erred"}
        found: list[Any] = []
        seen: set[Any] = set()
        stack = [(known[key], False) for key in self._failed]
        while stack:
            task, expanded = stack.pop()
            if expanded:
                found.append(task)
            elif task.state == "erred" and task not in seen:
                seen.add(task)
                stack.append((task, True))
                stack.extend((each, False) for each in task.dependencies)
        return found

    def _forget_lineage(self, task: Any) -> None:
        """Have a key that is known only because its dependents are take the task of the next graph."""
        forgettable = {}
        for dependency in task.dependencies:
            dependency.dependents.discard(task)
            if not (dependency.dependents or dependency.who_wants):
                forgettable[dependency.key] = "forgotten"
        task.dependencies.clear()
        task.run_spec = None
        if task.state == "erred":
            task.exception_blame = None
            task.state = "released"
        self.scheduler.transitions(forgettable, "daskfed-import")

    # -- keys that tasks made ----------------------------------------------------------------------------------------

    def find(self, keys: Collection[Key], client: str) -> list[Key]:
        """Hold those of ``keys`` for the agent that tasks made, or are making, and return them.

        Others are held when they come: a task's client may have named a key before what it submits is here, and let go
        of it before it is looked for again.
        """
        found = [key for key in keys if (task := self.scheduler.tasks.get(key)) and (task.run_spec or task.who_has)]
        self.scheduler.client_desires_keys(found, client)
        self._no_longer_sought(found)
        self._sought |= dict.fromkeys(set(keys).difference(found), time.monotonic() + SOUGHT_S)
        return found

    def _hold_sought(self, keys: Collection[Key]) -> None:
        """A task's client has submitted something: hold what the hub looked for."""
        if self._sought and (come := self._sought.keys() & set(keys)):
            self._came |= come
            self.scheduler.client_desires_keys(list(come), self.client)

    def _no_longer_sought(self, keys: Collection[Key]) -> None:
        for key in self._sought and keys:
            self._sought.pop(key, None)
            self._came.discard(key)

    def _end_seeking(self) -> None:
        """Let go of what came after all and was not looked for again."""
        now = time.monotonic()
        over = [key for key, until in self._sought.items() if until <= now]
        if unwanted := [key for key in over if key in self._came]:
            self.scheduler.client_releases_keys(unwanted, self.client)
        self._no_longer_sought(over)

    def holders(self, keys: Collection[Key] | None = None) -> Holders:
        """Return which workers hold which keys, of all that are known where none are named."""
        known = self.scheduler.tasks
        groups: defaultdict[frozenset[Any], list[Key]] = defaultdict(list)
        for key in known if keys is None else keys:
            task = known.get(key)
            groups[frozenset(task.who_has or ()) if task is not None else frozenset()].append(key)
        return [([worker.address for worker in workers], there) for workers, there in groups.items()]

    def claim(self, keys: Collection[Key], client: str) -> None:
        """Hold keys that tasks made for the agent, and tell how they stand; of one that is gone, that it is."""
        if client != self.client:
            return
        self._no_longer_sought(keys)
        known = self.scheduler.tasks
        for key in keys:
            if key in known and known[key].state == "memory":
                self._send({"op": "fed-key", "key": key, "nbytes": known[key].nbytes})
            elif key not in known:
                self.scheduler.report_on_key(key, client=client)
        self.scheduler.client_desires_keys([key for key in keys if key in known], client)

    # -- telling -----------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any]) -> None:
        stream = self.scheduler.client_comms.get(self.client)
        if stream is not None:
            with suppress(CommClosedError):
                stream.send(message)

    def _plan_load(self) -> None:
        """Tell the load later: what changes until then is told with it."""
        soon = self.unfinished < PLENTY * self.scheduler.total_nthreads
        if self._load_timer is None or soon:
            self._unplan_load()
            self._load_is_due_soon = soon
            self._load_timer = self.scheduler.loop.call_later(LOAD_S if soon else BUSY_S, self._tell_load)

    def _unplan_load(self) -> None:
        if self._load_timer is not None:
            self.scheduler.loop.remove_timeout(self._load_timer)
        self._load_timer, self._load_is_due_soon = None, False

    def _tell_load(self) -> None:
        self._unplan_load()
        self._send({"op": "fed-load", "unfinished": self.unfinished, "threads": self.scheduler.total_nthreads})

    def _tell_status(self) -> None:
        workers = self.scheduler.workers.values()
        threads = sum(worker.nthreads for worker in self.scheduler.running)  # those of paused workers take nothing
        running = sum(min(len(worker.processing), worker.nthreads) for worker in workers)
        self._send(
            {
                "op": "fed-status",
                "workers": len(workers),
                "threads": threads,
                "memory_limit": sum(worker.memory_limit for worker in workers),
                "memory_used": sum(worker.metrics.get("memory", 0) for worker in workers),
                "running": running,
                "queued": max(0, self.unfinished - running),
            }
        )

    def _tell_learned(self) -> None:
        if not self._durations:
            return
        durations = [(prefix, int(count), seconds) for prefix, (count, seconds) in self._durations.items()]
        sizes = [(prefix, count, nbytes) for prefix, (count, nbytes) in self._sizes.items()]
        self._durations.clear()
        self._sizes.clear()
        self._send({"op": "fed-learned", "durations": durations, "sizes": sizes})


def _unbind(task: Any) -> None:
    """Let a task go to any worker, if it has to go to another."""
    task.worker_restrictions, task.loose_restrictions = None, False


def _is_useless(task: Any) -> bool:
    """Whether nobody wants a task and nothing can be made from it."""
    return not (task.dependents or task.who_wants)
