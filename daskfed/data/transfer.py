"""Bringing keys from one site's agent to another's: directly where it can be reached, else through the hub.

:class:`Source` is the side that has them: it gets values from the workers of its site and streams them.
:class:`Fetcher` is the side that wants them. Values stay unopened (see :mod:`daskfed.data.parcels`); each message is
read only when the one before it was taken, so a slow receiver slows the sender down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from daskfed.comm.opaque import OpaqueError, OpaquePool
from daskfed.config import largest_message
from daskfed.data.parcels import Parcel, Unpacker, pack
from daskfed.ending import end_tasks
from daskfed.errors import TransferError
from daskfed.messages import Key

GROUP_BYTES = 8 * 2**20  # values that one request brings together, if they are as small as that
GROUP_KEYS = 2048
DIAL_TIMEOUT_S = 3.0  # how long a direct connection may take before the hub relays instead
UNREACHABLE_S = 60.0  # how long a site that could not be reached is not dialled again
STALLED_S = 30.0  # after which a stream from which nothing comes is given up, and asked for again
STREAMS_PER_SOURCE = 4  # requests to one site at a time

Gather = Callable[[list[Key]], Awaitable[Mapping[Key, Any]]]
Deliver = Callable[["Arrival"], None]


@dataclass(frozen=True, slots=True)
class Arrival:
    """What became of one wanted key: its parcel, or why it could not be had."""

    key: Key
    source: str  # site
    parcel: Parcel | None
    reason: str  # empty if it arrived
    seconds: float  # since it was asked for, or since the key before it in the same stream arrived
    relayed: bool  # it came through the hub
    missing: bool = False  # the site does not have it


@dataclass(frozen=True, slots=True)
class Door:
    """Where an agent can be dialled, and what it wants to be shown; no address: only the hub may be asked."""

    address: str
    token: str = field(default="", repr=False)


class Directory(Protocol):
    """What a fetcher needs of the hub."""

    async def door_of(self, site: str) -> Door:
        """Return where the agent of ``site`` can be dialled. Raises OSError."""
        ...

    def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of a stream of keys of ``site`` that comes through the hub."""
        ...


# -- the side that has the keys --------------------------------------------------------------------------------------


