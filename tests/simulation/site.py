"""A simulated site: the real core, and around it what the agent's shell does, over the stand-in for Dask's scheduler.

Commands travel to the scheduler, and its events back, in order and with a delay each way. As the real shell does, this
one lets no event about a released key through until the scheduler has answered the release. Beside the core's own
invariants it verifies what the scheduler sees: no key is imported while a block makes it, no graph lacks an input, no
two attempts of a block are active, no payload and no bytes are missing or left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import groupby
from random import Random
from typing import TYPE_CHECKING, Any

from daskfed.hub.events import SiteReach
from daskfed.messages import (
    PROTOCOL_VERSION,
    Attempt,
    Key,
    KeysFailed,
    Learned,
    MadeKey,
    Message,
    RunBlock,
    SiteHello,
    SiteHoldings,
    SiteStatus,
)
from daskfed.site import events as ev
from daskfed.site.states import BLOCK_MOVES, KEY_MOVES, BlockPhase, KeyPhase
from daskfed.testing.scheduler import (
    UNDER_WAY,
    Cancelled,
    Erred,
    Failure,
    FakeScheduler,
    FakeTask,
    InMemory,
    SchedulerEvent,
    State,
)
from daskfed.testing.transport import Connection, Wire, connect
from tests.simulation.coverage import Follower

if TYPE_CHECKING:
    from tests.simulation.federation import Simulation

STATUS_S = 2.0  # between two reports of a site
LOAD_S = 0.25  # between two counts of the scheduler's unfinished tasks
WORKER_START_S = 3.0  # until another worker is there in place of a lost one
BAD_LUCK = 0.3  # chance that a flaky task fails, or a brittle value does not open
GATHER_S = 2.0  # for which a site waits for a key that it holds and no worker has, before it gives it up
RPC_TIMEOUT_S = 1.0  # after which a transfer from a site that is cut off fails
LOST_INPUT = "lost dependencies"

DORMANT = (State.RELEASED, State.ERRED)
"""States of tasks that cost nothing; Dask forgets to forget ancestors of a key that it knew with other dependencies."""


class SiteNode:
    """One site."""

    def __init__(self, sim: Simulation, n: int, rng: Random, incarnation: int = 1) -> None:
        self.sim = sim
        self.n = n
        self.name = f"s{n}"
        self.incarnation = str(incarnation)
        self.label = f"zone={'ab'[n % 2]}"
        ends = [at for site, at, back_after in sim.plan.crashes if site == n and back_after is None]
        self.stays = sim.plan.drains_at[n] is None and not ends
        self.dialled = False  # it has tried to join
        self.joined = False  # the hub knows it
        self.joined_at = 0.0
        self.draining = False
        self.stopped = False
        self.core = sim.cores.site(import_budget=rng.choice([10**6, 10**9]))
        self.threads = rng.choice([1, 2, 4])
        self.scheduler = FakeScheduler(sim.clock, self.threads, self._from_scheduler)
        self.scheduler.slowness = sim.plan.slowness[n]
        self.connection: Connection | None = None
        self.wires: list[Wire] = []  # that it ever had
        self.reachable = True
        self.blocks = Follower("site block", BLOCK_MOVES, BlockPhase.WAITING)
        self.keys = Follower("site key", KEY_MOVES, KeyPhase.ABSENT)
        self.payloads: dict[tuple[str, Attempt], dict[Key, FakeTask]] = {}
        self.bytes: dict[Key, int] = {}  # imports in the agent's memory
        self._weather = sim.plan.weather[n]
        self._rng = rng
        self._delay_s = rng.choice([0.0005, 0.005])  # between agent and scheduler, each way
        self._round_trip_s = rng.choice([0.02, 5.0])  # as it says; a site that is far is sent much work ahead
        self._releasing: Counter[Key] = Counter()  # releases that the scheduler has not answered yet
        self._batch: list[SchedulerEvent | tuple[Key, ...]] = []  # events on their way from the scheduler
        self._submitted = 0
        self._seen_attempts: set[tuple[str, Attempt]] = set()
        self._maker: dict[Key, tuple[str, Attempt]] = {}  # last block that was to make a key here
        self._last_load: tuple[int, int] | None = None
        self._ran = 0
        self._excused_until = 0.0  # just after a worker was lost
        self._failures: dict[Key, dict[str, Any]] = {}  # errors of failed keys, for a hub that starts anew

    # -- membership ---------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Dial the hub, until it answers, and say what there is."""
        if self.stopped or self.connection is not None:
            return
        if self.sim.hub.crashed:
            self.sim.clock.call_later(0.3, self.join)
            return
        session = f"{self.name}/{self.incarnation}/{self.sim.hub.core.ledger.epoch}"
        handlers = (self._to_hub_shell, self._from_hub)
        self.connection = connect(self.sim.clock, self._rng, self._weather, session, handlers, self.sim.cores.link)
        self.wires += self.connection.wires
        self.joined_at = self.sim.clock.now
        self.sim.hub.links[self.name] = self.connection
        self._send(self._hello())
        self._send(self.core.holdings(), self._errors())
        if self.dialled:
            self._send(self._status())
        else:
            self.dialled = True
            self._count_traits()
            self._report()
            self._count_load()
        if not self.reachable:
            self.connection.cut()

    def _count_traits(self) -> None:
        if self.sim.plan.joins_at[self.n] and self.incarnation == "1":
            self.sim.count("site late")
        if self.scheduler.slowness > 1:
            self.sim.count("site slow")

    def _hello(self) -> SiteHello:
        name, value = self.label.split("=")
        return SiteHello(self.name, self.incarnation, PROTOCOL_VERSION, ((name, value),), ("default",), (), "", "", ())

    def _errors(self) -> dict[Key, dict[str, Any]]:
        self._failures = {key: self._failures[key] for key in self.core.holdings().failed}
        return self._failures

    def hub_lost(self) -> None:
        """The hub is gone: go on, and dial it again when it is back."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def drain(self) -> None:
        """Tell the hub that this site wants to leave."""
        if not self.stopped:
            self.sim.count("site drained")
        self.draining = True
        self._send(self._status())

    def lose_worker(self, chosen: Callable[[], bool]) -> None:
        """A worker dies, with those of its values and running tasks that are ``chosen``."""
        self.log_fault("loses a worker")
        self._excused_until = self.sim.clock.now + 4 * self._delay_s
        self.scheduler.lose(chosen)
        threads = (self.threads + 1) // 2
        self.threads -= threads
        self.scheduler.add_threads(-threads)
        self.sim.clock.call_later(WORKER_START_S, self._start_worker, threads)

    def lose_all_workers(self, seconds: float) -> None:
        """All workers die, with what they have, and none comes for so many seconds."""
        self.log_fault("loses all workers")
        self._excused_until = self.sim.clock.now + 4 * self._delay_s
        self.scheduler.lose(lambda: True)
        threads, self.threads = self.threads, 0
        self.scheduler.add_threads(-threads)
        self.sim.clock.call_later(seconds, self._start_worker, threads)

    def _start_worker(self, threads: int) -> None:
        self.threads += threads
        if not self.stopped:
            self.scheduler.add_threads(threads)

    def log_fault(self, what: str) -> None:
        """Tell of a fault in the story."""
        self.sim.log(self.name, what, out=True)

    def cut(self) -> None:
        """Start a partition: neither hub nor other sites reach it."""
        self.sim.count("partition")
        self.reachable = False
        if self.connection is not None:
            self.connection.cut()
            self.sim.hub.handle(SiteReach(self.name, away=True))

    def mend(self) -> None:
        """End the partition."""
        self.reachable = True
        if self.connection is not None:
            self.connection.mend()
            self.sim.hub.handle(SiteReach(self.name, away=False))

    def crash(self) -> None:
        """Stop without a word."""
        self.stopped = True
        self.scheduler.closed = True
        if self.connection is not None:
            self.connection.ends[1].close()

    def _stop(self) -> None:
        self.stopped = self.scheduler.closed = True
        self.sim.clock.call_later(self._weather.delay_s[1], self.sim.hub.site_left, self.name, self.incarnation)

    # -- the hub ------------------------------------------------------------------------------------------------

    def _to_hub_shell(self, message: Message, beside: Any) -> None:
        self.joined = True
        self.sim.hub.from_site(self.name, message, beside)

    def _from_hub(self, message: Message, beside: Any) -> None:
        if isinstance(message, RunBlock):
            self.payloads[message.block.id, message.attempt] = self.sim.payloads[message.block.id]
        self._handle(message, beside)

    def _send(self, message: Message, beside: Any = None) -> None:
        if self.connection is not None and not self.stopped:
            self.connection.ends[1].send(message, beside)
            self.connection.ends[1].pump()

    def _report(self) -> None:
        if not (self.stopped or self.sim.over):
            self._send(self._status())
            self._learn()
            self.sim.clock.call_later(STATUS_S, self._report)

    def _status(self) -> SiteStatus:
        queued = self._unfinished()
        workers = min(1, self.threads)
        return SiteStatus(workers, self.threads, 2**33, 2**20, 0, queued, self.draining, round_trip_s=self._round_trip_s)

    def _learn(self) -> None:
        fresh = self.scheduler.settled - self._ran
        if fresh:
            self._ran += fresh
            seconds = fresh * 0.1 * self.scheduler.slowness
            self._send(Learned((("inc", fresh, seconds),), (("inc", fresh, fresh * 100),)))

    # -- the core -----------------------------------------------------------------------------------------------

    def _handle(self, event: Any, beside: Any = None) -> None:
        """Give one event to the core, verify it, and do what it commands."""
        if self.stopped:
            return
        self.sim.log(self.name, event)
        commands = self.core.handle(event, self.sim.clock.now)
        if self.sim.should_check() and (commands or not isinstance(event, ev.Load)):
            self.core.check()
        self._follow_stories()
        for command in commands:
            self.sim.log(self.name, command, out=True)
            self._do(command, beside)
        if self.connection is not None and not self.stopped:
            self.connection.ends[1].pump()

    def _do(self, command: ev.Command, beside: Any) -> None:
        if isinstance(command, ev.TellHub):
            if isinstance(command.message, SiteHoldings):
                beside = self._errors()
            elif not isinstance(command.message, KeysFailed):
                beside = None
            if self.connection is not None:
                self.connection.ends[1].send(command.message, beside)
        elif isinstance(command, ev.SubmitBlock):
            payload = self.payloads.pop((command.block, command.attempt), None)
            states = {key: self.core.keys[key] for key in command.outputs if key in self.core.keys}
            others = {key: {*s.makers, *s.made_by} - {command.block} for key, s in states.items()}
            joined = {key for key, s in states.items() if s.hub or s.users or others[key]}
            self.sim.require(payload is not None, "a block is submitted whose payload is gone", self.name, command)
            self._to_scheduler(self._run_block, command, payload, joined)
        elif isinstance(command, ev.SubmitImport):
            error = Failure(beside[command.key]["exception"]) if command.failed else None
            if command.failed:
                self._failures[command.key] = beside[command.key]
            self._to_scheduler(self._import, command.key, error)
        elif isinstance(command, ev.Fetch):
            self._fetch(command)
        elif isinstance(command, ev.DropBytes):
            self.bytes.pop(command.key, None)
        elif isinstance(command, ev.ReleaseAtScheduler):
            self._releasing.update(command.keys)
            self._to_scheduler(self._release, command.keys)
        elif isinstance(command, ev.ForgetPayload):
            self.payloads.pop((command.block, command.attempt))
        else:
            self._stop()

    def _follow_stories(self) -> None:
        stories = self.core.stories
        while stories:
            subject, move = stories.popleft()
            is_block = subject in self.sim.payloads
            (self.blocks if is_block else self.keys).follow(subject, move)

    # -- to the scheduler ---------------------------------------------------------------------------------------

    def _to_scheduler(self, action: Callable[..., None], *args: Any) -> None:
        self.sim.clock.call_later(self._delay_s, action, *args)

    def _run_block(self, command: ev.SubmitBlock, payload: dict[Key, FakeTask], joined: set[Key]) -> None:
        """Have the scheduler run a block; keys in ``joined`` may be under way for other blocks here."""
        attempt = (command.block, command.attempt)
        self.sim.require(attempt not in self._seen_attempts, "an attempt is submitted twice", self.name, *attempt)
        self._seen_attempts.add(attempt)
        for key in command.outputs:
            task, maker = self.scheduler.tasks.get(key), self._maker.get(key)
            going = task is not None and task.wanted and task.state in UNDER_WAY and key not in joined
            two = going and maker is not None and maker[0] == command.block
            self.sim.require(not two, "two attempts of a block are active at one site", self.name, maker, attempt)
            self._maker[key] = attempt
        self._submitted += 1
        payload = {key: self._by_chance(task) for key, task in payload.items()}
        self.scheduler.update_graph(payload, command.outputs)

    def _by_chance(self, task: FakeTask) -> FakeTask:
        """Return a task, or one that fails in its place."""
        if task.key not in self.sim.universe.flaky or self._rng.random() > BAD_LUCK:
            return task
        self.sim.count("task failed by chance")
        return replace(task, fails=True)

    def _import(self, key: Key, error: Failure | None) -> None:
        task = self.scheduler.tasks.get(key)
        making = task is not None and task.wanted and task.state in UNDER_WAY
        self.sim.require(not making, "a key is imported while it is being made here", self.name, key)
        self._maker.pop(key, None)  # what is under way from now on is no attempt of a block
        fetch = FakeTask(key, (), seconds=0.001, nbytes=8, fetch=lambda: error or self._bytes_of(key))
        self.scheduler.update_graph({key: fetch}, [key])

    def _bytes_of(self, key: Key) -> int | Failure:
        if self._rng.random() < self.sim.plan.landing_failure:
            self.sim.count("landing failed")
            return Failure(key, transfer=True)
        if key in self.sim.universe.brittle and self._rng.random() < BAD_LUCK:
            self.sim.count("value that does not open")
            return Failure(key)
        return self.bytes.get(key, Failure(key, transfer=True))

    def _release(self, keys: tuple[Key, ...]) -> None:
        self.scheduler.release(keys)
        self._from_scheduler(keys)

    def value(self, key: Key) -> int | Failure | None:
        """Return the value of a key that is in memory here, None where it is not."""
        if self.stopped:
            return None
        try:
            return self.scheduler.gather(key)
        except KeyError:
            return None

    def takes(self, keys: tuple[Key, ...]) -> bool:
        """Say whether data may be put here now: as in the real agent not before a release of it that is under way."""
        if self.name not in self.sim.hub.core.sites or self.stopped or self.connection is None:
            return False
        hub, here = (end.link for end in self.connection.ends)
        busy = any(self._releasing[key] or (key in self.core.keys and not self.core.holds(key)) for key in keys)
        return here.received == hub.accepted and not busy

    def scatter(self, keys: tuple[Key, ...]) -> None:
        """Put data on a worker, as the agent does for the hub."""
        for key in keys:
            value = self.sim.universe.values[key]
            assert value is not None
            self.scheduler.scatter(key, value, nbytes=8)
        self._handle(ev.KeysScattered(tuple(MadeKey(key, 8) for key in keys)))

    # -- from the scheduler -------------------------------------------------------------------------------------

    def _from_scheduler(self, event: SchedulerEvent | tuple[Key, ...]) -> None:
        if not self._batch:
            self.sim.clock.call_later(self._delay_s, self._hear_batch)
        self._batch.append(event)

    def _hear_batch(self) -> None:
        batch, self._batch = self._batch, []
        for kind, events in groupby(batch, key=_kind):
            self._hear(kind, list(events))

    def _hear(self, kind: Any, events: list[Any]) -> None:
        if kind is tuple:  # the scheduler has answered releases
            for keys in events:
                self._releasing.subtract(keys)
            self._releasing = +self._releasing
        elif kind is Cancelled:
            for event in events:
                excused = self.sim.clock.now < self._excused_until  # its input was lost on the way to the scheduler
                lacking = event.reason == LOST_INPUT and not excused
                self.sim.require(not lacking, "a block ran without an input", self.name, event)
                self._handle(ev.KeysForgotten(tuple(key for key in event.keys if not self._releasing[key])))
        elif fresh := [event for event in events if not self._releasing[event.key]]:
            if kind is InMemory:
                self._handle(ev.KeysReady(tuple(MadeKey(event.key, event.nbytes) for event in fresh)))
            else:
                self._hear_failure(kind, tuple(event.key for event in fresh))

    def _hear_failure(self, failure: Failure, keys: tuple[Key, ...]) -> None:
        beside = {"exception": failure.origin, "traceback": None}
        self._failures |= dict.fromkeys(keys, beside)
        self._handle(ev.KeysErred(keys, failure.transfer), beside)

    def _count_load(self) -> None:
        if self.stopped or self.sim.over:
            return
        load = (self._unfinished(), self._submitted)
        if load != self._last_load:
            self._last_load = load
            count = ev.Load(load[0], self.threads, load[1])
            self.sim.clock.call_later(self._delay_s, self._handle, count)
        self.sim.clock.call_later(LOAD_S, self._count_load)

    def _unfinished(self) -> int:
        return sum(task.state in UNDER_WAY for task in self.scheduler.tasks.values())

    # -- transfers ----------------------------------------------------------------------------------------------

    def _fetch(self, command: ev.Fetch) -> None:
        asked = self.sim.clock.now
        seconds = 0.002 + command.nbytes / self.sim.plan.bandwidth_bps * (1 + self._rng.random())
        if self._rng.random() < self.sim.plan.fetch_stall:
            self.sim.count("fetch stalled")
            seconds += self._rng.choice([1.0, 5.0])
        self.sim.clock.call_later(0.001, self._read_there, command, asked, seconds)

    def _read_there(self, command: ev.Fetch, asked: float, seconds: float, patience_s: float = GATHER_S) -> None:
        source = self.sim.sites[command.source]
        value = source.value(command.key)
        if not (source.reachable and self.reachable):
            self._fetch_failed(command, "timed out", RPC_TIMEOUT_S)
        elif value is None and patience_s and source.core.holds(command.key) and not source.stopped:
            self.sim.clock.call_later(patience_s, self._read_there, command, asked, seconds, 0.0)
        elif value is None or isinstance(value, Failure):
            source.misses(command.key)
            self._fetch_failed(command, "not there", 0.001)
        elif self._rng.random() < self.sim.plan.fetch_failure:
            self.sim.count("fetch failed")
            self._fetch_failed(command, "the connection broke", seconds / 2)
        else:
            self.sim.clock.call_later(seconds, self._fetched, command, asked, value)

    def misses(self, key: Key) -> None:
        """Somebody asked for a key that no worker here has, and has not had for a while."""
        if not self.stopped:
            self.sim.count("key missing")
            self._handle(ev.KeysMissing((key,)))

    def _fetch_failed(self, command: ev.Fetch, reason: str, seconds: float) -> None:
        failed = ev.FetchFailed(command.key, command.source, reason, missing=reason == "not there")
        self.sim.clock.call_later(seconds, self._handle, failed)

    def _fetched(self, command: ev.Fetch, asked: float, value: int) -> None:
        if not self.stopped:
            self.bytes[command.key] = value
            seconds = self.sim.clock.now - asked
            self._handle(ev.Fetched(command.key, command.source, command.nbytes or 8, seconds, False))

    # -- the books ----------------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Return what this site still has, in words; nothing once everything was released."""
        if self.stopped:
            return []
        books: dict[str, Collection[Any]] = {
            "keys": self.core.keys,
            "blocks": self.core.blocks,
            "payloads": self.payloads,
            "bytes": self.bytes,
            "tasks": [key for key, task in self.scheduler.tasks.items() if task.wanted or task.state not in DORMANT],
            "unanswered releases": self._releasing,
        }
        return [f"{self.name} has {name} left: {list(book)[:3]}" for name, book in books.items() if book]

    @property
    def talks(self) -> bool:
        """Whether anything is under way or owed between hub and site."""
        return not self.stopped and self.connection is not None and not self.connection.idle


def _kind(event: SchedulerEvent | tuple[Key, ...]) -> Any:
    """Return what events have in common that the agent passes on in one piece."""
    return event.failure if isinstance(event, Erred) else type(event)

