"""Dataframe expressions that keep their constraint through query planning.

Dask's dataframes ignore annotations: a collection holds an expression, which the planner rewrites (columns and filters
move into the reader, partitions are dropped, readers of several files are joined) before any task exists. An
expression here is *pinned* by changing its class: a subclass, made on the fly, that differs only in that its tasks
carry a note (:mod:`daskfed.client.notes`) and that the note is part of its name. Dask rewrites an expression either as
``type(self)(...)``, which is pinned too, or puts others in its place, which are then pinned; and every ``isinstance``
test still holds. Pinned is the expression of each collection that is built inside ``at``: readers, and every operation
but repartitioning. What the planner makes up by itself (a selection of columns, say) may run anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dask
from dask.base import tokenize

from daskfed.client.notes import Note, put_note
from daskfed.client.stock import dataframes
from daskfed.dask_private import Expr
from daskfed.messages import Key

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

_classes: dict[tuple[type, str], type] = {}


class Pinned(_Base):
    """What is put in front of a class of dataframe expressions to pin it."""

    _determ_token: str | None
    _note: Note
    _note_token: str
    _unpinned: type

    def __dask_tokenize__(self) -> Any:
        """Return a token that differs from the one of the same expression with another note, or none."""
        if not self._determ_token:
            plain = self._unpinned(*self.operands)
            self._determ_token = tokenize(plain.deterministic_token, self._note_token)
        return self._determ_token

    def __reduce__(self) -> Any:
        rebuild, (_, *rest) = super().__reduce__()
        return _rebuild, (rebuild, self._unpinned, dict(self._note), rest)

    def _task(self, name: Key, index: int) -> Any:
        return put_note(super()._task(name, index), self._note)

    def _layer(self) -> dict[Key, Any]:
        return {key: put_note(node, self._note) for key, node in super()._layer().items()}

    def _lower(self) -> Any:
        """Pin what the planner puts in the place of this expression."""
        out = super()._lower()
        return out if out is None else self._spread(out)

    def _simplify_down(self) -> Any:
        out = super()._simplify_down()
        return out if out is None else self._spread(out)

    def _spread(self, expr: Any) -> Any:
        """Pin the expressions that are new, those from which this one was made stay as they are."""
        known: set[str] = set()
        stack = list(self.dependencies())
        while stack:
            node = stack.pop()
            if node._name not in known:
                known.add(node._name)
                stack.extend(node.dependencies())
        return _pinned_above(expr, known, self._note)

    def _tune_up(self, parent: Any) -> Any:
        """Pin the reader of several files that Dask puts in the place of a reader of one."""
        out = super()._tune_up(parent)
        if out is None:
            return None
        for kind in (dataframes().FusedIO, dataframes().FusedParquetIO):
            joined = kind(self)
            out = out.substitute(joined, pinned(joined, self._note))
        return out

    def load_statistics(self, *args: Any, **kwargs: Any) -> Any:
        """Read the statistics of Parquet files where the files are."""
        with dask.annotate(**self._note):
            return super().load_statistics(*args, **kwargs)


def pinned(expr: Any, note: Note) -> Any:
    """Return an expression pinned by a note; one that is pinned already stays as it is."""
    if isinstance(expr, Pinned) or type(expr) is dataframes().Repartition:
        return expr  # repartitioning asks for exactly its own class, and is replaced before there are tasks
    return _pinned_class(type(expr), note)(*expr.operands)


def pinned_new(expr: Any, note: Note) -> Any:
    """Return the expression of a new collection, pinned.

    A wrapper that Dask puts around a reader (the conversion of strings) does not hide the reader.
    """
    if isinstance(expr, dataframes().ArrowStringConversion):
        reader = expr.operands[0]
        expr = expr.substitute(reader, pinned_new(reader, note))
    return pinned(expr, note)


def _pinned_above(expr: Any, known: set[str], note: Note) -> Any:
    """Return an expression pinned down to those that are known by name."""
    if not isinstance(expr, Expr) or expr._name in known or isinstance(expr, Pinned):
        return expr
    operands = [_pinned_above(operand, known, note) for operand in expr.operands]
    if any(new is not old for new, old in zip(operands, expr.operands, strict=True)):
        expr = type(expr)(*operands)
    return pinned(expr, note)


def _pinned_class(base: type, note: Note) -> type:
    token = tokenize(sorted(note.items(), key=lambda item: item[0]))
    cls = _classes.get((base, token))
    if cls is None:
        members = {"_note": dict(note), "_note_token": token, "_unpinned": base}
        cls = type(base.__name__, (Pinned, base), {**members, "__module__": base.__module__, "__doc__": base.__doc__})
        _classes[base, token] = cls
    return cls


def _rebuild(rebuild: Any, base: type, note: Mapping[str, Any], rest: list[Any]) -> Any:
    return rebuild(_pinned_class(base, note), *rest)
