"""Simulated clients: they submit overlapping graphs, let go of keys, cancel, and remember what they were told."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from daskfed.hub import events as ev
from daskfed.messages import BlockSpec, Key
from daskfed.testing.scheduler import Failure
from tests.simulation.workload import Cutter

if TYPE_CHECKING:
    from tests.simulation.federation import Simulation

Told = ev.Outcome | None  # None: nothing yet
SETTLED = (ev.Outcome.IN_MEMORY, ev.Outcome.FAILED)


class ClientNode:
    """One client; its connection to the hub is an ordered stream with a delay."""

    def __init__(self, sim: Simulation, name: str, rng: Random, cutter: Cutter, submissions: int) -> None:
        self.sim = sim
        self.name = name
        self.held: dict[Key, Told] = {}
        self.values: dict[Key, int | Failure] = {}  # what was gathered, or the error that was told
        self._rng = rng
        self._cutter = cutter
        self._submissions = submissions
        self._delay_s = rng.choice([0.001, 0.02, 0.1])
        self.copies: dict[Key, None] = {}  # data that it can bring again
        self._under_way = 0  # actions that it planned
        self.gone = False  # it crashed or left
        self.connected = True  # as far as it knows
        self._line = 0  # which connection it has: what is under way on a former one is lost
        self.book: dict[str, tuple[BlockSpec, int]] = {}  # its blocks that the hub has not forgotten -> arrival number
        self._place_in_graph: dict[str, int] = {}
        self.borrowed: set[Key] = set()
        self._given_up: set[Key] = set()  # keys that it did not want any more when it was back: cancelled, or lost

    @property
    def acting(self) -> bool:
        """Whether it will still submit, release or cancel of its own will."""
        return self._under_way > 0

    def start(self) -> None:
        """Connect, and plan the first graph."""
        if self.gone:
            return
        if self.sim.hub.crashed:
            self.sim.clock.call_later(0.3, self.start)
            return
        self._say(self.sim.hub.handle, ev.ClientJoined(self.name, "user"))
        self._plan(self._rng.random(), self._act)

    def leave(self) -> None:
        """Disconnect for good; what it held is released."""
        self._say(self.sim.hub.handle, ev.ClientLeft(self.name))
        self.crash()

    def crash(self) -> None:
        """Stop without a word."""
        self.gone = True
        self.held.clear()

    def _say(self, action: Callable[..., None], *args: Any) -> None:
        if self.connected and not self.gone:  # else: what it says when it is back has it all
            self.sim.clock.call_later(self._delay_s, self._if_on(self._line, action), *args)

    def _if_on(self, line: int, action: Callable[..., None]) -> Callable[..., None]:
        """Return ``action``, to be carried out only if the connection did not break meanwhile."""
        return lambda *args: action(*args) if line == self._line else None

    def hub_lost(self) -> None:
        """The connection with the hub broke, with what was under way on it."""
        self.connected = False
        self._line += 1

    def resume(self) -> None:
        """The hub is back: tell it all that this client knows."""
        if self.gone or self.connected or self.sim.hub.crashed:
            return
        self.connected = True
        lost = (ev.Outcome.CANCELLED, ev.Outcome.LOST)
        wanted = tuple(key for key, told in self.held.items() if told not in lost)
        self._given_up = self.held.keys() - set(wanted)
        for key in wanted:
            self.held[key] = None
        self.sim.log(self.name, f"is back with {len(self.book)} blocks")
        self._say(self.sim.hub.resume, self.name, tuple(self.book.values()), wanted, tuple(self.copies))

    def hears(self, action: Callable[..., None], *args: Any) -> None:
        """Called by the hub: ``action`` is what a message of it makes this client do, a delay later."""
        if self.connected and not self.gone:
            self.sim.clock.call_later(self._delay_s, self._if_on(self._line, action), *args)

    def arrived(self, block: str, arrival: int, count: int) -> None:
        """The hub has numbered ``count`` blocks of a submission, from this one on."""
        if block not in self.book:
            return
        graph, first = block.rsplit("/", 1)[0], self._place_in_graph[block]
        for name, (spec, _) in self.book.items():
            place = self._place_in_graph[name] - first
            if name.rsplit("/", 1)[0] == graph and 0 <= place < count:
                self.book[name] = (spec, arrival + place)

    def forget(self, block: str) -> None:
        """The hub will never ask for a block again."""
        self.book.pop(block, None)

    def _plan(self, delay_s: float, action: Callable[[], None]) -> None:
        self._under_way += 1
        self.sim.clock.call_later(delay_s, self._carry_out, action)

    def _carry_out(self, action: Callable[[], None]) -> None:
        self._under_way -= 1
        if not self.gone:
            action()

    # -- acting -------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        keys = self.sim.universe.computed()
        self.submit(tuple(dict.fromkeys(self._rng.choice(keys) for _ in range(self._rng.choice([1, 3, 8])))))
        for _ in range(self._rng.randrange(4)):
            self._plan(self._rng.expovariate(1.0), self._change_its_mind)
        self._submissions -= 1
        if self._submissions:
            self._plan(self._rng.expovariate(0.5), self._act)

    def submit(self, wanted: tuple[Key, ...]) -> None:
        """Submit a graph for the keys ``wanted``, which may refer to keys that it holds."""
        usable = [key for key, told in self.held.items() if told in (None, *SETTLED) and key not in wanted]
        given = frozenset(key for key in usable if self._rng.random() < 0.7)
        graph = self._cutter.cut(self.name, wanted, given)
        for key in wanted:
            self.held[key] = None
            self.values.pop(key, None)
            self.borrowed.discard(key)
            self._given_up.discard(key)
        self.sim.payloads |= graph.payloads
        self.sim.specs += graph.blocks
        self.book |= {block.id: (block, 0) for block in graph.blocks}
        self._place_in_graph |= {block.id: n for n, block in enumerate(graph.blocks)}
        self.sim.log(self.name, f"submits {len(graph.blocks)} blocks for {len(wanted)} keys")
        if self._rng.random() < 0.1:
            self._say(self.sim.hub.promise, self.name, wanted)
        self._say(self.sim.hub.submit, self.name, graph)

    def _change_its_mind(self) -> None:
        if not self.held:
            return
        actions = (self._release_some, self._start_over, self._cancel_some, self._borrow_some)
        self._rng.choice(actions)(self._some_held())

    def _some_held(self) -> tuple[Key, ...]:
        share = self._rng.choice([0.1, 0.5, 1.0])
        return tuple(key for key in self.held if self._rng.random() < share)

    def _release_some(self, keys: tuple[Key, ...]) -> None:
        for key in keys:
            del self.held[key]
            self.values.pop(key, None)
        self._say(self.sim.hub.handle, ev.KeysReleased(self.name, keys))

    def _start_over(self, keys: tuple[Key, ...]) -> None:
        """Release keys and ask for them, or some of them, again at once."""
        self._release_some(keys)
        wanted = tuple(key for key in keys if key not in self.sim.universe.data and self._rng.random() < 0.8)
        if wanted:
            self.submit(wanted)

    def _cancel_some(self, keys: tuple[Key, ...]) -> None:
        keys = tuple(key for key in keys if key not in self.sim.universe.data)[:3]  # hardly anything runs without data
        for key in keys:
            del self.held[key]
            self.values.pop(key, None)
        self.sim.cancelled |= dict.fromkeys(keys)
        self.sim.count("cancellation")
        self._say(self.sim.hub.handle, ev.KeysCancelled(self.name, keys, force=self._rng.random() < 0.3))

    def _borrow_some(self, keys: tuple[Key, ...]) -> None:
        """Take keys of another client, as through a published dataset."""
        others = [client for client in self.sim.clients.values() if client is not self]
        if others:
            other = self._rng.choice(others)
            keys = tuple(key for key, told in other.held.items() if told in SETTLED and key not in self.held)[:3]
            self.held |= dict.fromkeys(keys)
            self.borrowed.update(keys)
            self._given_up.difference_update(keys)
            self._say(self.sim.hub.desire, self.name, keys)

    def too_late(self, keys: tuple[Key, ...]) -> None:
        """Keys to borrow had been released when the hub was asked: what was to be made from them ends as well."""
        self.sim.cancelled |= dict.fromkeys(keys)
        for key in self.borrowed.intersection(keys):
            self.held.pop(key, None)

    def retry_failed(self) -> None:
        """Have all that failed made again."""
        if failed := tuple(key for key, told in self.held.items() if told is ev.Outcome.FAILED):
            self.sim.hub.retry(failed)

    def release_all(self) -> None:
        """Let go of everything."""
        self._release_some(tuple(self.held))

    # -- hearing ------------------------------------------------------------------------------------------------

    def bring_again(self, keys: tuple[Key, ...]) -> None:
        """The hub asks for data of this client whose site is gone."""
        self.sim.require(self.copies.keys() >= set(keys), "a client is asked for data of which it has no copy", keys)
        self._say(self._scatter_again, keys)  # it takes a while, and is forgotten where the connection breaks

    def _scatter_again(self, keys: tuple[Key, ...]) -> None:
        if not self.connected:
            return
        there = [site for site in self.sim.sites.values() if site.stays and site.takes(keys)]
        if there:
            self.sim.hub.scatter(self.name, self._rng.choice(there).name, keys, again=True)
        else:
            self.sim.clock.call_later(0.1, self._scatter_again, keys)

    def drop_copies(self, keys: tuple[Key, ...]) -> None:
        """The hub says that nobody needs this data any more."""
        for key in keys:
            self.copies.pop(key, None)

    def told(self, command: ev.TellClient, failures: dict[Key, Failure]) -> None:
        """The hub says how keys stand."""
        for key in command.keys:
            if key not in self.held or key in self._given_up:  # said before the hub heard that it is back
                continue
            self.held[key] = None if command.outcome is ev.Outcome.RETRIED else command.outcome
            if key in failures:
                self._take(key, failures[key])
            elif command.outcome is ev.Outcome.IN_MEMORY and self._rng.random() < 0.3:
                self.gather(key)
            elif command.outcome in (ev.Outcome.CANCELLED, ev.Outcome.LOST):
                allowed = key in self.sim.doomed() or key in self.borrowed
                self.sim.require(allowed, f"a key is {command.outcome.value} without cause", key, command.reason)

    def gather(self, key: Key) -> bool:
        """Fetch a value and compare it with the reference; return whether it was there."""
        value = self.sim.hub.gather(key)
        if value is None:
            return False
        self._take(key, value)
        return True

    def _take(self, key: Key, value: int | Failure) -> None:
        self.values[key] = value
        self.sim.require(self.sim.agrees(key, value), "a key has the wrong outcome", key, value)
