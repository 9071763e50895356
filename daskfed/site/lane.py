"""A lane: a Dask task that holds a thread of its worker for a turn, and runs calls that it gets from the agent.

It is sent to workers by value, and needs only distributed and the standard library. The thread runs calls; the worker's
event loop talks to the agent, also while a call runs: what is done is told every FLUSH_S, and calls that have not begun
are given back when the one before them takes long, so that nobody waits for it who need not.

Lane to agent: ``{"done": [(run, start, [value, ...], types, seconds), ...], "failed": [...], "returned": [...]}``, and
of results that stay with the worker ``{"large": [(run, row, seconds), ...]}``, which the agent answers with their keys,
in ``{"store": [(run, row, key), ...]}``, and then ``{"stored": [(run, row, key, nbytes, type), ...]}``; and, where the
call that runs has left the pool of threads, so that the lane will end with it, ``{"seceded": True}``.
Agent to lane: ``{"payloads": {run: <frames>}, "chunks": [(run, start, stop), ...], "patience": seconds}``;
``{"back": True}``, to give back what has not begun; and ``{"end": True}``.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections import deque
from time import perf_counter
from typing import Any

from dask.sizeof import sizeof
from distributed import Actor, Future, Reschedule, get_worker
from distributed.comm import connect
from distributed.comm.core import CommClosedError
from distributed.core import Status, error_message
from distributed.protocol.pickle import dumps, loads
from distributed.protocol.serialize import merge_and_deserialize
from distributed.utils import sync

from daskfed.comm.prompt import PromptSend
from daskfed.dask_private import UpdateDataEvent
from daskfed.messages import PLAIN

SMALL = 2**16  # bytes of a result that rides home
FLUSH_S = 0.01
PIECE_S = 0.001  # of work that the thread takes on at once
MOST_TURNS = 10  # one after the other, where nothing else waits for the thread
PREFIX = "daskfed-lane-"  # of the names of lanes


def run_lane(address: str, token: str, name: str, turn_s: float) -> None:
    """Run calls of the agent at ``address`` for a turn, or until it has no more; runs in a worker's thread."""
    lane = Lane(get_worker(), name)
    sync(lane.worker.loop, lane.connect, address, token)
    try:
        lane.work(turn_s)
    finally:
        sync(lane.worker.loop, lane.close)


class Chunk:
    """Calls of one block that the agent gave, of which those before ``next`` have begun."""

    def __init__(self, run: int, start: int, stop: int) -> None:
        self.run, self.next, self.stop = run, start, stop


