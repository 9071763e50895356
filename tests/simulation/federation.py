"""One history: a hub, sites and clients over bad wires, from one seed, and what must hold at its end.

Everything random comes from ``random.Random(seed)``; the same seed gives the same history, event by event. Both cores
are verified after each event. A history has four acts:

1. clients submit, release and cancel while faults happen;
2. all is calm; every key that a client holds must settle, rightly, within bounded time, and what failed is tried again
   (more is asked for until enough tasks have run);
3. the clients release everything: hub, sites, schedulers and links must be empty, within bounded time;
4. the books are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from daskfed.hub import events as ev
from daskfed.hub.core import HubCore
from daskfed.hub.placement import DataOnly, LowestCost, Policy, RoundRobin
from daskfed.link import Link
from daskfed.messages import BlockSpec, Key
from daskfed.site.core import SiteCore
from daskfed.testing.clock import VirtualClock
from daskfed.testing.scheduler import Failure, FakeTask
from daskfed.testing.transport import AnyLink
from tests.simulation.clients import ClientNode
from tests.simulation.faults import random_plan
from tests.simulation.hub import HubNode
from tests.simulation.site import SiteNode
from tests.simulation.workload import Cutter, random_universe

NTASKS = 215  # in the universe of a history
ENOUGH = 200  # tasks run, and events: a history that has fewer asks for more before it ends
RETRY_S = 1.0  # until a client has heard that what it retries is pending again
SETTLE_S = 600.0  # virtual time after which a key that has not settled never will
SILENT_S = 300.0  # virtual time after which links that nobody uses must be silent; losses make them patient
DETECT_S = 1.0  # until the hub finds out that a peer has crashed
EMPTY_S = 60.0  # virtual time after which what is left was forgotten
RECENTLY_S = 2.0  # a site that joined less than this ago has not yet got all its work


class Broken(AssertionError):
    """A history broke a rule; the message has the seed and how to replay it."""


@dataclass(slots=True)
class Cores:
    """How the cores of a history are made; the tests of seeded bugs put worse ones in their place."""

    hub: Callable[..., HubCore] = HubCore
    site: Callable[..., SiteCore] = SiteCore
    link: Callable[..., AnyLink] = Link
    node: Callable[..., SiteNode] = SiteNode
    check_every: int | None = None  # events between two self-checks of the cores; 0: never; None: see should_check


@dataclass(slots=True)
class Result:
    """What a history that broke nothing went through."""

    seed: int
    sites: int
    tasks: int
    events: int
    seconds: float  # of virtual time
    rows: dict[str, Any] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)  # that really happened, by kind
    dropped_reports: int = 0


class Simulation:
    """The federation of one history."""

    def __init__(self, seed: int, cores: Cores | None = None, story: list[str] | None = None) -> None:
        self.seed = seed
        self.cores = cores or Cores()
        self.story = story
        self.clock = VirtualClock()
        self.rng = Random(seed)
        self.over = False
        self.events = 0
        self.payloads: dict[str, dict[Key, FakeTask]] = {}  # every block that was ever submitted
        self.specs: list[BlockSpec] = []
        self.cancelled: dict[Key, None] = {}  # also what nobody can make any more
        self.given_up: dict[Key, None] = {}  # what the hub failed for that reason
        self.faults: Counter[str] = Counter()
        self.universe = random_universe(self.rng, NTASKS)
        self.plan = random_plan(self.rng, seed)
        self.hub = HubNode(self, self.cores.hub(policy=self._policy()))
        self.sites = {f"s{n}": self._site(n) for n in range(len(self.plan.joins_at))}
        self.clients = {f"c{n}": self._client(f"c{n}") for n in range(self.rng.choice([1, 2, 3]))}
        self.former_sites: list[SiteNode] = []
        self.former_hubs: list[HubNode] = []
        self._plan_faults()

    def _policy(self) -> Policy:
        """Return how the hub chooses sites: the worse it does so, the more is recalled, and the longer are queues."""
        policies: tuple[type[Policy], ...] = (LowestCost, DataOnly, RoundRobin, DataOnly)
        return policies[self.seed % len(policies)]()

    def _site(self, n: int, incarnation: int = 1) -> SiteNode:
        return self.cores.node(self, n, Random(self.rng.random()), incarnation)

    def _client(self, name: str) -> ClientNode:
        staying = [site for site in self.sites.values() if site.stays]
        places = [site.name for site in staying] + [site.label for site in staying]
        rng = Random(self.rng.random())
        cutter = Cutter(rng, self.universe, tuple(places))
        return ClientNode(self, name, rng, cutter, rng.choice([1, 2]))

    def _plan_faults(self) -> None:
        sites = list(self.sites.values())
        for site, joins_at, drains_at in zip(sites, self.plan.joins_at, self.plan.drains_at, strict=True):
            self.clock.call_at(joins_at, site.join)
            if drains_at is not None:
                self.clock.call_at(max(drains_at, joins_at + 0.5), site.drain)
        for n, start, end in self.plan.partitions:
            self.clock.call_at(start, sites[n].cut)
            self.clock.call_at(end, self._mend, sites[n])
        for n, at, back_after in self.plan.crashes:
            self.clock.call_at(at, self.crash_site, f"s{n}", back_after)
        for at, back_after in self.plan.hub_crashes:
            self.clock.call_at(at, self.crash_hub, back_after)
        for n, at, share in self.plan.worker_losses:
            self.clock.call_at(at, self._lose_worker, f"s{n}", share)
        for n, at, seconds in self.plan.desertions:
            self.clock.call_at(at, self._lose_all_workers, f"s{n}", seconds)
        for n, at, silently in self.plan.departures:
            self.clock.call_at(at, self.lose_client, f"c{n}", silently)
        for n, at, seconds in self.plan.sleeps:
            self.clock.call_at(at, self._put_to_sleep, (*self.clients, "data")[n % (len(self.clients) + 1)], seconds)

    def _mend(self, site: SiteNode) -> None:
        self.sites[site.name].mend()  # another one may have come in its place meanwhile

    def _lose_worker(self, name: str, share: float) -> None:
        site, rng = self.sites[name], self.rng
        if site.dialled and not site.stopped:
            self.count("worker lost")
            site.lose_worker(lambda: rng.random() < share)

    def _lose_all_workers(self, name: str, seconds: float) -> None:
        site = self.sites[name]
        if site.dialled and not site.stopped:
            self.count("all workers lost for long")
            site.lose_all_workers(seconds)

    def _put_to_sleep(self, name: str, seconds: float) -> None:
        """A client's connection breaks, and is up again later; the hub waits for it."""
        client = self.clients.get(name)
        if client is not None and client.connected and not client.gone:
            self.count("client asleep")
            self.log(name, "falls asleep", out=True)
            client.hub_lost()
            self.clock.call_later(seconds, client.resume)

    def _bring_data(self) -> None:
        """Once a site is there, a client puts the data of the universe on it, and the others start."""
        there = [site for site in self.sites.values() if site.stays and site.takes(self.universe.data)]
        if not there or self.hub.crashed:
            self.clock.call_later(0.05, self._bring_data)
            return
        owner = self._client("data")
        self.clients = {"data": owner} | self.clients
        owner.held |= dict.fromkeys(self.universe.data)
        owner.copies |= dict.fromkeys(self.universe.data)
        self.hub.handle(ev.ClientJoined(owner.name, "user"))
        self.hub.scatter(owner.name, self.rng.choice(there).name, self.universe.data)
        for client in list(self.clients.values())[1:]:
            client.start()

    # -- crashes --------------------------------------------------------------------------------------------------

    def crash_site(self, name: str, back_after: float | None = None) -> None:
        """A site stops without a word; the hub finds out after a while, or when it is back."""
        site = self.sites[name]
        if site.stopped or not site.joined:
            return
        site.log_fault("crashes")
        self.count("site crash")
        if site.incarnation != "1" and self.clock.now - site.joined_at < RECENTLY_S:
            self.count("site crash just after the last")
        site.crash()
        self.clock.call_later(DETECT_S, self.hub.site_left, name, site.incarnation)
        if back_after is not None:
            self.clock.call_later(back_after, self.restart_site, name)

    def restart_site(self, name: str) -> None:
        """A site that crashed comes back with nothing."""
        former = self.sites[name]
        self.former_sites.append(former)
        self.hub.site_left(name, former.incarnation)
        self.sites[name] = self._site(former.n, int(former.incarnation) + 1)
        self.sites[name].join()

    def lose_client(self, name: str, silently: bool) -> None:
        """A client goes for good, perhaps without a word: then the hub finds out after a while, or never if it is away.

        A hub that never heard of it, or not since it started anew, cannot know how what it wanted is made.
        """
        client = self.clients.get(name)
        if client is None or client.gone or not client.held:
            return
        silently = silently or not client.connected
        self.log(name, "crashes" if silently else "leaves", out=True)
        self.count("client crash" if silently else "client left")
        if silently:
            client.crash()
            self.clock.call_later(DETECT_S, self.hub.handle, ev.ClientLeft(name))
        else:
            client.leave()
        if self.hub.crashed or name in self.hub.core.recovery.clients:
            self.count("client crash while the hub is away")
            self._bury(client)

    def _bury(self, client: ClientNode) -> None:
        self.cancelled |= {key: None for spec, _ in client.book.values() for key in spec.outputs}

    def crash_hub(self, back_after: float) -> None:
        """The hub stops without a word; sites go on with their work."""
        self.log("hub", "crashes", out=True)
        self.count("hub crash")
        if not self.hub.core.recovery.settled:
            self.count("hub crash while it recovers")
        self.hub.crash()
        for peer in (*self.sites.values(), *self.clients.values()):
            peer.hub_lost()
        self.clock.call_later(back_after, self.restart_hub)

    def restart_hub(self) -> None:
        """The hub comes back with what its journal says; sites and clients dial it again."""
        former = self.hub
        self.former_hubs.append(former)
        epoch, awaited = former.core.ledger.epoch + 1, former.journal()
        self.hub = HubNode(self, self.cores.hub(epoch=epoch, policy=self._policy(), awaited=awaited))
        for site in self.sites.values():
            if site.dialled and not site.stopped:
                self.clock.call_later(self.rng.choice([0.1, 1.0]) * self.rng.random(), site.join)
        for client in self.clients.values():
            if client.gone:
                self._bury(client)
            away = self.rng.choice([0.1, 1.0, 15.0])  # the last one sleeps
            self.clock.call_later(away * self.rng.random(), client.resume)

    # -- rules --------------------------------------------------------------------------------------------------

    def log(self, who: str, what: Any, out: bool = False) -> None:
        """Count an event and, where a story is wanted, tell it."""
        self.events += not out
        if self.story is not None:
            self.story.append(f"{self.clock.now:10.4f} {who:>4} {'=>' if out else '<-'} {what}")

    def count(self, fault: str) -> None:
        """Count a fault that has happened."""
        self.faults[fault] += 1

    def agrees(self, key: Key, value: int | Failure) -> bool:
        """Say whether a value is right, or an error is that of a task that may fail or was given up."""
        if isinstance(value, Failure) and value.origin in self.given_up:
            return value.origin == key or value.origin in self.universe.closure((key,))
        return self.universe.agrees(key, value)

    def require(self, truth: bool, rule: str, *about: Any) -> None:
        """Raise Broken where a rule does not hold."""
        if not truth:
            raise Broken(f"{rule}: {', '.join(map(str, about))}" if about else rule)

    def fail(self, rule: str) -> None:
        """Raise Broken."""
        raise Broken(rule)

    def should_check(self) -> bool:
        """Say whether a core is to verify itself now.

        It takes as long as all the rest; so only every eighth history, and a replay, does so after each event.
        """
        every = self.cores.check_every
        if every is None:
            every = 1 if self.story is not None or self.seed % 8 == 0 else 20
        return every > 0 and self.events % every == 0

    def all_joined(self) -> bool:
        """Whether every site is there: then a constraint that no site meets is an error at once."""
        return len(self.hub.core.sites) == len(self.sites)

    def doomed(self) -> set[Key]:
        """Return the keys that a cancellation may end: what was cancelled, and all outputs of blocks that need it."""
        doomed: set[Key] = set(self.cancelled)
        before = -1
        while before != len(doomed):
            before = len(doomed)
            for spec in self.specs:
                if not doomed.isdisjoint(spec.inputs):
                    doomed.update(spec.outputs)
        return doomed

    # -- acts ---------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Play the history; raises Broken, naming the seed, where it breaks a rule."""
        try:
            self._bring_data()
            self.clock.run_until(self.plan.calm_at)
            self._wait(SETTLE_S, self._acting)
            self._settle()
            self._retry()
            while (lacking := ENOUGH - min(self._ran(), self.events)) > 0:
                self._ask_for_more(lacking)
            for client in self.clients.values():
                client.release_all()  # those that are gone have nothing
            self._wait(EMPTY_S, self._leftovers)
            self.over = True
            self._wait(SILENT_S, self._talking)
        except Exception as exc:
            raise Broken(
                f"seed {self.seed}, at {self.clock.now:.4f} s: {type(exc).__name__}: {exc}\n"
                f"replay it: python -m tests.simulation.replay {self.seed}"
            ) from exc
        return self._result()

    def _wait(self, limit_s: float, unfinished: Callable[[], str]) -> None:
        end = self.clock.now + limit_s
        while problem := unfinished():
            self.require(self.clock.now < end, f"after {limit_s:.0f} s", problem)
            self.clock.run_until(self.clock.now + 0.5)

    def _acting(self) -> str:
        if "data" not in self.clients:
            return "no site has joined"
        return ", ".join(f"{client.name} still acts" for client in self.clients.values() if client.acting)

    def _unsettled(self) -> str:
        for client in self.clients.values():
            for key, told in client.held.items():
                if told is None:
                    return f"{client.name} waits for {key!r}: {self.hub.core.explain(key)}"
                if told is ev.Outcome.IN_MEMORY and not client.gather(key):
                    return f"{client.name} cannot gather {key!r}: {self.hub.core.explain(key)}"
        return ""

    def _settle(self) -> None:
        """All that clients hold must settle, and must be what the reference evaluation says."""
        self._wait(SETTLE_S, self._unsettled)

    def _ask_for_more(self, ntasks: int) -> None:
        """A client starts over, with keys that nobody holds: so they are made once more."""
        client = self.clients["c0"]
        client.release_all()
        held = {key for each in self.clients.values() for key in each.held}
        client.submit(self.universe.some(self.rng, ntasks, held))
        self._settle()

    def _retry(self) -> None:
        """What failed is made again; it settles as before."""
        for client in self.clients.values():
            client.retry_failed()
        self.clock.run_until(self.clock.now + RETRY_S)
        self._settle()

    def _leftovers(self) -> str:
        left = self.hub.leftovers()
        for site in self.sites.values():
            left += site.leftovers()
            if site.draining and not site.stopped:
                left.append(f"{site.name} still drains")
        return "; ".join(left)

    def _talking(self) -> str:
        return ", ".join(f"{site.name} still talks" for site in self.sites.values() if site.talks)

    def _ran(self) -> int:
        return sum(site.scheduler.settled for site in self.sites.values())

    def _result(self) -> Result:
        rows: dict[str, Counter[Any]] = {}
        hubs = (*self.former_hubs, self.hub)
        sites = (*self.former_sites, *self.sites.values())
        for node in (*hubs, *sites):
            for follower in (node.blocks, node.keys):
                rows[follower.name] = rows.get(follower.name, Counter()) + follower.rows
        for site in sites:
            for wire in site.wires:
                self.faults.update({"envelope lost": wire.lost, "envelope repeated": wire.repeated})
        result = Result(self.seed, len(self.sites), self._ran(), self.events, self.clock.now, rows, self.faults)
        result.dropped_reports = sum(hub.dropped_reports for hub in hubs)
        return result
