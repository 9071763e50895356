"""What happens to a site (events) and what its core wants done (commands): frozen, without I/O.

The hub's messages (RunBlock, RecallBlock, CancelBlock, ReleaseKeys, CopyKeys, CloseSite) are events as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from daskfed.messages import (
    Attempt,
    CancelBlock,
    CloseSite,
    CopyKeys,
    Key,
    MadeKey,
    Message,
    RecallBlock,
    ReleaseKeys,
    RunBlock,
)

# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeysReady:
    """The scheduler has these keys in memory."""

    keys: tuple[MadeKey, ...]


@dataclass(frozen=True, slots=True)
class KeysErred:
    """These keys failed at the scheduler, all with one error, whose frames the shell keeps by key."""

    keys: tuple[Key, ...]
    transfer: bool = False  # an import could not be brought to a worker: no fault of the tasks
    blame: Key | None = None  # the task that the scheduler gave up since too many workers died while they ran it


@dataclass(frozen=True, slots=True)
class KeysForgotten:
    """The scheduler no longer knows these keys, and was not asked to forget them."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class KeysMissing:
    """Somebody asked for these keys, as the hub believes them to be here, but for a while no worker has had them."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class KeysScattered:
    """Data that was put on workers: the site holds it for the federation from now on."""

    keys: tuple[MadeKey, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What the scheduler has to do."""

    unfinished: int  # tasks that are not in memory, not failed and not released
    threads: int  # of its workers
    submitted: int  # how many SubmitBlock commands it had taken in when it counted


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of a key have arrived from another site and lie in the agent's memory."""

    key: Key
    source: str
    nbytes: int  # on the wire
    seconds: float  # from asking for it until it had arrived
    relayed: bool  # it went through the hub


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A key could not be fetched from ``source``."""

    key: Key
    source: str
    reason: str
    missing: bool = False  # the source does not have it: it is no use to ask again


Event: TypeAlias = (
    RunBlock
    | RecallBlock
    | CancelBlock
    | ReleaseKeys
    | CopyKeys
    | CloseSite
    | KeysReady
    | KeysErred
    | KeysForgotten
    | KeysMissing
    | KeysScattered
    | Load
    | Fetched
    | FetchFailed
)

# -- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SubmitBlock:
    """Give the payload of this block to the scheduler and ask for its outputs; the payload is not needed again."""

    block: str
    attempt: Attempt
    outputs: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class SubmitImport:
    """Give the scheduler a task under the name of an imported key.

    It gets the bytes from the agent, or raises the error of a key that failed elsewhere (``failed``).
    """

    key: Key
    source: str  # site that the bytes came from; empty if ``failed``
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the bytes of a key from another site into the agent's memory; answered by Fetched or FetchFailed."""

    key: Key
    source: str
    nbytes: int  # expected; 0 if unknown


@dataclass(frozen=True, slots=True)
class DropBytes:
    """The agent's memory need not hold the bytes of this key any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class ReleaseAtScheduler:
    """Tell the scheduler that these keys are not needed.

    The shell sees to it that no event about them that is still under way reaches the core afterwards.
    """

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class TellHub:
    """Send a message to the hub; the shell adds errors and types."""

    message: Message


@dataclass(frozen=True, slots=True)
class ForgetPayload:
    """Drop the payload of a block that will not be submitted."""

    block: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StopSite:
    """End the site: close its cluster and leave."""

    reason: str


Command: TypeAlias = (
    SubmitBlock | SubmitImport | Fetch | DropBytes | ReleaseAtScheduler | TellHub | ForgetPayload | StopSite
)