class Lane:
    """One turn of one thread."""

    def __init__(self, worker: Any, name: str) -> None:
        self.worker = worker
        self.name = name
        self._stream: Any = None
        self._inbox: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._payloads: dict[int, Any] = {}  # run -> frames, or the function, its columns and keywords
        self._done: deque[tuple[Any, ...]] = deque()
        self._failed: deque[tuple[Any, ...]] = deque()
        self._kept: deque[tuple[Any, ...]] = deque()  # large results that are to be told of
        self._large: dict[tuple[int, int], Any] = {}  # (run, row) -> those that are not stored yet, and their type
        self._again: deque[tuple[int, int, int]] = deque()  # calls that want to run again
        self._claims = threading.Lock()
        self._chunks: deque[Chunk] = deque()  # that have calls which have not begun
        self._patience_s = 0.0  # after which a call no longer keeps others waiting
        self._since = 0.0  # when the thread began what it runs; 0: nothing
        self._flushed = 0.0
        self._deadline = self._last = self._turn_s = 0.0  # when the turn is over, and no other follows; how long one is
        self._aside = False  # whether the agent knows that the call has seceded
        self._types: dict[type, bytes] = {}
        self._reader: Any = None
        self._watcher: Any = None

    # -- on the event loop -------------------------------------------------------------------------------------------

    async def connect(self, address: str, token: str) -> None:
        """Tell the agent that the lane is there."""
        import asyncio

        comm = await connect(address, deserialize=False, **self.worker.connection_args)
        comm.name = "Lane->Agent"
        await comm.write(
            {"op": "lane", "token": token, "lane": self.name, "worker": self.worker.address, "reply": False}
        )
        self._stream = PromptSend()  # which belongs to the loop on which it is made
        self._stream.start(comm)
        self._reader = asyncio.ensure_future(self._read(comm))
        self._watcher = asyncio.ensure_future(self._watch())

    async def _read(self, comm: Any) -> None:
        try:
            while True:
                message = await comm.read()
                for each in message if isinstance(message, (list, tuple)) else (message,):
                    self._take(each)
        except (CommClosedError, OSError):
            self._inbox.put(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "end" in message:
            self._inbox.put(None)
            return
        if "back" in message:
            self._give_back()
            return
        if "store" in message:
            self._store(message["store"])
            return
        self._payloads.update(message.get("payloads", {}))
        self._patience_s = message["patience"]
        for run, start, stop in message["chunks"]:
            chunk = Chunk(run, start, stop)
            self._chunks.append(chunk)
            self._inbox.put(chunk)

    async def _watch(self) -> None:
        """Tell what is done while a call runs, and give back what waits for it."""
        import asyncio

        while True:
            await asyncio.sleep(2 * FLUSH_S)
            if self._since and (took := perf_counter() - self._since) > 2 * FLUSH_S:
                self._flush()
                aside = self._has_seceded()
                if took > self._patience_s or aside:
                    self._give_back()
                if aside and not self._aside:
                    self._send({"seceded": True})
                self._aside = aside

    def _has_seceded(self) -> bool:
        """Whether the call that runs has left the pool of threads (``secede``): the worker then runs another task."""
        task = self.worker.state.tasks.get(self.name)
        return task is not None and task.state == "long-running"

    def _give_back(self) -> None:
        returned = []
        with self._claims:
            for chunk in self._chunks:
                if chunk.next < chunk.stop:
                    returned.append((chunk.run, chunk.next, chunk.stop))
                    chunk.stop = chunk.next
            self._chunks.clear()
        if returned:
            self._send({"returned": returned})

    def _store(self, told: Any) -> None:
        """Keep large results under their keys."""
        stored = []
        for run, row, key in told:
            value, kind = self._large.pop((run, row))
            stored.append((run, row, key, sizeof(value), self._type(kind)))
            event = UpdateDataEvent(data={key: value}, stimulus_id=f"{self.name}-{run}-{row}")
            self.worker.handle_stimulus(event)
        self._send({"stored": stored})

    def _flush(self) -> None:
        """Tell what is done."""
        message = {}
        kinds = (("done", self._done), ("failed", self._failed), ("large", self._kept), ("returned", self._again))
        for name, kept in kinds:
            told = []
            while kept:
                told.append(kept.popleft())
            if told:
                message[name] = told
        if message:
            self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._stream.send(message)
        except CommClosedError:
            self._inbox.put(None)

    async def close(self) -> None:
        """Tell the rest, give back what has not begun, and end."""
        import asyncio

        self._watcher.cancel()
        self._give_back()
        self._flush()
        while self._large and not self._stream.closed():
            await asyncio.sleep(FLUSH_S)
        self._send({"ended": True})
        await self._stream.close()
        self._reader.cancel()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def work(self, turn_s: float) -> None:
        """Run what comes until the turn is over, or the agent ends it."""
        self._deadline = perf_counter() + turn_s
        self._last = perf_counter() + MOST_TURNS * turn_s
        self._turn_s = turn_s
        while self._has_time():
            try:
                chunk = self._inbox.get(timeout=max(0.0, self._deadline - perf_counter()))
            except queue.Empty:
                return
            if chunk is None:
                return
            self._run(chunk)
            if self._inbox.empty():
                self._flush_soon()
            if not self._may_go_on():
                return

    def _has_time(self) -> bool:
        """Whether the turn is not over; it is a new one where no other task waits for a thread of this worker.

        A scheduler gives each worker a task more than it has threads, if there are any (``worker-saturation``).
        """
        now = perf_counter()
        if now >= self._deadline and now < self._last and not self._others_wait():
            self._deadline = now + self._turn_s / 4
        return now < self._deadline

    def _others_wait(self) -> bool:
        state = self.worker.state
        try:
            return any(not str(task.key).startswith(PREFIX) for task in (*state.ready, *state.constrained))
        except RuntimeError:  # they are changing, on the event loop
            return True

    def _may_go_on(self) -> bool:
        """Whether the thread is still of its worker's pool, and the worker takes work."""
        pool = getattr(self.worker.executors["default"], "_threads", None)
        seceded = pool is not None and threading.current_thread() not in pool
        return self.worker.status is Status.running and not seceded

    def _run(self, chunk: Chunk) -> None:
        try:
            payload = self._opened(chunk.run)
        except Exception as exc:  # as of tasks: it cannot be opened here
            for row in self._claimed(chunk, chunk.stop):
                self._note_failure(chunk.run, row, exc)
            return
        most = 1
        while self._has_time() and self._may_go_on() and (rows := self._claimed(chunk, most)):
            began = self._since = perf_counter()
            self._run_rows(chunk.run, rows, *payload)
            self._since = 0.0
            took = perf_counter() - began
            if took < PIECE_S:
                most = min(4 * most, max(1, int(most * PIECE_S / max(took, 1e-7))) * 2)
            if perf_counter() - self._flushed > FLUSH_S:
                self._flush_soon()

    def _flush_soon(self) -> None:
        self._flushed = perf_counter()
        if self._done or self._failed or self._kept or self._again:
            self.worker.loop.add_callback(self._flush)

    def _claimed(self, chunk: Chunk, most: int) -> range:
        with self._claims:
            rows = range(chunk.next, min(chunk.stop, chunk.next + most))
            chunk.next = rows.stop
            if chunk.next >= chunk.stop and self._chunks and self._chunks[0] is chunk:
                self._chunks.popleft()
        return rows

    def _opened(self, run: int) -> tuple[Any, Any, Any]:
        """Return the function of a run, its columns, or its rows as they were pickled, and keywords or None."""
        payload: Any = self._payloads[run]
        if not isinstance(payload, tuple):
            payload = merge_and_deserialize(payload.header, payload.frames)
            if len(payload) == 2:
                payload = (loads(payload[0]), payload[1], None)
            self._payloads[run] = payload
        return payload  # type: ignore[no-any-return]

    def _run_rows(self, run: int, rows: range, func: Any, columns: Any, kwargs: Any) -> None:
        values: list[bytes] = []
        types: list[Any] = []
        start, began = rows.start, perf_counter()
        for row in rows:
            try:
                if kwargs is None:
                    args, own = loads(columns[row])
                    value = func(*args, **own)
                else:
                    value = func(*[column[row] for column in columns], **kwargs)
                kind = type(value)
                told = pickle.dumps(value, 5) if kind in PLAIN else _pickled(value)
            except (SystemExit, KeyboardInterrupt):  # as of any task: it ends the worker
                raise
            except BaseException as exc:
                self._tell(run, start, values, types, began)
                self._note_failure(run, row, exc)
                values, types, start, began = [], [], row + 1, perf_counter()
                continue
            if told is None or len(told) > SMALL:
                self._tell(run, start, values, types, began)
                self._large[run, row] = value, kind
                self._kept.append((run, row, perf_counter() - began))
                values, types, start, began = [], [], row + 1, perf_counter()
            else:
                values.append(told)
                types.append(kind)
        self._tell(run, start, values, types, began)

    def _note_failure(self, run: int, row: int, exc: BaseException) -> None:
        if isinstance(exc, Reschedule):
            self._again.append((run, row, row + 1))
        else:
            error = error_message(exc)
            self._failed.append((run, row, error["exception"], error["traceback"]))

    def _tell(self, run: int, start: int, values: list[bytes], types: list[Any], began: float) -> None:
        if values:
            kinds = set(types)
            told = [self._type(kind) for kind in (kinds if len(kinds) == 1 else types)]
            self._done.append((run, start, values, told, perf_counter() - began))

    def _type(self, kind: type) -> bytes:
        if kind not in self._types:
            try:
                self._types[kind] = dumps(kind)
            except Exception:
                self._types[kind] = dumps(object)
        return self._types[kind]


def _pickled(value: Any) -> bytes | None:
    """Return a result as it can ride home, None where it must stay with its worker: it is large, or bound to it."""
    if isinstance(value, Future | Actor) or sizeof(value) > SMALL:
        return None
    if isinstance(value, (list, tuple, set, dict)) and futures_in(value):
        return None
    try:
        return bytes(dumps(value))
    except Exception:  # as of any task: it is known when somebody gathers it
        return None


def futures_in(value: Any, depth: int = 3) -> bool:
    """Whether there are futures or actors in a small container."""
    if isinstance(value, Future | Actor):
        return True
    if not isinstance(value, (list, tuple, set, dict)) or len(value) > 1000 or depth == 0:
        return False
    return any(futures_in(each, depth - 1) for each in (value.values() if isinstance(value, dict) else value))
