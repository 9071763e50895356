"""Tokens of calls and of the tasks of a graph: what they are made from, not what Dask calls them. No I/O.

The token of a task is made of its function, its arguments, and the tokens of its inputs; so the same task has the same
token in every run, whether its keys are random or not, whether it was fused with others, and whether it was submitted
as a call or as part of a graph. Where it is bound to sites or an environment, these count too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from daskfed.client.constraints import EMPTY
from daskfed.client.notes import Tasks
from daskfed.dask_private import Alias, DataNode, GraphNode, NestedContainer, Task, TaskRef, execute_subgraph
from daskfed.data.content import PYTHON, Digest, Walk, digest
from daskfed.errors import ConfigurationError, NotCacheable
from daskfed.messages import Constraint, Key

FORMAT = "1"  # of tokens: another one forgets all results

Outside = Callable[[Key], Digest]
"""Gives the digest of a key that a graph does not make; raises NotCacheable."""


def version_of(cache: Any) -> str | None:
    """Return the version of the code that ``cache=`` names: "" for True, None where nothing is to be kept.

    Raises ConfigurationError for what is neither a bool nor a word.
    """
    if cache is None or cache is False:
        return None
    if cache is True:
        return ""
    if isinstance(cache, str) and cache:
        return cache
    raise ConfigurationError(
        f"cache={cache!r} must be True, or a word that names the version of your code, as in cache='v2'; or False"
    )


def memo_digest(call: Digest, version: str, constraint: Constraint) -> Digest:
    """Return what a call counts as for those that use its result; in hexadecimal it is the token of that."""
    place = repr((constraint.sites, constraint.environment)) if constraint.sites or constraint.environment else ""
    return digest("memo", FORMAT, PYTHON, version, place, call)


class CallTokens:
    """Tokens of calls of one function, bound by one constraint; ``outside`` knows the futures among arguments."""

    def __init__(self, function: Any, version: str, constraint: Constraint, outside: Outside) -> None:
        self._walk = TaskWalk(outside)
        self._function = function
        self._called = self._walk.function(function)
        self._how = version, constraint

    def token(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the token of a call; raises NotCacheable, which names the argument."""
        call = self._walk.call_of(self._called, self._function, args, kwargs)
        return memo_digest(call, *self._how).hex()


def graph_tokens(
    tasks: Tasks, versions: Mapping[Key, str], constraints: Mapping[Key, Constraint], outside: Outside
) -> dict[Key, str]:
    """Return the token of each key in ``versions``, which has the versions that the user named.

    Raises NotCacheable, which names the key of the task.
    """
    digests: dict[Key, Digest] = {}

    def given(key: Key) -> Digest:
        return digests[key] if key in digests else outside(key)

    walk = TaskWalk(given)
    for key in inputs_first(tasks, versions):
        try:
            found = walk.of(tasks[key])
        except NotCacheable as exc:
            raise NotCacheable(f"the task {key!r}, which {_whose(key, versions)}: {exc}") from None
        if type(tasks[key]) is Task:
            found = memo_digest(found, versions.get(key, ""), constraints.get(key, EMPTY))
        digests[key] = found
    return {key: digests[key].hex() for key in versions}


def _whose(key: Key, versions: Collection[Key]) -> str:
    return "is annotated with cache" if key in versions else "is needed by one that is annotated with cache"


def inputs_first(tasks: Mapping[Key, GraphNode], wanted: Iterable[Key]) -> Iterator[Key]:
    """Yield the wanted keys and all that they need of the tasks, each after what it needs."""
    done: set[Key] = set()
    stack = [(key, False) for key in wanted]
    while stack:
        key, ready = stack.pop()
        if key in done or key not in tasks:
            continue
        if ready:
            done.add(key)
            yield key
        else:
            stack.append((key, True))
            stack += [(need, False) for need in tasks[key].dependencies if need not in done and need != key]


class TaskWalk(Walk):
    """A walk that knows tasks; ``given`` gives the digest of a key."""

    def __init__(self, given: Outside) -> None:
        super().__init__(self._other)
        self._given = given
        self._inner: list[dict[Key, Digest]] = []  # of fused tasks, whose keys mean nothing outside
        self._scopes = itertools.count(1)

    def function(self, function: Any) -> Digest:
        """Return the digest of a function that is called."""
        return self.part(getattr(function, "__qualname__", type(function).__name__), function)

    def _other(self, value: Any) -> Digest | None:
        if isinstance(value, TaskRef):
            return self._key(value.key)
        return self._node(value) if isinstance(value, GraphNode) else None

    def _key(self, key: Key) -> Digest:
        return self._inner[-1][key] if self._inner and key in self._inner[-1] else self._given(key)

    def _node(self, node: GraphNode) -> Digest:
        if isinstance(node, Alias):
            return self._key(node.target)
        if isinstance(node, DataNode):
            return self.of(node.value)
        if isinstance(node, NestedContainer):
            return digest(node.klass.__name__, self.all(node.args))
        if not isinstance(node, Task):
            raise NotCacheable(f"it is of a kind that daskfed does not know: {type(node).__name__}")
        if node.func is execute_subgraph:
            return self._fused(*node.args)
        return self.call(node.func, node.args, node.kwargs)

    def _fused(self, inner: Mapping[Key, GraphNode], out: Key, inkeys: Iterable[Key], *given: Any) -> Digest:
        """Return the digest of the last of some tasks that were fused."""
        digests = {key: self.of(value) for key, value in zip(inkeys, given, strict=True)}
        outside, self.scope = self.scope, next(self._scopes)
        self._inner.append(digests)
        try:
            for key in inputs_first(inner, [out]):
                found = self.of(inner[key])
                digests[key] = memo_digest(found, "", EMPTY) if type(inner[key]) is Task and key != out else found
        finally:
            self._inner.pop()
            self.scope = outside
        return digests[out]
