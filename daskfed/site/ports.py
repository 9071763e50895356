"""How an agent reaches the hub: over connections that it dials, or in the same process.

Everything that goes between agent and hub rides on connections that the agent dials::

    control stream   ordered messages both ways, after ``register-site``
    channels         parked at the hub, for calls of the hub to the agent
    short calls      of the agent to the hub, pooled
    relays           streams of keys of other sites that cannot be dialled
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from distributed.comm.core import Comm, CommClosedError
from distributed.core import error_message

from daskfed.comm.control import ControlStream, Deliver
from daskfed.comm.opaque import MOST_CALLS, OpaqueError, OpaquePool, connect_opaque
from daskfed.comm.pacing import Paced, allow_pauses
from daskfed.ending import end_tasks
from daskfed.errors import ConnectionRefused, DaskfedError
from daskfed.messages import Key, Message, SiteEnds, SiteHello, encode

logger = logging.getLogger(__name__)

POLL_S = 0.002
IDLE_CHANNELS = 2
MOST_CHANNELS = 8  # beside those over which keys are streamed, as slowly as their reader takes them
CONNECT_TIMEOUT_S = 10.0
ROUND_TRIP_EVERY_S = 10.0


class HubPort(Protocol):
    """The hub, as the agent sees it."""

    epoch: int  # of the hub
    federation: str  # secret of its sites, which shows the hub that a call is one's
    door: str  # what agents show that fetch keys from this one

    def send(self, message: Message, payload: Any = None) -> None:
        """Queue a message for the hub, with what travels beside it."""
        ...

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the hub; raises OpaqueError as it raised, OSError where it is gone."""
        ...

    def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of a stream of keys of another site, which comes through the hub."""
        ...


class AgentSide(Protocol):
    """What the hub may ask of an agent over a channel."""

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler; raises what it raises."""
        ...

    def stream_keys(self, keys: list[Key], checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages of a stream of this site's keys."""
        ...


class RemoteHub:
    """A hub that is dialled, and dialled again when the connection breaks: what is sent then waits.

    ``find`` returns its address, which may change: that of a tunnel does.
    """

    def __init__(self, find: Callable[[], str], connection_args: Mapping[str, Any] | None = None) -> None:
        self._find = find
        self.address = find()  # that is or was dialled last
        self.connection_args = dict(connection_args or {})
        self.epoch = 0
        self.federation = ""
        self.door = ""
        self._round_trips: deque[float] = deque(maxlen=5)  # seconds
        self._pool = OpaquePool(limit=MOST_CALLS, timeout=CONNECT_TIMEOUT_S, connection_args=self.connection_args)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stream: ControlStream | None = None
        self._channels: Channels | None = None
        self.lost = asyncio.Event()  # the connection has ended
        self.found = asyncio.Event()  # there is one

    @property
    def round_trip_s(self) -> float:
        """Seconds for a message there and its answer, the best of the last few."""
        return min(self._round_trips, default=0.0)

    async def register(self, hello: SiteHello, agent: AgentSide, deliver: Deliver) -> bool:
        """Join the hub, or join it again; return whether it goes on where it was, or knows nothing of this site.

        Raises ConnectionRefused with its reason, OSError where nobody answers.
        """
        await self._hang_up()
        self.address = self._find()
        comm = await connect_opaque(self.address, timeout=CONNECT_TIMEOUT_S, **self.connection_args)
        comm.name = "Agent->Hub"
        reply = await self._introduce(comm, hello)
        self.epoch, self.federation, self.door = reply["epoch"], reply["federation"], reply["door"]
        await self._pool.start()
        resumed = self._stream is not None and reply["session"] == self._stream.session
        if self._stream is not None and resumed:
            self._stream.resume(comm, reply["received"])
        else:
            self._stream = ControlStream(comm, reply["session"], deliver)
        self._channels = Channels(lambda: self._park(hello), agent, self._received)
        self.lost.clear()
        self.found.set()
        self._start(self._serve(self._stream))
        self._start(self._measure_round_trip())
        self._channels.fill()
        return resumed

    def leave_where_moved(self) -> None:
        """End the connection where the hub has another address by now, so that it is dialled there."""
        if self._stream is not None and not self.lost.is_set() and self._find() != self.address:
            self._stream.comm.abort()

    def _received(self) -> int:
        return 0 if self._stream is None else self._stream.received

    async def _introduce(self, comm: Comm, hello: SiteHello) -> dict[str, Any]:
        had, received = ("", 0) if self._stream is None else (self._stream.session, self._stream.received)
        started = time.monotonic()
        stream = {"session": had, "received": received}
        await comm.write({"op": "register-site", "hello": encode(hello), "token": "", **stream, "reply": False})
        reply = await comm.read()
        self._round_trips.append(time.monotonic() - started)
        if not isinstance(reply, dict) or reply.get("status") != "OK":
            await comm.close()
            reason = reply.get("reason") if isinstance(reply, dict) else None
            raise ConnectionRefused(f"the hub at {self.address} refused: {reason or 'it is no daskfed hub'}")
        return reply

    async def _hang_up(self) -> None:
        """End what is left of the last connection."""
        if self._channels is not None:
            await self._channels.close()
        await end_tasks(*self._tasks)
        if self._stream is not None:
            self._stream.comm.abort()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: ControlStream) -> None:
        try:
            await stream.serve()
        except OSError as exc:
            logger.debug("control stream with %s ended: %s", self.address, exc)
        finally:
            self.found.clear()
            self.lost.set()

    async def _park(self, hello: SiteHello) -> Comm:
        comm = await connect_opaque(self.address, timeout=CONNECT_TIMEOUT_S, **self.connection_args)
        comm.name = "Agent->Hub channel"
        who = {"site": hello.site, "incarnation": hello.incarnation, "token": self.federation}
        await comm.write({"op": "park-channel", **who, "reply": False})
        return comm

    async def _measure_round_trip(self) -> None:
        while True:
            with suppress(OSError, OpaqueError):
                started = time.monotonic()
                await self.call("echo", data=None)
                self._round_trips.append(time.monotonic() - started)
            await asyncio.sleep(ROUND_TRIP_EVERY_S)

    def send(self, message: Message, payload: Any = None) -> None:
        """Queue a message on the control stream."""
        assert self._stream is not None, "the site is not registered yet"
        self._stream.send(message, payload)

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the hub; raises OpaqueError as it raised, OSError where it is gone."""
        return await self._pool.call(self.address, op, **kwargs)

    async def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of a stream of keys of another site, which comes through the hub."""
        address = self.address  # which may be another one in the end
        comm = await self._pool.connect(address)
        ended = False
        try:
            request = {"op": "relay-fetch", "site": site, "keys": keys, "token": self.federation, "reply": False}
            await comm.write(request)
            while not ended:
                message = await comm.read()
                ended = bool(message.get("end"))
                yield message
        finally:
            if not ended:
                comm.abort()  # what comes late must not be taken for the next answer
            self._pool.reuse(address, comm)

    async def close(self) -> None:
        """Send what is queued and end all connections."""
        if self._stream is not None and not self.lost.is_set():
            self._stream.send(SiteEnds())
            await self._stream.flush(timeout_s=2.0)
            with suppress(OSError):
                await self._stream.comm.close()
        await self._hang_up()
        await self._pool.close()
        self.lost.set()


