"""The simulated hub: the real core and the real stores, with links and clients around them as the real shell has."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import TYPE_CHECKING, Any

from daskfed.hub import events as ev
from daskfed.hub.core import HubCore
from daskfed.hub.recovery import PATIENCE_S, Awaited
from daskfed.hub.states import BLOCK_MOVES, KEY_MOVES, BlockPhase, KeyPhase
from daskfed.hub.stores import Stores
from daskfed.messages import (
    Attempt,
    BlockSpec,
    BlockStarted,
    CancelBlock,
    CloseSite,
    Key,
    KeysFailed,
    Learned,
    Message,
    ReportHoldings,
    RunBlock,
    SiteHello,
    SiteHoldings,
    SiteStatus,
)
from daskfed.testing.scheduler import Failure
from daskfed.testing.transport import Connection
from tests.simulation.coverage import Follower
from tests.simulation.workload import Submission

if TYPE_CHECKING:
    from tests.simulation.federation import Simulation

TICK_S = 1.0
LEASE_S = 20.0  # of clients, after the hub started anew
QUIET = (BlockStarted, Learned, SiteStatus)


class HubNode:
    """One hub."""

    def __init__(self, sim: Simulation, core: HubCore) -> None:
        self.sim = sim
        self.core = core
        self.stores = Stores()
        self.links: dict[str, Connection] = {}  # site -> its connection, of which the hub has end 0
        self.blocks = Follower("hub block", BLOCK_MOVES, BlockPhase.WAITING)
        self.keys = Follower("hub key", KEY_MOVES, KeyPhase.PENDING)
        self.dropped_reports = 0
        self.crashed = False
        self._started = sim.clock.now
        self._cancelled: set[tuple[str, str, Attempt]] = set()  # (site, block, attempt) that were told to stop
        self._asked: dict[str, float] = {}  # site that was to report its holdings -> when
        self._told: set[str] = set()  # sites that have said what they hold, since this hub started
        self._tells_due: dict[tuple[str, Key], int] = {}  # how often a client may yet be told that a key is there
        sim.clock.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        if not (self.sim.over or self.crashed):
            self.handle(ev.Tick())
            self.sim.clock.call_later(TICK_S, self._tick)

    # -- sites --------------------------------------------------------------------------------------------------

    def from_site(self, site: str, message: Message, beside: Any) -> None:
        """Take in a message of a site and what travelled beside it."""
        ledger = self.core.ledger
        if isinstance(message, SiteHello):
            self.handle(ev.SiteJoined(message))
            return
        failed: tuple[Key, ...] = ()
        if isinstance(message, KeysFailed):
            failed = message.keys
            self.stores.keep_error([key for key in failed if key in ledger.keys], beside)
        elif isinstance(message, SiteHoldings):
            self._told.add(site)
            failed = message.failed
            for key in failed:
                if key in ledger.keys and key not in self.stores.errors:
                    self.stores.keep_error([key], beside[key])
        self.handle(ev.FromSite(site, message))
        self.stores.forget_keys([key for key in failed if key not in ledger.keys])  # released meanwhile

    def site_left(self, site: str, incarnation: str) -> None:
        """A site's connection ended for good; where that is known already, nothing is done."""
        known = self.core.sites.get(site)
        if not self.crashed and known is not None and known.hello.incarnation == incarnation:
            self.links.pop(site).close()
            self.handle(ev.SiteLeft(site, incarnation))

    def journal(self) -> Awaited:
        """Return what the hub's journal says of who is there."""
        awaited = self.core.recovery
        sites = frozenset({*self.core.sites, *awaited.sites})
        return Awaited(sites, {**awaited.clients, **self.core.clients}, lease_s=LEASE_S)

    def crash(self) -> None:
        """Stop without a word."""
        self.crashed = True
        for link in self.links.values():
            link.close()

    # -- the core -----------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> None:
        """Give one event to the core, verify it, and do what it commands."""
        if self.crashed:
            return
        self.sim.log("hub", event)
        commands = self.core.handle(event, self.sim.clock.now)
        if self.sim.should_check() and (commands or not _quiet(event)):
            self.core.check()
        self._follow_stories()
        touched: dict[str, None] = {}
        for command in commands:
            self.sim.log("hub", command, out=True)
            self._do(command)
            if isinstance(command, ev.TellSite):
                touched[command.site] = None
        for site in touched:
            if site in self.links:
                self.links[site].ends[0].pump()

    def _do(self, command: ev.Command) -> None:
        if isinstance(command, ev.TellSite):
            self._tell_site(command.site, command.message)
        elif isinstance(command, ev.TellClient):
            self._tell_client(command)
        elif isinstance(command, ev.ForgetBlock):
            self.stores.forget_block(command.block)
            client = self.sim.clients[command.client]
            client.hears(client.forget, command.block)
        elif isinstance(command, ev.BlocksArrived):
            client = self.sim.clients[command.client]
            client.hears(client.arrived, command.block, command.arrival, command.count)
        elif isinstance(command, ev.ForgetKeys):
            self.stores.forget_keys(command.keys)
        elif isinstance(command, ev.FailKeys):
            self._fail_keys(command)
        elif isinstance(command, ev.AskForData):
            client = self.sim.clients[command.client]
            client.hears(client.bring_again, command.keys)
        elif isinstance(command, ev.DropCopies):
            client = self.sim.clients[command.client]
            client.hears(client.drop_copies, command.keys)
        else:
            self.dropped_reports += 1

    def _fail_keys(self, command: ev.FailKeys) -> None:
        """The hub itself may fail only what nobody can make any more, as the client that could is gone.

        What was cancelled counts as failed too, for blocks that need it for nothing that is wanted: nobody is to see that.
        """
        if command.kind == "CancelledKeyError":
            for key in command.keys:
                self.stores.keep_error([key], {"exception": key, "traceback": None})
            return
        killed = command.kind == "KilledSite"  # so many sites crashed by chance while it was made
        excused = killed or (command.kind == "SiteLostError" and self.sim.doomed().issuperset(command.keys))
        self.sim.require(excused, "the hub fails keys without cause", command)
        for key in command.keys:
            self.stores.keep_error([key], {"exception": key, "traceback": None})
            self.sim.given_up[key] = None

    def _tell_site(self, site: str, message: Message) -> None:
        if site not in self.links:
            return
        beside = None
        if isinstance(message, RunBlock):
            self.sim.require(message.block.id in self.stores.payloads, "a block is sent whose payload is gone", message)
            self._require_idle(message.block.id, site)
            beside = self.stores.beside(message)["errors"]  # the payload itself is taken from the simulation's book
        elif isinstance(message, CancelBlock):
            self._cancelled.add((site, message.block, message.attempt))
            if self.core.sites[site].deserted:
                self.sim.count("block taken from a deserted site")
        elif isinstance(message, ReportHoldings):
            self._asked[site] = self.sim.clock.now
        elif isinstance(message, CloseSite):
            self._require_handed_over(site)
        self.links[site].ends[0].send(message, beside)

    def _require_idle(self, block: str, target: str) -> None:
        """No other site may be at work at a block that is placed, unless it was told to stop or is long overdue."""
        for site in self.sim.sites.values():
            here = site.core.blocks.get(block)
            if site.stopped or site.name == target or here is None or not here.open:
                continue
            excused = (site.name, block, here.attempt) in self._cancelled or self._is_overdue(site.name)
            self.sim.require(excused, "a block is placed while another site is at work at it", block, target, site.name)

    def _is_overdue(self, site: str) -> bool:
        """Whether a site has not come back in time, or not said in time what it holds."""
        if site not in self.links or site not in self._told:
            since = self._started
        else:
            since = self._asked.get(site, inf) if site in self.core.ledger.crossing else inf
        return self.sim.clock.now - since >= PATIENCE_S

    def _require_handed_over(self, name: str) -> None:
        """A site that may leave has nothing that is needed and nowhere else, where all that was said has been heard.

        What it has for clients that the hub still waits for may be made again: the hub does not know of it.
        """
        site, hub_end = self.sim.sites[name], self.links[name].ends[0]
        if self.core.sites[name].unclaimed:
            return
        site_end = self.links[name].ends[1]
        if hub_end.link.accepted == site_end.handled and site_end.link.accepted == hub_end.handled:
            for key, here in site.core.keys.items():
                state = self.core.ledger.keys.get(key)
                needed = site.core.holds(key) and state is not None and state.needed
                elsewhere = state is not None and (state.holders.keys() - {name} or state.phase is KeyPhase.FAILED)
                self.sim.require(not needed or bool(elsewhere), "a site leaves with what only it has", name, here)

    def leftovers(self) -> list[str]:
        """Return what the hub still has, in words; nothing once everything was released."""
        ledger, dispatcher = self.core.ledger, self.core.dispatcher
        books: dict[str, Collection[Any]] = {
            "keys": ledger.keys,
            "blocks": ledger.blocks,
            "wants": ledger.wants,
            "payloads": self.stores.payloads,
            "errors": self.stores.errors,
            "queues": dispatcher.queues,
        }
        left = [f"the hub has {name} left: {list(book)[:3]}" for name, book in books.items() if book]
        for site in dispatcher.sites.values():
            if site.blocks or site.copying or site.recalled_for or site.backlog.total.blocks:
                left.append(f"the hub counts work at {site.name}: {site}")
        return left

    def _follow_stories(self) -> None:
        stories = self.core.ledger.stories
        while stories:
            subject, move = stories.popleft()
            follower = self.blocks if subject in self.sim.payloads else self.keys
            follower.follow(subject, move)
            if move == "lost" and follower is self.keys:  # then it will be made, and told of, once more
                state = self.core.ledger.keys.get(subject)
                for client in state.wanted_by if state is not None else ():
                    self._tells_due[client, subject] = self._tells_due.get((client, subject), 0) + 1

    # -- clients ------------------------------------------------------------------------------------------------

    def submit(self, client: str, graph: Submission) -> None:
        """Take in a graph with its payloads."""
        if self.crashed:
            return
        known = self.core.ledger.blocks
        self.stores.payloads |= {block.id: block.id for block in graph.blocks if block.id not in known}
        self._expect_tells(client, graph.wanted)
        self.handle(ev.BlocksSubmitted(client, graph.blocks, graph.wanted, wait=not self.sim.all_joined()))
        for block in graph.blocks:
            if block.id not in known:
                self.stores.forget_block(block.id)

    def resume(
        self, client: str, blocks: tuple[tuple[BlockSpec, int], ...], wanted: tuple[Key, ...], kept: tuple[Key, ...]
    ) -> None:
        """A client that had lost its hub is back, with all that it knows."""
        if self.crashed:
            return
        self.stores.payloads |= {spec.id: spec.id for spec, _ in blocks if spec.id not in self.core.ledger.blocks}
        self._expect_tells(client, wanted)
        self.handle(ev.ClientBack(client, "user", blocks, wanted, kept))

    def scatter(self, client: str, site: str, keys: tuple[Key, ...], again: bool = False) -> None:
        """Put data of a client, who keeps a copy, on a worker of a site."""
        if self.crashed:
            return
        if not again:
            self._expect_tells(client, keys)
        self.sim.sites[site].scatter(keys)
        self.handle(ev.KeysScattered(client, site, tuple((key, 8) for key in keys), kept=True, again=again))

    def desire(self, client: str, keys: tuple[Key, ...]) -> None:
        """A client wants keys that another client submitted."""
        if self.crashed:
            return
        known = tuple(key for key in keys if key in self.core.ledger.keys)
        node = self.sim.clients[client]
        node.hears(node.too_late, tuple(key for key in keys if key not in known))
        self.promise(client, known)

    def promise(self, client: str, keys: tuple[Key, ...]) -> None:
        """A client wants keys whose graph is perhaps still on the way."""
        self._expect_tells(client, keys)
        self.handle(ev.KeysDesired(client, keys))

    def _expect_tells(self, client: str, keys: tuple[Key, ...]) -> None:
        for key in keys:
            self._tells_due[client, key] = self._tells_due.get((client, key), 0) + 1

    def _tell_client(self, command: ev.TellClient) -> None:
        failures: dict[Key, Failure] = {}
        client = self.sim.clients[command.client]
        for key in command.keys:
            if command.outcome is ev.Outcome.IN_MEMORY:
                due = self._tells_due.get((command.client, key), 0)
                self.sim.require(due > 0, "a client is told once more that a key is in memory", command.client, key)
                self._tells_due[command.client, key] = due - 1
            elif command.outcome is ev.Outcome.RETRIED:
                self._expect_tells(command.client, (key,))
            elif command.outcome is ev.Outcome.FAILED:
                self.sim.require(key in self.stores.errors, "no error is stored for a key that failed", key)
                failures[key] = Failure(self.stores.errors[key]["exception"])
            elif key in client.borrowed:  # its client let go of it meanwhile; what was to be made from it ends as well
                self.sim.cancelled[key] = None
        client.hears(client.told, command, failures)

    def retry(self, keys: tuple[Key, ...]) -> None:
        """A client wants what failed made again."""
        if not self.crashed:
            self.handle(ev.KeysRetried(keys))

    def gather(self, key: Key) -> int | Failure | None:
        """Return the value of a key as a client that asks now would get it; None where no site has it."""
        state = self.core.ledger.keys.get(key) if not self.crashed else None
        for name in state.holders if state is not None else ():
            return self.sim.sites[name].value(key)
        return None


def _quiet(event: ev.Event) -> bool:
    """Say whether an event that led to no command has changed nothing that the invariants are about."""
    return isinstance(event, ev.Tick) or (isinstance(event, ev.FromSite) and isinstance(event.message, QUIET))
