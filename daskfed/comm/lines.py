"""The sockets below ``zmq://``: lines that this process dials, and those that others dial to it.

A :class:`Line` is a :class:`~daskfed.comm.multiplex.Multiplexer` and what it has of the network at present. One that
breaks is dialled again for a while and goes on where it was. Lines are encrypted and authenticated with CurveZMQ
(RFC 26, https://rfc.zeromq.org/spec/26/), and then go on only for the same key; without keys they end where they break.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket as sockets
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import Any

import dask
import zmq
from dask.utils import parse_timedelta
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.utils import get_ip, get_ipv6
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from daskfed.comm import multiplex as mux
from daskfed.dask_private import FatalCommClosedError
from daskfed.errors import KeyFileError
from daskfed.keys import Authorized, KeyFolder, KeyPair, Role, parsed, written

logger = logging.getLogger(__name__)

PREFIX = "zmq://"
TICK_S = 0.5
PING_AFTER_S = 5.0  # of silence
BREAK_AFTER_S = 15.0
IDLE_S = 10.0  # a line without channels is kept so long
RETRY_S = (0.05, 2.0)  # the first pause before a line is dialled again, and the longest
DIAL_S = 10.0
CUT_OFF_TRIES = 3
ANSWER_S = 30.0  # the key of a token ends with its use, the line a while later: the answer is under way
PING_AT_S = (0.0, 0.05, 0.5)  # after somebody was cut off
BATCH = 200  # packets that are taken in before others have their turn
ZERO_COPY = 64 * 2**10  # bytes
LINGER_MS = 1000
READABLE = int(zmq.POLLIN)
WAITING = 1000  # packets that arrived and are not taken in yet, of each peer
ZAP = "inproc://zeromq.zap.01"
FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
ENDS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | FAILURES


def resume_s() -> float:
    """Return how long a broken line is dialled again before its comms end, in seconds.

    ``daskfed.comm.resume`` in Dask's configuration, by default "10s".
    """
    return float(parse_timedelta(dask.config.get("daskfed.comm.resume", "10s")))


# -- sockets on an event loop ----------------------------------------------------------------------------------------


class Reactor:
    """What an event loop has of zmq: a context, the lines that it dialled, and a clock for all its lines."""

    _of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Reactor] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.context: zmq.Context[Any] = zmq.Context()
        self.dialled: dict[tuple[str, bytes, bytes], DialledLine] = {}
        self.ticking: set[Line | ListeningSocket] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._gate: Gate | None = None

    @classmethod
    def running(cls) -> Reactor:
        """Return that of the running loop."""
        loop = asyncio.get_running_loop()
        for ended in [each for each in list(cls._of) if each.is_closed()]:
            cls._of.pop(ended).context.destroy(linger=0)
        if loop not in cls._of:
            cls._of[loop] = cls(loop)
        return cls._of[loop]

    def line_to(self, where: str, own: KeyPair | None, hub: bytes | None) -> DialledLine:
        """Return the line to an address with these keys, which is dialled if there is none."""
        name = (where, own.public if own else b"", hub or b"")
        if name not in self.dialled:
            self.dialled[name] = DialledLine(self, name, own, hub)
        return self.dialled[name]

    @property
    def gate(self) -> Gate:
        """Who decides which keys are let in."""
        if self._gate is None:
            self._gate = Gate(self)
        return self._gate

    def tick_for(self, who: Line | ListeningSocket) -> None:
        """Call ``who.tick`` every now and then, until it is taken out of :attr:`ticking`."""
        self.ticking.add(who)
        if self._timer is None:
            self._timer = self.loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(TICK_S, self._tick) if self.ticking else None
        for who in list(self.ticking):
            who.tick(time.monotonic())


class Pipe:
    """A socket whose messages are given to ``receive`` one by one; it reads one, or raises zmq.Again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[Any], receive: Callable[[], None]) -> None:
        self.loop = loop
        self.socket = socket
        self.after: Callable[[], None] = _nothing  # called when some were received
        self._receive = receive
        self._soon = False
        self._descriptor = socket.getsockopt(zmq.FD)
        loop.add_reader(self._descriptor, self._check)

    def check_soon(self) -> None:
        """Look for messages if there are some: whatever is done with a socket may swallow the sign of them."""
        if not self._soon and not self.socket.closed and self.socket.getsockopt(zmq.EVENTS) & READABLE:
            self._soon = True
            self.loop.call_soon(self._check)

    def _check(self) -> None:
        self._soon = False
        try:
            for _ in range(BATCH):
                if self.socket.closed:
                    return
                self._receive()
        except zmq.Again:
            pass
        except Exception:
            logger.exception("what came over zmq:// could not be taken in")
            self.loop.call_later(RETRY_S[0], self._check)
        else:
            self.check_soon()
        self.after()

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Close the socket; what was sent last still leaves."""
        if not self.socket.closed:
            self.loop.remove_reader(self._descriptor)
            self.socket.close(linger_ms)


class Monitor:
    """Tells what becomes of a socket's connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[Any], events: int, tell: Any) -> None:
        self._watched = socket
        self._tell = tell
        self._pipe = Pipe(loop, socket.get_monitor_socket(events), self._receive)
        self._pipe.check_soon()

    def _receive(self) -> None:
        event = parse_monitor_message(self._pipe.socket.recv_multipart(zmq.NOBLOCK))
        self._tell(int(event["event"]))

    def close(self) -> None:
        """Stop watching; before the socket itself is closed."""
        if not self._watched.closed:
            self._watched.disable_monitor()
        self._pipe.close(0)


