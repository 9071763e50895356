"""The drop-in Client: a ``distributed.Client`` whose graphs are cut into blocks and run on many sites."""

from __future__ import annotations

import asyncio
import getpass
import itertools
import logging
import pickle
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import dask
import distributed
from dask.base import tokenize
from dask.utils import format_bytes, format_time, funcname, parse_bytes
from distributed.client import ClosedClientError, Future, futures_of
from distributed.protocol.pickle import loads
from distributed.versions import VersionMismatchWarning
from toolz import merge

from daskfed.client import hooks, opening, progress
from daskfed.client.acting import ActingClient, names_of
from daskfed.client.assembly import Assembly, split_final
from daskfed.client.bundling import Bundling, Learned
from daskfed.client.cached_values import CachingRPC
from daskfed.client.caching import LIVE, Cache, Caching, asked_for
from daskfed.client.calling import Call, Functions, Outbox, call_of, submission_of
from daskfed.client.constraints import constraint_of, set_sites_lookup, site_selectors
from daskfed.client.databinding import DataSites, bound_to_data, calls_by_place
from daskfed.client.federation import Federation
from daskfed.client.gathering import Stream
from daskfed.client.graphs import MaterialisedGraph, external_futures, materialise
from daskfed.client.keywords import CACHE, TIMEOUT, takes, takes_timeout
from daskfed.client.lanes import (
    PLAIN_ANNOTATIONS,
    BlocksNeeded,
    CallState,
    Countdown,
    how_for_lanes,
    noticed_futures,
    pickled_futures,
)
from daskfed.client.letting_go import LetGo, LightFuture
from daskfed.client.limits import limited, wants_limits
from daskfed.client.notes import flat_keys
from daskfed.client.observing import Observing
from daskfed.client.packages import Packages, Unasked
from daskfed.client.profiles import profile_for
from daskfed.client.retrying import Retrying
from daskfed.client.returning import Memory, PatientRPC, Replicas, dialled_at, pauses, wanted_keys
from daskfed.client.submission import Submission, plan_calls, plan_graph, plan_lanes
from daskfed.client.versions import differences, foreign, unopened
from daskfed.collecting import Relaxed, paused_collection
from daskfed.comm.prompt import promptly
from daskfed.config import ALWAYS, AUTO, NEVER, client_grace_s, fusion, lanes, site_timeout_s
from daskfed.dask_private import GraphNode, LLGExpr, MapExpr, Task, validate_key, warn_untested
from daskfed.data.homing import futures_in
from daskfed.errors import ConfigurationError, ConnectionRefused, TransferError, UnknownSiteError
from daskfed.messages import PROTOCOL_VERSION, Constraint, Key

logger = logging.getLogger(__name__)

METHODS = ("dataframe.shuffle.method", "array.rechunk.method")  # by tasks they span sites; P2P stays whole at one
RECONNECT_TIMEOUT_S = 10.0  # for one attempt
MOST_CALLS = 512  # in one block
FEWEST_BLOCKS = 16  # that a map of as many calls is divided into, so that every site gets some
PLACING = frozenset({"workers", "allow_other_workers", "resources", "restrictions", "loose_restrictions"})
OWN_ANNOTATIONS = ("sites", "environment", "workers", "allow_other_workers", "resources", "retries", "priority")


