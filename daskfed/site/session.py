"""One connection of a site with its hub: carries out what the site's core decides.

Events come from the hub (messages), from the scheduler (:mod:`daskfed.site.wire`) and from transfers; commands go to
the same three. A session that ends takes everything with it that it had asked of the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dask.utils import apply
from distributed.protocol.pickle import dumps
from distributed.protocol.serialize import Serialized, serialize

from daskfed.comm.opaque import OpaquePool
from daskfed.dask_private import LLGExpr, Task, gather_from_workers
from daskfed.data.fetch import by_value, fetch_import, open_import, raise_import
from daskfed.data.homing import INLINE, Homing
from daskfed.data.parcels import Parcel
from daskfed.data.transfer import Arrival, Fetcher, Source
from daskfed.errors import SiteStartError, TransferError
from daskfed.messages import (
    CopyKeys,
    Key,
    KeysFailed,
    KeysMade,
    Learned,
    MadeKey,
    Message,
    RunBlock,
    SiteHoldings,
    SiteStatus,
    agent_client,
)
from daskfed.site import events as ev
from daskfed.site import inspection
from daskfed.site.core import SiteCore
from daskfed.site.lanes import Lanes
from daskfed.site.ports import HubPort
from daskfed.site.quiet import QuietEnd
from daskfed.site.reporting import SiteReporter
from daskfed.site.states import KeyPhase
from daskfed.site.stuck import StuckTasks
from daskfed.site.wire import POLL_S, Report, SchedulerWire

logger = logging.getLogger(__name__)

INLINE_BYTES = 32 * 1024  # imports up to this size travel inside their fetch task
IMPORT_PRIORITY = 1000  # fetch tasks are short, and others wait for them
ARRIVALS_S = 0.001  # keys that arrive within this time are given to the scheduler together
SCATTER_TIMEOUT_S = 30
LET_GO_S = 0.1  # after a release, until data is scattered under the same key again
SHOW_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 30.0
GATHER_TIMEOUT_S = 15.0  # for workers to answer, beside the time that the bytes take
SLOWEST_BPS = 10e6  # bytes per second from a worker to the agent, at the least
GATHER_TRIES = 20
GATHER_PAUSE_S = 0.1  # while a key that the site holds is on its way from a lost worker to another
TASK_FUNCTIONS = {function: by_value(function) for function in (open_import, fetch_import, raise_import)}


class Session:
    """A site's core with its shell.

    ``door_address`` is where workers reach the agent, ``door_token`` what they show there. ``on_stop`` is called with a
    reason when the hub ends the site, ``on_scheduler_lost`` when the scheduler is gone.
    """

    def __init__(
        self,
        scheduler_address: str,
        door_address: str,
        door_token: str,
        *,
        on_stop: Callable[[str], None],
        on_scheduler_lost: Callable[[], None],
        connection_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.incarnation = secrets.token_hex(8)
        self.client = agent_client(self.incarnation)
        self.scheduler_address = scheduler_address
        self.door_address = door_address
        self.door_token = door_token
        self.on_stop = on_stop
        self.core = SiteCore()
        self.pool = OpaquePool(limit=256, connection_args=dict(connection_args or {}))
        self.status = SiteStatus(0, 0, 0, 0, 0, 0)
        self.wire = SchedulerWire(scheduler_address, self.client, self._take_report, on_scheduler_lost, connection_args)
        threads = lambda: self.status.threads  # noqa: E731
        calls = self._take_report, threads, self.ask_scheduler, self._land_results
        self.lanes = Lanes(self.wire, door_address, door_token, *calls)
        self.source = Source(self.gather_values, self._expected_nbytes)
        self.closed = False
        self.parcels: dict[Key, Parcel] = {}  # imports that have not landed on a worker yet
        self.port: HubPort | None = None
        self.fetcher: Fetcher | None = None
        self._payloads: dict[str, Any] = {}
        self._errors: dict[Key, dict[str, Any]] = {}  # of failed imports
        self._failures: dict[Key, Any] = {}  # errors of keys that failed here, for a hub that starts anew
        self._arrivals: list[Arrival] = []
        self._imports: list[ev.SubmitImport] = []
        self._fetches: defaultdict[str, list[tuple[Key, int]]] = defaultdict(list)
        self._got_status = asyncio.Event()
        self._scattered: set[Key] = set()  # keys that were scattered here and not released
        self._let_go: dict[Key, float] = {}  # those that were released a moment ago -> when

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to the scheduler and have it report; raises OSError, SiteStartError."""
        await self.pool.start()
        await self.wire.connect()
        await self.register_plugin(SiteReporter(self.client))
        await self.prepare_workers()
        await self.register_plugin(StuckTasks(self.client))  # what it tells workers, only prepared ones understand
        try:
            await asyncio.wait_for(self._got_status.wait(), REPORT_TIMEOUT_S)
        except TimeoutError:
            problem = f"the scheduler at {self.scheduler_address} takes clients but does not report"
            raise SiteStartError(problem) from None

    async def register_plugin(self, plugin: Any) -> None:
        """Register a plugin at the scheduler, which opens it; raises OpaqueError where it refuses."""
        await self.ask_scheduler("register_scheduler_plugin", plugin=dumps(plugin), name=plugin.name, idempotent=False)

    async def prepare_workers(self) -> None:
        """Have every worker, also those to come, carry our plugins; raises OpaqueError, OSError."""
        for plugin in (Homing(), QuietEnd()):
            await self.ask_scheduler(
                "register_worker_plugin", plugin=by_value(plugin), name=plugin.name, idempotent=True
            )

    async def join(self, port: HubPort, directory: Any, connection_args: dict[str, Any] | None = None) -> None:
        """Begin to work for the hub behind ``port``, or tell one that started anew what goes on here.

        ``directory`` says where other sites are.
        """
        self.port = port
        self._tell_holdings()
        if self.fetcher is None:
            self.fetcher = Fetcher(directory, self._take_arrival, connection_args)
            await self.fetcher.start()
        self.status = replace(self.status, round_trip_s=self._round_trip_s())
        self.send_status()

    def _tell_holdings(self) -> None:
        self._tell(self.core.holdings(), self._errors_of_failed())

    def _errors_of_failed(self) -> dict[Key, Any]:
        """Return the errors of keys that failed, forgetting those of all others."""
        failed = self.core.holdings().failed
        self._failures = {key: self._failures[key] for key in failed if key in self._failures}
        return self._failures

    def _round_trip_s(self) -> float:
        return getattr(self.port, "round_trip_s", 0.0)  # a hub in the same process has none

    def drain(self) -> None:
        """Tell the hub that the site wants to leave: it hands the keys over and then ends the site."""
        self.status = replace(self.status, draining=True)
        self.send_status()

    def are_here(self, keys: Collection[Key]) -> bool:
        """Say whether all of these keys are here, in memory or failed."""
        states = [self.core.keys.get(key) for key in keys]
        return all(state is not None and state.phase in (KeyPhase.HELD, KeyPhase.FAILED) for state in states)

    async def close(self) -> None:
        """Drop everything: transfers, and at the scheduler whatever was asked for."""
        self.closed = True
        await self.lanes.close()
        if self.fetcher is not None:
            await self.fetcher.close()
        await self.wire.close()
        await self.pool.close()

    async def ask_scheduler(self, op: str, **kwargs: Any) -> Any:
        """Call an RPC of the scheduler and return its unopened reply; raises OpaqueError as it raised, OSError."""
        return await self.pool.call(self.scheduler_address, op, **kwargs)

    # -- events ------------------------------------------------------------------------------------------------------

    def take_message(self, message: Message, payload: Any = None) -> None:
        """Take in a message of the hub, with what travelled beside it."""
        if isinstance(message, RunBlock):
            self._payloads[message.block.id] = payload["block"]
        if isinstance(message, RunBlock | CopyKeys):
            self._errors.update((payload or {}).get("errors") or {})
        self.take([message])

    def _take_report(self, report: Report) -> None:
        report.events = self.lanes.heard(report.events)
        if report.restarted:
            report.events.append(ev.KeysForgotten(tuple(self.core.keys)))
        self.take(report.events, report)
        if report.restarted:
            self.lanes.restarted()
        if report.status is not None:
            self._take_status(report.status)
        for learned in report.learned:
            self.lanes.learned(learned["durations"])
            self._tell(Learned(tuple(map(tuple, learned["durations"])), tuple(map(tuple, learned["sizes"]))))

    def _take_status(self, told: Mapping[str, Any]) -> None:
        self.status = SiteStatus(
            workers=told["workers"],
            threads=told["threads"],
            memory_limit=told["memory_limit"],
            memory_used=told["memory_used"],
            running=told["running"],
            queued=told["queued"],
            draining=self.status.draining,
            round_trip_s=self._round_trip_s(),
        )
        self._got_status.set()
        self.send_status()

    def _take_arrival(self, arrival: Arrival) -> None:
        if not self._arrivals:
            asyncio.get_running_loop().call_later(ARRIVALS_S, self._take_arrivals)
        self._arrivals.append(arrival)

    def _take_arrivals(self) -> None:
        arrivals, self._arrivals = self._arrivals, []
        if not self.closed:
            self.take([self._arrived(arrival) for arrival in arrivals])

    def _arrived(self, arrival: Arrival) -> ev.Fetched | ev.FetchFailed:
        key, parcel = arrival.key, arrival.parcel
        if parcel is None:
            return ev.FetchFailed(key, arrival.source, arrival.reason, arrival.missing)
        self.parcels[key] = parcel
        return ev.Fetched(key, arrival.source, parcel.nbytes, arrival.seconds, arrival.relayed)

    def take(self, events: Iterable[Any], report: Report | None = None) -> None:
        """Give events to the core and carry out its commands."""
        now = time.monotonic()
        for event in events:
            for command in self.core.handle(event, now):
                self._perform(command, report)
        self._submit_imports()
        self._start_fetches()

    # -- commands ----------------------------------------------------------------------------------------------------

    def _perform(self, command: ev.Command, report: Report | None) -> None:
        if isinstance(command, ev.SubmitBlock | ev.ReleaseAtScheduler | ev.DropBytes):
            self._submit_imports()
        match command:
            case ev.SubmitBlock(block, _, outputs):
                self._submit_block(block, outputs)
            case ev.SubmitImport():
                self._imports.append(command)
            case ev.Fetch(key, source, nbytes):
                self._fetches[source].append((key, nbytes))
            case ev.DropBytes(key):
                self.parcels.pop(key, None)
            case ev.ReleaseAtScheduler(keys):
                if left := self.lanes.release(keys):
                    self.wire.release(left)
                self._note_let_go(keys)
                for key in self._failures.keys() & set(keys):
                    del self._failures[key]
            case ev.TellHub(SiteHoldings() as message):
                self._tell(message, self._errors_of_failed())
            case ev.TellHub(KeysFailed() as message):
                error = _beside(message, report)
                self._failures.update(dict.fromkeys(message.keys, error))
                self._tell(message, error)
            case ev.TellHub(message):
                self._tell(message, _beside(message, report))
            case ev.ForgetPayload(block):
                self._payloads.pop(block, None)
            case ev.StopSite(reason):
                self.on_stop(reason)

    def _submit_block(self, block: str, outputs: Collection[Key]) -> None:
        payload, spec = self._payloads.pop(block), self.core.blocks[block].spec
        if "calls" in payload:
            self.lanes.submit(spec, outputs, payload)
            self.wire.note_elsewhere()
            return
        self._land_results(spec.inputs)
        self.wire.submit_block(outputs, payload)
        self.lanes.yield_idle()

    def _land_results(self, keys: Collection[Key]) -> None:
        """Have the scheduler know the results of calls that its tasks need."""
        inline = {}
        for key in self.lanes.landing(keys):
            parcel = Parcel.of(self.lanes.value(key))
            frames = [bytes(frame) for frame in parcel.frames]
            inline[key] = _by_value_task(key, open_import, parcel.header, frames, parcel.checksum)
        self._import(inline, {INLINE: True})

    async def show(self, keys: Collection[Key] | None) -> None:
        """Have the scheduler know the results of calls among ``keys`` (None: all), for who looks at its tasks."""
        wanted = list(self.lanes.values) if keys is None else [key for key in keys if key in self.lanes.values]
        self._land_results(wanted)
        with suppress(TimeoutError):
            async with asyncio.timeout(SHOW_TIMEOUT_S):
                while not self.lanes.have_landed(wanted):
                    await asyncio.sleep(POLL_S)

    def _tell(self, message: Message, payload: Any = None) -> None:
        if self.port is not None:
            self.port.send(message, payload)

    def send_status(self) -> None:
        """Tell the hub what the site has and does."""
        self._tell(self.status)

    def _start_fetches(self) -> None:
        fetches, self._fetches = self._fetches, defaultdict(list)
        for source, sized in fetches.items():
            assert self.fetcher is not None
            self.fetcher.fetch(source, sized)

    def _submit_imports(self) -> None:
        imports, self._imports = self._imports, []
        inline: dict[Key, Task] = {}
        others: dict[Key, Task] = {}
        for wanted in imports:
            key = wanted.key
            if wanted.failed:
                others[key] = self._failing_task(key)
            elif (parcel := self.parcels[key]).nbytes <= INLINE_BYTES:
                frames = [bytes(frame) for frame in parcel.frames]
                inline[key] = _by_value_task(key, open_import, parcel.header, frames, parcel.checksum)
            else:
                others[key] = _by_value_task(key, fetch_import, self.door_address, key, self.door_token)
        self._import(inline, {INLINE: True})
        self._import(others, {})

    def _import(self, graph: dict[Key, Task], notes: Mapping[str, Any]) -> None:
        if graph:
            expr = LLGExpr(graph, _determ_token=secrets.token_hex(8))
            pickled = Serialized(*serialize(expr, on_error="raise"))
            self.wire.submit_imports(list(graph), pickled, IMPORT_PRIORITY, notes)

    def _failing_task(self, key: Key) -> Task:
        """Return the task that raises the error that an import failed with at its source."""
        error = self._failures[key] = self._errors.pop(key)
        return _by_value_task(key, raise_import, *map(_framed, (error["exception"], error["traceback"])))

    # -- data --------------------------------------------------------------------------------------------------------

    async def explain(self, key: Key) -> dict[str, Any]:
        """Return what this site knows of a key, and how its task stands with the scheduler."""
        tasks = await self.ask_scheduler("get_task_status", keys=[key])
        who_has = await self.ask_scheduler("who_has", keys=[key])
        return {**inspection.explain(self.core, key), "task": tasks.get(key), "workers": list(who_has.get(key, ()))}

    def import_for_worker(self, key: Key) -> dict[str, Any]:
        """Return a key's bytes to the worker that runs its fetch task."""
        parcel = self.parcels.get(key)
        if parcel is None:
            return {"status": "error", "reason": "the agent no longer has its bytes"}
        return {"status": "OK", "data": parcel.serialized(), "checksum": parcel.checksum}

    def _expected_nbytes(self, key: Key) -> int:
        state = self.core.keys.get(key)
        return state.nbytes if state is not None else 0

    async def gather_values(self, keys: Collection[Key]) -> dict[Key, Any]:
        """Return the unopened values of those of ``keys`` that are in memory here; give up those that no worker has."""
        values: dict[Key, Any] = {key: self.lanes.value(key) for key in keys if key in self.lanes.values}
        located: dict[Key, Any] = {}
        for _ in range(GATHER_TRIES):
            missing = [key for key in keys if key not in values]
            if not missing:
                break
            who_has = await self.ask_scheduler("who_has", keys=missing)
            located = {key: workers for key, workers in who_has.items() if workers}
            found = await self._from_workers(located)
            values.update(found)
            if not any(self.core.holds(key) for key in missing if key not in found):
                break
            await asyncio.sleep(GATHER_PAUSE_S)
        if absent := [key for key in keys if key not in values and key not in located]:
            self.take([ev.KeysMissing(tuple(absent))])
        return values

    async def _from_workers(self, located: Mapping[Key, Collection[str]]) -> dict[Key, Any]:
        """Return the unopened values that workers answer with; of those that take far too long, nothing."""
        limit_s = GATHER_TIMEOUT_S + sum(map(self._expected_nbytes, located)) / SLOWEST_BPS
        try:
            async with asyncio.timeout(limit_s):
                found, *_ = await gather_from_workers(located, rpc=self.pool)
        except TimeoutError:
            logger.warning("workers did not answer within %.0f s when asked for %d keys", limit_s, len(located))
            return {}
        return dict(found)

    def stream_keys(self, keys: Collection[Key], checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages of a stream with ``keys``; see :mod:`daskfed.data.parcels`."""
        return self.source.stream(keys, checked)

    async def scatter(
        self, data: dict[Key, Any], broadcast: bool | int = False, workers: Collection[str] | None = None
    ) -> dict[Key, int]:
        """Put data on workers (None: any), hold it, and return its sizes.

        A key that is being made or imported here is waited for, be it that it comes or that it fails; raises
        TransferError where that takes too long.
        """
        deadline = time.monotonic() + SCATTER_TIMEOUT_S
        while busy := [key for key in data if key in self.core.keys and not self.core.holds(key)]:
            if time.monotonic() > deadline:
                raise TransferError(f"{busy[0]!r} cannot be scattered: it is being made or imported at this site")
            await asyncio.sleep(POLL_S)
        await self.wire.quiet(data)
        await self._workers_released(data)
        how = {"workers": workers, "broadcast": broadcast, "timeout": SCATTER_TIMEOUT_S}
        await self.ask_scheduler("scatter", data=data, client=self.client, **how)
        self._scattered.update(data)
        return await self.hold(data)

    async def _workers_released(self, keys: Iterable[Key]) -> None:
        """Wait until workers have let go of an earlier value under these keys: else they would drop the new one.

        They are told of it on a stream that the data does not go by, and nobody says when they have heard.
        """
        released = max((self._let_go.get(key, 0.0) for key in keys), default=0.0)
        await asyncio.sleep(max(0.0, released + LET_GO_S - time.monotonic()))

    def _note_let_go(self, keys: Iterable[Key]) -> None:
        """Note which keys that were scattered here were released, for as long as it matters."""
        now = time.monotonic()
        self._let_go = {key: then for key, then in self._let_go.items() if now - then < LET_GO_S}
        self._let_go.update(dict.fromkeys(self._scattered.intersection(keys), now))
        self._scattered.difference_update(keys)

    async def hold(self, keys: Collection[Key]) -> dict[Key, int]:
        """Hold keys that the scheduler has and the core does not know yet, and return their sizes."""
        self.wire.desire([key for key in keys if key not in self.core.keys])
        sizes: dict[Key, int] = await self.ask_scheduler("nbytes", keys=list(keys), summary=False)
        self.take([ev.KeysScattered(tuple(MadeKey(key, sizes[key]) for key in keys))])
        return sizes


def _beside(message: Message, report: Report | None) -> Any:
    """Return what travels beside a message: types of results, or an error."""
    if report is None:
        return None
    if isinstance(message, KeysMade):
        types = {made.key: report.types[made.key] for made in message.keys if made.key in report.types}
        values = {made.key: report.values[made.key] for made in message.keys if made.key in report.values}
        return {"types": types, "values": values} if types else None
    return report.errors.get(message.keys[0]) if isinstance(message, KeysFailed) else None


def _by_value_task(key: Key, function: Any, *args: Any) -> Task:
    opened = Task(None, pickle.loads, TASK_FUNCTIONS[function])
    return Task(key, apply, opened, list(args))


def _framed(value: Any) -> tuple[Any, list[bytes]] | None:
    """Return what an opaque value consists of, as a task's argument."""
    if value is None:
        return None
    parcel = Parcel.of(value)
    return parcel.header, [bytes(frame) for frame in parcel.frames]