class Gate:
    """Answers for all listeners of a context whether a key is let in (ZAP, RFC 27)."""

    def __init__(self, reactor: Reactor) -> None:
        self.listening: dict[bytes, ListeningSocket] = {}  # by ZAP domain
        socket = reactor.context.socket(zmq.REP)
        socket.bind(ZAP)
        self._pipe = Pipe(reactor.loop, socket, self._receive)

    def _receive(self) -> None:
        version, request, domain, _, _, mechanism, *credentials = self._pipe.socket.recv_multipart(zmq.NOBLOCK)
        listening = self.listening.get(domain)
        try:
            admitted = listening is not None and mechanism == b"CURVE" and listening.admits(credentials[0])
        except Exception:  # it must be answered, or nobody is heard any more
            logger.exception("whether a key is let in could not be found out")
            admitted = False
        status = (b"200", b"OK") if admitted else (b"400", b"this key is not let in")
        user = written(credentials[0]).encode() if admitted else b""
        self._pipe.socket.send_multipart([version, request, *status, user, b""])
        self._pipe.check_soon()


# -- lines -----------------------------------------------------------------------------------------------------------


class Line:
    """A multiplexer, and what it has of the network at present."""

    def __init__(self, reactor: Reactor, multiplexer: mux.Multiplexer, local: str, peer: str) -> None:
        self.reactor = reactor
        self.multiplexer = multiplexer
        self.local = local  # host and port of this end
        self.peer = peer  # and of the other one
        self.who: Authorized | None = None  # at the other end, by key
        self.broke_at = 0.0
        reactor.tick_for(self)

    def send(self, parts: list[mux.Buffer]) -> None:
        """Hand a packet to the socket."""
        raise NotImplementedError

    def pump(self) -> None:
        """Send all that can be sent now."""
        outgoing = self.multiplexer.outgoing
        while (parts := outgoing(time.monotonic())) is not None:
            self.send(parts)

    def take(self, parts: list[mux.Buffer]) -> None:
        """Take in a packet."""
        try:
            self.multiplexer.incoming(parts, time.monotonic())
        except mux.ProtocolError as exc:
            logger.warning("Ended the connection with %s: %s", self.peer, exc)
            self.end(f"the other end does not keep to the protocol: {exc}")
        if not self.multiplexer.alive:
            self.end("the other end has ended")

    def tick(self, now: float) -> None:
        """See how the line is."""
        multiplexer = self.multiplexer
        if not multiplexer.alive:
            self.reactor.ticking.discard(self)
        elif multiplexer.connected:
            if now - multiplexer.heard_at > BREAK_AFTER_S:
                self.broke("nothing was heard for long")
            elif now - multiplexer.heard_at > PING_AFTER_S:
                self.send(multiplexer.tell(mux.Kind.PING))
            elif multiplexer.owes_answer:
                self.send(multiplexer.tell(mux.Kind.ACK))
        elif now - self.broke_at > self.patience_s:
            self.end("the connection broke, and could not be made again")

    @property
    def patience_s(self) -> float:
        """How long a broken line is waited for."""
        return resume_s()

    def broke(self, why: str) -> None:
        """The line is down."""
        if self.multiplexer.connected:
            logger.info("the connection with %s broke: %s", self.peer, why)
            self.multiplexer.broke()
            self.broke_at = time.monotonic()

    def end(self, reason: str) -> None:
        """The line is of the past, and all comms over it."""
        if self.multiplexer.alive:
            if self.multiplexer.connected:
                self.send(self.multiplexer.tell(mux.Kind.BYE))
            self.multiplexer.end(reason)
        self.reactor.ticking.discard(self)