class Source:
    """Streams keys of this site; ``gather`` gets unopened values from its workers, ``size_of`` tells expected bytes."""

    def __init__(self, gather: Gather, size_of: Callable[[Key], int]) -> None:
        self.gather = gather
        self.size_of = size_of

    async def stream(self, keys: Collection[Key], checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages with ``keys``; without checksums if not ``checked``.

        While one group of values is taken, the next one comes from the workers.
        """
        groups = list(grouped([(key, self.size_of(key)) for key in keys]))
        coming = self._ask(groups, 0)
        try:
            for n, group in enumerate(groups):
                assert coming is not None
                values, coming = dict(await coming), self._ask(groups, n + 1)
                messages = list(_messages_of(group, values, checked))
                for message in messages:
                    last = coming is None and message is messages[-1]
                    yield {**message, "end": True} if last else message
            if not groups:
                yield {"end": True}
        finally:
            await end_tasks(coming)

    def _ask(self, groups: Sequence[list[Key]], n: int) -> asyncio.Task[Mapping[Key, Any]] | None:
        async def ask() -> Mapping[Key, Any]:
            return await self.gather(groups[n])

        return asyncio.create_task(ask(), name="gather from workers") if n < len(groups) else None


def _messages_of(keys: Collection[Key], values: dict[Key, Any], checked: bool) -> Iterator[dict[str, Any]]:
    if absent := [key for key in keys if key not in values]:
        yield {"missing": dict.fromkeys(absent, "it is not in memory at its site")}
    yield from pack({key: Parcel.of(values.pop(key), checked) for key in keys if key in values})


def grouped(
    sized: Sequence[tuple[Key, int]], most_bytes: int = GROUP_BYTES, most_keys: int = GROUP_KEYS
) -> Iterator[list[Key]]:
    """Yield groups of so many keys and bytes at most; a larger value is a group of its own."""
    group: list[Key] = []
    nbytes = 0
    for key, size in sized:
        if group and (nbytes + size > most_bytes or len(group) >= most_keys):
            yield group
            group, nbytes = [], 0
        group.append(key)
        nbytes += size
    if group:
        yield group


# -- the side that wants them ----------------------------------------------------------------------------------------


class Fetcher:
    """Fetches keys from other sites and hands each to ``deliver`` as it arrives, or why it did not.

    ``connection_args`` are for dialling other agents.
    """

    def __init__(self, directory: Directory, deliver: Deliver, connection_args: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.deliver = deliver
        self._doors: dict[str, Door] = {}
        self._unreachable: dict[str, float] = {}  # site -> when to dial it again
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = OpaquePool(limit=64, timeout=DIAL_TIMEOUT_S, connection_args=connection_args)

    async def start(self) -> None:
        """Get ready; needed before the first fetch."""
        await self._pool.start()

    def fetch(self, source: str, sized: Sequence[tuple[Key, int]]) -> None:
        """Start to bring keys, given with their expected bytes, from the site ``source``."""
        for group in grouped(sized):
            task = asyncio.create_task(self._fetch_group(source, group), name=f"fetch from {source}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def forget(self, site: str) -> None:
        """Ask the hub anew where a site is, the next time that something is fetched from it."""
        self._doors.pop(site, None)

    async def close(self) -> None:
        """Give up what is under way."""
        await end_tasks(*self._tasks)
        await self._pool.close()

    async def _fetch_group(self, source: str, keys: list[Key]) -> None:
        async with self._slots.setdefault(source, asyncio.Semaphore(STREAMS_PER_SOURCE)):
            request = _Request(source, dict.fromkeys(keys), time.monotonic())
            reason = await self._direct(request)
            if request.pending and reason is None:
                reason = await self._relayed(request)
        for key in list(request.pending):
            self.deliver(Arrival(key, source, None, reason or "the stream ended early", 0.0, request.relayed))

    async def _direct(self, request: _Request) -> str | None:
        """Fetch over a direct connection; returns None where there is none, else why keys are still pending."""
        known = request.source in self._doors
        try:
            door = await self._door_of(request.source)
        except (OSError, OpaqueError) as exc:
            return f"the hub does not say where site {request.source!r} is: {exc}"
        if not door.address:
            return None
        try:
            comm = await self._pool.connect(door.address)
        except (OSError, ValueError, TypeError):  # TypeError: it wants TLS, and there is no certificate here
            self.forget(request.source)
            if known:  # it may have another address since it was asked for
                return await self._direct(request)
            self._not_reached(request.source)
            return None
        return await self._receive_from(comm, door, request)

    def _not_reached(self, site: str) -> None:
        self._unreachable[site] = time.monotonic() + UNREACHABLE_S

    async def _receive_from(self, comm: Any, door: Door, request: _Request) -> str | None:
        keys = list(request.pending)
        try:
            await comm.write(
                {"op": "get_keys", "site": request.source, "keys": keys, "token": door.token, "reply": False}
            )
            return await self._receive(_messages(comm), request)
        except _StrangerError:  # of two private networks, in which the same address is another machine
            self.forget(request.source)
            self._not_reached(request.source)
            return None
        except OSError as exc:
            comm.abort()
            if isinstance(exc, TransferError) and len(request.pending) == len(keys):
                self.forget(request.source)  # nothing came: whoever is there, it may not be the site
                self._not_reached(request.source)
                return None
            return f"the connection with site {request.source!r} broke: {exc}"
        except asyncio.CancelledError:
            comm.abort()
            raise
        finally:
            self._pool.reuse(door.address, comm)

    async def _door_of(self, source: str) -> Door:
        if self._unreachable.get(source, 0.0) > time.monotonic():
            return Door("")
        if source not in self._doors:
            self._doors[source] = await self.directory.door_of(source)
        return self._doors[source]

    async def _relayed(self, request: _Request) -> str:
        request.relayed = True
        try:
            return await self._receive(self.directory.relay(request.source, list(request.pending)), request)
        except (OSError, OpaqueError) as exc:
            return f"the hub could not relay from site {request.source!r}: {exc}"

    async def _receive(self, messages: AsyncIterator[dict[str, Any]], request: _Request) -> str:
        """Deliver what a stream brings; returns why the rest is missing. Raises OSError where it breaks off."""
        unpacker = Unpacker(largest_message())
        async for message in _lively(messages):
            if message.get("stranger"):
                raise _StrangerError(message.get("error"))
            for key, parcel in unpacker.take(message).items():
                self._arrived(request, key, parcel, "")
            for key, reason in message.get("missing", {}).items():
                self._arrived(request, key, None, reason)
            if message.get("end"):
                return str(message.get("error") or "the stream ended early")
        raise TransferError(f"the stream from site {request.source!r} broke off")

    def _arrived(self, request: _Request, key: Key, parcel: Parcel | None, reason: str) -> None:
        if key in request.pending:
            del request.pending[key]
            seconds = request.lap()
            self.deliver(Arrival(key, request.source, parcel, reason, seconds, request.relayed, missing=bool(reason)))


class _StrangerError(Exception):
    """Another site answers, or one of another federation."""


@dataclass(slots=True)
class _Request:
    """Keys that are asked of one site together."""

    source: str
    pending: dict[Key, None]
    since: float  # when it was made, or the last key arrived
    relayed: bool = False

    def lap(self) -> float:
        """Return the seconds since the last key arrived: together they add up to the time of the whole request."""
        now = time.monotonic()
        seconds, self.since = now - self.since, now
        return seconds


async def _messages(comm: Any) -> AsyncIterator[dict[str, Any]]:
    while True:
        yield await comm.read()


async def _lively(messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Yield messages; raises TransferError where the next one does not come for a long time."""
    while True:
        try:
            async with asyncio.timeout(STALLED_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise TransferError(f"nothing came for {STALLED_S:g} s") from None
        yield message