class Channels:
    """Connections parked at the hub, on which it calls the agent: some always idle, a bounded number for calls.

    How many streams there are is for the hub to say: no call waits for one.
    ``received`` counts the messages of the control stream: a call may ask to be served ``after`` some of them.
    """

    def __init__(
        self, park: Callable[[], Awaitable[Comm]], agent: AgentSide, received: Callable[[], int] = lambda: 0
    ) -> None:
        self.park = park
        self.agent = agent
        self.received = received
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = 0
        self._streaming = 0

    def fill(self) -> None:
        """Open channels until enough are idle."""
        while self._idle < IDLE_CHANNELS and len(self._tasks) - self._streaming < MOST_CHANNELS:
            self._idle += 1
            task = asyncio.create_task(self._keep_one(), name="channel")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End all channels."""
        await end_tasks(*self._tasks)

    async def _keep_one(self) -> None:
        """Serve one channel; when it breaks while the hub is still there, another is opened with the next call."""
        idle = True
        try:
            comm = await self.park()
            try:
                while True:
                    request = await comm.read()
                    idle, self._idle = False, self._idle - 1
                    self.fill()
                    await self._answer(comm, request)
                    idle, self._idle = True, self._idle + 1
            finally:
                comm.abort()
        except OSError as exc:
            logger.debug("a channel ended: %s", exc)
        finally:
            self._idle -= idle

    async def _answer(self, comm: Comm, request: dict[str, Any]) -> None:
        op, reply, after = request.pop("op"), request.pop("reply", True), request.pop("after", 0)
        while self.received() < after:  # a connection that breaks meanwhile ends this channel too
            await asyncio.sleep(POLL_S)
        if op == "get_keys":
            await self._stream(comm, list(request["keys"]), bool(request.get("checked", True)))
            return
        answer: Any
        try:
            answer = await self.agent.call(op, **request)
        except OpaqueError as exc:
            answer = exc.reply()
        except CommClosedError:
            raise  # the scheduler is gone, and with it the site: the channel ends, which tells the hub so
        except DaskfedError as exc:
            logger.info("the hub's call %r was refused: %s", op, exc)
            answer = error_message(exc, status="uncaught-error")
        except Exception as exc:
            logger.exception("the hub's call %r failed", op)
            answer = error_message(exc, status="uncaught-error")
        if reply:
            await comm.write(answer)

    async def _stream(self, comm: Comm, keys: list[Key], checked: bool) -> None:
        self._streaming += 1
        self.fill()
        allow_pauses(comm)  # where many sites stream to one client, each waits for its turn
        try:
            await Paced(comm).write_all(self.agent.stream_keys(keys, checked))
        finally:
            self._streaming -= 1