class Client(Retrying, Observing, ActingClient):
    """Connect to a federation of sites and submit computation to it.

    Takes what ``distributed.Client`` takes. ``Client()`` starts a hub and one local site in this process, with keywords
    as for ``LocalCluster``; ``Client(federation)`` connects to a :class:`daskfed.Federation`; ``Client("tls://…")``
    connects to a hub that runs elsewhere; ``Client(profile="climate")`` starts, or connects to, what Dask's
    configuration has under ``daskfed.profiles.climate``. ``daskfed.default-profile`` is what ``Client()`` uses, if set.

    Raises OSError where no hub answers, ConnectionRefused where it speaks another protocol version, ConfigurationError
    for a profile that does not exist or in which something is misspelt.
    """

    cluster: Any
    scheduler: Any
    scheduler_comm: Any
    _gather_keys: Any

    def __init__(self, address: Any = None, *, profile: str | None = None, **kwargs: Any) -> None:
        warn_untested()
        self._embedded_profile = profile_for(address, profile, kwargs)
        if self._embedded_profile is not None and not self._embedded_profile.embedded:
            address, self._embedded_profile = self._embedded_profile.hub, None
        hooks.install()
        progress.install(lambda client: isinstance(client, Client))
        self._sites: dict[str, dict[str, Any]] = {}
        self._strange = False  # whether some site has another Python
        self._data = DataSites()
        self._packages = Packages()
        self._functions = Functions(self._packages.mentioned)
        self._fixed_single = False
        self._graph_ids = itertools.count()
        self._assemblies: dict[Key, tuple[Assembly, list[Future]]] = {}
        self._watches: dict[Key, asyncio.Task[Any]] = {}  # of assemblies
        self._marks = 0  # set on the stream
        self._set_methods: Any = None
        self.let_go = LetGo(partial(self._call_later, 0), self._dec_ref)
        self._memory = Memory()
        self._caching = Caching(self)
        self.cache = Cache(self._caching)
        self._secret = secrets.token_hex(16)  # shows the hub whose calls these are, and who comes back
        self._epoch = 0  # of the hub
        opens = kwargs.get("deserializers") or kwargs.get("serializers") or ("pickle",)
        self._lanes = lanes() if "pickle" in opens else NEVER  # as what comes home from lanes is pickled
        self._collector = Relaxed()
        self._fusion = fusion()
        self._learned: dict[str, Learned] = {}  # by prefix
        set_sites_lookup(_sites_of_current_client)
        with dask.config.set({} if self._embedded_profile is None else {"scheduler-address": None}):
            super().__init__(address, **kwargs)

    # -- connecting --------------------------------------------------------------------------------------------------

    def start(self, **kwargs: Any) -> None:
        """Connect; called by the constructor."""
        self._stream_handlers |= {
            "fed-sites": self._handle_sites,
            "fed-refused": self._handle_refused,
            "fed-made": self._handle_made,
            "fed-arrived": self._handle_arrived,
            "fed-bound": self._memory.bound,
            "fed-forget": self._memory.forget,
            "fed-bring-data": self._handle_bring_data,
            "fed-drop-copies": self._handle_drop_copies,
            "fed-ended": self._handle_ended,
            "fed-learned": self._handle_learned,
        }
        self._outbox = Outbox(self._call_later, self._send_to_scheduler_safe, self._packed_calls, self._all_has_left)
        super().start(**kwargs)

    async def _start(self, timeout: Any = distributed.client.no_default, **kwargs: Any) -> Any:
        elsewhere = self.cluster or self.scheduler_file or self._start_arg or self.scheduler
        own = {"loop": self.loop, "asynchronous": True}
        if self._embedded_profile is not None:
            self.cluster = await Federation.of_profile(self._embedded_profile, **own)
        elif not elsewhere and not dask.config.get("scheduler-address", None):
            self.cluster = await Federation.local(**own, **self._startup_kwargs)
        started = await super()._start(timeout=timeout, **kwargs)
        if self._set_as_default and not self._fixed_single:
            self._set_methods = dask.config.set({name: "tasks" for name in METHODS if not dask.config.get(name, None)})
        return started

    async def _close(self, fast: bool = False) -> None:
        await self._caching.flush()
        self._outbox.flush()
        if self._set_methods is not None:
            self._set_methods.__exit__(None, None, None)
            self._set_methods = None
        await super()._close(fast=fast)
        for state in list(self.futures.values()):  # submitted while it closed
            state.cancel(reason="client-closed", msg="the client has closed; submit the work with another one")
        await self._caching.close()
        self._memory.close()
        self._collector.end()

    async def _shutdown(self) -> None:
        try:
            await super()._shutdown()
        except PermissionError:  # the hub goes on
            await self._close()
            raise

    async def _ensure_connected(self, timeout: Any = None) -> None:
        fresh = self.scheduler_comm is None
        if self.scheduler is not None and not isinstance(self.scheduler, PatientRPC):
            rpc, address = self.scheduler, self.scheduler.address
            within = address.startswith("inproc:")  # where values are handed over as they are
            stream = None if within else Stream(address, self.connection_args, self._deserializers)
            how = (self._standing, self._memory, self._mark, self._secret, stream)
            self.scheduler = CachingRPC(self._caching.values, self._caching.send, rpc, *how)
        with dialled_at(self.cluster.within if isinstance(self.cluster, Federation) else ""):
            await super()._ensure_connected(timeout=timeout)
        if fresh and self.scheduler_comm is not None:
            self.scheduler_comm = promptly(self.scheduler_comm)
            self._say_hello()

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        if delay_s:
            self.loop.call_later(delay_s, call)
        else:
            self.loop.add_callback(call)  # from any thread

    def _all_has_left(self) -> bool:
        """Whether the stream to the hub, if there is one now, keeps nothing back."""
        return self.scheduler_comm is None or not self.scheduler_comm.buffer

    def _standing(self) -> str:
        """Return the status of this client; it is new until it was connected once."""
        return str(self.status) if self._epoch else "newly-created"

    def _mark(self) -> int:
        """Set a mark on the stream, so that a call can be made to wait for what was said before."""
        self._marks += 1
        self._send_to_scheduler({"op": "fed-mark", "mark": self._marks})
        return self._marks

    def _say_hello(self) -> None:
        info = self._scheduler_identity
        if info.get("type") != "Hub":
            where = self.scheduler.address if self.scheduler else "?"
            raise ConnectionRefused(f"{where} is a {info.get('type')}, no daskfed hub: use dask.distributed's Client")
        fed = info["fed"]
        self._fixed_single = bool(fed["fixed"]) and len(fed["sites"]) == 1
        self._data = DataSites.of(fed.get("data", {}))  # an older hub will refuse this client
        if not self._fixed_single:
            self.direct_to_workers = False  # sites cannot be dialled
        me = {"owner": getpass.getuser(), "patience_s": site_timeout_s(), "secret": self._secret}
        me["fuses"] = self._fusion == AUTO
        self.scheduler_comm.send({"op": "fed-hello", "protocol": PROTOCOL_VERSION, **me})
        if self._epoch:
            self._subscribe_again()
            wanted = wanted_keys(self.futures, self._assemblies.keys() | self._caching.unknown_at_hub())
            self.scheduler_comm.send(self._memory.message(fed["epoch"], wanted))
        self._epoch = fed["epoch"]

    async def _reconnect(self) -> None:
        """The connection with the hub broke: keep all futures, and try to reach it for the time of grace."""
        grace_s = client_grace_s()
        logger.warning(
            "Lost the hub at %s; waiting up to %s for it (daskfed.client.grace), nothing is lost meanwhile",
            self.scheduler.address, format_time(grace_s),
        )  # fmt: skip
        self.scheduler_comm = None
        deadline = time.monotonic() + grace_s
        for pause in pauses():
            if self.status != "connecting":
                return
            try:
                await self._ensure_connected(timeout=RECONNECT_TIMEOUT_S)
                logger.warning("Connected with the hub at %s again", self.scheduler.address)
                return
            except (OSError, TimeoutError) as exc:
                logger.debug("the hub does not answer yet: %s", exc)
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(pause)
        await self._handle_ended(f"the hub did not come back within {format_time(grace_s)}")

    async def _handle_ended(self, reason: str = "the hub has ended") -> None:
        for state in list(self.futures.values()):
            state.cancel(reason="scheduler-connection-lost", msg=f"{reason}; submit the work to another one")
        self.futures.clear()
        self.loop.add_callback(self._close)

    def _handle_arrived(self, block: str, arrival: int, count: int) -> None:
        self._memory.arrived(block, arrival, count, self._epoch)

    def _handle_bring_data(self, keys: Collection[Key]) -> None:
        """The site is gone that had data of this client: put its copy at another one."""
        copies = self._memory.copies(keys)
        if absent := [key for key in keys if key not in copies]:
            self.scheduler_comm.send({"op": "fed-no-copies", "keys": absent})
        if copies:
            self.loop.add_callback(self._bring_data, copies)

    async def _bring_data(self, copies: dict[Key, Any]) -> None:
        """Bring copies to the hub until a site has taken them, or nobody needs them any more."""
        for pause in pauses():
            try:
                if copies:
                    await self.scheduler.bring(copies, self.id, client_grace_s())
                return
            except (TimeoutError, TransferError) as exc:
                logger.info("no site has taken data that was lost, it is brought again: %s", exc)
                await asyncio.sleep(pause)
                copies = self._memory.copies(copies)
            except OSError:
                return  # a hub that is gone will ask again

    def _handle_drop_copies(self, keys: Collection[Key]) -> None:
        """Nobody needs data any more that this client scattered, unless it has done so again meanwhile."""
        self._memory.drop_data([key for key in keys if key not in self.futures])

    def _handle_sites(self, sites: dict[str, dict[str, Any]]) -> None:
        joined = {name: facts for name, facts in sites.items() if name not in self._sites}
        self._sites, self._data = sites, DataSites.of(sites)
        self._strange = any(map(foreign, sites.values()))
        self._packages.sites_changed(sites)
        if problems := differences(joined):
            warnings.warn(VersionMismatchWarning("Mismatched versions found:\n" + "\n".join(problems)), stacklevel=2)

    def _handle_learned(self, prefixes: Mapping[str, tuple[float, int]]) -> None:
        """The hub says how long tasks take that this client has submitted, and how large their results are."""
        self._learned = self._learned | {prefix: Learned.told(*known) for prefix, known in prefixes.items()}

    def _bundling(self) -> Bundling | None:
        """Return how tiny tasks are to run several as one, None where they are not."""
        if self._fusion == NEVER:
            return None
        threads = sum(facts.get("threads", 0) for facts in self._sites.values())
        return Bundling(self._learned, threads, self._fusion == ALWAYS)

    def _handle_refused(self, reason: str) -> None:
        raise ConnectionRefused(reason)

    # -- what a user asks of the federation --------------------------------------------------------------------------

    def sites(self) -> Any:
        """Return site name -> status, workers, threads, memory, environments, labels, data, held bytes, running, …"""
        return self.sync(self._fetch_sites)

    async def _fetch_sites(self) -> dict[str, dict[str, Any]]:
        self._handle_sites(await self.scheduler.fed_sites())
        return self._sites

    def transfers(self) -> Any:
        """Return (from, to) -> count, nbytes and seconds of every movement of a key between two sites."""
        return self.sync(self._transfers)

    async def _transfers(self) -> dict[tuple[str, str], dict[str, Any]]:
        rows = await self.scheduler.fed_transfers()
        names = ("count", "nbytes", "seconds", "relayed")
        return {(source, target): dict(zip(names, values, strict=True)) for source, target, *values in rows}

    def explain(self, key: Any) -> Any:
        """Return why a key (or future) waits, or where and why it ran: phase, why, sites, nbytes, block, site.

        Of a block that waits for inputs, ``waits_for`` has the first of those that do not exist yet.
        """
        return self.sync(self._explain, getattr(key, "key", key))

    async def _explain(self, key: Key) -> dict[str, Any]:
        facts = await self.scheduler.fed_explain(key=key)
        listed = {name: list(facts[name]) for name in ("sites", "story", "waits_for") if name in facts}
        return {**facts, **listed}

    async def fetch_progress(self, keys: Iterable[Key]) -> dict[str, dict[str, int]]:
        """Return ``all`` and ``remaining`` tasks behind keys of this client, per key prefix."""
        asked = {part for key in keys for part in self._part_keys(key)}
        return await self.scheduler.fed_progress(keys=list(asked))  # type: ignore[no-any-return]

    def open(self, function: Callable[..., Any], *args: Any, site: str, **kwargs: Any) -> Any:
        """Call ``function(*args, **kwargs)`` at a site and return the lazy object that it opened, bound there.

        Paths are relative to the working directory of the site's workers; this process need not see them. Raises what
        ``function`` raises there, and UnknownSiteError.
        """
        return opening.open_at(self, function, *args, site=site, **kwargs)

    # -- submitting --------------------------------------------------------------------------------------------------

    def submit(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        """Submit a call; as ``distributed.Client.submit``, with ``site=``, ``environment=``, ``timeout=``, ``cache=``.

        ``site`` is a name, a label ``name=value``, or a list of them; where ``func`` itself has a parameter of that
        name, it gets it. The same call bound to another site has another key: what it finds there differs.

        ``timeout`` is how long each run of the call may take, in seconds or as "5m"; one that takes longer fails
        with TimeoutError, and is run again if it has ``retries``. A ``func`` that has a parameter of that name, or
        keywords of any name, gets it: for such a one use ``dask.annotate(timeout=…)``. Raises ConfigurationError.

        ``cache=True`` keeps the result between runs, for calls of a function of the same content with the same
        arguments; ``cache="v2"`` for calls with the same word. Raises NotCacheable where these cannot be told.
        """
        if self._lanes != NEVER and (future := self._submit_at_once(func, args, kwargs)) is not None:
            return future
        if (version := asked_for(func, kwargs)) is not None:
            return self._caching.submit(version, self._submit_call, func, args, kwargs)
        return self._submit_call(func, *args, **kwargs)

    def _submit_call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        func = _with_timeout(func, kwargs)
        with _annotated(func, kwargs) as bound:
            if bound and _names_itself(kwargs):
                kwargs["key"] = f"{bound}-{tokenize(func, kwargs, *args)}"
            return super().submit(func, *args, **kwargs)

    def _submit_at_once(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future | None:
        """Submit a call of which nothing need be found out before; None where this is another one."""
        if self._data or self._strange or dask.get_annotations():
            return None
        if (call := call_of(self._functions, func, args, kwargs)) is None:
            return None
        with self._refcount_lock:
            known = call.key in self.futures
            future = LightFuture(call.key, self)
            future._state.in_block = True
        if not known:
            self._say(call, "submit")
        return future

    def _packed_calls(self, calls: list[Call]) -> list[dict[str, Any]]:
        submission = submission_of(calls, self._block_ids(), MOST_CALLS, how_for_lanes(self._lanes))
        self._memory.keep(submission)
        return list(submission.messages(call.key for call in calls))

    def _send_to_scheduler(self, msg: dict[str, Any]) -> None:
        if msg["op"] == "update-graph" and any(map(self._is_in_block, noticed_futures())):
            raise BlocksNeeded
        self._say(msg, msg["op"])

    def _is_in_block(self, key: Key) -> bool:
        state = self.futures.get(key)
        return state is not None and state.in_block

    def _say(self, item: Any, name: str) -> None:
        """Have something sent to the hub, in order; raises ClosedClientError where the client has closed."""
        if self.status not in ("running", "closing", "connecting", "newly-created"):
            raise ClosedClientError(f"Client is {self.status}. Can't send {name} message.")
        self._outbox.put(item)

    def map(self, func: Callable[..., Any], *iterables: Any, **kwargs: Any) -> list[Future]:
        """Map a function over sequences; as ``distributed.Client.map``, with the keywords of :meth:`submit`."""
        if (version := asked_for(func, kwargs)) is not None:
            return self._caching.map(version, self._map_calls, func, iterables, kwargs)
        return self._map_calls(func, *iterables, **kwargs)

    def _map_calls(self, func: Callable[..., Any], *iterables: Any, **kwargs: Any) -> list[Future]:
        func = _with_timeout(func, kwargs)
        with _annotated(func, kwargs) as bound:
            if bound and _names_itself(kwargs):
                kwargs["key"] = bound
            with paused_collection():
                return super().map(func, *iterables, **kwargs)  # type: ignore[no-any-return]

    def _graph_to_futures(
        self,
        expr: Any,
        keys: Collection[Key],
        span_metadata: Any,
        workers: Any = None,
        allow_other_workers: bool | None = None,
        internal_priority: Any = None,
        user_priority: int = 0,
        resources: Any = None,
        retries: int | None = None,
        fifo_timeout: Any = 0,
        actors: Any = None,
    ) -> dict[Key, Future]:
        given = _given(workers, allow_other_workers, user_priority, resources, retries)
        annotations = merge(dask.get_annotations(), given)
        if is_call := _one_by_one(expr):
            for done in (TIMEOUT, CACHE):  # its function keeps to the one, and the other was looked for
                annotations.pop(done, None)
        self._check_sites(annotations)
        self._check_workers(annotations)
        calls = self._calls_for_lanes(expr, annotations, actors) if self._fixed_single else None
        whole = self._fixed_single and calls is None and not self._may_bundle(expr, annotations, actors)
        if whole and self._may_pass_whole(expr, annotations, is_call):
            with suppress(BlocksNeeded), pickled_futures():
                return super()._graph_to_futures(  # type: ignore[no-any-return]
                    expr, keys, span_metadata, self._workers_here(workers), allow_other_workers, internal_priority,
                    user_priority, resources, retries, fifo_timeout, actors,
                )  # fmt: skip
        for key in set(keys):
            validate_key(key)
        if calls is not None:
            return self._send_calls(calls, keys)
        with paused_collection():
            return _in_blocks(self._submit(expr, list(dict.fromkeys(keys)), annotations, actors))

    def _may_pass_whole(self, expr: Any, annotations: Mapping[str, Any], is_call: bool) -> bool:
        """Whether nothing in an expression for the only site is for this client to see to."""
        if wants_limits(expr, annotations) or self._caching.concerns(expr, annotations, is_call):
            return False
        return not any(map(self._is_in_block, _needs_of_one(expr)))

    def _submit(self, expr: Any, keys: list[Key], annotations: Mapping[str, Any], actors: Any) -> dict[Key, Future]:
        """Submit an expression; before sites are sent what they may not be able to open, they are asked.

        Nobody may hold the lock of this client meanwhile, so what was planned until then is planned anew.
        """
        for asked in itertools.count():
            try:
                return self._submit_once(expr, keys, annotations, actors, asked)
            except Unasked as exc:
                packages = exc.packages
            self.sync(self._ask_for_packages, packages)
        raise AssertionError("it ends when sites were asked often enough")

    def _submit_once(
        self, expr: Any, keys: list[Key], annotations: Mapping[str, Any], actors: Any, asked: int
    ) -> dict[Key, Future]:
        if _one_by_one(expr):
            self._finish_releasing(keys)
            with self._refcount_lock:
                return self._submit_calls(expr, keys, annotations, bool(actor_keys(actors, keys)), asked)
        named = actor_keys(actors, keys)
        graph = materialise(expr, keys, annotations, named)
        if self._fixed_single:  # whose scheduler puts results together as it always does
            graph = replace(graph, finals=frozenset())
        _check_actors(named, graph.tasks)
        self._know_sites_of(set(graph.constraints.values()))
        self._finish_releasing(graph.tasks)
        graph = replace(graph, finals=graph.finals - named)
        return self._caching.submit_graph(
            graph, keys, named, lambda found: self._submit_graph(found, keys, named, asked)
        )

    def _submit_calls(
        self, expr: Any, keys: list[Key], annotations: Mapping[str, Any], actors: bool, asked: int
    ) -> dict[Key, Future]:
        constraint = self._bound(constraint_of(annotations))
        other = {name: value for name, value in annotations.items() if name not in OWN_ANNOTATIONS}
        size = max(1, min(MOST_CALLS, -(-len(keys) // FEWEST_BLOCKS)))
        batches = calls_by_place(expr, constraint, self._data, size)
        submission = plan_calls(batches, other, self._block_ids(), actors, self._lanes)
        self._place_by_packages(submission, asked)
        held = self._hold(key for block in submission.blocks for key in block.inputs)
        futures: dict[Key, Future] = {key: LightFuture(key, self) for key in keys}
        self._send(submission, keys, held)
        return futures

    def _may_bundle(self, expr: Any, annotations: Mapping[str, Any], actors: Any) -> bool:
        """Whether a graph for the only site is to be opened here, since tasks of it may be tiny."""
        bundling = None if actors or _one_by_one(expr) or PLACING.intersection(annotations) else self._bundling()
        return bundling is not None and bundling.is_useful

    def _calls_for_lanes(self, expr: Any, annotations: Mapping[str, Any], actors: Any) -> Submission | None:
        """Return the blocks of calls that may all go down lanes; else None: the only site takes them as they are."""
        if self._lanes == NEVER or actors or not _one_by_one(expr) or not PLAIN_ANNOTATIONS.issuperset(annotations):
            return None
        batches = calls_by_place(expr, self._bound(constraint_of(annotations)), self._data, MOST_CALLS)
        return plan_lanes(batches, {}, self._block_ids(), self._lanes)

    def _send_calls(self, submission: Submission, keys: Collection[Key]) -> dict[Key, Future]:
        with self._refcount_lock:
            futures: dict[Key, Future] = {key: LightFuture(key, self) for key in dict.fromkeys(keys)}
            self._send(submission, list(futures), [])
        return _in_blocks(futures)

    def _submit_graph(
        self, graph: MaterialisedGraph, keys: list[Key], actors: frozenset[Key] = frozenset(), asked: int = 0
    ) -> dict[Key, Future]:
        known = set(filter(self._is_live, keys))
        graph, assemblies = split_final(graph)
        graph = self._caching.without_known(self._without_known(graph))
        graph = bound_to_data(self._bound_graph(graph), self._data)
        for constraint in set(graph.constraints.values()):
            self._check_constraint(constraint)
        held = self._hold(external_futures(graph))
        submission = plan_graph(graph, self._block_ids(), actors, self._bundling(), whole=self._fixed_single)
        self._place_by_packages(submission, asked)
        inputs: dict[Key, Future] = {key: LightFuture(key, self) for key in graph.wanted}
        futures = {key: inputs[key] if key in inputs else LightFuture(key, self) for key in keys}
        for key, assembly in assemblies.items():
            if key not in known:
                self._assemble_later(assembly, futures[key], inputs)
        self._send(submission, list(graph.wanted), held)
        self._caching.expect_graph(graph, keys)
        return futures

    def _without_known(self, graph: MaterialisedGraph) -> MaterialisedGraph:
        """Leave out what the federation holds already, and add what so far only this client could assemble."""
        tasks = dict(graph.tasks)
        for key in list(filter(self._is_live, tasks)):
            if key not in self._assemblies:
                del tasks[key]
        wanted_here = external_futures(graph) & self._assemblies.keys()
        tasks |= {key: self._assemblies[key][0].task for key in wanted_here}
        return graph.restricted(tasks)

    def _finish_releasing(self, keys: Iterable[Key]) -> None:
        """Let the loop release what this thread has let go, where that may be among ``keys``.

        What has failed and is computed again would find the former error, as it does in stock Dask. Nobody may hold the
        lock of this client meanwhile, which the loop needs.
        """
        if not (self.futures.keys().isdisjoint(keys) or self.asynchronous or self._in_loop()):
            self.sync(self._have_released)

    async def _have_released(self) -> None:
        self.let_go.all()

    def _is_live(self, key: Key) -> bool:
        """Say whether a future of this client stands for a key, so that it need not be made again."""
        live = key in self.futures and self.futures[key].status in LIVE
        return live and not self._caching.is_undecided(key)

    def _inc_ref(self, key: Key) -> None:
        if key not in self.futures:  # a hub that could not read one key would take none of those that come with it
            validate_key(key)
            self.futures[key] = CallState(key)
        super()._inc_ref(key)

    def _hold(self, keys: Iterable[Key]) -> list[Future]:
        """Keep keys that a graph needs from being released before the graph was sent; have the hub know them."""
        keys = list(keys)
        self._caching.send(keys)
        return [LightFuture(key, self) for key in dict.fromkeys(keys)]

    def _send(self, submission: Submission, wanted: Collection[Key], held: list[Future]) -> None:
        _warn_if_large(submission.nbytes)
        self._memory.keep(submission)
        for message in submission.messages(wanted):
            self._send_to_scheduler(message)
        del held[:]

    def _block_ids(self) -> Iterator[str]:
        graph = next(self._graph_ids)
        return (f"{self.id}/{graph}/{i}" for i in itertools.count())

    # -- final assembly ----------------------------------------------------------------------------------------------

    def _assemble_later(self, assembly: Assembly, future: Future, inputs: dict[Key, Future]) -> None:
        parts = [inputs[key] if key in inputs else LightFuture(key, self) for key in assembly.inputs]
        self._assemblies[assembly.key] = (assembly, parts)
        self._watch(assembly.key, future._state, parts)

    def _watch(self, key: Key, state: Any, parts: list[Future]) -> None:
        self.loop.add_callback(self._watch_assembly, key, state, [part._state for part in parts])

    async def _watch_assembly(self, key: Key, state: Any, parts: list[Any]) -> None:
        """Let an assembly be done when its parts are; it holds none of them, so that they can be released meanwhile."""
        if self.futures.get(key) is not state:
            return
        self._watches[key] = asyncio.current_task()  # type: ignore[assignment]
        await asyncio.gather(*(part.wait() for part in parts))
        bad = next((part for part in parts if part.status != "finished"), None)
        if bad is None:
            state.finish()
        elif bad.status == "error":
            state.set_error(bad.exception, bad.traceback)
        else:
            state.cancel()

    def _handle_made(self, keys: Collection[Key], values: Collection[Any], types: Collection[Any]) -> None:
        """Keys are in memory, and small values have come along."""
        kinds = list(map(_loaded, types)) if len(types) > 1 else [_loaded(next(iter(types)))] * len(keys)
        for key, value, kind in zip(keys, values, kinds, strict=True):
            if (state := self.futures.get(key)) is not None:
                state.value = value
                state.finish(kind)

    async def _gather(self, futures: Any, errors: str = "raise", *args: Any, **kwargs: Any) -> Any:
        if type(futures) is list and all(isinstance(each, Future) and each.client is self for each in futures):
            states = [future._state for future in futures]
            await Countdown(states).wait()
            if all(state.status == "finished" for state in states):
                return await self._gather_made(futures, [state.value for state in states], errors, *args, **kwargs)
        return await self._gather_all(futures, errors, *args, **kwargs)

    async def _gather_made(
        self, futures: list[Future], here: list[bytes | None], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Gather what has been made, some of which is here."""
        lacking = [future for future, value in zip(futures, here, strict=True) if value is None]
        brought = await self._gather_all(lacking, *args, **kwargs) if lacking else []
        if len(brought) < len(lacking):  # some were lost meanwhile, and may be left out
            return await self._gather_all(futures, *args, **kwargs)  # type: ignore[no-any-return]
        others = iter(brought)
        return [next(others) if value is None else pickle.loads(value) for value in here]

    async def _gather_all(self, futures: Any, *args: Any, **kwargs: Any) -> Any:
        values = await super()._gather(futures, *args, **kwargs)
        if returned := [future for future in futures_in(values) if future.client is None]:
            for future in returned:  # a task made it, and returned it
                future.bind_client(self)
            self._send_to_scheduler({"op": "client-desires-keys", "keys": [future.key for future in returned]})
        return values

    async def _gather_remote(self, direct: bool, local_worker: Any) -> dict[str, Any]:
        asked = set(self._gather_keys)
        here = {key: self._assemblies[key] for key in asked & self._assemblies.keys()}
        self._gather_keys = (asked - here.keys()).union(*(assembly.inputs for assembly, _ in here.values()))
        response: dict[str, Any] = await super()._gather_remote(direct and self._fixed_single, local_worker)
        if response["status"] == "OK":
            data = response["data"]
            done = {key: await asyncio.to_thread(assembly.run, data) for key, (assembly, _) in here.items()}
            response["data"] = {key: value for key, value in data.items() if key in asked} | done
        return response

    def _release_key(self, key: Key) -> None:
        parts = self._disassemble(key)
        self._caching.released(key)
        super()._release_key(key)
        for part in parts:
            self._release_at_once(part)

    def _handle_restart(self) -> None:
        super()._handle_restart()
        self._caching.restarted()

    def _release_at_once(self, future: Future) -> None:
        """Release a future in this turn of the loop: who computes the same again finds nothing of the former time."""
        if not future._cleared and future._generation == self.generation:
            future._cleared = True
            self._dec_ref(future.key)

    def _disassemble(self, key: Key) -> list[Future]:
        """Assemble a result here no more that was to be; return its parts, which are to be released."""
        if (watch := self._watches.pop(key, None)) is not None:
            watch.cancel()
        _, parts = self._assemblies.pop(key, (None, []))
        return parts

    async def _cancel(self, futures: Any, **how: Any) -> None:
        for future in futures_of(futures):
            self._caching.released(future.key)
            for part in self._disassemble(future.key):
                self._release_at_once(part)
        await super()._cancel(futures, **how)

    async def _retry(self, futures: Any) -> None:
        asked = futures_of(futures)
        here = {each.key: self._assemblies[each.key][1] for each in asked if each.key in self._assemblies}
        await super()._retry([*(each for each in asked if each.key not in here), *here.values()])
        for key, parts in here.items():
            if self.futures[key].status == "error":
                self.futures[key].retry()
                self._watch(key, self.futures[key], parts)

    # -- checking ----------------------------------------------------------------------------------------------------

    def _check_sites(self, annotations: Mapping[str, Any]) -> None:
        if annotations.get("sites") or annotations.get("environment") or any(map(foreign, self._sites.values())):
            self._know_sites_of([constraint := constraint_of(annotations)])
            self._check_constraint(constraint)

    def _know_sites_of(self, constraints: Iterable[Constraint]) -> None:
        """Ask which sites there are, if none that is known meets one of the constraints.

        Nobody may hold the lock of this client meanwhile: its loop may wait for that before it hears the answer.
        """
        unmet = any(_unmet(self._bound(each), self._sites) for each in constraints)
        if unmet and not self.asynchronous and not self._in_loop():
            self.sites()

    def _check_constraint(self, constraint: Constraint) -> None:
        """Raise UnknownSiteError where no site has what a constraint names, as far as this client knows."""
        if why := unopened(constraint, self._sites):
            raise ConfigurationError(why)
        if self._sites and (problem := _unmet(constraint, self._sites)):
            raise UnknownSiteError(problem)

    # -- data --------------------------------------------------------------------------------------------------------

    def scatter(
        self, data: Any, workers: Any = None, *args: Any, site: Any = None, replicas: int = 1, **kwargs: Any
    ) -> Any:
        """Put data at a site; as ``distributed.Client.scatter``, with ``site=`` (a name, a label, or a list).

        ``replicas`` sites hold it, so that one of them may be lost. This client keeps a copy too, and brings it to
        another site when the last of them is lost; once the client is gone, a loss is a SiteLostError.
        """
        if site is not None:
            workers = [f"fed://{selector}" for selector in site_selectors(site)]
        if not isinstance(replicas, int) or replicas < 1:
            raise ValueError(f"replicas={replicas!r} must be the number of sites that are to hold the data")
        places = [workers] if isinstance(workers, str) else list(workers or ())
        return super().scatter(data, [*places, Replicas(replicas)], *args, **kwargs)

    async def _scatter(self, data: Any, **how: Any) -> Any:
        return await super()._scatter(data, **{**how, "direct": False})  # sites cannot be dialled


class _annotated:
    """Annotate what is submitted inside with the ``site`` and ``environment`` taken out of ``kwargs``.

    Gives the start of keys for calls of ``func`` that are bound so, empty if they are not bound.
    """

    def __init__(self, func: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        annotations: dict[str, Any] = {}
        if "site" in kwargs and not takes(func, "site"):
            annotations["sites"] = site_selectors(kwargs.pop("site"))
        if "environment" in kwargs and not takes(func, "environment"):
            annotations["environment"] = kwargs.pop("environment")
        self._context = dask.annotate(**annotations)
        self._func = func

    def __enter__(self) -> str:
        self._context.__enter__()
        current = dask.get_annotations()
        bound = current.get("sites"), current.get("environment")
        return f"{funcname(self._func)}-0{tokenize(bound)}" if any(bound) else ""

    def __exit__(self, *exc_info: Any) -> None:
        self._context.__exit__(*exc_info)


def _in_blocks(futures: dict[Key, Future]) -> dict[Key, Future]:
    for future in futures.values():
        future._state.in_block = True
    return futures


def _needs_of_one(expr: Any) -> Iterable[Key]:
    """Return what a single call needs; what a graph needs is known when it has been pickled."""
    if type(expr) is not LLGExpr or len(expr.operand("dsk")) != 1:
        return ()
    (task,) = expr.operand("dsk").values()
    return task.dependencies if isinstance(task, GraphNode) else ()


def _with_timeout(func: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that keeps to the ``timeout`` taken out of ``kwargs``, or else of the annotations around."""
    timeout = dask.get_annotations().get(TIMEOUT)
    if TIMEOUT in kwargs and not takes_timeout(func):
        timeout = kwargs.pop(TIMEOUT)
    if timeout is None:
        return func
    if kwargs.get("actor") or kwargs.get("actors"):
        raise ConfigurationError("timeout= is for calls: an actor lives until nobody holds its future any more")
    return limited(func, timeout)


def _names_itself(kwargs: Mapping[str, Any]) -> bool:
    """Whether the key of a call is made from what it calls."""
    return kwargs.get("key") is None and kwargs.get("pure", True) and not (kwargs.get("actor") or kwargs.get("actors"))


def _given(workers: Any, allow_other_workers: Any, priority: int, resources: Any, retries: Any) -> dict[str, Any]:
    """Return the keywords of a submission as annotations, as a stock client does."""
    if allow_other_workers not in (True, False, None):
        raise TypeError("allow_other_workers= must be True, False, or None")
    named = {"priority": priority, "retries": retries, "resources": resources}
    named |= {"workers": [workers] if isinstance(workers, str) else workers, "allow_other_workers": allow_other_workers}
    return {name: value for name, value in named.items() if value}


def actor_keys(actors: Any, keys: Collection[Key]) -> frozenset[Key]:
    """Return the keys that are to be actors: ``actors`` is True for ``keys``, or keys and collections, one or several.

    In a dict, as Dask documents it, they are those whose value is true.
    """
    if actors is None or isinstance(actors, bool):
        return frozenset(keys if actors else ())
    if dask.is_dask_collection(actors):
        return frozenset(flat_keys(actors.__dask_keys__()))
    if isinstance(actors, dict):
        return actor_keys([key for key, is_one in actors.items() if is_one], keys)
    if isinstance(actors, list | set | frozenset) or (isinstance(actors, tuple) and actors not in keys):
        return frozenset().union(*(actor_keys(each, keys) for each in actors))
    return frozenset((actors,))


def _check_actors(actors: Iterable[Key], tasks: Collection[Key]) -> None:
    """Raise ValueError where what is to be an actor is no task."""
    if unknown := [key for key in actors if key not in tasks]:
        raise ValueError(
            f"{', '.join(map(repr, unknown))}: actors= names what is not computed here, or was joined with another "
            "task; name collections or keys of what is computed, or try optimize_graph=False"
        )


def _loaded(kind: Any) -> Any:
    """Return a type that was pickled, None where it cannot be opened here."""
    try:
        return loads(kind)
    except Exception:
        return None


def _one_by_one(expr: Any) -> bool:
    """Whether an expression is what ``submit`` or ``map`` make, calls that do not need each other."""
    if isinstance(expr, MapExpr):
        return True
    graph = expr.operand("dsk") if isinstance(expr, LLGExpr) else {}
    return len(graph) == 1 and isinstance(next(iter(graph.values())), Task)


def _unmet(constraint: Constraint, sites: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return what of a constraint no site has, in words."""
    known = names_of(sites)
    if constraint.sites and not known.intersection(constraint.sites):
        wanted = ", ".join(map(repr, constraint.sites))
        return f"no site or label {wanted} in this federation; there are {', '.join(sorted(known)) or 'no sites yet'}"
    environments = {name for facts in sites.values() for name in facts["environments"]}
    if constraint.environment is not None and constraint.environment not in environments:
        offered = ", ".join(sorted(environments)) or "none"
        return f"no site offers the environment {constraint.environment!r}; environments are: {offered}"
    return None


def _warn_if_large(nbytes: int) -> None:
    if nbytes > parse_bytes(dask.config.get("distributed.admin.large-graph-warning-threshold")):
        warnings.warn(
            f"Sending large graph of size {format_bytes(nbytes)}.\nThis may cause some slowdown.\nConsider loading the "
            "data with Dask directly\n or using futures or delayed objects to embed the data into the graph without "
            "repetition.",
            stacklevel=4,
        )


def _sites_of_current_client() -> dict[str, dict[str, Any]]:
    client = distributed.get_client()
    if not isinstance(client, Client):
        raise UnknownSiteError("at(callable) needs a daskfed Client: create one first")
    return client.sites()  # type: ignore[no-any-return]
