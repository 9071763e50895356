"""The keys that a hub knows: there may be millions, so most of them rest, as one of few records that they share. Pure.

Most keys are results of calls: one client wants each, one block makes it, no block needs it, and until it is let go
nothing more than that befalls it. Such a key has no state of its own: in its place stands a :class:`Rest`, the same for
all keys of which the same is to be said. Whoever takes a state out of the table gets one of the key's own, to change as
they like; :meth:`KeyTable.put_to_rest` looks at these again when an event has been taken in.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from daskfed.hub.states import KeyPhase
from daskfed.messages import Key


class _Nothing(dict[str, Any]):
    """An empty dict that stays empty."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("this dict is shared: use KeyState.add")


NOTHING = _Nothing()
"""What most keys have in most of their dicts: shared, since there may be millions of keys."""


def _nothing() -> dict[str, Any]:
    return NOTHING


@lru_cache(maxsize=1024)
def alone(claim: str) -> tuple[str, ...]:
    """Return a tuple that all keys of one block share."""
    return (claim,)


@dataclass(slots=True)
class KeyState:
    """One key. Dicts to None are sets that keep their order, so that the same events always give the same commands."""

    key: Key
    owner: str
    producer: str | None = None  # id of the block that makes it; None for scattered data and for promises
    keeper: str | None = None  # client that has a copy of it
    phase: KeyPhase = KeyPhase.PENDING
    nbytes: int = 0
    holders: dict[str, tuple[str, ...]] = field(default_factory=dict)  # site that holds it, first maker first -> why
    importing: dict[str, int] = field(default_factory=_nothing)  # site that is to bring it in -> number of that import
    failed_at: dict[str, None] = field(default_factory=_nothing)  # sites that were told of its failure
    wanted_by: dict[str, None] = field(default_factory=dict)  # clients
    consumers: dict[str, None] = field(default_factory=_nothing)  # unfinished blocks that need it
    shielded: bool = False  # a client that is not back yet may want it
    replicas: int = 1  # how many sites are to hold it
    lost_at: str = ""  # the site that held it last
    cancelled: bool = False  # it counts as failed since it was cancelled: who asks for it has it made
    heirs: dict[str, None] = field(default_factory=_nothing)  # finished blocks that took it and may have to run again

    def add(self, name: str, member: str, value: int | None = None) -> None:
        """Add to ``importing``, ``failed_at``, ``consumers`` or ``heirs``, which are shared while they are empty."""
        own = getattr(self, name)
        if own is NOTHING:
            own = {}
            setattr(self, name, own)
        own[member] = value

    @property
    def needed(self) -> bool:
        """Whether its value is needed, now or as soon as it exists."""
        return bool(self.wanted_by or self.consumers)

    def present_at(self, site: str) -> bool:
        """Say whether a block at ``site`` can use the key without a further import."""
        return site in self.holders or site in self.importing or site in self.failed_at


@dataclass(frozen=True)
class Rest:
    """What is to be said of keys that rest: these facts, and that every other is as in a new :class:`KeyState`."""

    owner: str
    producer: str  # id of the block that makes them
    phase: KeyPhase = KeyPhase.PENDING  # or HELD
    client: str | None = None  # who wants them
    site: str | None = None  # which one holds them, since that block made them there
    nbytes: int = 0
    cancelled = False

    @cached_property
    def holders(self) -> dict[str, tuple[str, ...]]:
        """As in a state; not to be changed."""
        return {} if self.site is None else {self.site: alone(self.producer)}

    @cached_property
    def wanted_by(self) -> dict[str, None]:
        """As in a state; not to be changed."""
        return {} if self.client is None else {self.client: None}

    def present_at(self, site: str) -> bool:
        """As a state does."""
        return site == self.site

    def wanted(self, client: str | None) -> Rest:
        """Return what is to be said when this client, or nobody, wants them."""
        return rest(self.owner, self.producer, self.phase, client, self.site, self.nbytes)

    def state(self, key: Key) -> KeyState:
        """Return the state of a key that rests so."""
        return KeyState(
            key, self.owner, self.producer, None, self.phase, self.nbytes, dict(self.holders),
            wanted_by=dict(self.wanted_by),
        )  # fmt: skip


@lru_cache(maxsize=2**12)
def _shared(*facts: Any) -> Rest:
    return Rest(*facts)


def rest(
    owner: str,
    producer: str,
    phase: KeyPhase = KeyPhase.PENDING,
    client: str | None = None,
    site: str | None = None,
    nbytes: int = 0,
) -> Rest:
    """Return a record that keys share."""
    return _shared(owner, producer, phase, client, site, nbytes)


def rest_of(state: KeyState) -> Rest | None:
    """Return the record that says all of a state; None where there is more to say."""
    if state.consumers or state.heirs or state.importing or state.failed_at or state.shielded or state.cancelled:
        return None
    if len(state.wanted_by) > 1 or len(state.holders) > 1 or state.replicas != 1 or state.lost_at:
        return None
    if state.producer is None or state.keeper is not None or state.phase not in (KeyPhase.PENDING, KeyPhase.HELD):
        return None
    site, why = next(iter(state.holders.items()), (None, (state.producer,)))
    if why != (state.producer,) or (site is None and state.nbytes):
        return None
    return rest(state.owner, state.producer, state.phase, next(iter(state.wanted_by), None), site, state.nbytes)


class KeyTable(MutableMapping[Key, KeyState]):
    """Key -> its state, of its own from the moment that it is looked up."""

    def __init__(self) -> None:
        self._known: dict[Key, KeyState | Rest] = {}
        self.peek: Callable[[Key], KeyState | Rest | None] = self._known.get
        """What is known of a key, to be read only; it does not wake the key."""
        self._awake: list[KeyState] = []  # looked up or put in since keys were last put to rest

    def __getitem__(self, key: Key) -> KeyState:
        found = self._known[key]
        return self._wake(key, found) if isinstance(found, Rest) else found

    def get(self, key: Any, default: None = None) -> KeyState | None:  # type: ignore[override]
        """Return a key's state; None where the key is not known."""
        found = self._known.get(key)
        if found is None:
            return default
        return self._wake(key, found) if isinstance(found, Rest) else found

    def __setitem__(self, key: Key, state: KeyState) -> None:
        self._known[key] = state
        self._awake.append(state)

    def __delitem__(self, key: Key) -> None:
        del self._known[key]

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[Key]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _wake(self, key: Key, resting: Rest) -> KeyState:
        state = self._known[key] = resting.state(key)
        self._awake.append(state)
        return state

    # -- without waking ----------------------------------------------------------------------------------------------

    def peeks(self) -> ItemsView[Key, KeyState | Rest]:
        """Return what is known of all keys, to be read only."""
        return self._known.items()

    def at_rest(self, key: Key) -> Rest | None:
        """Return as what a key rests, if it does."""
        found = self._known.get(key)
        return found if type(found) is Rest else None

    def lay(self, key: Key, resting: Rest) -> None:
        """Have a key that is new, or rests, rest as this from now on."""
        self._known[key] = resting

    def at(self, site: str) -> Iterable[KeyState]:
        """Return the states of the keys that a site holds, is to bring in, or was told to have failed."""
        there = [key for key, found in self._known.items() if found.present_at(site)]
        return map(self.__getitem__, there)

    def put_to_rest(self) -> None:
        """Have those rest again that were looked up, where there is no more to say of them than of others."""
        awake, self._awake = self._awake, []
        for state in awake:
            if self._known.get(state.key) is state and (resting := rest_of(state)) is not None:
                self._known[state.key] = resting
