"""What happens to the hub (events) and what the hub wants done (commands): frozen, without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from daskfed.messages import Attempt, BlockSpec, Key, Message, QuickEnum, SiteHello

# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientJoined:
    """A client connected; ``owner`` is the user it acts for."""

    client: str
    owner: str


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """A client is gone for good: whatever only it wanted is released."""

    client: str


@dataclass(frozen=True, slots=True)
class BlocksSubmitted:
    """A client submits the blocks of a graph and wants ``wanted`` of their outputs.

    ``wait`` asks to wait where no site meets a constraint; else the outputs fail at once. ``refused`` are blocks that
    cannot run, and why: they name workers that do not exist, or that several sites have.
    """

    client: str
    blocks: tuple[BlockSpec, ...]
    wanted: tuple[Key, ...]
    wait: bool = False
    refused: tuple[tuple[str, str], ...] = ()  # (block, why)


@dataclass(frozen=True, slots=True)
class ClientBack:
    """A client is back after its connection broke or the hub started anew, and says all that it knows.

    ``blocks``: those that the hub does not know, with the arrival numbers that a hub gave them (0: none did).
    ``wanted``: all keys that it wants; ``kept``: those of which it keeps a copy; ``refused``: as for
    :class:`BlocksSubmitted`.
    """

    client: str
    owner: str
    blocks: tuple[tuple[BlockSpec, int], ...]
    wanted: tuple[Key, ...]
    kept: tuple[Key, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()  # (block, why)


@dataclass(frozen=True, slots=True)
class KeysDesired:
    """A client wants keys that exist, or that it expects to exist."""

    client: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class KeysReleased:
    """A client no longer wants these keys."""

    client: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class KeysCancelled:
    """A client cancels keys, and with them what depends on them, as far as only it wants them.

    ``force`` cancels also what other clients want. ``reason`` and ``msg`` are the user's.
    """

    client: str
    keys: tuple[Key, ...]
    force: bool = False
    reason: str = ""
    msg: str | None = None


@dataclass(frozen=True, slots=True)
class KeysRetried:
    """Keys that failed are to be made again, with what they failed from and what failed from them."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class KeysScattered:
    """A client's data, or keys made inside a task, are in memory at a site: they cannot be recomputed.

    ``kept``: the client keeps a copy and brings it again when asked (:class:`AskForData`); ``again``: it does so now,
    which makes nobody want the keys that did not want them before; ``replicas``: how many sites are to hold them.
    """

    client: str
    site: str
    keys: tuple[tuple[Key, int], ...]  # (key, bytes)
    kept: bool = False
    again: bool = False
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class CopiesGone:
    """A client does not have the copies of keys that it was asked for."""

    client: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class KeysNeeded:
    """A task at a site took futures of these keys out of a Variable, a Queue or a dataset."""

    site: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class SiteJoined:
    """A site connected."""

    hello: SiteHello


@dataclass(frozen=True, slots=True)
class SiteReach:
    """The connection with a site broke, which may come back, or is there again."""

    site: str
    away: bool


@dataclass(frozen=True, slots=True)
class SiteServes:
    """A site that is there serves other owners than before; what it works at it goes on with."""

    site: str
    serves: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SiteLeft:
    """A site is gone, with all it held."""

    site: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class FromSite:
    """A message of a site."""

    site: str
    message: Message


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by; sent a few times a second."""


Event: TypeAlias = (
    ClientJoined
    | ClientLeft
    | ClientBack
    | BlocksSubmitted
    | KeysDesired
    | KeysReleased
    | KeysCancelled
    | KeysRetried
    | KeysScattered
    | CopiesGone
    | KeysNeeded
    | SiteJoined
    | SiteReach
    | SiteServes
    | SiteLeft
    | FromSite
    | Tick
)

# -- commands --------------------------------------------------------------------------------------------------------


class Outcome(QuickEnum):
    """What a client is told of a key."""

    IN_MEMORY = "memory"
    FAILED = "erred"
    CANCELLED = "cancelled"
    LOST = "lost"
    RETRIED = "retried"


@dataclass(frozen=True, slots=True)
class TellClient:
    """Tell a client how keys stand; exceptions and types are added by the shell."""

    client: str
    outcome: Outcome
    keys: tuple[Key, ...]
    reason: str = ""
    msg: str | None = None  # what a user said beside the reason


@dataclass(frozen=True, slots=True)
class TellSite:
    """Send a message to a site; payloads are added by the shell."""

    site: str
    message: Message


@dataclass(frozen=True, slots=True)
class ForgetKeys:
    """These keys ended: drop what is stored for them (exceptions, types)."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class ForgetBlock:
    """This block ended: drop its payload, also at the client that submitted it."""

    block: str
    client: str = ""


@dataclass(frozen=True, slots=True)
class FailKeys:
    """The hub itself fails keys: store an error with ``reason`` for them. ``kind`` names a class of daskfed.errors."""

    keys: tuple[Key, ...]
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class BlocksArrived:
    """Tell a client a block's arrival number; ``count`` blocks of its submission from there on have it and the next.

    A client that comes back after the hub started anew repeats them, so that the order stays what it was.
    """

    client: str
    block: str
    arrival: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class AskForData:
    """Ask a client to scatter keys again of which it keeps copies: their site is gone."""

    client: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class DropCopies:
    """Tell a client that its copies of these keys are not needed any more."""

    client: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class DropReport:
    """A report of an old attempt was dropped (for logs and tests)."""

    site: str
    block: str
    attempt: Attempt


Command: TypeAlias = (
    TellClient | TellSite | ForgetKeys | ForgetBlock | FailKeys | BlocksArrived | AskForData | DropCopies | DropReport
)