class _CutOffError(FatalCommClosedError):
    """The connection ended before both ends knew each other."""


class DialledLine(Line):
    """A line that this end dials, again where it breaks."""

    def __init__(
        self, reactor: Reactor, name: tuple[str, bytes, bytes], own: KeyPair | None, hub: bytes | None
    ) -> None:
        local = bracketed(ip_towards(parse_host_port(name[0])[0]))
        super().__init__(reactor, mux.Multiplexer(secrets.token_bytes(16), dialled=True), local, name[0])
        self.name = name  # as the reactor has it
        self._keys = (own, hub)
        self._pipe: Pipe | None = None
        self._monitor: Monitor | None = None
        self._shaken = False  # hands, at the level of zmq
        self._answer: asyncio.Future[None] = reactor.loop.create_future()
        self._down = asyncio.Event()
        self._idle_since = time.monotonic()
        self.ready: asyncio.Future[None] = reactor.loop.create_future()
        self._task = reactor.loop.create_task(self._keep())
        self.broke_at = time.monotonic()

    async def _keep(self) -> None:
        pause, tries = RETRY_S[0], 0
        while self.multiplexer.alive:
            self._down.clear()
            try:
                async with asyncio.timeout(DIAL_S):
                    await self._dial()
            except (OSError, zmq.ZMQError) as error:
                exc = error if isinstance(error, OSError) else OSError(error.errno, str(error))
                self._hang_up()
                tries += 1
                if self._is_final(exc, tries):
                    self._fail(exc)
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_S[1])
                continue
            pause, tries = RETRY_S[0], 0
            if not self.ready.done():
                self.ready.set_result(None)
            await self._down.wait()
            self._hang_up()

    def _is_final(self, exc: OSError, tries: int) -> bool:
        """Whether it is no use to dial again: who was cut off may have the wrong key, or a bad line."""
        if isinstance(exc, _CutOffError):
            return not self.ready.done() and tries >= CUT_OFF_TRIES
        return not self.ready.done() or isinstance(exc, FatalCommClosedError)

    async def _dial(self) -> None:
        own, hub = self._keys
        socket = self.reactor.context.socket(zmq.DEALER)
        _prepare(socket, self.peer)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if own is not None and hub is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, z85.encode(hub))
            socket.setsockopt(zmq.CURVE_PUBLICKEY, z85.encode(own.public))
            socket.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(own.secret))
        self._answer, self._shaken = self.reactor.loop.create_future(), False
        self._pipe = Pipe(self.reactor.loop, socket, self._receive)
        self._pipe.after = self.pump
        self._monitor = Monitor(self.reactor.loop, socket, ENDS | zmq.EVENT_HANDSHAKE_SUCCEEDED, self._event)
        socket.connect(f"tcp://{self.peer}")
        greeting = mux.GREETING.pack(mux.PROTOCOL, self.multiplexer.session)
        self.send(self.multiplexer.tell(mux.Kind.HELLO, body=greeting))
        await self._answer

    def _receive(self) -> None:
        assert self._pipe is not None
        parts = _received(self._pipe.socket)
        if self.multiplexer.connected:
            self.take(parts)
            return
        kind, flags, _, _, received = mux.read_header(memoryview(parts[0]))
        if self._answer.done():
            return
        if kind == mux.Kind.REFUSED:
            reason = str(memoryview(parts[0])[mux.HEADER.size :], "utf-8", "replace")
            self._answer.set_exception(FatalCommClosedError(f"{self.peer} refused the connection: {reason}"))
        elif kind == mux.Kind.WELCOME:
            if self.ready.done() and not flags & mux.RESUMED:
                self._answer.set_exception(FatalCommClosedError(f"{self.peer} has started anew"))
                return
            self.multiplexer.goes_on(received, time.monotonic())
            self._answer.set_result(None)

    def _event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._shaken = True
        elif self.multiplexer.connected:
            self._drain()
            self.broke("it was cut")
        elif not self._answer.done():
            self._answer.set_exception(self._why_not(event))

    def _drain(self) -> None:
        """Take in what has arrived already."""
        with suppress(zmq.Again):
            while self._pipe is not None and self.multiplexer.connected:
                self._receive()

    def _why_not(self, event: int) -> OSError:
        if event & FAILURES or (event == zmq.EVENT_DISCONNECTED and not self._shaken):
            own, hub = self._keys
            if own is None or hub is None:
                why = "it wants encrypted connections: daskfed keys trust ADDRESS KEY tells which key it has"
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                why = f"it does not let in the key {written(own.public)}: daskfed keys authorize does, where the hub is"
            else:
                why = f"its key is not {written(hub)}, or it has none"
            kind = FatalCommClosedError if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH else _CutOffError
            refused: OSError = kind(f"no connection with {PREFIX}{self.peer}: {why}")
            return refused
        return ConnectionRefusedError(f"nobody answers at {PREFIX}{self.peer}")

    def _fail(self, exc: OSError) -> None:
        if not self.ready.done():
            self.ready.set_exception(exc)
            self.ready.exception()  # nobody may be there any more to hear of it
        self.end(str(exc))

    def _hang_up(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self._pipe is not None:  # what is sent again must not come late by the old connection
            self._pipe.close(0 if self.multiplexer.alive else LINGER_MS)
        self._pipe = self._monitor = None

    def send(self, parts: list[mux.Buffer]) -> None:
        """Hand a packet to the socket."""
        if self._pipe is None:
            return
        try:
            _send(self._pipe.socket, parts)
        except zmq.Again:
            if self.multiplexer.connected:
                self.broke("it was cut")
            return  # while it is dialled the monitor tells why
        self._pipe.check_soon()

    @property
    def patience_s(self) -> float:
        """How long a broken line is dialled again; one that never was has its own limit."""
        return resume_s() if self.ready.done() else inf

    def tick(self, now: float) -> None:
        """See how the line is, and whether it is of use."""
        super().tick(now)
        if self.multiplexer.channels or not self.ready.done():
            self._idle_since = now
        elif now - self._idle_since > IDLE_S:
            self.end("it was of no use")

    def broke(self, why: str) -> None:
        """The line is down: dial it again, if the other end can know us again."""
        super().broke(why)
        if self._keys[0] is None:
            self.end(f"the connection broke: {why}")
        self._down.set()

    def end(self, reason: str) -> None:
        """The line is of the past."""
        super().end(reason)
        self._hang_up()
        self._down.set()
        if self.reactor.dialled.get(self.name) is self:
            del self.reactor.dialled[self.name]


class AcceptedLine(Line):
    """A line that the other end dialled."""

    def __init__(
        self, listening: ListeningSocket, multiplexer: mux.Multiplexer, route: bytes, local: str, peer: str
    ) -> None:
        self.listening = listening
        self.route = route
        self.barred_at: float | None = None  # when its key was first seen to be let in no more
        self._breaking = False
        super().__init__(listening.reactor, multiplexer, local, peer)

    def send(self, parts: list[mux.Buffer]) -> None:
        """Hand a packet to the socket."""
        try:
            _send(self.listening.socket, parts, self.route)
        except zmq.ZMQError as exc:
            if exc.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN, zmq.ENOTSOCK):
                raise
            self.broke("it was cut")
        self.listening.pipe.check_soon()

    def broke(self, why: str) -> None:
        """The line is down: who comes by its route is somebody else until they have shown who they are."""
        if self._breaking or not self.multiplexer.connected:
            return
        self._breaking = True
        self.listening.drain()
        self._breaking = False
        super().broke(why)
        self.listening.forget_route(self)
        if self.who is None and self.multiplexer.alive:
            self.end(f"the connection broke: {why}")

    def end(self, reason: str) -> None:
        """The line is of the past."""
        super().end(reason)
        self.listening.forget(self)


