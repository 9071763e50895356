"""Bringing results to the memo store: in the background, unopened, a few at a time."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from distributed.client import Future

from daskfed.client.gathering import Stream
from daskfed.client.lanes import SETTLED, CallState
from daskfed.comm.opaque import OpaqueError
from daskfed.config import cache_directory, cache_size, largest_cached
from daskfed.data.memo import Entry, Memo
from daskfed.data.packed import packed, packed_pickle
from daskfed.data.transfer import grouped
from daskfed.ending import end_tasks
from daskfed.messages import SESSION, Key

if TYPE_CHECKING:
    from daskfed.client.client import Client

logger = logging.getLogger(__name__)

AT_ONCE = (2**26, 256)  # bytes and number of results that are brought to the store together
COLLECTED_S = 0.01  # for which results are collected before they are stored
FLUSH_S = 2.0  # how long a client that closes waits for what is under way
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Memoized:
    """What a result is; it watches the state of its key, and has it kept once it is made."""

    storing: Storing
    token: str
    name: str
    held: dict[Key, Future] | None = None  # results that only this one keeps alive
    kept: bool = False

    def settled(self, state: CallState) -> None:
        """It is known what became of the key."""
        if state.status == "finished" and not self.kept:
            self.kept = True
            self.storing.made(state, self)
        if self.held is not None:
            self.held.pop(state.key, None)

    async def wait(self, state: CallState) -> None:
        """Watch a state that something else watches already."""
        await state.wait()
        self.settled(state)


class Storing:
    """The memo store of one client, and what is on its way there."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._memo: Memo | None = None
        self._opening = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "daskfed-memo")  # writes one after the other
        self._stream: Stream | None = None
        self._ready: deque[tuple[Future, Memoized]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._complained = False

    # -- the store -----------------------------------------------------------------------------------------------------

    def store(self) -> Memo:
        """Return the store, opened when it is first needed; raises ConfigurationError where it cannot be used."""
        with self._opening:
            if self._memo is None:
                self._memo = Memo(cache_directory(), cache_size())
                self._later(self._memo.sweep)
            return self._memo

    def quietly(self, work: Callable[..., T], *args: Any) -> T | None:
        """Do something with the store; where that fails, computing goes on without it."""
        try:
            return work(*args)
        except (OSError, sqlite3.Error) as exc:
            self._complain(exc)
            return None

    def used(self, tokens: Collection[str]) -> None:
        """Say that results were used, in the background."""
        if tokens:
            self._later(self.store().touch, list(tokens))

    def _later(self, work: Callable[..., Any], *args: Any) -> None:
        with suppress(RuntimeError):  # the client has closed
            self._thread.submit(self.quietly, work, *args)

    def _complain(self, exc: BaseException) -> None:
        level = logging.DEBUG if self._complained else logging.WARNING
        self._complained = True
        logger.log(level, "Results are computed, but not kept in %s: %s", cache_directory(), exc or repr(exc))

    # -- what is to be kept --------------------------------------------------------------------------------------------

    def expect(self, memos: dict[Key, Memoized]) -> None:
        """Have results kept when they are made."""
        for key, memo in memos.items():
            state = self.client.futures.get(key)
            if state is not None and state.watch is None and state.status not in SETTLED:
                state.watch = memo
        self.client.loop.add_callback(self._watch, memos)

    def _watch(self, memos: dict[Key, Memoized]) -> None:
        """See to those that were made a moment ago, or that something else watches; on the event loop."""
        for key, memo in memos.items():
            state = self.client.futures.get(key)
            if state is None or state.watch is memo:
                continue
            if state.status in SETTLED:
                memo.settled(state)
            else:
                self.client.loop.add_callback(memo.wait, state)

    def made(self, state: CallState, memo: Memoized) -> None:
        """A result is there; it is held until it is stored. On the event loop."""
        if self.client.futures.get(state.key) is not state:
            return
        self._ready.append((Future(state.key, self.client), memo))
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            await asyncio.sleep(COLLECTED_S)
            while self._ready:
                some = [self._ready.popleft() for _ in range(min(len(self._ready), AT_ONCE[1]))]
                try:
                    await self._keep(some)
                except Exception as exc:  # the hub, the disk, a value that cannot be sent: the user has the result
                    self._complain(exc)
        finally:
            self._task = None

    async def _keep(self, some: Sequence[tuple[Future, Memoized]]) -> None:
        memos = {future.key: memo for future, memo in some}
        states = {future.key: future._state for future, _ in some}
        largest = largest_cached()
        here = {key: value for key, state in states.items() if (value := state.value) is not None}
        await self._put([(memos[key], packed_pickle, (value,)) for key, value in here.items() if len(value) <= largest])
        elsewhere = [key for key in states if key not in here]
        if elsewhere:
            sizes = await self.client.scheduler.nbytes(keys=elsewhere, summary=False)
            for keys in grouped([(key, size) for key, size in sizes.items() if size <= largest], *AT_ONCE):
                parcels = await self._parcels(keys)
                each = [(memos[key], packed, (parcel.header, parcel.frames)) for key, parcel in parcels.items()]
                await self._put(each)

    async def _parcels(self, keys: list[Key]) -> dict[Key, Any]:
        """Return values unopened; those that cannot be had are left out."""
        if self._stream is None:
            self._stream = Stream(self.client.scheduler.address, self.client.connection_args)
            self._stream.open = dict  # type: ignore[assignment]
        with suppress(OpaqueError):
            return await self._stream.gather(keys, **{SESSION: self.client._secret})
        return {}

    async def _put(self, values: list[tuple[Memoized, Callable[..., bytes], tuple[Any, ...]]]) -> None:
        if values:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.quietly, self._put_now, values)

    def _put_now(self, values: list[tuple[Memoized, Callable[..., bytes], tuple[Any, ...]]]) -> None:
        entries = (Entry(memo.token, memo.name, pack(*parts)) for memo, pack, parts in values)
        largest = largest_cached()
        self.store().put(entry for entry in entries if len(entry.value) <= largest)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Wait for what is under way, but not for long."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=FLUSH_S)

    async def close(self) -> None:
        """Give up what is under way, and end the connections."""
        if self._task is not None:
            await end_tasks(self._task)
        self._ready.clear()
        if self._stream is not None:
            await self._stream.close()
        if self._memo is not None:
            self._later(self._memo.close)
        self._thread.shutdown(wait=False)
