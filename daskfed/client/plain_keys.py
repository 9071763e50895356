"""Keys as they can travel: strings, numbers, and tuples of these.

Only keys that a user asks for are checked by Dask. Inside a graph it makes some with NumPy's integers in them
(``dask.array`` does, for ``vindex``). With one scheduler they never travel outside of a pickled graph; here the hub has
to know every key that crosses from one block to another, and it opens no pickles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from dask.base import tokenize

from daskfed.client.notes import Tasks
from daskfed.dask_private import GraphNode
from daskfed.messages import Key

_BASES: tuple[Any, ...] = (str, bytes, int, float)
_PLAIN: frozenset[Any] = frozenset({*_BASES, bool, NoneType})


def with_plain_keys(tasks: Mapping[Key, GraphNode]) -> Tasks:
    """Return the same tasks under plain keys, which equal the given ones wherever these had a plain equal."""
    if _surely_plain(tasks):
        return dict(tasks)
    odd = {key: plain_key(key) for key in _keys(tasks) if not is_plain(key)}
    if not odd:
        return dict(tasks)
    # Dask leaves a reference as it is where the new key equals the old one: so each gets another name on the way.
    halfway: dict[Key, Any] = {key: ("daskfed-halfway", i) for i, key in enumerate(odd)}
    home: dict[Key, Any] = {halfway[key]: plain for key, plain in odd.items()}
    return _renamed(_renamed(tasks, halfway), home)


def is_plain(key: Any) -> bool:
    """Say whether a key, or all that it consists of, is of a type that every message can carry."""
    kind = type(key)
    return kind in _PLAIN or (kind is tuple and all(map(is_plain, key)))


def plain_key(key: Any) -> Any:
    """Return the equal of a key that is made of plain types; where there is none, one made from its token."""
    if is_plain(key):
        return key
    if isinstance(key, tuple):
        return tuple(map(plain_key, key))
    plain = key.item() if hasattr(key, "item") else next((kind(key) for kind in _BASES if isinstance(key, kind)), None)
    return plain if type(plain) in _PLAIN and plain == key else f"{type(key).__name__}-{tokenize(key)}"


def _surely_plain(tasks: Mapping[Key, GraphNode]) -> bool:
    """Say whether all keys are plain without a look at each, as almost always; False where some have tuples in them."""
    kinds = {type(key) for key in tasks}
    kinds |= {type(key) for node in tasks.values() for key in node.dependencies}
    parts = {type(part) for key in tasks if type(key) is tuple for part in key}
    parts |= {type(part) for node in tasks.values() for key in node.dependencies if type(key) is tuple for part in key}
    return kinds <= _PLAIN | {tuple} and parts <= _PLAIN


def _keys(tasks: Mapping[Key, GraphNode]) -> Iterator[Key]:
    """Yield every key that tasks have or refer to, some more than once."""
    for key, node in tasks.items():
        yield key
        yield from node.dependencies


def _renamed(tasks: Mapping[Key, GraphNode], names: dict[Key, Any]) -> Tasks:
    return {names.get(key, key): node.substitute(names, key=names.get(key)) for key, node in tasks.items()}
