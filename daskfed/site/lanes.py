"""The lanes of a site: Dask tasks that the agent submits to run calls, see :mod:`daskfed.site.lane`.

Which calls a lane gets is decided by :class:`daskfed.site.calls.CallQueue`. Here are the tasks, one for each thread while
calls wait, the streams that these dial, and the results: small ones stay with the agent, unopened, until the hub lets
them go. What becomes of calls is reported in the words in which the scheduler reports, as if those were its tasks.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import pickle
import secrets
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

from dask.utils import apply
from distributed.batched import BatchedSend
from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status, error_message
from distributed.protocol.serialize import Serialized, serialize
from distributed.scheduler import KilledWorker

from daskfed.dask_private import LLGExpr, Task
from daskfed.data.fetch import by_value
from daskfed.messages import BlockSpec, Key, MadeKey
from daskfed.site import events as ev
from daskfed.site import lane
from daskfed.site.calls import CallQueue, Chunk, Run
from daskfed.site.wire import Report, SchedulerWire

logger = logging.getLogger(__name__)

TURN_S = 1.0
PREFIX = "daskfed-lane-"
HEADER = {"serializer": "pickle", "writeable": ()}
RUN_LANE = by_value(lane.run_lane)


class LaneStream:
    """What a lane dialled."""

    def __init__(self, stream: BatchedSend) -> None:
        self.stream = stream
        self.payloads: set[int] = set()  # runs whose payload it has
        self.ended = False

    def send(self, message: dict[str, Any]) -> None:
        """Tell the lane something; what it no longer hears is dropped."""
        with suppress(CommClosedError):
            self.stream.send(message)


class Lanes:
    """All lanes of a site; ``deliver`` gets a :class:`Report` of what became of calls, ``threads`` says how many.

    ``address`` and ``token`` are those of the agent's door.
    """

    def __init__(
        self, wire: SchedulerWire, address: str, token: str, deliver: Callable[[Report], None], threads: Callable[[], int]
    ) -> None:
        self.queue = CallQueue()
        self.values: dict[Key, bytes] = {}  # small results
        self.landed: set[Key] = set()  # those of which the scheduler knows
        self.wire = wire
        self.tasks: dict[str, None] = {}  # that the scheduler has
        self._address, self._token = address, token
        self._deliver = deliver
        self._threads = threads
        self._streams: dict[str, LaneStream] = {}
        self._payloads: dict[int, Any] = {}
        self._names = (f"{PREFIX}{secrets.token_hex(4)}-{n}" for n in itertools.count())

    # -- blocks ------------------------------------------------------------------------------------------------------

    def submit(self, spec: BlockSpec, outputs: Collection[Key], payload: Any) -> None:
        """Have calls run."""
        keys = spec.outputs
        rows: Iterable[int] = range(len(keys)) if len(outputs) == len(keys) else _places(keys, outputs)
        constraint = spec.constraint
        run = self.queue.submit(
            spec.id, keys, rows, spec.prefixes[0][0], priority=constraint.priority, retries=constraint.retries
        )
        self._payloads[run.number] = payload
        self._feed()

    def release(self, keys: Collection[Key]) -> list[Key]:
        """Nobody wants these keys any more: they need not be made, and results are forgotten.

        Return those of which the scheduler may know.
        """
        others = [key for key in keys if self.values.pop(key, None) is None or key in self.landed]
        self.landed.difference_update(others)
        if others and self.queue.runs:
            pending = self.queue.drop(others)
            return [key for key in others if key not in pending]
        return others

    def landing(self, keys: Collection[Key]) -> list[Key]:
        """Return which of ``keys`` are results that the scheduler is to hear of now, since its tasks need them."""
        found = [key for key in keys if key in self.values and key not in self.landed]
        self.landed.update(found)
        return found

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
            for _ in range(max(1, self._threads()) - len(self.tasks)):
                self._start()

    def _give(self, name: str, stream: LaneStream) -> None:
        if stream.ended or self.queue.has(name):
            return
        chunks = self.queue.give(name, max(1, len(self._streams)))
        if not chunks:
            return
        new = {chunk.run for chunk in chunks} - stream.payloads
        stream.payloads |= new
        stream.send({"payloads": {run: self._payloads[run] for run in new}, "chunks": [tuple(each) for each in chunks]})

    def _start(self) -> None:
        name = next(self._names)
        self.tasks[name] = None
        opened = Task(None, pickle.loads, RUN_LANE)
        task = Task(name, apply, opened, [self._address, self._token, name, TURN_S])
        expr = LLGExpr({name: task}, _determ_token=name)
        self.wire.submit([name], Serialized(*serialize(expr, on_error="raise")))

    def yield_idle(self) -> None:
        """Other work waits: lanes that have nothing to do end their turn."""
        for name, stream in self._streams.items():
            if not stream.ended and not self.queue.has(name):
                stream.ended = True
                stream.send({"end": True})

    def heard(self, events: list[ev.Event]) -> list[ev.Event]:
        """Return what the scheduler said without what is about lanes."""
        return [each for event in events if (each := self._without_lanes(event)) is not None] if self.tasks else events

    def _without_lanes(self, event: ev.Event) -> ev.Event | None:
        if not isinstance(event, ev.KeysReady | ev.KeysErred | ev.KeysForgotten):
            return event
        names = [each.key if isinstance(each, MadeKey) else each for each in event.keys]
        if not any(name in self.tasks for name in names):
            return event
        for name in names:
            if name in self.tasks:
                del self.tasks[name]  # type: ignore[arg-type]
                if not isinstance(event, ev.KeysForgotten):
                    self.wire.release([name])
        self._feed()
        left = tuple(each for each, name in zip(event.keys, names, strict=True) if not str(name).startswith(PREFIX))
        return type(event)(left) if left else None  # type: ignore[arg-type]

    # -- streams -----------------------------------------------------------------------------------------------------

    async def serve(self, comm: Comm, token: str, lane: str) -> Status:
        """Serve a lane until its turn ends."""
        if not hmac.compare_digest(token, self._token):
            await comm.close()
            return Status.dont_reply
        comm.name = "Agent->Lane"
        stream = self._streams[lane] = LaneStream(BatchedSend(interval="1ms"))
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
            self._killed(self.queue.close_lane(lane, died))
            self._feed()
            stream.stream.abort()
        return Status.dont_reply

    def _take(self, lane: str, message: dict[str, Any]) -> None:
        report = Report()
        for run, *told in message.get("done", ()):
            self._done(report, lane, run, *told)
        for run, row, exception, traceback in message.get("failed", ()):
            self._failed(report, lane, run, row, {"exception": exception, "traceback": traceback})
        for chunk in message.get("returned", ()):
            self.queue.returned(lane, Chunk(*chunk))
        if message.get("returned"):
            self._feed()
        if report.events:
            self._deliver(report)

    def _done(
        self, report: Report, lane: str, run: int, start: int, values: list[bytes], types: list[bytes], seconds: float
    ) -> None:
        known = self.queue.runs.get(run)
        rows = self.queue.done(lane, Chunk(run, start, start + len(values)), seconds)
        self._forget_payload(run)
        if known is None or not rows:
            return
        keys = known.keys
        made = []
        for row in rows:
            key, value = keys[row], values[row - start]
            self.values[key] = report.values[key] = value
            report.types[key] = types[0] if len(types) == 1 else types[row - start]
            made.append(MadeKey(key, len(value)))
        report.events.append(ev.KeysReady(tuple(made)))

    def _failed(self, report: Report, lane: str, run: int, row: int, error: dict[str, Any]) -> None:
        known = self.queue.runs.get(run)
        told = self.queue.failed(lane, Chunk(run, row, row + 1))
        self._forget_payload(run)
        if known is not None and told:
            key = known.keys[row]
            report.errors[key] = error
            report.events.append(ev.KeysErred((key,)))

    def _forget_payload(self, run: int) -> None:
        if run not in self.queue.runs:
            self._payloads.pop(run, None)

    def _killed(self, rows: list[tuple[Run, int]]) -> None:
        report = Report()
        for run, row in rows:
            key = run.keys[row]
            error = error_message(KilledWorker(key, None, self.queue.allowed_deaths, "a worker of a lane"))
            report.errors[key] = {"exception": error["exception"], "traceback": error["traceback"]}
            report.events.append(ev.KeysErred((key,), blame=key))
        if report.events:
            self._deliver(report)


def _places(keys: tuple[Key, ...], some: Collection[Key]) -> list[int]:
    place = {key: n for n, key in enumerate(keys)}
    return sorted(place[key] for key in some)