class ListeningSocket:
    """A socket that listens, and the lines that others have dialled to it."""

    def __init__(self, reactor: Reactor, where: str, keys: KeyFolder, opened: Callable[[Line, mux.Channel], None]):
        self.reactor = reactor
        self.keys = keys
        self.closing = False
        self._opened = opened
        self._own = keys.own("hub")
        self._domain = secrets.token_hex(8).encode()  # names this socket where it is asked who is let in
        self._seen = self._state()
        self._authorized = keys.authorized() if self._own else {}
        self._lines: dict[bytes, AcceptedLine] = {}  # by route
        self._sessions: dict[bytes, AcceptedLine] = {}
        self.socket: zmq.Socket[Any] = reactor.context.socket(zmq.ROUTER)
        _prepare(self.socket, where)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self._own is not None:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(self._own.secret))
            self.socket.setsockopt(zmq.ZAP_DOMAIN, self._domain)
            reactor.gate.listening[self._domain] = self
        try:
            self.socket.bind(f"tcp://{where}")
        except zmq.ZMQError as exc:
            self.socket.close(0)
            reactor.gate.listening.pop(self._domain, None)
            raise OSError(exc.errno, f"cannot listen on {PREFIX}{where}: {exc.strerror}") from exc
        self.endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        self.pipe = Pipe(reactor.loop, self.socket, self._receive)
        self.pipe.after = self._pump
        self._monitor = Monitor(reactor.loop, self.socket, zmq.EVENT_DISCONNECTED, self._event)
        self._busy: set[AcceptedLine] = set()
        self._pinging = False
        reactor.tick_for(self)

    # -- who is let in -----------------------------------------------------------------------------------------------

    def admits(self, public: bytes) -> bool:
        """Say whether a key is let in."""
        self._read_again()
        return self._entry(public) is not None

    def _entry(self, public: bytes) -> Authorized | None:
        entry = self._authorized.get(public)
        return entry if entry is not None and entry.valid(datetime.now(UTC)) else None

    def _state(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self.keys.authorized_file)
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_ino, found.st_size)

    def _read_again(self) -> None:
        if self._seen == (state := self._state()):
            return
        self._seen = state
        try:
            self._authorized = self.keys.authorized()
        except KeyFileError as exc:
            logger.error("Nobody new is let in: %s", exc)
            still = self.keys.named_in_file()
            self._authorized = {key: entry for key, entry in self._authorized.items() if written(key) in still}

    def tick(self, now: float) -> None:
        """See whether all are still let in, and whether it is the end."""
        if self._own is not None:
            self._read_again()
            for line in list(self._sessions.values()):
                if line.who is not None and self._entry(line.who.public) == line.who:
                    continue
                line.barred_at = line.barred_at or now
                if line.who is None or Role.JOIN not in line.who.roles or now - line.barred_at > ANSWER_S:
                    logger.info("the key of %s is not let in any more as it was", line.peer)
                    line.end("its key is not let in any more as it was")
        if self.closing and not self._sessions:
            self.close()

    # -- packets -----------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        route = self.socket.recv(zmq.NOBLOCK)
        line = self._lines.get(route)
        if line is None:
            self._greet(route)
            return
        line.take(_received(self.socket))
        self._busy.add(line)

    def _pump(self) -> None:
        busy, self._busy = self._busy, set()
        for line in busy:
            line.pump()

    def _greet(self, route: bytes) -> None:
        frame = self.socket.recv(zmq.NOBLOCK, copy=False)
        while self.socket.getsockopt(zmq.RCVMORE):
            self.socket.recv(zmq.NOBLOCK)
        head = frame.buffer
        if head.nbytes != mux.HEADER.size + mux.GREETING.size or head[0] != mux.Kind.HELLO:
            return
        received = mux.read_header(head)[4]
        protocol, session = mux.GREETING.unpack_from(head, mux.HEADER.size)
        user = _property(frame, "User-Id")
        self._read_again()
        who = self._entry(parsed(user)) if user else None
        if protocol != mux.PROTOCOL:
            self._refuse(route, f"it speaks version {mux.PROTOCOL} of the protocol, and not {protocol}")
        elif self._own is not None and who is None:
            self._refuse(route, "its key is not let in any more")
        elif self.closing:
            self._refuse(route, "it ends")
        else:
            self._welcome(route, session, received, _ends(frame), who)

    def _welcome(
        self, route: bytes, session: bytes, received: int, ends: tuple[str, str], who: Authorized | None
    ) -> None:
        line = self._sessions.get(session)
        if line is not None and (who is None or line.who != who):
            self._refuse(route, "this session is another's" if who else "without keys no session goes on")
            return
        if line is None:
            multiplexer = mux.Multiplexer(session, dialled=False)
            line = self._sessions[session] = AcceptedLine(self, multiplexer, route, *ends)
            line.who = who
            multiplexer.opened = partial(self._opened, line)
            flags = 0
        else:
            self._lines.pop(line.route, None)
            line.route, flags = route, mux.RESUMED
        self._lines[route] = line
        line.multiplexer.broke()
        line.send(line.multiplexer.tell(mux.Kind.WELCOME, flags))
        line.multiplexer.goes_on(received, time.monotonic())
        self._busy.add(line)

    def _refuse(self, route: bytes, reason: str) -> None:
        packet = mux.Packet(mux.Kind.REFUSED, body=reason.encode())
        with suppress(zmq.ZMQError):
            _send(self.socket, packet.encode(0), route)

    def _event(self, event: int) -> None:
        """A peer is gone, it is not said which: who does not take a message is, as soon as zmq knows it as well."""
        if not self._pinging:
            self._pinging = True
            for after_s in PING_AT_S:
                self.reactor.loop.call_later(after_s, self._ping, after_s == PING_AT_S[-1])

    def _ping(self, last: bool) -> None:
        self._pinging = not last
        for line in list(self._lines.values()):
            if line.multiplexer.connected:
                line.send(line.multiplexer.tell(mux.Kind.PING))

    def drain(self) -> None:
        """Take in what has arrived already."""
        with suppress(zmq.Again, zmq.ZMQError):
            while not self.socket.closed:
                self._receive()

    def forget_route(self, line: AcceptedLine) -> None:
        """What comes by the route of a line is not from its peer any more."""
        if self._lines.get(line.route) is line:
            del self._lines[line.route]

    # -- the end -----------------------------------------------------------------------------------------------------

    def forget(self, line: AcceptedLine) -> None:
        """A line is of the past."""
        self.forget_route(line)
        self._sessions.pop(line.multiplexer.session, None)

    def stop(self) -> None:
        """Let nobody new in, and close when all lines have ended: zmq would end them with the address."""
        self.closing = True

    def close(self) -> None:
        """End all."""
        for line in list(self._sessions.values()):
            line.end("the other end has ended")
        self.reactor.ticking.discard(self)
        if not self.socket.closed:
            self._monitor.close()
            self.pipe.close()
        self.reactor.gate.listening.pop(self._domain, None)


