"""What simulated clients submit: parts of one random graph, cut into random blocks, with random constraints.

All clients of a history draw from one *universe* of tasks, as Dask's deterministic tokens make real clients do: their
graphs overlap, and a key means the same wherever it turns up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from random import Random

from daskfed.messages import BlockKind, BlockSpec, Constraint, Key
from daskfed.testing.scheduler import Failure, FakeTask, value_of

PREFIXES = ("load", "inc", "sum", "merge", "x")


@dataclass(slots=True)
class Universe:
    """All tasks that a history may ever run, and what each must yield."""

    tasks: dict[Key, FakeTask]
    data: tuple[Key, ...]  # those of them that a client brings: they are never run
    flaky: frozenset[Key] = frozenset()  # tasks that fail now and then
    brittle: frozenset[Key] = frozenset()  # values that now and then cannot be opened at another site
    values: dict[Key, int | None] = field(init=False)  # None: the task, or what it needs, always fails
    blamed: dict[Key, frozenset[Key]] = field(init=False)  # the tasks whose failure a key may show

    def __post_init__(self) -> None:
        self.values, self.blamed = {}, {}
        for key, task in self.tasks.items():  # in topological order
            inputs = [self.values[dep] for dep in task.deps]
            there = [each for each in inputs if each is not None]
            complete = len(there) == len(inputs) and not task.fails
            self.values[key] = value_of(key, there) if complete else None
            self.blamed[key] = self._blamed(task)

    def _blamed(self, task: FakeTask) -> frozenset[Key]:
        runs = all(self.values[dep] is not None for dep in task.deps)
        own = {task.key} if runs and (task.fails or task.key in self.flaky) else set[Key]()
        inputs = [self.blamed[dep] for dep in task.deps]
        return frozenset(own.union(*inputs, self.brittle.intersection(task.deps)))

    def agrees(self, key: Key, value: int | Failure) -> bool:
        """Say whether ``value`` is what the reference evaluation gives for ``key``."""
        if isinstance(value, Failure):
            return value.origin in self.blamed[key]
        return value == self.values[key]

    def closure(self, keys: Iterable[Key], given: frozenset[Key] = frozenset()) -> list[Key]:
        """Return ``keys`` and their ancestors in topological order, without data and what lies behind ``given``."""
        stack, found, given = list(keys), set[Key](), given | set(self.data)
        while stack:
            key = stack.pop()
            if key not in found and key not in given:
                found.add(key)
                stack.extend(self.tasks[key].deps)
        return [key for key in self.tasks if key in found]

    def computed(self) -> list[Key]:
        """Return all keys but the data."""
        return [key for key in self.tasks if key not in self.data]

    def some(self, rng: Random, count: int, held: Set[Key]) -> tuple[Key, ...]:
        """Return one to three random keys but those ``held``, which need about ``count`` tasks, or as many as there are."""
        keys, chosen = [key for key in self.computed() if key not in held], dict[Key, None]()
        while (need := count - len(self.closure(chosen))) > 0 and len(chosen) < 3:
            drawn = rng.sample(keys, 6)
            chosen[min(drawn, key=lambda key: abs(len(self.closure((key,))) - need))] = None
        return tuple(chosen)


def random_universe(rng: Random, ntasks: int) -> Universe:
    """Return a random graph: mostly local edges, some far ones, a few tasks that fail, a few large results."""
    data: tuple[Key, ...] = ("data-0", "data-1")
    tasks = {key: FakeTask(key) for key in data}
    keys = list(data)
    failing = rng.choice([0.0, 0.01, 0.04])
    width = rng.choice([8, 20, 60])
    for n in range(ntasks):
        prefix = PREFIXES[n % len(PREFIXES)]
        key: Key = ("x", n) if prefix == "x" else f"{prefix}-{n}"
        deps = () if n < 6 or rng.random() < 0.2 else _some_earlier(rng, keys, width)
        seconds = rng.choice([0.002, 0.02, 0.1, 0.4])
        nbytes = rng.choice([8, 1000, 10**6])
        tasks[key] = FakeTask(key, deps, seconds, nbytes, fails=rng.random() < failing)
        keys.append(key)
    made, share = keys[len(data) :], rng.choice([0.0, 0.0, 0.03])
    flaky = frozenset(key for key in made if rng.random() < share)
    brittle = frozenset(key for key in made if rng.random() < share)
    return Universe(tasks, data, flaky, brittle)


def _some_earlier(rng: Random, keys: list[Key], width: int) -> tuple[Key, ...]:
    chosen = [rng.choice(keys if rng.random() < 0.1 else keys[-width:]) for _ in range(rng.choice([1, 2, 2, 3, 4]))]
    return tuple(dict.fromkeys(chosen))


@dataclass(frozen=True, slots=True)
class Submission:
    """One graph as a client sends it."""

    blocks: tuple[BlockSpec, ...]
    payloads: dict[str, dict[Key, FakeTask]]  # block -> its tasks
    wanted: tuple[Key, ...]


class Cutter:
    """Cuts parts of a universe into blocks."""

    def __init__(self, rng: Random, universe: Universe, places: tuple[str, ...]) -> None:
        self._rng = rng
        self._universe = universe
        self._places = places  # selectors that a block may be pinned to
        self._cuts = 0

    def cut(self, client: str, wanted: tuple[Key, ...], given: frozenset[Key]) -> Submission:
        """Cut what is needed for ``wanted``; keys in ``given`` are held by the client and are only referred to.

        Each task gets a colour; a block holds the tasks of one colour and one stage, and the stage rises where an edge
        joins two colours: so edges between blocks go to higher stages only. Some sources are copied to their users.
        """
        order = self._universe.closure(wanted, given)
        copied = {key for key in order if not self._universe.tasks[key].deps and self._rng.random() < 0.1}
        home = self._colour(order)
        members: defaultdict[tuple[int, int], list[Key]] = defaultdict(list)
        for key in order:
            members[home[key]].append(key)
        needed = self._needed_elsewhere(order, home, copied) | set(wanted)
        self._cuts += 1
        blocks, payloads = [], {}
        for rank, place in enumerate(sorted(members)):
            outputs = tuple(key for key in members[place] if key in needed)
            if outputs:
                payload = self._payload(outputs, set(members[place]) | copied)
                spec = self._spec(f"{client}/{self._cuts}/{rank}", client, payload, outputs, rank)
                blocks.append(spec)
                payloads[spec.id] = payload
        return Submission(tuple(blocks), payloads, wanted)

    def _colour(self, order: list[Key]) -> dict[Key, tuple[int, int]]:
        colours = self._rng.choice([1, 2, 3, 6])
        home: dict[Key, tuple[int, int]] = {}
        for key in order:
            colour = self._rng.randrange(colours)
            deps = [home[dep] for dep in self._universe.tasks[key].deps if dep in home]
            if deps and self._rng.random() < 0.6:
                colour = deps[0][1]
            stage = max((stage + (other != colour) for stage, other in deps), default=0)
            home[key] = (stage, colour)
        return home

    def _needed_elsewhere(self, order: list[Key], home: dict[Key, tuple[int, int]], copied: set[Key]) -> set[Key]:
        return {
            dep
            for key in order
            for dep in self._universe.tasks[key].deps
            if dep in home and home[dep] != home[key] and dep not in copied
        }

    def _payload(self, outputs: tuple[Key, ...], inside: set[Key]) -> dict[Key, FakeTask]:
        stack, found = list(outputs), dict[Key, FakeTask]()
        while stack:
            key = stack.pop()
            if key in inside and key not in found:
                found[key] = self._universe.tasks[key]
                stack.extend(found[key].deps)
        return {key: found[key] for key in self._universe.tasks if key in found}

    def _spec(
        self, name: str, client: str, payload: dict[Key, FakeTask], outputs: tuple[Key, ...], rank: int
    ) -> BlockSpec:
        inputs = dict.fromkeys(dep for task in payload.values() for dep in task.deps if dep not in payload)
        prefixes: defaultdict[str, int] = defaultdict(int)
        for key in payload:
            prefixes[str(key[0]) if isinstance(key, tuple) else str(key).split("-")[0]] += 1
        return BlockSpec(
            id=name,
            client=client,
            owner="user",
            kind=BlockKind.GRAPH if inputs or len(payload) > 1 else BlockKind.CALLS,
            inputs=tuple(inputs),
            outputs=outputs,
            ntasks=len(payload),
            prefixes=tuple(sorted(prefixes.items())),
            constraint=self._constraint(),
            rank=rank,
            near=(self._places[sum(map(ord, name)) % len(self._places)],) if rank % 3 == 0 else (),
        )

    def _constraint(self) -> Constraint:
        sites = (self._rng.choice(self._places),) if self._rng.random() < 0.2 else ()
        return Constraint(sites=sites, priority=self._rng.choice([0, 0, 0, 5]))
