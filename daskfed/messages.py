"""Every message between hub and sites, and the nouns that they carry.

Each message is a frozen dataclass whose fields are names, sizes, times and flags: nothing here holds user data.
Payloads (pickled graphs, results, exceptions) are opaque frames that travel *beside* a message; the shells keep them
by block id or key and the pure cores never see them.

:func:`encode` turns a message into a plain dict for msgpack, :func:`decode` turns it back.
The protocol version goes up with every change that an older peer would not understand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from math import inf
from typing import Any, ClassVar, NamedTuple, TypeAlias

PROTOCOL_VERSION = 7
COORDINATION = ("event_", "variable_", "queue_", "semaphore_", "multi_lock_", "publish_")
"""Ops of a scheduler that begin so are coordination: the hub does them, for clients and for tasks at sites."""
PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})
"""Types whose values hold no others, need not be opened, and do not change."""
REQUEST = "fed_request"
"""The name under which an op of coordination carries an id, so that it is done once though it is asked again."""
SESSION = "fed_session"
"""The name under which a call of daskfed's client carries the secret that it told the hub in its hello."""

WORKER_SCHEME = "fed://"
"""Of a worker's address across sites: ``fed://site/host:port``."""

Key: TypeAlias = str | bytes | int | float | tuple[Any, ...]
"""What Dask calls a key: the name of one result."""


def agent_client(incarnation: str) -> str:
    """Return the id under which the agent of a site is a client of its scheduler."""
    return f"daskfed-agent-{incarnation}"


class Attempt(NamedTuple):
    """Which placement of a block a message is about; a late answer from an older attempt is dropped."""

    epoch: int  # of the hub: goes up each time the hub starts
    n: int  # of the block: goes up each time it is placed


class QuickEnum(Enum):
    """An enum whose members are hashed in C: those of the cores are looked up for each key, again and again."""

    __hash__ = object.__hash__


class BlockKind(StrEnum):
    """What the payload of a block holds."""

    GRAPH = "graph"  # a Dask expression with the tasks of one block, as the client cut it
    CALLS = "calls"  # a Dask expression with at most 512 independent calls of one function (submit, map)
    WHOLE = "whole"  # a whole, unmaterialised Dask expression: its inner keys are unknown to everybody but the site
    NESTED = "nested"  # nothing: the outputs are keys that tasks made at the one site of its constraint


@dataclass(frozen=True, slots=True)
class Constraint:
    """Where and how the tasks of one block may run; the empty constraint allows everything."""

    sites: tuple[str, ...] = ()  # any of these: a site's name, or a label "name=value"; empty: every site
    environment: str | None = None  # name of an environment that the site must report
    workers: tuple[str, ...] = ()  # worker addresses or host names, as in Dask
    allow_other_workers: bool = False  # ``workers`` is a preference
    resources: tuple[tuple[str, float], ...] = ()  # sorted (name, amount) that one task takes on a worker
    priority: int = 0  # the user's priority: higher runs earlier
    retries: int = 0  # how often a failing task runs again
    python: str = ""  # version, as in "3.11", that must open the payload unless an environment is named; empty: any
    owner: str = ""  # whose work it is, where the hub knows by key: some sites serve some owners only; set by the hub


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A piece of a graph that is placed as one."""

    id: str  # unique in the federation
    client: str  # id of the client that submitted it
    owner: str  # user whom it belongs to
    kind: BlockKind
    inputs: tuple[Key, ...]  # keys that it needs from elsewhere
    outputs: tuple[Key, ...]  # keys that others may ask for
    ntasks: int  # number of tasks in the payload
    prefixes: tuple[tuple[str, int], ...]  # (Dask key prefix, number of its tasks in the block)
    constraint: Constraint = Constraint()
    rank: int = 0  # place in the order in which the client would like its blocks to run
    near: tuple[str, ...] = ()  # names or labels of sites that most of its data is bound to, or goes to: a hint
    label: str = ""  # what a person calls it: the prefixes of its outputs
    stateful: bool = False  # its results are actors: they end with their site
    patience_s: float = inf  # how long it waits for a site that meets its constraint where there is none any more
    uses: tuple[tuple[int, ...], ...] = ()  # of each output the places in ``inputs`` that it needs; empty: maybe all

    def needs(self, output: Key, key: Key) -> bool:
        """Say whether one of its outputs may need one of its inputs."""
        if not self.uses:
            return True
        return any(self.inputs[place] == key for place in self.uses[self.outputs.index(output)])


@dataclass(frozen=True, slots=True)
class Import:
    """A key that a site must bring in before a block can run there."""

    key: Key
    source: str  # site that holds it; empty where the key failed and only its error is brought
    nbytes: int  # 0 where unknown
    failed: bool = False  # the task that makes this key failed: its dependents are to fail with the same error
    number: int = field(default=0, compare=False)  # of the imports that the hub asked for; the answer repeats it


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A key that a site has in memory and holds for the federation."""

    key: Key
    nbytes: int


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """A block that a site works at, or of which it still holds outputs."""

    block: str
    attempt: Attempt
    open: tuple[Key, ...]  # outputs that are to be reported yet; none: it has finished
    kept: tuple[Key, ...]  # outputs that were reported and are here


