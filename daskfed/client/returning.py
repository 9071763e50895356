"""What a client remembers so that its work outlives its connection, and its hub: its blocks and its scattered data.

The hub forgets nothing while it lives, but it may be killed. A client keeps each block that it has submitted until the
hub says that it will never be needed again, and tells them all to a hub that does not know them.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from distributed.comm.core import CommClosedError
from distributed.protocol.serialize import deserialize

from daskfed.client.gathering import Stream
from daskfed.client.graphs import BlockExpr
from daskfed.client.lanes import calls_of
from daskfed.client.submission import Submission
from daskfed.comm.opaque import OpaqueError
from daskfed.config import client_memory
from daskfed.data.spill import Spilled
from daskfed.messages import COORDINATION, REQUEST, SESSION, BlockSpec, Key, encode

NOTICED_S = 2.0  # within which a client notices that its hub is gone, after a call to it has failed
ASK_AGAIN_S = (0.1, 0.3, 0.6, 1.0)  # pauses before a gather asks again for what could not be had
PAUSE_S = (0.05, 2.0)  # first and longest pause between attempts to reach a hub that is gone


@dataclass(slots=True)
class Kept:
    """A block that may be needed again."""

    spec: BlockSpec
    arrival: int = 0  # the number that a hub gave it
    epoch: int = 0  # of that hub


class Memory:
    """The blocks of one client, in the order of submission, and copies of the data that it scattered.

    Of each, as many bytes stay in memory as the configuration says; the rest goes to disk.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, Kept] = {}
        self.payloads = Spilled(client_memory())
        self.data = Spilled(client_memory())
        self.keys: dict[Key, str] = {}  # of the data -> name in ``data``
        self.sending: Counter[Key] = Counter()  # of the data: how often it is being scattered at the moment
        self._names = itertools.count()

    def keep(self, submission: Submission) -> None:
        """Keep the blocks of a submission."""
        for spec, payload in zip(submission.blocks, submission.payloads, strict=True):
            self.blocks[spec.id] = Kept(spec)
            self.payloads[spec.id] = payload

    def opened(self) -> Iterator[tuple[BlockSpec, Mapping[Key, Any]]]:
        """Yield the blocks with their tasks, the newest first."""
        for name in reversed(list(self.blocks)):
            spec, payload = self.blocks[name].spec, self.payloads[name]
            yield spec, calls_of(spec, payload) if "calls" in payload else _tasks_of(payload["expr"])

    def forget(self, block: str) -> None:
        """The hub will never need a block again."""
        self.blocks.pop(block, None)
        self.payloads.pop(block, None)

    def keep_data(self, data: Mapping[Key, Any]) -> None:
        """Keep a copy of what is scattered."""
        for key, value in data.items():
            if key not in self.keys:
                self.keys[key] = name = str(next(self._names))
                self.data[name] = value

    @contextmanager
    def scattering(self, data: Mapping[Key, Any]) -> Iterator[None]:
        """Keep a copy of what is scattered, and do not drop it meanwhile."""
        self.keep_data(data)
        self.sending.update(data.keys())
        try:
            yield
        finally:
            self.sending.subtract(data.keys())
            self.sending += Counter()  # without those that are zero

    def drop_data(self, keys: Collection[Key]) -> None:
        """Nobody will need these copies again, unless their keys are being scattered again meanwhile."""
        for key in keys:
            if key not in self.sending and (name := self.keys.pop(key, None)) is not None:
                del self.data[name]

    def copies(self, keys: Collection[Key]) -> dict[Key, Any]:
        """Return those of ``keys`` of which there is a copy."""
        return {key: self.data[self.keys[key]] for key in keys if key in self.keys}

    def close(self) -> None:
        """Forget everything."""
        self.payloads.close()
        self.data.close()

    def arrived(self, block: str, arrival: int, count: int, epoch: int) -> None:
        """A hub has numbered ``count`` blocks that were submitted together, from ``block`` on."""
        stem, first = block.rsplit("/", 1)
        for n in range(count):
            if (kept := self.blocks.get(f"{stem}/{int(first) + n}")) is not None:
                kept.arrival, kept.epoch = arrival + n, epoch

    def bound(self, sites: Mapping[str, Collection[str]]) -> None:
        """A hub has bound blocks, by name, to the sites of the workers that they name."""
        for block, there in sites.items():
            if (kept := self.blocks.get(block)) is not None:
                kept.spec = replace(kept.spec, constraint=replace(kept.spec.constraint, sites=tuple(there)))

    def message(self, epoch: int, wanted: Collection[Key]) -> dict[str, Any]:
        """Return what a client says when it is back at a hub of this epoch."""
        unknown = [block for block in self.blocks.values() if block.epoch != epoch]
        return {
            "op": "fed-back",
            "blocks": [encode(block.spec) for block in unknown],
            "arrivals": [block.arrival for block in unknown],
            "payloads": [self.payloads[block.spec.id] for block in unknown],
            "wanted": list(wanted),
            "kept": list(self.keys),
        }


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many sites are to hold what is scattered; it travels among the workers, as stock takes nothing else."""

    count: int


_dialling: ContextVar[str] = ContextVar("dialling", default="")


@contextmanager
def dialled_at(address: str) -> Iterator[None]:
    """Have who dials the hub meanwhile, in this task, dial it at another address, if one is given."""
    token = _dialling.set(address)
    try:
        yield
    finally:
        _dialling.reset(token)


class PatientRPC:
    """The calls of a client to its hub: while the hub is gone, and the client tries to reach it, they wait.

    What is asked again then is done once: calls of coordination carry an id of their own. ``rpc`` makes a call,
    ``status`` is the client's: ``connecting`` while it tries, ``running`` also for a moment after the hub is gone.
    ``memory`` keeps what is scattered; ``mark`` sets a mark on the client's stream and returns its number. ``secret``
    goes with each call, and says whose it is. Values come by ``stream``, where there is one.
    """

    def __init__(
        self,
        rpc: Any,
        status: Callable[[], str],
        memory: Memory,
        mark: Callable[[], int],
        secret: str = "",
        stream: Stream | None = None,
    ) -> None:
        self._rpc = rpc
        self._stream = stream
        self._mark = mark
        self._secret = {SESSION: secret} if secret else {}
        self._status = status
        self._memory = memory

    @property
    def address(self) -> str:
        """Where the hub is."""
        return _dialling.get() or str(self._rpc.address)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._rpc, name)
        if not callable(found) or name.startswith("_"):
            return found

        async def call(**kwargs: Any) -> Any:
            if name.startswith(COORDINATION):
                kwargs[REQUEST] = secrets.token_hex(8)
            if name != "identity":  # which is asked before it is known that a hub answers
                kwargs |= self._secret
            return await self._patiently(found, kwargs)

        return call

    async def _patiently(self, call: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
        first_failed: float | None = None
        for pause in pauses():
            try:
                return await call(**kwargs)
            except OSError as exc:
                first_failed = first_failed or time.monotonic()
                if not self._may_pass(exc, time.monotonic() - first_failed):
                    raise
                await asyncio.sleep(pause)

    def _may_pass(self, exc: OSError, since_s: float) -> bool:
        """Whether an error means that the hub is gone, and may come back."""
        status = self._status()
        return status == "connecting" or (status == "running" and is_broken(exc) and since_s < NOTICED_S)

    async def scatter(self, data: Mapping[Key, Any], workers: Any, **how: Any) -> Any:
        """Put data at a site, and keep a copy until the hub says that nobody can need it any more."""
        places = [each for each in workers or () if not isinstance(each, Replicas)]
        replicas = max((each.count for each in workers or () if isinstance(each, Replicas)), default=1)
        added = [key for key in data if key not in self._memory.keys]
        if len(added) < len(data):  # it is there, and may have been released a moment ago
            how["mark"] = self._mark()
        try:
            with self._memory.scattering(data):
                request = {**how, "data": data, "workers": places, "kept": True, "replicas": replicas, **self._secret}
                return await self._patiently(self._rpc.scatter, request)
        except BaseException:
            self._memory.drop_data(added)
            raise

    async def gather(self, keys: Collection[Key], **how: Any) -> Any:
        """Return values as a scheduler's ``gather`` does."""
        if self._stream is not None:
            with suppress(OpaqueError):  # asked in the plain way, the hub answers with an error that can be raised
                return await self._gather_streamed(self._stream, keys)
        return await self._patiently(self._rpc.gather, {"keys": keys, **how, **self._secret})

    async def _gather_streamed(self, stream: Stream, keys: Collection[Key]) -> dict[str, Any]:
        """Gather, and ask a few times for what could not be had: a site that is away may be back in a moment."""
        values: dict[Key, Any] = {}
        missing = list(keys)
        for pause in ASK_AGAIN_S:
            values |= await self._patiently(stream.gather, {"keys": missing, **self._secret})
            missing = [key for key in keys if key not in values]
            if not missing:
                return {"status": "OK", "data": values}
            await asyncio.sleep(pause)
        return {"status": "error", "keys": missing}

    async def bring(self, copies: Mapping[Key, Any], client: str, timeout_s: float) -> None:
        """Put copies of data at a site, since the one that had it is gone."""
        request = {"data": copies, "workers": [], "client": client, "timeout": timeout_s, "again": True, **self._secret}
        await self._patiently(self._rpc.scatter, request)

    async def close_rpc(self) -> None:
        """End the connections."""
        if self._stream is not None:
            await self._stream.close()
        await self._rpc.close_rpc()


def _tasks_of(expr: Any) -> Mapping[Key, Any]:
    opened = deserialize(expr.header, expr.frames)
    return opened.tasks if isinstance(opened, BlockExpr) else opened.__dask_graph__()


def is_broken(exc: OSError) -> bool:
    """Whether a connection broke or was not made; an answer of the hub may be an OSError too."""
    return isinstance(exc, (CommClosedError, ConnectionError)) or type(exc) is OSError


def pauses() -> Any:
    """Yield pauses in seconds, each twice as long as the one before, up to the longest."""
    first, longest = PAUSE_S
    return (min(first * 2**n, longest) for n in itertools.count())


def wanted_keys(futures: Mapping[Key, Any], assemblies: Collection[Key]) -> list[Key]:
    """Return the keys that a client wants of its hub: those of its futures that are not assembled here or cancelled."""
    return [key for key, state in futures.items() if key not in assemblies and state.status != "cancelled"]
