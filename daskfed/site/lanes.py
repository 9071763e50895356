"""The lanes of a site: Dask tasks that the agent submits to run calls, see :mod:`daskfed.site.lane`.

Which calls a lane gets is decided by :class:`daskfed.site.calls.CallQueue`. Here are the tasks, one for each thread
while calls wait, the streams that these dial, and the results: small ones stay with the agent, unopened, until the hub
lets them go. What becomes of calls is reported in the words in which the scheduler reports, as if those were its tasks.

Lanes are for many short calls. How long those of a function take is found out from the first ones, which the scheduler
gets as the tasks that they are; it also gets calls that take long, or that come now and then: there its price does not
matter, and whoever looks at tasks finds them.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import pickle
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from dask.utils import apply
from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status, error_message
from distributed.protocol.serialize import Serialized, serialize
from distributed.scheduler import KilledWorker, WorkerState

from daskfed.comm import prompt
from daskfed.comm.opaque import OpaqueError
from daskfed.comm.prompt import PromptSend
from daskfed.dask_private import LLGExpr, Task
from daskfed.data.fetch import by_value
from daskfed.ending import end_tasks
from daskfed.messages import BlockSpec, Key, MadeKey
from daskfed.site import events as ev
from daskfed.site import lane
from daskfed.site.calls import CallQueue, Chunk, Heat, Run
from daskfed.site.lane import PREFIX
from daskfed.site.opening import FramedCalls
from daskfed.site.wire import POLL_S, Report, SchedulerWire

logger = logging.getLogger(__name__)

TURN_S = 1.0
CLOSE_S = 0.5
LEARNED_S = 0.5
MOST_BYTES = 256 * 2**20  # of results that the agent keeps; beyond, workers take the oldest
HAND_OVER_BYTES = 32 * 2**20  # at a time
LONG_S = 1.0  # calls of which none is back by then are the scheduler's
SHORT_S = 0.5  # calls that take less on average are for lanes
HOT = 50  # calls within about a second from which lanes are worth it
LOOK_S = 0.5  # how often it is seen whether there is work for more lanes than threads
MOST_AHEAD = 200  # lanes for which there is no thread yet
PROBES = 2  # calls for each thread that are to tell how long they take
HEADER = {"serializer": "pickle", "writeable": ()}
RUN_LANE = by_value(lane.run_lane, prompt)


class Work(NamedTuple):
    """A block of calls, and its payload."""

    spec: BlockSpec
    calls: Serialized


class LaneStream:
    """What a lane dialled."""

    def __init__(self, task: str, stream: PromptSend, worker: str) -> None:
        self.task = task  # its name at the scheduler
        self.stream = stream
        self.worker = worker  # its address
        self.payloads: set[int] = set()  # runs whose payload it has
        self.ended = False

    def send(self, message: dict[str, Any]) -> None:
        """Tell the lane something; what it no longer hears is dropped."""
        with suppress(CommClosedError):
            self.stream.send(message)


class Lanes:
    """All lanes of a site; ``deliver`` gets a :class:`Report` of what became of calls, ``threads`` says how many,
    ``ask`` calls an RPC of the scheduler, ``land`` has it know results.

    ``address`` and ``token`` are those of the agent's door.
    """

    def __init__(
        self,
        wire: SchedulerWire,
        address: str,
        token: str,
        deliver: Callable[[Report], None],
        threads: Callable[[], int],
        ask: Callable[..., Awaitable[Any]],
        land: Callable[[Collection[Key]], None],
    ) -> None:
        self.queue = CallQueue()
        self.values: dict[Key, bytes] = {}  # small results
        self.nbytes = 0  # of them
        self._handed: set[Key] = set()  # those that are the scheduler's alone when it has them
        self._measured: dict[str, list[float]] = {}  # prefix -> calls, seconds, bytes of results
        self.landed: set[Key] = set()  # those of which the scheduler knows
        self._landing: set[Key] = set()  # and of these, those that it does not have in memory yet
        self.wire = wire
        self.tasks: dict[str, None] = {}  # that the scheduler has
        self.ahead: dict[str, None] = {}  # those that it has beyond one for each thread, and that do not run yet
        self._aside: set[str] = set()  # those of which the call has seceded: their threads run others
        self._looking = False
        self._address, self._token = address, token
        self._ask = ask
        self._land = land
        self._tasks: set[asyncio.Task[None]] = set()  # that register large results
        self._unregistered: dict[str, list[tuple[int, int, MadeKey, bytes]]] = {}  # by worker: those that wait for it
        self._deliver = deliver
        self._threads = threads
        self._streams: dict[str, LaneStream] = {}
        self._work: dict[int, Work] = {}  # by run
        self._short: dict[str, bool] = {}  # prefix -> whether its calls are
        self._heat: dict[str, Heat] = {}
        self._probes: dict[str, asyncio.TimerHandle] = {}  # prefix of which that is being found out
        self._probing: dict[Key, str] = {}  # key -> prefix that it is to tell of
        self._served = itertools.count()
        self._names = (f"{PREFIX}{secrets.token_hex(4)}-{n}" for n in itertools.count())

    # -- blocks ------------------------------------------------------------------------------------------------------

    def submit(self, spec: BlockSpec, outputs: Collection[Key], payload: Mapping[str, Any]) -> None:
        """Have calls run: by lanes if they are short, else by the scheduler, which also has those to find that out."""
        keys, prefix = spec.outputs, spec.prefixes[0][0]
        rows: Sequence[int] = range(len(keys)) if len(outputs) == len(keys) else _places(keys, outputs)
        work = Work(spec, payload["calls"])
        short = True if payload.get("always") else self._short.get(prefix)
        heat = self._heat.setdefault(prefix, Heat()).add(len(rows), time.monotonic())
        if heat < HOT and not payload.get("always"):
            self._to_scheduler(work, rows)
        elif short:
            self._enqueue(work, rows)
        elif short is None and prefix not in self._probes:
            probes = rows[: PROBES * max(1, self._threads())]
            self._probe(prefix, [keys[row] for row in probes])
            self._to_scheduler(work, probes)
            self._enqueue(work, rows[len(probes) :], held=True)
        elif short is None:
            self._enqueue(work, rows, held=True)
        else:
            self._to_scheduler(work, rows)

    def _enqueue(self, work: Work, rows: Sequence[int], held: bool = False) -> None:
        if rows:
            spec, constraint = work.spec, work.spec.constraint
            how = {"priority": constraint.priority, "retries": constraint.retries, "held": held}
            run = self.queue.submit(spec.id, spec.outputs, rows, spec.prefixes[0][0], **how)  # type: ignore[arg-type]
            self._work[run.number] = work
            self._feed()

    def _to_scheduler(self, work: Work, rows: Sequence[int]) -> None:
        if rows:
            keys = [work.spec.outputs[row] for row in rows]
            parts = work.calls.header, [bytes(frame) for frame in work.calls.frames]
            expr = FramedCalls(*parts, keys, list(rows), _determ_token=secrets.token_hex(8))
            self.yield_idle()
            constraint = work.spec.constraint
            notes = {"retries": constraint.retries, "priority": constraint.priority}
            self.wire.submit_calls(keys, _pickled(expr), {name: value for name, value in notes.items() if value})

    # -- short or long -----------------------------------------------------------------------------------------------

    def _probe(self, prefix: str, keys: Collection[Key]) -> None:
        """Find out whether calls of a function are short, from those that the scheduler is about to get."""
        loop = asyncio.get_running_loop()
        self._probes[prefix] = loop.call_later(LONG_S, self._judge, prefix, False)
        self._probing.update(dict.fromkeys(keys, prefix))

    def _judge(self, prefix: str, short: bool) -> None:
        """It is known whether calls of a function are short."""
        self._short[prefix] = short
        if (timer := self._probes.pop(prefix, None)) is not None:
            timer.cancel()
            self._probing = {key: each for key, each in self._probing.items() if each != prefix}
        if short:
            self.queue.resume(prefix)
            self._feed()
        else:
            for run, rows in self.queue.withdraw(prefix):
                self._to_scheduler(self._work.pop(run.number), rows)

    def learned(self, durations: Iterable[tuple[str, int, float]]) -> None:
        """The scheduler has told how long tasks took: prefix, how many, seconds in all."""
        for prefix, count, seconds in durations:
            if prefix in self._short and count:
                self._short[prefix] = seconds / count < SHORT_S

    def release(self, keys: Collection[Key]) -> list[Key]:
        """Nobody wants these keys any more: they need not be made, and results are forgotten.

        Return those of which the scheduler may know.
        """
        others = []
        for key in keys:
            if (value := self.values.pop(key, None)) is not None and key not in self._handed:
                self.nbytes -= len(value)
            if value is None or key in self.landed:
                others.append(key)
        self._handed.difference_update(others)
        self.landed.difference_update(others)
        self._landing.difference_update(others)
        if others and self.queue.runs:
            pending = self.queue.drop(others)
            self._recall()
            return [key for key in others if key not in pending]
        return others

    def _recall(self) -> None:
        """Have lanes give back what they have not begun, where some of that is wanted no more."""
        for name in self.queue.in_vain & self._streams.keys():
            self._streams[name].send({"back": True})
        self.queue.in_vain.clear()

    def landing(self, keys: Collection[Key]) -> list[Key]:
        """Return which of ``keys`` are results that the scheduler is to hear of now, since its tasks need them."""
        found = [key for key in keys if key in self.values and key not in self.landed]
        self.landed.update(found)
        self._landing.update(found)
        return found

    def have_landed(self, keys: Collection[Key]) -> bool:
        """Whether the scheduler has those of ``keys`` in memory that it was told to have."""
        return self._landing.isdisjoint(keys)

    def value(self, key: Key) -> Serialized:
        """Return a small result, unopened."""
        return Serialized(HEADER, [self.values[key]])

    # -- tasks -------------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Give lanes what waits, and start more of them while some still does."""
        for name, stream in self._streams.items():
            if not self.queue.waiting:
                return
            self._give(name, stream)
        if self.queue.waiting:
            for _ in range(max(1, self._threads()) - len(self.tasks) + len(self._aside)):
                self._start(self.tasks)
            if not self._looking:
                self._looking = True
                asyncio.get_running_loop().call_later(LOOK_S, self._look_ahead)

    def _look_ahead(self) -> None:
        """Have the scheduler see how much waits, by as many lanes as that is turns: an adaptive cluster then grows."""
        self._looking = bool(self.queue.waiting)
        wanted = min(MOST_AHEAD, int(self.queue.seconds_waiting() / TURN_S)) if self._looking else 0
        for _ in range(wanted - len(self.ahead)):
            self._start(self.ahead, priority=-1)  # other work need not wait for them
        if surplus := list(self.ahead)[wanted:]:
            self.ahead = dict.fromkeys(list(self.ahead)[:wanted])
            self.wire.release(surplus)
        if self._looking:
            asyncio.get_running_loop().call_later(LOOK_S, self._look_ahead)

    def _give(self, name: str, stream: LaneStream) -> None:
        if stream.ended or not self.queue.wants_more(name, len(self._streams)):
            return
        chunks = self.queue.give(name, max(1, len(self._streams)))
        if not chunks:
            return
        new = {chunk.run for chunk in chunks} - stream.payloads
        stream.payloads |= new
        payloads, told = {run: self._work[run].calls for run in new}, [tuple(each) for each in chunks]
        stream.send({"payloads": payloads, "chunks": told, "patience": self.queue.patience_s(name)})

    def _start(self, book: dict[str, None], priority: int = 0) -> None:
        name = next(self._names)
        book[name] = None
        opened = Task(None, pickle.loads, RUN_LANE)
        task = Task(name, apply, opened, [self._address, self._token, name, TURN_S])
        self.wire.submit([name], _pickled(LLGExpr({name: task}, _determ_token=name)), priority=priority)

    def yield_idle(self) -> None:
        """Other work waits: lanes that have nothing to do end their turn."""
        for name, stream in self._streams.items():
            if not stream.ended and not self.queue.has(name):
                stream.ended = True
                stream.send({"end": True})

    def heard(self, events: list[ev.Event]) -> list[ev.Event]:
        """Return what the scheduler said without what is about lanes."""
        if self._landing:
            ready = (each.key for event in events if isinstance(event, ev.KeysReady) for each in event.keys)
            self._landed(list(ready))
        if self._probing:
            named = (each for event in events if isinstance(event, ev.KeysReady | ev.KeysErred) for each in event.keys)
            keys = (each.key if isinstance(each, MadeKey) else each for each in named)
            for prefix in {self._probing[key] for key in keys if key in self._probing}:
                self._judge(prefix, True)
        if not (self.tasks or self.ahead):
            return events
        return [each for event in events if (each := self._without_lanes(event)) is not None]

    def restarted(self) -> None:
        """The scheduler has forgotten all tasks, also those that are lanes; what runs of them ends with its worker."""
        names, self.tasks, self.ahead = [*self.tasks, *self.ahead], {}, {}
        self._aside.clear()
        if names:
            self.wire.release(names)  # one that was on its way is not forgotten
        self._feed()

    def _landed(self, keys: Collection[Key]) -> None:
        """The scheduler has keys in memory: those that were handed over are its own now."""
        self._landing.difference_update(keys)
        for key in self._handed.intersection(keys):
            del self.values[key]
            self._handed.discard(key)

    def _without_lanes(self, event: ev.Event) -> ev.Event | None:
        if not isinstance(event, ev.KeysReady | ev.KeysErred | ev.KeysForgotten):
            return event
        names = [each.key if isinstance(each, MadeKey) else each for each in event.keys]
        mine = self.tasks.keys() | self.ahead.keys()
        if mine.isdisjoint(names):
            return event
        for name in names:
            if name in mine:
                self.tasks.pop(name, None)
                self.ahead.pop(name, None)
                self._aside.discard(str(name))
                if not isinstance(event, ev.KeysForgotten):
                    self.wire.release([name])
        self._feed()
        left = tuple(each for each, name in zip(event.keys, names, strict=True) if not str(name).startswith(PREFIX))
        return type(event)(left) if left else None  # type: ignore[arg-type]

    # -- streams -----------------------------------------------------------------------------------------------------

    async def serve(self, comm: Comm, token: str, lane: str, worker: str) -> Status:
        """Serve a lane until its turn ends."""
        if not hmac.compare_digest(token, self._token):
            await comm.close()
            return Status.dont_reply
        comm.name = "Agent->Lane"
        if lane in self.ahead:
            self.tasks[lane] = self.ahead.pop(lane)
        task, lane = lane, f"{lane}-{next(self._served)}"  # a task whose worker died runs again, under the same name
        stream = self._streams[lane] = LaneStream(task, PromptSend(), worker)
        stream.stream.start(comm)
        self.queue.open_lane(lane)
        died = True
        try:
            self._give(lane, stream)
            while True:
                for message in await comm.read():
                    self._take(lane, message)
                    died = died and "ended" not in message
                self._give(lane, stream)
        except CommClosedError:
            pass
        finally:
            del self._streams[lane]
            self._aside.discard(task)
            self._killed(self.queue.close_lane(lane, died), worker)
            self._feed()
            stream.stream.abort()
        return Status.dont_reply

    def _take(self, lane: str, message: dict[str, Any]) -> None:
        report = Report()
        for run, *told in message.get("done", ()):
            self._done(report, lane, run, *told)
        for run, row, exception, traceback in message.get("failed", ()):
            self._failed(report, lane, run, row, {"exception": exception, "traceback": traceback})
        if large := message.get("large"):
            self._large(lane, large)
        if stored := message.get("stored"):
            self._stored(lane, stored)
        for chunk in message.get("returned", ()):
            self.queue.returned(lane, Chunk(*chunk))
        if message.get("seceded"):
            stream = self._streams[lane]
            self._aside.add(stream.task)
            stream.ended = True
            stream.send({"end": True})
        if message.get("returned") or message.get("seceded"):
            self._feed()
        if report.events:
            self._deliver(report)

    def _done(
        self, report: Report, lane: str, run: int, start: int, values: list[bytes], types: list[bytes], seconds: float
    ) -> None:
        known = self.queue.runs.get(run)
        rows = self.queue.done(lane, Chunk(run, start, start + len(values)), seconds)
        self._forget_work(run)
        if known is None or not rows:
            return
        keys = known.keys
        made = []
        nbytes = 0
        for row in rows:
            key, value = keys[row], values[row - start]
            self.values[key] = report.values[key] = value
            report.types[key] = types[0] if len(types) == 1 else types[row - start]
            made.append(MadeKey(key, size := len(value)))
            nbytes += size
        self._note(known.prefix, len(values), seconds, nbytes)
        report.events.append(ev.KeysReady(tuple(made)))

    def _large(self, lane: str, large: Iterable[tuple[int, int, float]]) -> None:
        """Some results are large: they stay with their worker, under their keys, or others where nobody wants them."""
        store: list[tuple[int, int, Key]] = []
        for run, row, seconds in large:
            known = self.queue.runs.get(run)
            if known is not None:
                self.queue.time(known.prefix, 1, seconds)
            store.append((run, row, known.keys[row] if known is not None else _unwanted(run, row)))
        self._streams[lane].send({"store": store})

    def _stored(self, lane: str, stored: Iterable[tuple[int, int, Key, int, bytes]]) -> None:
        worker = self._streams[lane].worker
        under_way = worker in self._unregistered
        waiting = self._unregistered.setdefault(worker, [])
        for run, row, key, nbytes, kind in stored:
            self.queue.park(lane, Chunk(run, row, row + 1))
            waiting.append((run, row, MadeKey(key, nbytes), kind))
        if not under_way:
            self._tasks.add(task := asyncio.ensure_future(self._register_all(worker)))
            task.add_done_callback(self._tasks.discard)

    async def _register_all(self, worker: str) -> None:
        """Have the scheduler know the large results of a worker: what comes meanwhile is told together."""
        try:
            while waiting := self._unregistered[worker]:
                self._unregistered[worker] = []
                await self._register(worker, waiting)
        finally:
            del self._unregistered[worker]

    async def _register(self, worker: str, stored: list[tuple[int, int, MadeKey, bytes]]) -> None:
        """Have the scheduler know large results, and report them; where their worker is gone the calls run again."""
        who_has = {made.key: [worker] for _, _, made, _ in stored}
        nbytes = {made.key: made.nbytes for _, _, made, _ in stored}
        try:
            await self._ask("update_data", who_has=who_has, nbytes=nbytes, client=self.wire.client)
        except (OpaqueError, OSError) as exc:
            logger.info("%d results, such as %r, cannot be kept at %s: %s", len(stored), stored[0][2].key, worker, exc)
            for run, row, _, _ in stored:
                self.queue.unpark(run, row)
            self._feed()
            return
        report = Report()
        ready, unwanted = [], []
        for run, row, made, kind in stored:
            if self.queue.parked_done(run, row):
                ready.append(made)
                report.types[made.key] = kind
            else:
                unwanted.append(made.key)
            self._forget_work(run)
        if ready:
            report.events.append(ev.KeysReady(tuple(ready)))
            self._deliver(report)
        if unwanted:
            self.wire.release(unwanted)

    async def close(self) -> None:
        """End what is under way; lanes that run nothing end their turns, and are waited for."""
        self.yield_idle()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while any(not self.queue.has(name) for name in self._streams):
                    await asyncio.sleep(POLL_S)
        await end_tasks(*self._tasks)

    def _note(self, prefix: str, calls: int, seconds: float, nbytes: int) -> None:
        """Remember what the hub wants to know of calls of a function, and how much the results are."""
        if not self._measured:
            asyncio.get_running_loop().call_later(LEARNED_S, self._tell_learned)
        if self.queue.timings[prefix].seconds > SHORT_S:
            self._short[prefix] = False  # those that come from now on
        measured = self._measured.setdefault(prefix, [0, 0.0, 0])
        for n, what in enumerate((calls, seconds, nbytes)):
            measured[n] += what
        self.nbytes += nbytes
        if self.nbytes > MOST_BYTES:
            self._hand_over()

    def _tell_learned(self) -> None:
        measured, self._measured = self._measured, {}
        durations = [(prefix, int(calls), seconds) for prefix, (calls, seconds, _) in measured.items()]
        sizes = [(prefix, int(calls), int(nbytes)) for prefix, (calls, _, nbytes) in measured.items()]
        self._deliver(Report(learned=[{"durations": durations, "sizes": sizes}]))

    def _hand_over(self) -> None:
        """The results are too much for the memory of an agent: workers take the oldest, which spill what they must."""
        some, nbytes = [], 0
        for key, value in self.values.items():
            if key not in self._handed:
                some.append(key)
                nbytes += len(value)
            if nbytes > HAND_OVER_BYTES:
                break
        self._handed.update(some)
        self.nbytes -= nbytes
        self._land(some)

    def _failed(self, report: Report, lane: str, run: int, row: int, error: dict[str, Any]) -> None:
        known = self.queue.runs.get(run)
        told = self.queue.failed(lane, Chunk(run, row, row + 1))
        self._forget_work(run)
        if known is not None and told:
            key = known.keys[row]
            report.errors[key] = error
            report.events.append(ev.KeysErred((key,)))

    def _forget_work(self, run: int) -> None:
        if run not in self.queue.runs:
            self._work.pop(run, None)

    def _killed(self, rows: list[tuple[Run, int]], worker: str) -> None:
        """Report calls that too many workers died of, the last of them at the address ``worker``."""
        report = Report()
        for run, row in rows:
            key = run.keys[row]
            error = error_message(KilledWorker(key, dead_worker(worker), self.queue.allowed_deaths))
            report.errors[key] = {"exception": error["exception"], "traceback": error["traceback"]}
            report.events.append(ev.KeysErred((key,), blame=key))
        if report.events:
            self._deliver(report)


def dead_worker(address: str) -> WorkerState:
    """Return what Dask's KilledWorker has of the last worker."""
    nothing: dict[str, Any] = {"status": Status.closed, "pid": 0, "name": address, "nthreads": 0, "memory_limit": 0}
    return WorkerState(address=address, local_directory="", nanny="", server_id="", **nothing)


def _unwanted(run: int, row: int) -> str:
    """Return the key of a result that nobody wants any more."""
    return f"{PREFIX}unwanted-{run}-{row}"


def _pickled(expr: Any) -> Serialized:
    return Serialized(*serialize(expr, on_error="raise"))


def _places(keys: tuple[Key, ...], some: Collection[Key]) -> list[int]:
    place = {key: n for n, key in enumerate(keys)}
    return sorted(place[key] for key in some)