class Message:
    """Base of everything on the link between hub and site."""

    __slots__ = ()
    op: ClassVar[str]


# -- hub to site -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunBlock(Message):
    """Run this block and hold its outputs, or some of them. Its payload travels beside it."""

    op: ClassVar[str] = "run-block"
    block: BlockSpec
    attempt: Attempt
    imports: tuple[Import, ...]  # inputs that the site has neither made nor imported yet
    expected_s: float  # estimated seconds of one thread for the whole block
    only: tuple[Key, ...] = ()  # the outputs that are to be made, where the others exist or are not needed; empty: all


@dataclass(frozen=True, slots=True)
class RecallBlock(Message):
    """Give this block back if its tasks were not handed to the site's scheduler yet."""

    op: ClassVar[str] = "recall-block"
    block: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class CancelBlock(Message):
    """Nobody wants this block any more: stop it and forget its outputs."""

    op: ClassVar[str] = "cancel-block"
    block: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StopKeys(Message):
    """Nobody wants these outputs of a block any more, but others of it: stop what makes them.

    Those that were not reported before are answered by one KeysStopped.
    """

    op: ClassVar[str] = "stop-keys"
    block: str
    attempt: Attempt
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class ReleaseKeys(Message):
    """The federation no longer needs these keys at this site.

    A report that some block made one of them may cross this message: then the hub counts on that key again.
    ``seen`` tells the two apart.
    """

    op: ClassVar[str] = "release-keys"
    keys: tuple[Key, ...]
    seen: int | None = field(default=None, compare=False)  # KeysMade and KeysFailed of the site so far; None: all


@dataclass(frozen=True, slots=True)
class CopyKeys(Message):
    """Bring these keys in and hold them (a draining site hands over, or a user asked for replicas)."""

    op: ClassVar[str] = "copy-keys"
    imports: tuple[Import, ...]


@dataclass(frozen=True, slots=True)
class ReportHoldings(Message):
    """Say anew what you hold and work at: a client came back whose blocks the hub did not know."""

    op: ClassVar[str] = "report-holdings"


@dataclass(frozen=True, slots=True)
class CloseSite(Message):
    """The federation ends, or this site was refused: release everything and stop."""

    op: ClassVar[str] = "close-site"
    reason: str


# -- site to hub -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiteHello(Message):
    """The first message of a site."""

    op: ClassVar[str] = "site-hello"
    site: str  # its name, unique in the federation
    incarnation: str  # unique to this run of the site's agent
    protocol: int  # PROTOCOL_VERSION of the agent
    labels: tuple[tuple[str, str], ...]  # sorted (name, value)
    environments: tuple[str, ...]  # names of the environments that its workers offer
    resources: tuple[tuple[str, float], ...]  # sorted (name, largest amount that one worker offers)
    data_address: str  # where other agents may fetch keys; empty if nobody can connect
    dashboard: str  # URL of the site's Dask dashboard; empty if none
    versions: tuple[tuple[str, str], ...]  # sorted (package, version): python, dask, distributed, numpy …
    data: tuple[str, ...] = ()  # absolute paths and URLs: tasks that read below them belong here
    data_binding: str = "prefer"  # or "strict": they run nowhere else
    network: str = ""  # stands for the machine, or the part of it, whose loopback is the site's; empty: not known
    serves: tuple[str, ...] = ()  # owners whose work it runs, empty: everybody's; set by the hub, from the site's key