def _prepare(socket: zmq.Socket[Any], where: str) -> None:
    options = {
        zmq.LINGER: LINGER_MS, zmq.SNDHWM: 0, zmq.RCVHWM: WAITING, zmq.MAXMSGSIZE: mux.MAX_PACKET,
        zmq.IPV6: "[" in where,
        zmq.HEARTBEAT_IVL: int(PING_AFTER_S * 1000), zmq.HEARTBEAT_TIMEOUT: int(BREAK_AFTER_S * 1000),
        zmq.HANDSHAKE_IVL: int(DIAL_S * 1000),
    }  # fmt: skip
    for option, value in options.items():
        socket.setsockopt(option, int(value))


def _send(socket: zmq.Socket[Any], parts: list[mux.Buffer], route: bytes | None = None) -> None:
    """Send a message; raises ZMQError where there is no connection to send it by."""
    if route is not None:
        socket.send(route, zmq.SNDMORE | zmq.NOBLOCK)
    last = parts[-1]
    for part in parts[:-1]:
        socket.send(part, zmq.SNDMORE | zmq.NOBLOCK, copy=len(part) < ZERO_COPY)
    socket.send(last, zmq.NOBLOCK, copy=len(last) < ZERO_COPY)


def _received(socket: zmq.Socket[Any]) -> list[mux.Buffer]:
    parts: list[mux.Buffer] = [socket.recv(zmq.NOBLOCK)]
    while socket.getsockopt(zmq.RCVMORE):
        parts.append(socket.recv(zmq.NOBLOCK, copy=False).buffer)
    return parts


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def _ends(frame: zmq.Frame) -> tuple[str, str]:
    """Return host and port of both ends of the connection that a message came by, this one first."""
    with suppress(OSError, zmq.ZMQError), sockets.socket(fileno=os.dup(int(frame.get(zmq.SRCFD)))) as connection:
        ends = connection.getsockname(), connection.getpeername()
        local, peer = (unparse_host_port(str(end[0]).removeprefix("::ffff:"), end[1]) for end in ends)
        return str(local), str(peer)
    return "0.0.0.0", "0.0.0.0"  # it has just been cut


def ip_towards(host: str) -> str:
    """Return the address of this machine as seen from another."""
    with suppress(OSError, ValueError):
        return str(get_ipv6(host) if ":" in host else get_ip(host))
    return "127.0.0.1"


def bracketed(host: str) -> str:
    """Return a host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def _nothing() -> None:
    """Do nothing."""
