"""``cache=True``: what was computed once is not computed again, in this run or a later one.

:class:`Caching` is what a client has of it. Before something is sent, it looks whether the memo store has the result
(:mod:`daskfed.data.memo`); then the future is finished at once (:mod:`daskfed.client.cached_values`). What is not there
is made as ever, and comes to the store in the background when it is made (:mod:`daskfed.client.storing`).

An asynchronous client submits on its event loop, where nothing may wait for a disk: there a future stays pending until
a thread has looked. If something needs it before that, its task is sent unlooked.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dask
import distributed
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.utils import funcname, key_split
from distributed.client import Future

from daskfed.client.cached_values import CachedValues, value_task
from daskfed.client.constraints import constraint_of
from daskfed.client.graphs import MaterialisedGraph
from daskfed.client.keywords import CACHE, TIMEOUT, takes, takes_timeout
from daskfed.client.notes import Noted, take_notes
from daskfed.client.storing import Memoized, Storing
from daskfed.client.tokens import CallTokens, graph_tokens, version_of
from daskfed.dask_private import Expr, LLGExpr, Task
from daskfed.data.content import Digest, Walk
from daskfed.data.packed import opened_copy
from daskfed.errors import ConfigurationError, NotCacheable
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.client.client import Client

OURS = frozenset({"site", "environment", TIMEOUT})  # keywords of submit and map that stock Dask does not have
LIVE = ("pending", "finished", "error")  # states of futures whose keys need not be made again
LINGER_S = 1.0  # for which intermediate results are still waited for, once nobody waits for what is made of them

Send = Callable[..., Any]
Values = Mapping[Key, bytes]
Submit = Callable[[MaterialisedGraph], dict[Key, Future]]
Settle = Callable[[Values, Set[Key]], dict[Key, Future]]
"""Finishes the futures of values, and submits what makes the others among some keys; returns futures."""


def asked_for(func: Callable[..., Any], kwargs: dict[str, Any]) -> str | None:
    """Take ``cache`` out of keywords, and say which version of the code it names; None where nothing is to be kept.

    A function that has a parameter of that name gets it.
    """
    if CACHE in kwargs and not takes(func, CACHE):
        return version_of(kwargs.pop(CACHE))
    return version_of(dask.get_annotations().get(CACHE))


class Cache:
    """The memo store as a user sees it: ``client.cache``."""

    def __init__(self, caching: Caching) -> None:
        self._caching = caching

    def info(self) -> Any:
        """Return ``entries`` and ``bytes`` of the store, and ``hits`` and ``misses`` of this client."""
        return self._caching.client.sync(self._caching.info)

    def clear(self, prefix: str | None = None) -> Any:
        """Forget all results, or those of functions whose names begin with ``prefix``; return how many."""
        return self._caching.client.sync(self._caching.clear, prefix)


@dataclass(frozen=True, slots=True)
class CachedCall:
    """A call of ``submit`` or ``map``: its key, its token, and which row of the arguments it is."""

    key: Key
    token: str
    row: int = 0


@dataclass(eq=False, slots=True)
class Undecided:
    """Keys of which a thread finds out whether there are results."""

    keys: list[Key]
    settle: Settle
    decided: bool = False


@dataclass(eq=False, slots=True)
class Held:
    """Intermediate results that are to be kept, and the keys that are made of them and that somebody wants."""

    futures: dict[Key, Future]
    outputs: set[Key]


class Caching:
    """The results of one client that are kept for later runs."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.values = CachedValues(client)
        self._storing = Storing(client)
        self._hits = self._misses = 0
        self._tokens: dict[Key, str] = {}  # of keys that have futures
        self._held: dict[Key, list[Held]] = {}  # by output
        self._undecided: dict[Key, Undecided] = {}

    # -- the store -----------------------------------------------------------------------------------------------------

    async def info(self) -> dict[str, int]:
        """Return what there is, and how often this client found it."""
        found = await asyncio.to_thread(lambda: self._storing.store().contents())
        return {"entries": found.entries, "bytes": found.nbytes, "hits": self._hits, "misses": self._misses}

    async def clear(self, prefix: str | None = None) -> int:
        """Forget results."""
        return await asyncio.to_thread(lambda: self._storing.store().clear(prefix))

    def _found(self, tokens: Mapping[Key, str]) -> dict[Key, bytes]:
        """Return the values that there are, by key."""
        store = self._storing.store()
        values = self._storing.quietly(lambda: dict(store.found(tokens.values()))) or {}
        self._count(values, len(set(tokens.values())))
        return {key: values[token] for key, token in tokens.items() if token in values}

    def _count(self, found: Collection[str], asked: int) -> None:
        self._hits += len(found)
        self._misses += asked - len(found)
        self._storing.used(found)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def submit(self, version: str, send: Send, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future:
        """Return the future of a call, which ``send`` submits as ``Client.submit`` does if there is no result of it."""
        ours, own = _divided(func, kwargs, distributed.Client.submit)
        token = self._call_tokens(version, func, ours).token(args, own)
        call = CachedCall(ours.get("key") or _key(funcname(func), token, ours), token)

        def send_call(_: list[CachedCall]) -> list[Future]:
            with self._set_apart(call.key):
                return [send(func, *args, **{**kwargs, "key": call.key})]

        return self._all(func, [call], send_call)[0]

    def map(
        self, version: str, send: Send, func: Any, iterables: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[Future]:
        """Return the futures of calls, of which ``send`` submits those without a result as ``Client.map`` does."""
        if not callable(func) or not iterables or not all(hasattr(each, "__len__") for each in iterables):
            return send(func, *iterables, **kwargs)  # type: ignore[no-any-return]  # it says what is wrong
        kwargs.pop("batch_size", None)
        ours, own = _divided(func, kwargs, distributed.Client.map)
        rows = list(zip(*iterables, strict=False))
        tokens = self._call_tokens(version, func, ours)
        calls = _calls_of_rows(func, [tokens.token(row, own) for row in rows], ours)

        def send_calls(some: list[CachedCall]) -> list[Future]:
            columns = map(list, zip(*(rows[call.row] for call in some), strict=True))
            return send(func, *columns, **{**kwargs, "key": [call.key for call in some]})  # type: ignore[no-any-return]

        return self._all(func, calls, send_calls)

    def _call_tokens(self, version: str, func: Any, ours: Mapping[str, Any]) -> CallTokens:
        if ours.get("actor") or ours.get("actors"):
            raise ConfigurationError("an actor cannot be kept for later runs: leave out actor=, or cache=True")
        named = {"sites": ours.get("site"), "environment": ours.get("environment")}
        annotations = {**dask.get_annotations(), **{name: each for name, each in named.items() if each is not None}}
        return CallTokens(func, version, constraint_of(annotations), self._digest_of)

    def _all(
        self, func: Any, calls: list[CachedCall], send: Callable[[list[CachedCall]], list[Future]]
    ) -> list[Future]:
        """Return the future of each call: of those that are known, that have a result, and of the others, sent now."""
        client = self.client
        with client._refcount_lock:
            futures = {call.key: Future(call.key, client) for call in calls if _lives(client, call.key)}
        new = {call.key: call for call in calls if call.key not in futures}
        tokens = {key: call.token for key, call in new.items()}

        def settle(values: Values, among: Set[Key]) -> dict[Key, Future]:
            done = self._finished({key: value for key, value in values.items() if key in among})
            if missing := [call for key, call in new.items() if key in among and key not in done]:
                done.update({future.key: future for future in send(missing)})
                self._expect({call.key: call.token for call in missing}, funcname(func))
            return done

        if new:
            futures.update(self._settled(list(new), lambda: self._found(tokens), settle))
            self._tokens.update(tokens)  # now that there are futures, whose release forgets them
        return [futures[call.key] for call in calls]

    # -- graphs --------------------------------------------------------------------------------------------------------

    def submit_graph(
        self, graph: MaterialisedGraph, keys: Collection[Key], actors: Collection[Key], submit: Submit
    ) -> dict[Key, Future]:
        """Return the futures of ``keys``; ``submit`` submits a graph, and has the lock of the client meanwhile.

        Tasks that are annotated are replaced by their results where there are some, and what only they need is left
        out. Raises NotCacheable, which names the task.
        """
        if CACHE not in graph.annotations:
            with self.client._refcount_lock:
                return submit(graph)
        versions = {key: version for key, version in _versions(graph).items() if key not in actors}
        graph = replace(graph, annotations={name: each for name, each in graph.annotations.items() if name != CACHE})
        tokens = graph_tokens(graph.tasks, versions, graph.constraints, self._digest_of)

        def settle(values: Values, among: Set[Key]) -> dict[Key, Future]:
            found = _with_values(graph, tokens, values)
            with self.client._refcount_lock:
                return submit(found)

        futures = self._settled(list(keys), lambda: self._needed(graph, tokens), settle)
        self._tokens.update({key: tokens[key] for key in futures if key in tokens})
        return futures

    def _needed(self, graph: MaterialisedGraph, tokens: Mapping[Key, str]) -> dict[Key, bytes]:
        """Return the results that a graph needs; not those that only went into others of which there are results."""
        store, storing = self._storing.store(), self._storing
        known = storing.quietly(store.known, list(tokens.values())) or set()
        found: dict[str, bytes] = {}
        while True:
            ends, passed = _ends(graph, {key for key, token in tokens.items() if token in known})
            asked = {tokens[key] for key in ends}.difference(found)
            new = storing.quietly(lambda asked=asked: dict(store.found(asked))) or {}
            found |= new
            if len(new) == len(asked):
                break
            known -= asked - new.keys()  # damaged, or evicted meanwhile
        self._count({tokens[key] for key in ends}, len({tokens[key] for key in (*ends, *passed) if key in tokens}))
        return {key: found[tokens[key]] for key in ends}

    def without_known(self, graph: MaterialisedGraph) -> MaterialisedGraph:
        """Finish the futures of results that are wanted, and leave out those that nothing else needs.

        Whoever calls this holds the lock of the client.
        """
        wanted = [key for key in graph.known if key in graph.wanted and key in graph.tasks]
        if not wanted:
            return graph
        used = {need for node in graph.tasks.values() for need in node.dependencies}
        for key in wanted:
            self.values.finish(key, graph.known[key], sent=key in used)
        gone = {key for key in wanted if key not in used}
        tasks = {key: node for key, node in graph.tasks.items() if key not in gone}
        return replace(graph, wanted=graph.wanted - gone).restricted(tasks)

    def expect_graph(self, graph: MaterialisedGraph, outputs: Collection[Key]) -> None:
        """Have results of a graph kept that was submitted; those that nobody has a future of are held meanwhile.

        Whoever calls this holds the lock of the client.
        """
        tokens = {key: token for key, token in graph.tokens.items() if key in graph.tasks}
        inner = {key: Future(key, self.client) for key in tokens if key not in outputs}
        held = Held(inner, set(outputs))
        for key in outputs if inner else ():
            self._held.setdefault(key, []).append(held)
        if tokens:
            self._expect(tokens, None, inner)

    # -- what becomes of keys ------------------------------------------------------------------------------------------

    def _expect(self, tokens: Mapping[Key, str], name: str | None, held: dict[Key, Future] | None = None) -> None:
        self._tokens.update(tokens)
        memos = {key: Memoized(self._storing, token, name or key_split(key), held) for key, token in tokens.items()}
        self._storing.expect(memos)

    def _finished(self, values: Values) -> dict[Key, Future]:
        client = self.client
        with client._refcount_lock:
            known = {key for key in values if _lives(client, key) and key not in self._undecided}
            return {
                key: Future(key, client) if key in known else self.values.finish(key, value)
                for key, value in values.items()
            }

    def released(self, key: Key) -> None:
        """Nobody has a future of a key any more, or it was cancelled."""
        self._tokens.pop(key, None)
        self.values.release(key)
        for held in self._held.pop(key, ()):
            held.outputs.discard(key)
            if not held.outputs and held.futures:  # what is made may not have been heard of yet
                self.client.loop.call_later(LINGER_S, held.futures.clear)

    def restarted(self) -> None:
        """All futures were cancelled at once, and nobody will say so of each."""
        self._tokens.clear()
        self._undecided.clear()
        self.values.forget()
        for several in self._held.values():
            for held in several:
                held.futures.clear()
        self._held.clear()

    def send(self, keys: Iterable[Key]) -> None:
        """Have the hub know keys before something is sent that needs them."""
        keys = [key for key in keys if key in self._undecided or key in self.values]
        for undecided in {self._undecided[key] for key in keys if key in self._undecided}:
            self._decide(undecided, {})
        self.values.send(keys)

    def unknown_at_hub(self) -> set[Key]:
        """Return the keys with futures that the hub does not know."""
        return self.values.unsent | self._undecided.keys()

    def is_undecided(self, key: Key) -> bool:
        """Whether a thread still finds out whether there is a result, and nothing was sent."""
        return key in self._undecided

    def concerns(self, expr: Any, annotations: Mapping[str, Any], is_call: bool) -> bool:
        """Whether an expression must be looked into: it has annotations of ours, or it may need what is only here."""
        if self.values.unsent or self._undecided:
            return True
        return not is_call and (bool(annotations.get(CACHE)) or _mentions(expr))

    def _digest_of(self, key: Key) -> Digest:
        """Return what a future counts as: what it was made from, or the data that was scattered."""
        if (token := self._tokens.get(key)) is not None:
            return bytes.fromhex(token)
        if copies := self.client._memory.copies([key]):
            return Walk().of(opened_copy(copies[key]))
        raise NotCacheable(
            f"it is not known what the future {key!r} was made from: make it with cache=True too, scatter its value "
            "from this client, pass the value itself, or leave out cache=True"
        )

    # -- on the event loop ---------------------------------------------------------------------------------------------

    def _in_loop(self) -> bool:
        return bool(self.client.asynchronous or self.client._in_loop())

    def _settled(self, keys: list[Key], ask: Callable[[], Values], settle: Settle) -> dict[Key, Future]:
        """Return the futures of keys once it is known of which there are values; on the event loop, before that."""
        if not self._in_loop():
            return settle(ask(), set(keys))
        client = self.client
        undecided = Undecided([key for key in keys if not _lives(client, key)], settle)
        futures = {key: Future(key, client) for key in keys}
        self._undecided.update(dict.fromkeys(undecided.keys, undecided))
        client.loop.add_callback(self._look, undecided, ask)
        return futures

    async def _look(self, undecided: Undecided, ask: Callable[[], Values]) -> None:
        try:
            self._decide(undecided, await asyncio.to_thread(ask))
        except Exception as exc:
            self._fail(undecided, exc)

    def _decide(self, undecided: Undecided, values: Values) -> None:
        """Finish what there is, and submit the rest, as far as somebody still has futures of it."""
        with self.client._refcount_lock:
            decided, undecided.decided = undecided.decided, True
        if decided:
            return
        among = {key for key in undecided.keys if key in self.client.futures}
        try:
            if among:
                undecided.settle(values, among)
        except Exception as exc:
            self._fail(undecided, exc)
        finally:
            for key in undecided.keys:
                self._undecided.pop(key, None)

    def _fail(self, undecided: Undecided, exc: Exception) -> None:
        undecided.decided = True
        for key in undecided.keys:
            self._undecided.pop(key, None)
            if (state := self.client.futures.get(key)) is not None and state.status == "pending":
                state.set_error(exc, exc.__traceback__)

    @contextmanager
    def _set_apart(self, key: Key) -> Iterator[None]:
        """Let ``Client.submit`` not see a pending future, for which it would submit nothing."""
        state = self.client.futures.pop(key, None) if key in self._undecided else None
        try:
            yield
        finally:
            if state is not None:
                self.client.futures[key] = state

    # -- the end -------------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Wait for results that are on their way to the store, but not for long."""
        await self._storing.flush()

    async def close(self) -> None:
        """Give up what is under way, and forget everything."""
        await self._storing.close()
        self.values.close()


def _lives(client: Client, key: Key) -> bool:
    state = client.futures.get(key)
    return state is not None and state.status in LIVE


def _divided(func: Any, kwargs: Mapping[str, Any], method: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide keywords into those for the client, and those for the function."""
    if not callable(func):
        raise TypeError(f"what is submitted must be a callable function, not {func!r}")
    known = inspect.signature(method).parameters
    ours = {name: value for name, value in kwargs.items() if name in known or (name in OURS and not _gets(func, name))}
    return ours, {name: value for name, value in kwargs.items() if name not in ours}


def _gets(func: Any, name: str) -> bool:
    """Whether a keyword that is ours goes to the function all the same."""
    return takes_timeout(func) if name == TIMEOUT else takes(func, name)


def _key(start: str, token: str, ours: Mapping[str, Any]) -> Key:
    return f"{start}-{token[:32] if ours.get('pure', True) else uuid.uuid4()}"


def _calls_of_rows(func: Any, tokens: list[str], ours: Mapping[str, Any]) -> list[CachedCall]:
    """Return the calls of a map, with the keys that the user named, or with such as are made of what they call."""
    named = ours.get("key")
    if isinstance(named, list):
        return [CachedCall(key, token, row) for row, (key, token) in enumerate(zip(named, tokens, strict=False))]
    start = str(named or funcname(func))
    return [CachedCall(_key(start, token, ours), token, row) for row, token in enumerate(tokens)]


def _versions(graph: MaterialisedGraph) -> dict[Key, str]:
    """Return the tasks of a graph whose results are to be kept, with the version of the code that is named for each.

    What only puts a result together for the client is not kept.
    """
    versions = {key: version_of(value) for key, value in graph.annotations[CACHE].items()}
    return {
        key: version
        for key, version in versions.items()
        if version is not None and type(graph.tasks.get(key)) is Task and key not in graph.finals
    }


def _ends(graph: MaterialisedGraph, known: Collection[Key]) -> tuple[set[Key], set[Key]]:
    """Return the known keys that are met first on the way from what is wanted, and the keys that are passed."""
    ends: set[Key] = set()
    passed: set[Key] = set()
    stack = list(graph.wanted)
    while stack:
        key = stack.pop()
        if key in known:
            ends.add(key)
        elif key not in passed and key in graph.tasks:
            passed.add(key)
            stack.extend(graph.tasks[key].dependencies)
    return ends, passed


def _with_values(graph: MaterialisedGraph, tokens: Mapping[Key, str], values: Values) -> MaterialisedGraph:
    """Return a graph with values in the place of tasks, which wants what is to be kept of the others."""
    tasks = {**graph.tasks, **{key: value_task(key, value) for key, value in values.items()}}
    graph = replace(graph, known=dict(values)).restricted(tasks)
    missing = {key: token for key, token in tokens.items() if key in graph.tasks and key not in values}
    return replace(graph, tokens=missing, wanted=graph.wanted | missing.keys())


def _mentions(expr: Any) -> bool:
    """Whether something in an expression is annotated with ``cache``."""
    stack = [expr]
    while stack:
        node = stack.pop()
        if CACHE in getattr(node, "_note", ()):
            return True
        for operand in node.operands:
            if isinstance(operand, Expr):
                stack.append(operand)
            elif isinstance(operand, HighLevelGraph):
                if any(map(_is_marked, operand.layers.values())):
                    return True
            elif isinstance(node, LLGExpr) and isinstance(operand, dict) and _has_marked_tasks(operand):
                return True
    return False


def _is_marked(layer: Any) -> bool:
    return CACHE in (layer.annotations or ()) or (isinstance(layer, MaterializedLayer) and _has_marked_tasks(layer))


def _has_marked_tasks(tasks: Mapping[Key, Any]) -> bool:
    return Noted.ever and any(CACHE in note for node in tasks.values() for note in take_notes(node)[1])
