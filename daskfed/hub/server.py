"""The hub's shell: listens, gives events to the core, and does what the core commands.

Clients speak the Dask client protocol (a stream and RPCs); sites dial a control stream and park channels. Everything a
user pickled passes through unopened. The parts: :mod:`.clients` serves clients' streams, :mod:`.gateway` answers what
needs the sites (scatter ...), :mod:`.gathering` gets values from them, :mod:`.fanout` asks their schedulers and
workers, :mod:`.owners` says who may do what, :mod:`.plugins` keeps the plugins that all sites have, :mod:`.stores`
payloads, :mod:`.ports` reaches sites.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distributed.comm.core import Comm
from distributed.core import Status
from tornado.ioloop import PeriodicCallback

from daskfed.collecting import Relaxed
from daskfed.comm.control import ControlStream
from daskfed.comm.opaque import OpaqueError, OpaqueServer, relays_errors
from daskfed.config import client_grace_s, hub_memory
from daskfed.data.spill import Spilled
from daskfed.hub import events as ev
from daskfed.hub.actors import Actors
from daskfed.hub.clients import ClientSessions
from daskfed.hub.coordination import DESIRE, attach
from daskfed.hub.core import HubCore
from daskfed.hub.credentials import Credentials
from daskfed.hub.dashboard import Dashboard
from daskfed.hub.durations import Durations
from daskfed.hub.enrolment import enrol
from daskfed.hub.fanout import Fanout
from daskfed.hub.gateway import Gateway, Handlers
from daskfed.hub.hosting import Hosting
from daskfed.hub.journal import Journal
from daskfed.hub.nested import Nested
from daskfed.hub.ownerless import Ownerless
from daskfed.hub.owners import Owners
from daskfed.hub.placement import Policy
from daskfed.hub.plugins import Plugins
from daskfed.hub.ports import RemoteSite, SitePort
from daskfed.hub.states import KeyPhase
from daskfed.hub.stores import Stores
from daskfed.messages import (
    PROTOCOL_VERSION,
    Key,
    KeysFailed,
    KeysMade,
    Learned,
    Message,
    RunBlock,
    SiteEnds,
    SiteHello,
    SiteHoldings,
    SiteStatus,
    decode,
)

logger = logging.getLogger(__name__)

POLL_S = 0.05
TICK_S = 0.2  # how often the core is told the time
TAKEN_WITHIN_S = 10.0  # after a future was brought for a task, until the task holds it itself
SITE_GRACE_S = 2.0  # how long a site whose connection broke is waited for before its work goes elsewhere


class Hub(Hosting, OpaqueServer):
    """A federation's hub, on the current event loop.

    ``policy`` chooses sites; ``security`` is a ``distributed.Security`` or None; ``fixed`` declares that no site will
    join after the first ones; ``state`` is a folder for what must outlive this process; ``dashboard`` says whether it
    has a page of its own. Start it with ``await hub.start_at(address)``, end it with ``await hub.close()``.
    """

    default_port = 8700
    default_ip = "127.0.0.1"

    def __init__(
        self, *, policy: Policy | None = None, security: Any = None, fixed: bool = False, state: str | None = None,
        dashboard: bool = True,
    ) -> None:  # fmt: skip
        self.status: Status
        self.handlers: dict[str, Any]
        self.security = security
        self.fixed = fixed
        self.started_at = time.time()
        self.journal = Journal(state)
        epoch = max(int(self.started_at * 1000), self.journal.epoch + 1)
        self.journal.epoch = epoch
        self.core = HubCore(epoch, policy, replace(self.journal.awaited(), lease_s=client_grace_s()))
        self.payloads = Spilled(hub_memory())
        self.stores = Stores(self.payloads)
        self.ports: dict[str, SitePort] = {}
        self.secret = shown_by(self.journal.secret, "site")  # by this federation's sites, when they call
        self.owners = Owners(self)
        self.credentials = Credentials(self.ports, self.core.ledger.keys)
        self.sessions = ClientSessions(self)
        self.durations = Durations(self)
        self.fanout = Fanout(self)
        self.gateway = Gateway(self)
        self.actors = Actors(self)
        self.nested = Nested(self)
        self._collector = Relaxed()
        self.dashboard = Dashboard(self.gateway.sites_info, lambda: self.address)
        self.has_page = dashboard
        self.plugins = Plugins(self)
        self.watchers: dict[Comm, set[str]] = {}  # told about workers that come and go -> those they know
        self._telling = asyncio.Lock()
        self._sessions = itertools.count()  # of sites, and of futures that tasks take
        connection_args = security.get_connection_args("scheduler") if security else {}
        super().__init__(handlers={}, stream_handlers={}, connection_args=connection_args)
        served = self._own_handlers() | self.gateway.handlers() | self.fanout.handlers() | self.plugins.handlers()
        self.handlers = Handlers(self.handlers | served)
        self.stream_handlers.update(self.sessions.stream_handlers())
        self.coordination = attach(self, self.journal, self.recovered)
        self.ownerless = Ownerless(self)
        self.owners.guard(self.handlers)
        for op, handler in list(self.handlers.items()):
            self.handlers[op] = self.credentials.guarded(op, handler)
        self.periodic_callbacks["tick"] = PeriodicCallback(lambda: self.take(ev.Tick()), TICK_S * 1000)

    def _own_handlers(self) -> dict[str, Any]:
        return {
            "register-client": self.sessions.register,
            "register-site": self.register_site,
            "park-channel": self.park_channel,
            "relay-fetch": self.gateway.relay_fetch,
            "forward": relays_errors(self.forward),
            "announce-keys": self.announce_keys,
            "bring-keys": self.bring_keys,
            "proxy": self.actors.proxy,
            "enrol": enrol,
            "actor-answer": self.actor_answer,
            "terminate": self.terminate,
        }

    async def start_at(self, address: str) -> Hub:
        """Listen on ``address`` (``tcp://host:port``, ``tls://…``, ``inproc://``; port 0: any free one) and start."""
        self._start_address = address
        await self.start()
        return self

    async def start_unsafe(self) -> Hub:
        """Start listening; called by ``start``."""
        self._restore()
        listen_args = self.security.get_listen_args("scheduler") if self.security else {}
        await self.listen(self._start_address, **listen_args)
        if self.has_page:
            self.dashboard.start()
        await super().start_unsafe()
        self.start_periodic_callbacks()
        return self

    def _restore(self) -> None:
        """Take up what an earlier hub journalled, before anybody is served."""
        self.coordination.restore()
        self.ownerless.restore()
        self.plugins.restore()
        self.sessions.restore()
        if not self.core.recovery.settled:
            self.in_background(self._forget_absent_sites)
            self.loop.call_later(client_grace_s(), self._forget_absent_clients)

    async def recovered(self) -> None:
        """Return once the sites and clients are back that were there before, or have had time enough for it."""
        while not self.core.recovery.may_place(time.monotonic()):
            await asyncio.sleep(POLL_S)

    async def _forget_absent_sites(self) -> None:
        await self.recovered()
        for site in self.journal.awaited().sites - self.ports.keys():
            self.journal.forget_site(site)
            self.coordination.site_gone(site)

    def _forget_absent_clients(self) -> None:
        for client in self.journal.awaited().clients.keys() - self.sessions.sessions.keys():
            self.sessions.forget(client)

    async def terminate(self) -> None:
        """End the hub at its own user's request, after the reply was written; PermissionError for another's."""
        self.owners.check_rules("end the hub")
        asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(self.close()))

    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        """Tell clients and sites that the federation ends, and stop listening."""
        if self.status in (Status.closing, Status.closed):
            await self.finished()
            return
        self.status = Status.closing
        self.dashboard.close()
        self.coordination.close()
        await self.sessions.close()
        for port in list(self.ports.values()):
            await port.close()
        for comm in list(self.watchers):
            comm.abort()
        await super().close(timeout=timeout, reason=reason)
        self.journal.close()
        self.payloads.close()
        self._collector.end()
        self.status = Status.closed

    def in_background(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Have something done meanwhile; it ends with the hub at the latest."""
        self._ongoing_background_tasks.call_soon(work, *args)

    # -- the core ----------------------------------------------------------------------------------------------------

    def take(self, event: ev.Event) -> None:
        """Give one event to the core and carry out its commands."""
        for command in self.core.handle(event, time.monotonic()):
            self._perform(command)

    def _perform(self, command: ev.Command) -> None:
        match command:
            case ev.TellSite(site, message):
                self._tell_site(site, message)
            case ev.TellClient():
                self.sessions.tell(command)
            case ev.ForgetKeys(keys):
                self.stores.forget_keys(keys)
            case ev.ForgetBlock(block, client):
                self.stores.forget_block(block)
                self.ownerless.forget(block)
                self.sessions.tell_own(client, {"op": "fed-forget", "block": block})
            case ev.BlocksArrived(client, block, arrival, count):
                told = {"op": "fed-arrived", "block": block, "arrival": arrival, "count": count}
                self.sessions.tell_own(client, told)
            case ev.AskForData(client, keys):
                self.sessions.tell_own(client, {"op": "fed-bring-data", "keys": list(keys)})
            case ev.DropCopies(client, keys):
                self.sessions.tell_own(client, {"op": "fed-drop-copies", "keys": list(keys)})
            case ev.FailKeys(keys, kind, reason):
                self.stores.make_error(keys, kind, reason)
            case ev.DropReport():
                logger.debug("dropped a report of an old attempt: %s", command)

    def _tell_site(self, site: str, message: Message) -> None:
        port = self.ports.get(site)
        if port is None:
            return
        if isinstance(message, RunBlock):
            self.owners.placed(site, message.block.owner)
        port.send(message, self.stores.beside(message))

    # -- sites -------------------------------------------------------------------------------------------------------

    async def register_site(
        self, comm: Comm, hello: dict[str, Any], token: str | None = None, session: str = "", received: int = 0
    ) -> Status:
        """Serve the control stream that a site dialled, until it ends.

        ``session`` names the stream that the site had before its connection broke, of which it got ``received``
        messages; where the hub has the other end of it still, both go on where they were.
        """
        try:
            decoded = self.credentials.joins(comm, self._accepted(hello))
        except ValueError as exc:
            await comm.write({"status": "error", "reason": str(exc)})
            return Status.dont_reply
        port = self.ports.get(decoded.site)
        if isinstance(port, RemoteSite) and port.stream.session == session:
            await port.detach()
            await self._welcome(comm, decoded, session, port.stream.received)
            port.stream.resume(comm, received)
            port.hello = decoded
            self.take(ev.SiteServes(decoded.site, decoded.serves))
            logger.info("site %s is connected again", decoded.site)
        else:
            port = await self._new_site(comm, decoded)
        await self._serve_site(port)
        return Status.dont_reply

    async def _new_site(self, comm: Comm, hello: SiteHello) -> RemoteSite:
        if (former := self.ports.get(hello.site)) is not None:
            self.remove_site(former.hello)
        session = f"{hello.site}/{hello.incarnation}/{self.core.ledger.epoch}/{next(self._sessions)}"
        await self._welcome(comm, hello, session, 0)
        stream = ControlStream(comm, session, lambda message, payload: self.from_site(hello.site, message, payload))
        port = RemoteSite(hello, stream)
        self.add_site(port)
        return port

    async def _welcome(self, comm: Comm, hello: SiteHello, session: str, received: int) -> None:
        known = {"epoch": self.core.ledger.epoch, "federation": self.secret, "door": self.door_of(hello)}
        await comm.write({"status": "OK", "session": session, "received": received, **known})

    def _accepted(self, hello: dict[str, Any]) -> SiteHello:
        decoded = decode(dict(hello))
        if not isinstance(decoded, SiteHello):
            raise ValueError(f"a site's first message is a hello, not {decoded.op!r}")
        if problem := self._refusal(decoded):
            raise ValueError(problem)
        return decoded

    def _refusal(self, hello: SiteHello) -> str | None:
        if hello.protocol != PROTOCOL_VERSION:
            return f"the hub speaks protocol {PROTOCOL_VERSION}, this site {hello.protocol}: install the same daskfed"
        port = self.ports.get(hello.site)
        another = port is not None and port.hello.incarnation != hello.incarnation
        if another and not (isinstance(port, RemoteSite) and port.detached.is_set()):
            return f"a site named {hello.site!r} is connected already: give this one another name"
        return None

    async def _serve_site(self, port: RemoteSite) -> None:
        port.stream.comm.name = f"Hub->Site {port.hello.site}"
        self.take(ev.SiteReach(port.hello.site, away=False))
        try:
            await port.serve()
        finally:
            if port.ended or self.status is not Status.running:
                self.remove_site(port.hello, port)
            else:
                if self.ports.get(port.hello.site) is port:
                    self.take(ev.SiteReach(port.hello.site, away=True))
                self.loop.call_later(SITE_GRACE_S, self._give_up_site, port, port.stream.comm)

    def _give_up_site(self, port: RemoteSite, comm: Comm) -> None:
        """A site has not come back within the time of grace: it may when it likes, but its work goes elsewhere."""
        if port.stream.comm is comm and port.detached.is_set():
            self.remove_site(port.hello, port)

    def add_site(self, port: SitePort) -> None:
        """Take in a site that is reached through ``port``."""
        self.ports[port.hello.site] = port
        self.journal.keep_site(port.hello.site)
        logger.info("site %s joined", port.hello.site)
        self.take(ev.SiteJoined(port.hello))
        self.plugins.site_joined(port.hello)

    def remove_site(self, hello: SiteHello, port: SitePort | None = None) -> None:
        """A site is gone; where ``port`` is given, only if it is the one that the site is reached through."""
        present = self.ports.get(hello.site)
        if present is None or present.hello.incarnation != hello.incarnation or port not in (None, present):
            return
        del self.ports[hello.site]
        if isinstance(present, RemoteSite):
            present.give_up()
        if self.status is Status.running:
            self.journal.forget_site(hello.site)
        logger.info("site %s left", hello.site)
        self.coordination.site_gone(hello.site)
        self.actors.site_gone(hello.site)
        self.plugins.site_left(hello)
        self.take(ev.SiteLeft(hello.site, hello.incarnation))
        self.sites_changed()

    def from_site(self, site: str, message: Message, payload: Any = None) -> None:
        """Take in a message of a site, with what travelled beside it."""
        known = self.core.ledger.keys
        if isinstance(message, SiteEnds):
            self._site_ends(site)
            return
        if isinstance(message, SiteStatus) and self.plugins.holds_back(site, message):
            return
        if isinstance(message, KeysFailed):
            self.stores.keep_error([key for key in message.keys if key in known], payload)
        elif isinstance(message, SiteHoldings):
            for key in message.failed:
                if key in known and key not in self.stores.errors:
                    self.stores.keep_error([key], payload[key])
        elif isinstance(message, KeysMade) and payload:
            types = payload.get("types") or {}
            self.stores.keep_types(message.block, {key: kind for key, kind in types.items() if key in known})
            self.stores.passing = payload.get("values") or {}
        before = self.core.sites[site].status if site in self.core.sites else None
        self.take(ev.FromSite(site, message))
        self.stores.passing = {}
        if isinstance(message, Learned):
            self.durations.learnt(prefix for prefix, *_ in message.durations)
        if isinstance(message, SiteStatus) and (before is None or before.workers != message.workers):
            self.sites_changed()

    def _site_ends(self, site: str) -> None:
        port = self.ports.get(site)
        if isinstance(port, RemoteSite):
            port.ended = True

    def sites_changed(self) -> None:
        """Tell daskfed's clients what sites there are, and whoever watches workers."""
        self.gateway.roster.forget()
        self.sessions.announce_sites()
        for comm in list(self.watchers):
            self.in_background(self._tell_watcher, comm)

    async def _tell_watcher(self, comm: Comm) -> None:
        async with self._telling:
            with suppress(OSError, OpaqueError):  # a site that goes away meanwhile is told about again
                identity = await self.gateway.identity(n_workers=-1)
                gone = self.watchers.get(comm, set()) - identity["workers"].keys()
                if comm in self.watchers:
                    self.watchers[comm] = set(identity["workers"])
                await comm.write([("add", identity), *(("remove", address) for address in gone)])

    async def park_channel(self, comm: Comm, site: str, incarnation: str, token: str) -> Status:
        """Keep a channel that a site dialled, for calls to it."""
        port = self.ports.get(site)
        if self.trusts(token) and isinstance(port, RemoteSite) and port.hello.incarnation == incarnation:
            await port.park(comm)
            while not comm.closed():  # the site's calls are made over this comm by others; stay until it ends
                await asyncio.sleep(1)
        return Status.dont_reply

    # -- coordination ------------------------------------------------------------------------------------------------

    async def announce_keys(self, site: str, keys: Collection[Key], token: str) -> None:
        """Tasks made keys at a site; they are kept until the op that follows has been done."""
        self._check_token(token)
        owner = self.owners.at(site)
        self.owners.check(keys, owner)
        self.nested.claim(site, keys, _announcer(site), owner)

    async def bring_keys(self, site: str, keys: Collection[Key], token: str) -> None:
        """Have a site copy keys whose futures its tasks took; waits for those that are still being made."""
        self._check_token(token)
        known = self.core.ledger.keys
        while any((state := known.peek(key)) is not None and state.phase is KeyPhase.PENDING for key in keys):
            await asyncio.sleep(POLL_S)
        taken = tuple(key for key in keys if key in known)
        taker = f"{site}/taker-{next(self._sessions)}"  # until the task's client says that it has them
        self.take(ev.KeysDesired(taker, taken))
        self.loop.call_later(TAKEN_WITHIN_S, self._end_taking, taker, taken)
        self.take(ev.KeysNeeded(site, tuple(keys)))

    def _end_taking(self, taker: str, keys: tuple[Key, ...]) -> None:
        if self.status is Status.running:
            self.take(ev.KeysReleased(taker, keys))

    async def actor_answer(self, site: str, ticket: int, answer: Any, token: str) -> None:
        """A site has called an actor."""
        self._check_token(token)
        self.actors.answered(site, ticket, answer)

    async def forward(
        self, site: str, hub_op: str, kwargs: Mapping[str, Any], token: str, request: str | None = None
    ) -> Any:
        """Do what a task at a site asked of its scheduler, once per ``request``; PermissionError for a stranger."""
        self._check_token(token)
        try:
            owned = self.owners.of_task(site, hub_op, kwargs)
            if hub_op == "proxy":
                return await self.actors.proxy(**owned)
            wanted = owned["keys"] if hub_op == DESIRE else ()
            async with self.nested.known(wanted, self.owners.at(site) if wanted else self.owners.mine):
                return await self.coordination.serve_site(site, hub_op, owned, request)
        finally:
            self.take(ev.KeysReleased(_announcer(site), _keys_put(kwargs)))

    def door_of(self, hello: SiteHello) -> str:
        """Return what an agent shows that of a site, to fetch keys from it; another one each time that it starts."""
        return shown_by(self.journal.secret, f"door of {hello.site} {hello.incarnation}")

    def trusts(self, token: str) -> bool:
        """Say whether a caller knows the secret that the hub gave its sites."""
        return hmac.compare_digest(token or "", self.secret)

    def _check_token(self, token: str) -> None:
        if not self.trusts(token):
            raise PermissionError("the token is not this federation's")


def shown_by(secret: str, what: str) -> str:
    """Return what only who knows a secret can show; it tells nothing of the secret, nor of what others show."""
    return hmac.new(secret.encode(), what.encode(), "sha256").hexdigest()


def _keys_put(kwargs: Mapping[str, Any]) -> tuple[Key, ...]:
    """Return the keys of the futures that a coordination op puts where others see them."""
    one = kwargs.get("key")
    several = [key for keys in kwargs.get("keys") or () if isinstance(keys, list | tuple) for key in keys]
    return tuple(several) if one is None else (one, *several)


def _announcer(site: str) -> str:
    return f"announced-{site}"