@dataclass(frozen=True, slots=True)
class SiteEnds(Message):
    """The site ends of its own will: nobody need wait whether it comes back."""

    op: ClassVar[str] = "site-ends"


@dataclass(frozen=True, slots=True)
class SiteHoldings(Message):
    """What a site holds and works at, in the words of the hub: after its hello, and when asked.

    A hub that started anew learns from it what goes on. Errors of failed keys travel beside it.
    """

    op: ClassVar[str] = "site-holdings"
    held: tuple[MadeKey, ...]  # in memory, held for the federation
    failed: tuple[Key, ...]  # failed here, or known to have failed elsewhere
    placed: tuple[Key, ...]  # those of both that are here whatever becomes of the blocks that made them
    coming: tuple[Import, ...]  # imports that are not answered yet
    blocks: tuple[HeldBlock, ...]
    reports: int  # KeysMade and KeysFailed that the site has sent so far


@dataclass(frozen=True, slots=True)
class SiteStatus(Message):
    """What a site has and does now; sent about once a second and when its workers change."""

    op: ClassVar[str] = "site-status"
    workers: int
    threads: int
    memory_limit: int  # bytes, of all workers
    memory_used: int  # bytes
    running: int  # tasks that run now
    queued: int  # tasks that wait at the site's scheduler
    draining: bool = False  # the site wants to leave: it takes no more blocks and hands its keys over
    round_trip_s: float = 0.0  # measured between agent and hub
    queue_wait_s: float = 0.0  # how long a new worker would wait for a batch job to start
    cold_start_s: tuple[tuple[str, float], ...] = ()  # (environment, seconds to start a worker in it)
    walltime_left_s: float = float("inf")  # until the last allocation of the site ends


@dataclass(frozen=True, slots=True)
class BlockStarted(Message):
    """The tasks of this block are with the site's scheduler now and cannot be recalled."""

    op: ClassVar[str] = "block-started"
    block: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class BlockRecalled(Message):
    """The site gave a block back, or (``given`` is false) it is too late for that."""

    op: ClassVar[str] = "block-recalled"
    block: str
    attempt: Attempt
    given: bool


@dataclass(frozen=True, slots=True)
class KeysMade(Message):
    """Outputs of a block are in memory at the site, which holds them until told otherwise.

    The pickled types of the results may travel beside it, and small results of calls.
    """

    op: ClassVar[str] = "keys-made"
    block: str
    attempt: Attempt
    keys: tuple[MadeKey, ...]


@dataclass(frozen=True, slots=True)
class KeysFailed(Message):
    """Outputs of a block failed with one error, whose exception and traceback travel beside it."""

    op: ClassVar[str] = "keys-failed"
    block: str
    attempt: Attempt
    keys: tuple[Key, ...]
    blame: Key | None = None  # the task that the scheduler gave up since its workers died; it may be innocent


@dataclass(frozen=True, slots=True)
class KeysStopped(Message):
    """The site does not make these outputs of a block any more, as it was told, and will not report them."""

    op: ClassVar[str] = "keys-stopped"
    block: str
    attempt: Attempt
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class BlockLost(Message):
    """The site cannot finish this attempt through no fault of the tasks; it must be placed again."""

    op: ClassVar[str] = "block-lost"
    block: str
    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class KeyImported(Message):
    """A key from elsewhere is now held here as well."""

    op: ClassVar[str] = "key-imported"
    key: Key
    source: str  # site that it came from
    nbytes: int  # bytes on the wire
    seconds: float  # from asking for it until it had arrived
    relayed: bool  # it went through the hub
    number: int = field(default=0, compare=False)  # of the import that this answers


