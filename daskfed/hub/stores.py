"""What the hub keeps beside names and sizes: payloads, errors and types, all unopened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from distributed.core import error_message

from daskfed import errors
from daskfed.messages import BlockSpec, CopyKeys, Import, Key, Message, RunBlock

MOST_TYPES = 1000  # that are kept once for all keys that have them


class Stores:
    """Opaque things by block id or key; the core says when each may be forgotten.

    ``payloads`` is where those of blocks are kept.
    """

    def __init__(self, payloads: MutableMapping[str, Any] | None = None) -> None:
        self.payloads: MutableMapping[str, Any] = {} if payloads is None else payloads
        self.errors: dict[Key, dict[str, Any]] = {}
        self._types: dict[Key, Any] = {}  # of keys whose type is not that of the first result of their block
        self._usual: dict[str, Any] = {}  # block -> type of its first result
        self.passing: Mapping[Key, Any] = {}  # small results that come with the report that is being taken in
        self._same: dict[Any, Any] = {}  # type -> itself

    def keep_payloads(self, blocks: Iterable[BlockSpec], payloads: Iterable[Any]) -> None:
        """Keep the payload of each block."""
        for block, payload in zip(blocks, payloads, strict=True):
            if block.id not in self.payloads:
                self.payloads[block.id] = payload

    def keep_error(self, keys: Iterable[Key], error: dict[str, Any]) -> None:
        """Keep one error, as ``exception`` and ``traceback``, for several keys."""
        kept = {"exception": error.get("exception"), "traceback": error.get("traceback")}
        for key in keys:
            self.errors[key] = kept

    def keep_types(self, block: str, types: Mapping[Key, Any]) -> None:
        """Keep the types of results of a block; most are the same few."""
        if len(self._same) > MOST_TYPES:
            self._same.clear()
        for key, told in types.items():
            kind = self._same.setdefault(told, told)
            if self._usual.setdefault(block, kind) != kind:
                self._types[key] = kind
            elif key in self._types:
                del self._types[key]

    def type_of(self, key: Key, block: str | None) -> Any:
        """Return the type of a result, as it was told of the block that made it; None where it was not."""
        return self._types.get(key, self._usual.get(block or ""))

    def make_error(self, keys: Iterable[Key], kind: str, reason: str) -> None:
        """Keep an error of the hub's own; ``kind`` names a class of :mod:`daskfed.errors`."""
        self.keep_error(keys, dict(error_message(getattr(errors, kind)(reason))))

    def beside(self, message: Message) -> dict[str, Any] | None:
        """Return what travels beside an order to run a block or to copy keys; None beside others."""
        if not isinstance(message, RunBlock | CopyKeys):
            return None
        errors = {"errors": {each.key: self.errors[each.key] for each in _failed(message.imports)}}
        return errors | ({"block": self.payloads[message.block.id]} if isinstance(message, RunBlock) else {})

    def forget_keys(self, keys: Iterable[Key]) -> None:
        """Drop what is kept for keys."""
        for key in keys:
            self.errors.pop(key, None)
            self._types.pop(key, None)

    def forget_block(self, block: str) -> None:
        """Drop what is kept of a block."""
        self.payloads.pop(block, None)
        self._usual.pop(block, None)


def _failed(imports: Iterable[Import]) -> Iterable[Import]:
    return (each for each in imports if each.failed)
