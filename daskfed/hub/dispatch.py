"""Which ready block goes to which site, and when; which is asked back. Pure.

Blocks that may run at the same sites, near the same data, wait in one queue, in order. A block is sent only while its
best site has room: as much work as keeps it busy over a round trip, and a little more (late binding). Where a site runs
dry while others still have blocks that they did not start, one is recalled for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from daskfed.backlog import Backlog
from daskfed.hub.estimates import LANDING_S, FunctionBook, LinkBook
from daskfed.hub.events import TellSite
from daskfed.hub.fairness import Flow, Shares
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import BlockState, Ledger, Order
from daskfed.hub.placement import Candidate, Policy, finish_s, worth_moving
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.hub.suspicion import choose, on_trial
from daskfed.messages import (
    Attempt,
    BlockKind,
    BlockSpec,
    CloseSite,
    Constraint,
    CopyKeys,
    Import,
    Key,
    RecallBlock,
    RunBlock,
    SiteHello,
    SiteStatus,
)

HORIZON_S = 0.5  # work that a site is given ahead, in seconds of all its threads, beside two round trips
MIN_BLOCKS = 2  # that a site may always have, however long they are
TASKS_AHEAD = 4  # tasks per thread that a site may always have
LOOKAHEAD = 16  # blocks of a queue that are looked at while the first ones wait for a better site
LEAST_LEFT = 0.1  # of its expected time, that a backlog will still take, however long nothing has ended
RECALL_GAIN = 0.8  # a recall must promise to finish in this share of the time or less
EXISTING = (KeyPhase.HELD, KeyPhase.FAILED)
AT_ONCE = (BlockKind.WHOLE, BlockKind.NESTED)  # must not be overtaken by releases of what the hub does not know

Where: TypeAlias = tuple[Constraint, tuple[str, ...], Flow]
"""What blocks of one queue have in common: where they may run, near what they should, and whose turn it is."""


@dataclass(slots=True)
class SiteState:
    """One site of the federation."""

    hello: SiteHello
    status: SiteStatus | None = None  # None until its first report
    blocks: dict[str, None] = field(default_factory=dict)  # placed here and unfinished, in order of placement
    backlog: Backlog = field(default_factory=Backlog)  # what those blocks are expected to take
    since: float = 0.0  # when the last block ended here, or the first came
    recalled_for: str | None = None  # block that is being recalled for the sake of this site
    copying: set[Key] = field(default_factory=set)  # keys that it hands over before it leaves
    leaving: bool = False  # it was told to close
    trials: set[str] = field(default_factory=set)  # blocks here of which all that is to be made is suspect
    empty_since: float | None = None  # when it had blocks and no workers first, since it last had any
    deserted: bool = False  # that is long ago: it gets no blocks while other sites may have them
    away: bool = False  # the connection with it broke a moment ago: it gets no blocks until it is back
    unclaimed: bool = False  # it holds, or works at, what nobody here knows, while clients are still awaited

    @property
    def name(self) -> str:
        """The name of the site."""
        return self.hello.site

    @property
    def threads(self) -> int:
        """Threads of its workers; 0 while it has none."""
        return self.status.threads if self.status else 0

    @property
    def backlog_s(self) -> float:
        """Seconds of one thread that its unfinished blocks are expected to take."""
        return self.backlog.total.seconds

    def left_s(self, now: float) -> float:
        """Return ``backlog_s`` without what it has probably done since a block ended here, but never nothing."""
        return max(self.backlog_s - (now - self.since) * self.threads, LEAST_LEFT * self.backlog_s)

    @property
    def draining(self) -> bool:
        """Whether it takes no more blocks."""
        return self.leaving or self.status is None or self.status.draining

    def has_room(self, priority: int) -> bool:
        """Say whether it should be given more work of this priority now."""
        if self.draining or self.status is None:
            return False
        threads = max(1, self.threads)
        horizon = (HORIZON_S + 2 * self.status.round_trip_s) * threads
        ahead = self.backlog.ahead_of(priority)
        return ahead.blocks < MIN_BLOCKS or ahead.ntasks < TASKS_AHEAD * threads or ahead.seconds < horizon


def meets(hello: SiteHello, constraint: Constraint) -> bool:
    """Say whether a site satisfies a constraint's sites (names or labels), environment and resources."""
    if constraint.sites and not any(matches(hello, selector) for selector in constraint.sites):
        return False
    if constraint.environment is not None and constraint.environment not in hello.environments:
        return False
    if not opens(hello, constraint) or not serves(hello, constraint.owner):
        return False
    offered = dict(hello.resources)
    return all(offered.get(name, 0) >= amount for name, amount in constraint.resources)