@dataclass(frozen=True, slots=True)
class ImportFailed(Message):
    """A key could not be fetched from ``source``; the hub names another or makes it again."""

    op: ClassVar[str] = "import-failed"
    key: Key
    source: str
    reason: str
    number: int = field(default=0, compare=False)  # of the import that this answers


@dataclass(frozen=True, slots=True)
class KeysLost(Message):
    """Keys that the site held are gone and it cannot make them again by itself."""

    op: ClassVar[str] = "keys-lost"
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Learned(Message):
    """What the site measured since the last time, per Dask key prefix."""

    op: ClassVar[str] = "learned"
    durations: tuple[tuple[str, int, float], ...]  # (prefix, tasks, seconds of one thread in all)
    sizes: tuple[tuple[str, int, int], ...]  # (prefix, results, bytes in all)


MESSAGES: dict[str, type[Message]] = {cls.op: cls for cls in Message.__subclasses__()}

_NESTED: dict[tuple[type[Any], str], type[Any]] = {
    (RunBlock, "block"): BlockSpec,
    (BlockSpec, "constraint"): Constraint,
}
_NESTED_EACH: dict[tuple[type[Any], str], type[Any]] = {
    (RunBlock, "imports"): Import,
    (CopyKeys, "imports"): Import,
    (KeysMade, "keys"): MadeKey,
    (SiteHoldings, "held"): MadeKey,
    (SiteHoldings, "coming"): Import,
    (SiteHoldings, "blocks"): HeldBlock,
}
_PARTS = (Import, MadeKey, HeldBlock)


def encode(message: Message | BlockSpec | Constraint) -> dict[str, Any]:
    """Return ``message`` as a dict of plain values, with its ``op``, ready for msgpack."""
    plain = {name: _plain(getattr(message, name)) for name in _names(type(message))}
    if isinstance(message, Message):
        plain["op"] = message.op
    return plain


def decode(plain: dict[str, Any]) -> Message:
    """Return the message that :func:`encode` wrote.

    Raises ValueError where the ``op`` is unknown or a field is missing or too many: the peer speaks another version.
    """
    values = dict(plain)
    op = values.pop("op", None)
    cls = MESSAGES.get(op) if isinstance(op, str) else None
    if cls is None:
        raise ValueError(f"unknown message {op!r}: the peer speaks another version than {PROTOCOL_VERSION}")
    try:
        return _rebuild(cls, values)  # type: ignore[no-any-return]
    except TypeError as exc:
        raise ValueError(f"malformed message {op!r} ({exc}): the peer speaks another protocol version") from exc


def decode_block(plain: dict[str, Any]) -> BlockSpec:
    """Return the block that :func:`encode` wrote; raises ValueError where it is malformed."""
    try:
        return _rebuild(BlockSpec, dict(plain))  # type: ignore[no-any-return]
    except TypeError as exc:
        raise ValueError(f"malformed block ({exc}): the peer speaks another protocol version") from exc


_NAMES: dict[type[Any], tuple[str, ...]] = {}  # of fields


def _names(cls: type[Any]) -> tuple[str, ...]:
    if cls not in _NAMES:
        _NAMES[cls] = tuple(field.name for field in fields(cls))
    return _NAMES[cls]


def _plain(value: Any) -> Any:
    if isinstance(value, (BlockSpec, Constraint, *_PARTS)):
        return {name: _plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple) and value and isinstance(value[0], _PARTS):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Attempt):
        return tuple(value)
    return value


def _rebuild(cls: type[Any], values: dict[str, Any]) -> Any:
    for name, value in values.items():
        if (cls, name) in _NESTED:
            values[name] = _rebuild(_NESTED[cls, name], dict(value))
        elif name == "attempt":
            values[name] = Attempt(*value)
        elif (cls, name) in _NESTED_EACH:
            values[name] = tuple(_rebuild(_NESTED_EACH[cls, name], dict(item)) for item in value)
        elif name == "kind":
            values[name] = BlockKind(value)
    return cls(**values)
