"""A lane: a Dask task that holds a thread of its worker for a turn, and runs calls that it gets from the agent.

It is sent to workers by value, and needs only distributed and the standard library. The thread runs calls; the worker's
event loop talks to the agent, also while a call runs: what is done is told every FLUSH_S, and calls that have not begun
are given back when the one before them takes long, so that nobody waits for it who need not.

Lane to agent: ``{"done": [(run, start, [value, ...], types, seconds), ...], "failed": [...], "returned": [...]}``.
Agent to lane: ``{"payloads": {run: <frames>}, "chunks": [(run, start, stop), ...]}``, ``{"drop": [...]}``, ``{"end"}``.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections import deque
from time import perf_counter
from typing import Any

from distributed import get_worker
from distributed.batched import BatchedSend
from distributed.comm import connect
from distributed.comm.core import CommClosedError
from distributed.core import error_message
from distributed.protocol.pickle import dumps, loads
from distributed.protocol.serialize import merge_and_deserialize
from distributed.utils import sync

FLUSH_S = 0.01
PIECE_S = 0.001  # of work that the thread takes on at once
PLAIN = frozenset({int, float, bool, str, bytes, type(None), complex})


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
        self._claims = threading.Lock()
        self._chunks: deque[Chunk] = deque()  # that have calls which have not begun
        self._since = 0.0  # when the thread began what it runs; 0: nothing
        self._flushed = 0.0
        self._types: dict[type, bytes] = {}
        self._reader: Any = None
        self._watcher: Any = None

    # -- on the event loop -------------------------------------------------------------------------------------------

    async def connect(self, address: str, token: str) -> None:
        """Tell the agent that the lane is there."""
        import asyncio

        comm = await connect(address, deserialize=False, **self.worker.connection_args)
        comm.name = "Lane->Agent"
        await comm.write({"op": "lane", "token": token, "lane": self.name, "reply": False})
        self._stream = BatchedSend(interval="1ms")  # which belongs to the loop on which it is made
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
        self._payloads.update(message.get("payloads", {}))
        for run, start, stop in message["chunks"]:
            chunk = Chunk(run, start, stop)
            self._chunks.append(chunk)
            self._inbox.put(chunk)

    async def _watch(self) -> None:
        """Tell what is done while a call runs, and give back what waits for it."""
        import asyncio

        while True:
            await asyncio.sleep(2 * FLUSH_S)
            if self._since and perf_counter() - self._since > 2 * FLUSH_S:
                self._flush()
                self._give_back()

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

    def _flush(self) -> None:
        """Tell what is done."""
        message = {}
        for name, kept in (("done", self._done), ("failed", self._failed)):
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
        self._watcher.cancel()
        self._flush()
        self._give_back()
        self._send({"ended": True})
        await self._stream.close()
        self._reader.cancel()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def work(self, turn_s: float) -> None:
        """Run what comes until the turn is over, or the agent ends it."""
        deadline = perf_counter() + turn_s
        while (left := deadline - perf_counter()) > 0:
            try:
                chunk = self._inbox.get(timeout=left)
            except queue.Empty:
                return
            if chunk is None:
                return
            self._run(chunk, deadline)
            if self._inbox.empty():
                self._flush_soon()

    def _run(self, chunk: Chunk, deadline: float) -> None:
        payload = self._opened(chunk.run)
        most = 1
        while perf_counter() < deadline and (rows := self._claimed(chunk, most)):
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
        if self._done or self._failed:
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
        payload = self._payloads[run]
        if not isinstance(payload, tuple):
            payload = merge_and_deserialize(payload.header, payload.frames)
            if len(payload) == 2:
                payload = (loads(payload[0]), payload[1], None)
            self._payloads[run] = payload
        return payload

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
                values.append(pickle.dumps(value, 5) if kind in PLAIN else dumps(value))
            except Exception as exc:
                self._tell(run, start, values, types, began)
                error = error_message(exc)
                self._failed.append((run, row, error["exception"], error["traceback"]))
                values, types, start, began = [], [], row + 1, perf_counter()
            else:
                types.append(kind)
        self._tell(run, start, values, types, began)

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