def opens(hello: SiteHello, constraint: Constraint) -> bool:
    """Say whether a site has the Python that pickled the tasks; an environment brings its own."""
    if not constraint.python or constraint.environment is not None:
        return True
    version = dict(hello.versions).get("python", constraint.python)
    return version.split(".")[:2] == constraint.python.split(".")[:2]


def serves(hello: SiteHello, owner: str) -> bool:
    """Say whether a site runs the work of an owner, and keeps their data; an unknown one may be anybody."""
    return not (hello.serves and owner) or owner in hello.serves


def matches(hello: SiteHello, selector: str) -> bool:
    """Say whether ``selector`` is the site's name or one of its labels, written ``name=value``."""
    return selector == hello.site or tuple(selector.split("=", 1)) in hello.labels


class Dispatcher:
    """The queues of ready blocks and the sites that they may go to."""

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self.ledger = ledger
        self.policy = policy
        self.functions = FunctionBook()
        self.links = LinkBook()
        self.sites: dict[str, SiteState] = {}
        self.queues: dict[Where, list[tuple[Order, str]]] = {}
        self.shares = Shares()
        self.imports = 0  # asked for so far
        self.resting: list[tuple[float, Order, str]] = []  # (until, order, block) that are ready but failed before
        self.replicated: dict[Key, None] = {}  # keys that several sites are to hold
        self._eligible: dict[Constraint, list[SiteState]] = {}
        self._lonely: dict[Where, float] = {}  # queues that no site may take from -> since when

    # -- membership --------------------------------------------------------------------------------------------------

    def add_site(self, hello: SiteHello) -> None:
        """Take in a site."""
        self.sites[hello.site] = SiteState(hello)
        self._eligible.clear()

    def share_site(self, name: str, owners: tuple[str, ...]) -> None:
        """A site serves these owners from now on."""
        self.sites[name].hello = replace(self.sites[name].hello, serves=owners)
        self._eligible.clear()

    def remove_site(self, name: str) -> None:
        """Forget a site and what was being recalled for it."""
        del self.sites[name]
        self._eligible.clear()

    def eligible(self, constraint: Constraint) -> list[SiteState]:
        """Return the sites that meet a constraint."""
        where = placement_part(constraint)
        if where not in self._eligible:
            self._eligible[where] = [site for site in self.sites.values() if meets(site.hello, where)]
        return self._eligible[where]

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Take in what the ledger says became ready or left its site."""
        for name, block in self.ledger.unplaced:
            self._take_off(name, block)
        for block in self.ledger.ready:
            heapq.heappush(self.resting, (block.rests_until, block.order, block.spec.id))
        while self.resting and self.resting[0][0] <= self.ledger.now:
            _, order, name = heapq.heappop(self.resting)
            if (rested := self.ledger.blocks.get(name)) is not None:
                where = placement_part(rested.spec.constraint), rested.spec.near, Flow.of(rested.spec)
                heapq.heappush(self.queues.setdefault(where, []), (order, name))
        self.ledger.unplaced, self.ledger.ready = [], []

    def _put_on(self, site: SiteState, block: BlockState) -> None:
        if not site.blocks:
            site.since = self.ledger.now
        site.blocks[block.spec.id] = None
        site.backlog.add(*_work(block))

    def _take_off(self, name: str, block: BlockState) -> None:
        site = self.sites.get(name)
        if site is not None and block.spec.id in site.blocks:
            del site.blocks[block.spec.id]
            site.trials.discard(block.spec.id)
            site.backlog.remove(*_work(block))
            site.since = self.ledger.now
        self.recall_ended(block)

    def recall_ended(self, block: BlockState) -> None:
        """A block that was recalled is back, or stays where it is."""
        for site in self.sites.values():
            if site.recalled_for == block.spec.id:
                site.recalled_for = None

    def relearn(self) -> None:
        """Estimate every placed block anew, after durations were learnt."""
        for site in self.sites.values():
            site.backlog = Backlog()
            for name in site.blocks:
                block = self.ledger.blocks[name]
                block.expected_s = self.functions.block_s(block.spec)
                site.backlog.add(*_work(block))

    # -- placing -----------------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Send ready blocks to sites as long as the best site of one has room; of several flows in turn."""
        self.update()
        flows = {where[2] for where, queue in self.queues.items() if queue}
        self.shares.update(flows)
        if len(flows) > 1:
            self._place_in_turn()
        else:
            for where in sorted(self.queues, key=lambda where: self.queues[where][0] if self.queues[where] else ()):
                self._place_from(where)
        for where in [where for where, queue in self.queues.items() if not queue]:
            del self.queues[where]

    def _place_in_turn(self) -> None:
        waiting = [where for where, queue in self.queues.items() if queue]
        while waiting:
            where = min(waiting, key=self._turn)
            if not self._place_from(where, most=1) or not self.queues[where]:
                waiting.remove(where)

    def _turn(self, where: Where) -> tuple[tuple[bool, int], tuple[float, float], Order]:
        """Return a number for a queue; the least is next: its head's priority counts, then who has had least."""
        order = self.queues[where][0][0]
        return order[:2], self.shares.turn(where[2]), order

    def _place_from(self, where: Where, most: int | None = None) -> int:
        """Send blocks of a queue, at most so many; return how many were sent."""
        queue, sent = self.queues[where], 0
        deferred: list[tuple[Order, str]] = []
        sites = [site for site in self.eligible(where[0]) if not (site.draining or site.away)]
        sites = [site for site in sites if not site.deserted] or sites
        while queue and sites and len(deferred) < LOOKAHEAD and sent != most:
            block = self.ledger.blocks.get(queue[0][1])
            if block is None or block.phase is not BlockPhase.READY:
                heapq.heappop(queue)
                continue
            whole = block.spec.kind in AT_ONCE
            priority = block.spec.constraint.priority
            if not whole and not any(site.has_room(priority) for site in sites):
                break
            entry = heapq.heappop(queue)
            site = self._best(block, sites)
            if block.suspects and site.trials and self._is_trial(block):
                deferred.append(entry)
            elif whole or site.has_room(priority):
                self._send(block, site)
                self.shares.sent(where[2], block.expected_s)
                sent += 1
            else:
                deferred.append(entry)
        for entry in deferred:
            heapq.heappush(queue, entry)
        return sent

    def _is_trial(self, block: BlockState) -> bool:
        return on_trial(block.suspects, [state.key for state in self.ledger.pending_of(block)])

    def _best(self, block: BlockState, sites: list[SiteState]) -> SiteState:
        block.expected_s = self.functions.block_s(block.spec)
        if len(sites) == 1:
            return sites[0]
        return sites[self.policy.choose(block.spec, [self.candidate(block, site) for site in sites])]

    def candidate(self, block: BlockState, site: SiteState) -> Candidate:
        """Return everything that the estimate of ``block`` at ``site`` needs."""
        nbytes, seconds = self.bring(block.spec, site.name)
        status = site.status
        environment = block.spec.constraint.environment or "default"
        return Candidate(
            site=site.name,
            threads=site.threads,
            backlog_s=site.left_s(self.ledger.now),
            bring_nbytes=nbytes,
            bring_s=seconds,
            run_s=block.expected_s,
            guessed=not self.functions.known(block.spec),
            near=any(matches(site.hello, selector) for selector in block.spec.near),
            round_trip_s=status.round_trip_s if status else 0.0,
            cold_start_s=dict(status.cold_start_s).get(environment, 0.0) if status else 0.0,
            queue_wait_s=status.queue_wait_s if status else 0.0,
            walltime_left_s=status.walltime_left_s if status else float("inf"),
        )

    def bring(self, spec: BlockSpec, target: str) -> tuple[int, float]:
        """Return bytes and seconds to bring the inputs of a block that ``target`` lacks."""
        per_source: dict[str, list[int]] = {}
        for key in spec.inputs:
            state = self.ledger.keys[key]
            if state.holders and not state.present_at(target):
                per_source.setdefault(self.source_of(key, target), []).append(state.nbytes)
        seconds = sum(self.links.transfer_s(source, target, sum(sizes)) for source, sizes in per_source.items())
        landing_s = LANDING_S * sum(map(len, per_source.values())) / max(1, self.sites[target].threads)
        return sum(map(sum, per_source.values())), seconds + landing_s

    def source_of(self, key: Key, target: str) -> str:
        """Return the site from which ``target`` gets a held key soonest."""
        state = self.ledger.keys[key]
        if len(state.holders) == 1:
            return next(iter(state.holders))
        return min(state.holders, key=lambda source: (self.links.transfer_s(source, target, state.nbytes), source))

    def _send(self, block: BlockState, site: SiteState) -> None:
        ledger = self.ledger
        ledger.move_block(block, "place")
        block.site = site.name
        block.attempt = Attempt(ledger.epoch, block.attempt.n + 1)
        ledger.attempts = max(ledger.attempts, block.attempt.n)
        block.started = False
        self._put_on(site, block)
        imports = tuple(self._import(key, site.name) for key in block.spec.inputs if self._lacks(site.name, key))
        only = self._ask_for(block)
        ledger.command(TellSite(site.name, RunBlock(block.spec, block.attempt, imports, block.expected_s, only)))

    def adopt(self, block: BlockState, site: SiteState, attempt: Attempt, open_outputs: Iterable[Key]) -> None:
        """A site works at a block already, since before this hub started."""
        self.ledger.move_block(block, "adopt")
        block.site, block.attempt, block.started = site.name, attempt, True
        block.open_outputs = set(open_outputs)
        block.expected_s = self.functions.block_s(block.spec)
        self._put_on(site, block)

    def _ask_for(self, block: BlockState) -> tuple[Key, ...]:
        """Note which outputs this attempt is to make, and return them unless they are all."""
        peek = self.ledger.keys.peek
        outputs = block.spec.outputs
        only = tuple(key for key in outputs if (known := peek(key)) is not None and known.phase is KeyPhase.PENDING)
        if on_trial(block.suspects, only):
            self.sites[str(block.site)].trials.add(block.spec.id)
        only = choose(block.suspects, only, len(outputs))
        block.open_outputs = set(only)
        return only if len(only) < len(outputs) else ()

    def _lacks(self, site: str, key: Key) -> bool:
        return not self.ledger.keys[key].present_at(site)

    def _import(self, key: Key, target: str) -> Import:
        state = self.ledger.keys[key]
        if state.phase is KeyPhase.FAILED:
            state.add("failed_at", target)
            return Import(key, "", 0, failed=True)
        self.imports += 1
        state.add("importing", target, self.imports)
        return Import(key, self.source_of(key, target), state.nbytes, number=self.imports)

    # -- recalling ---------------------------------------------------------------------------------------------------

    def balance(self) -> None:
        """Ask blocks back from busy sites for those that run dry, and from those that want to leave."""
        for site in self.sites.values():
            if site.draining:
                self._recall_all(site)
            elif site.recalled_for is None and len(site.blocks) < MIN_BLOCKS and not (site.deserted or site.away):
                self._recall_for(site)

    def _recall_all(self, site: SiteState) -> None:
        for name in site.blocks:
            self._recall(self.ledger.blocks[name])

    def _recall_for(self, taker: SiteState) -> None:
        others = [site for site in self.sites.values() if site is not taker and not site.away]
        donors = [site for site in others if len(site.blocks) >= MIN_BLOCKS]
        for donor in sorted(donors, key=lambda site: -site.backlog_s / max(1, site.threads)):
            for name in reversed(donor.blocks):
                block = self.ledger.blocks[name]
                if self._worth_recalling(block, donor, taker):
                    taker.recalled_for = name
                    self._recall(block)
                    return

    def _worth_recalling(self, block: BlockState, donor: SiteState, taker: SiteState) -> bool:
        if not _recallable(block) or taker not in self.eligible(block.spec.constraint):
            return False
        there = replace(self.candidate(block, donor), bring_s=0.0, run_s=0.0)  # the backlog holds the block already
        here = self.candidate(block, taker)
        gains = finish_s(block.spec, here) < RECALL_GAIN * finish_s(block.spec, there)
        return gains and worth_moving(block.spec, there, here)

    def _recall(self, block: BlockState) -> None:
        if _recallable(block):
            self.ledger.move_block(block, "recall")
            self.ledger.command(TellSite(str(block.site), RecallBlock(block.spec.id, block.attempt)))

    # -- leaving -----------------------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Have other sites copy what only a draining site holds; let it go when it has nothing left."""
        for site in list(self.sites.values()):
            site.copying = {key for key in site.copying if self._is_coming(key, site.name)}
            if site.status is not None and site.status.draining and not site.leaving and not site.blocks:
                self._hand_over(site)

    def _hand_over(self, site: SiteState) -> None:
        held = [state for state in self.ledger.keys.at(site.name) if site.name in state.holders]
        unsafe = [state for state in held if all(self.sites[holder].draining for holder in state.holders)]
        if unsafe:
            self._spread(unsafe)
            return
        site.leaving = True
        for state in held:
            self.ledger.lose_key_at(state, site.name)
        self.ledger.command(TellSite(site.name, CloseSite("drained")))

    def _spread(self, states: Iterable[KeyState]) -> None:
        staying = [site for site in self.sites.values() if not site.draining]
        for state in states:
            takers = [site for site in staying if serves(site.hello, state.owner)]
            if takers and not state.importing:
                taker = min(takers, key=lambda other: (len(other.copying), other.backlog_s))
                self._copy(state.key, taker)

    def bring_key(self, key: Key, site: SiteState) -> None:
        """Have a site copy a key that it lacks, or its error; one that is unknown or not made yet is left alone."""
        state = self.ledger.keys.get(key)
        if state is not None and state.phase in EXISTING and not state.present_at(site.name):
            self._copy(key, site)

    def replicate(self) -> None:
        """Have sites copy the keys of which more are to hold a copy than do."""
        for key in list(self.replicated):
            state = self.ledger.keys.get(key)
            if state is None:
                del self.replicated[key]
            elif state.holders and (lacking := state.replicas - len(state.holders) - len(state.importing)) > 0:
                others = [site for site in self.sites.values() if not site.draining and not state.present_at(site.name)]
                takers = [site for site in others if serves(site.hello, state.owner)]
                for site in sorted(takers, key=lambda site: (len(site.copying), site.backlog_s))[:lacking]:
                    self._copy(key, site)

    def stranded(self) -> list[BlockState]:
        """Return ready blocks whose constraint no site has met for longer than they wait."""
        found, now = [], self.ledger.now
        lonely = {where for where, queue in self.queues.items() if queue and not self.eligible(where[0])}
        self._lonely = {where: self._lonely.get(where, now) for where in lonely}
        for where, since in self._lonely.items():
            blocks = (self.ledger.blocks.get(name) for _, name in self.queues[where])
            found += [block for block in blocks if block is not None and now - since > block.spec.patience_s]
        return [block for block in found if block.phase is BlockPhase.READY]

    def _is_coming(self, key: Key, site: str) -> bool:
        state = self.ledger.keys.get(key)
        return state is not None and site in state.importing

    def _copy(self, key: Key, taker: SiteState) -> None:
        taker.copying.add(key)
        self.ledger.command(TellSite(taker.name, CopyKeys((self._import(key, taker.name),))))


