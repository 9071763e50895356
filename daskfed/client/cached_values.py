"""Values from the memo store whose futures are finished; the federation gets them only where something needs them."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed.client import Future
from distributed.protocol.serialize import merge_and_deserialize

from daskfed.client.calls import Calls
from daskfed.client.constraints import EMPTY
from daskfed.client.lanes import CallState
from daskfed.client.notes import flat_keys
from daskfed.client.returning import PatientRPC
from daskfed.client.submission import plan_calls
from daskfed.config import client_memory
from daskfed.dask_private import GraphNode, LLGExpr, Task
from daskfed.data.packed import frames_of, opened, pickled
from daskfed.data.spill import Spilled
from daskfed.data.transfer import grouped
from daskfed.messages import COORDINATION, Key

if TYPE_CHECKING:
    from daskfed.client.client import Client

SMALL = 2**16  # bytes of a value that stays in memory while its future lives
TOGETHER = (2**20, 64)  # bytes and number of values that are sent as one block
KNOWN_S, POLL_S = 5.0, 0.002  # within which a hub knows what was sent to it, and how often that is looked at


@dataclass(slots=True)
class Here:
    """A value of this client."""

    small: bytes | None  # packed; None: it is among the large ones
    name: str  # among those
    block: str = ""  # that makes it at the hub, where one was sent for it alone


class CachedValues:
    """Values that a client has from the memo store, by key."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._here: dict[Key, Here] = {}
        self.unsent: set[Key] = set()  # keys that the hub does not know
        self._large = Spilled(client_memory())
        self._lock = threading.RLock()  # of the large ones
        self._names = itertools.count()

    def finish(self, key: Key, value: bytes, sent: bool = False) -> Future:
        """Return the future of a value, which is finished; ``sent``: the hub gets it with a graph.

        Whoever calls this holds the lock of the client.
        """
        client = self._client
        self.release(key)
        state = client.futures.get(key)
        if state is None:
            state = client.futures[key] = CallState(key)
        name = "" if len(value) <= SMALL else f"{next(self._names)}"
        if name:
            with self._lock:
                self._large[name] = value
        else:
            state.value = pickled(value)
        self._here[key] = Here(None if name else value, name)
        if not sent:
            self.unsent.add(key)
        future = Future(key, client)
        state.finish()
        return future

    def release(self, key: Key) -> None:
        """Nobody has a future of a key any more."""
        self.unsent.discard(key)
        if (here := self._here.pop(key, None)) is not None and here.name:
            with self._lock:
                self._large.pop(here.name, None)

    def forget(self) -> None:
        """Nobody has a future of any key."""
        for key in list(self._here):
            self.release(key)

    def close(self) -> None:
        """Forget everything, for good."""
        self.forget()
        with self._lock:
            self._large.close()

    def opened(self, keys: Collection[Key]) -> dict[Key, Any]:
        """Return those values that are here."""
        return {key: opened(self._value(self._here[key])) for key in keys if key in self._here}

    def _value(self, here: Here) -> bytes:
        with self._lock:
            return here.small if here.small is not None else self._large[here.name]

    def __contains__(self, key: Key) -> bool:
        return key in self._here

    # -- sending -------------------------------------------------------------------------------------------------------

    def send(self, keys: Collection[Key]) -> None:
        """Have the hub know those keys that it does not know yet, before what is sent next."""
        new = {key: self._value(self._here[key]) for key in keys if key in self.unsent}
        if not new:
            return
        groups = grouped([(key, len(value)) for key, value in new.items()], *TOGETHER)
        batches = [(_calls({key: new[key] for key in some}), EMPTY, ()) for some in groups]
        submission = plan_calls(batches, {}, self._client._block_ids())
        for block in submission.blocks:
            for key in block.outputs:
                self._here[key].block = block.id
        self.unsent.difference_update(new)
        self._client._memory.keep(submission)
        for message in submission.messages(new):
            self._client._send_to_scheduler(message)

    async def until_known(self, keys: Collection[Key]) -> None:
        """Wait until the hub knows the blocks that make these keys: a call may overtake what was sent on the stream."""
        blocks = self._client._memory.blocks
        sent = {self._here[key].block for key in keys if key in self._here}
        deadline = asyncio.get_running_loop().time() + KNOWN_S
        while any(name in blocks and not blocks[name].arrival for name in sent):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(POLL_S)


class CachingRPC(PatientRPC):
    """Calls to the hub of a client that has values which the hub does not know.

    ``send`` has the hub know keys; the other arguments are those of :class:`PatientRPC`.
    """

    def __init__(self, values: CachedValues, send: Callable[[Collection[Key]], None], *args: Any) -> None:
        self._values = values
        self._send = send
        super().__init__(*args)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "fed_explain":
            return lambda key: self._explain(found, key)
        if not name.startswith((*COORDINATION, "replicate")):
            return found

        async def call(**kwargs: Any) -> Any:
            keys = flat_keys(kwargs.get("keys") or ([kwargs["key"]] if "key" in kwargs else []))
            self._send(keys)
            await self._values.until_known(keys)
            return await found(**kwargs)

        return call

    async def _explain(self, ask: Callable[..., Any], key: Key) -> Any:
        if key in self._values.unsent:
            why = (
                "its value was kept on the client's machine by a former run, and nothing has needed it elsewhere so far"
            )
            return {"key": key, "phase": "cached", "why": why, "sites": []}
        return await ask(key=key)

    async def gather(self, keys: Collection[Key], **how: Any) -> Any:
        """Return values as a scheduler's ``gather`` does; those that are here without asking the hub."""
        here = [key for key in keys if key in self._values]
        if not here:
            return await super().gather(keys, **how)
        rest = [key for key in keys if key not in self._values]
        response: Any = await super().gather(rest, **how) if rest else {"status": "OK", "data": {}}
        if response["status"] == "OK":
            return {**response, "data": {**response["data"], **await asyncio.to_thread(self._values.opened, here)}}
        return response


def value_task(key: Key, value: bytes) -> Task:
    """Return a task that gives a value, which is opened where that runs."""
    if (plain := pickled(value)) is not None:
        return Task(key, pickle.loads, plain)
    return Task(key, merge_and_deserialize, *frames_of(value))


def _calls(values: Mapping[Key, bytes]) -> Calls:
    tasks: dict[Key, GraphNode] = {key: value_task(key, value) for key, value in values.items()}
    return Calls(LLGExpr(tasks, _determ_token=uuid.uuid4().hex), tuple(values), frozenset(), is_value=True)