def _work(block: BlockState) -> tuple[int, int, float]:
    """Return what a block counts in a backlog: priority, tasks, seconds."""
    return block.spec.constraint.priority, block.spec.ntasks, block.expected_s


def _recallable(block: BlockState) -> bool:
    """Say whether a block may be asked back; a whole graph may not, as its inputs are unknown."""
    return block.phase is BlockPhase.PLACED and not block.started and block.spec.kind not in AT_ONCE


def placement_part(constraint: Constraint) -> Constraint:
    """Return what of a constraint decides which sites are eligible."""
    deciding = {name: getattr(constraint, name) for name in ("sites", "environment", "resources", "python", "owner")}
    return Constraint(**deciding)


def unmet(constraint: Constraint, sites: Iterable[SiteHello]) -> str | None:
    """Return what of a constraint no site has, in words; None where every part is met by some site."""
    hellos = list(sites)
    unknown = [s for s in constraint.sites if not any(matches(hello, s) for hello in hellos)]
    if constraint.sites and len(unknown) == len(constraint.sites):
        return f"no site matches {', '.join(map(repr, unknown))}; sites are {_names(h.site for h in hellos)}"
    environment = constraint.environment
    known = {name for hello in hellos for name in hello.environments}
    if environment is not None and environment not in known:
        return f"no site offers the environment {environment!r}; environments are {_names(known)}"
    if hellos and not any(serves(hello, constraint.owner) for hello in hellos):
        return f"no site serves {constraint.owner!r}: who runs one can share it (daskfed site share)"
    return None


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or "none so far"
