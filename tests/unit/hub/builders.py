"""Short ways to say what happens to a hub, and what it should command: blocks, sites, their reports, and a stage.

Several keys are written as one string, ``"x y"``.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

from daskfed.hub import events as ev
from daskfed.hub.core import HubCore
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import BlockState
from daskfed.hub.placement import Policy
from daskfed.messages import (
    PROTOCOL_VERSION,
    Attempt,
    BlockKind,
    BlockLost,
    BlockRecalled,
    BlockSpec,
    BlockStarted,
    CancelBlock,
    Constraint,
    Import,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysMade,
    MadeKey,
    Message,
    RecallBlock,
    ReleaseKeys,
    RunBlock,
    SiteHello,
    SiteStatus,
    StopKeys,
)

Commands = list[ev.Command]

# -- what there is -----------------------------------------------------------------------------------------------------


def block(
    name: str,
    outputs: str,
    needs: str = "",
    *,
    kind: BlockKind = BlockKind.GRAPH,
    ntasks: int = 1,
    prefixes: tuple[tuple[str, int], ...] = (),
    label: str = "",
    near: tuple[str, ...] = (),
    stateful: bool = False,
    patience_s: float = inf,
    **constraint: Any,
) -> BlockSpec:
    """Return a block; without ``prefixes`` it is expected to take no time at all."""
    return BlockSpec(
        id=name, client="c", owner="ann", kind=kind, inputs=keys(needs), outputs=keys(outputs), ntasks=ntasks,
        prefixes=prefixes, constraint=Constraint(**constraint), label=label, near=near,
        stateful=stateful, patience_s=patience_s,
    )  # fmt: skip


def keys(names: str) -> tuple[Key, ...]:
    """Return the keys in a string."""
    return tuple(names.split())


def hello(site: str, **changes: Any) -> SiteHello:
    """Return the hello of a site without labels and resources."""
    plain: dict[str, Any] = {
        "incarnation": f"{site}-1", "protocol": PROTOCOL_VERSION, "labels": (), "environments": ("default",),
        "resources": (), "data_address": "", "dashboard": "", "versions": (),
    }  # fmt: skip
    return SiteHello(site=site, **{**plain, **changes})


def status(threads: int = 1, **changes: Any) -> SiteStatus:
    """Return the report of an idle site with one worker."""
    plain = {"workers": 1, "memory_limit": 10**9, "memory_used": 0, "running": 0, "queued": 0}
    return SiteStatus(threads=threads, **{**plain, **changes})


# -- what is commanded -------------------------------------------------------------------------------------------------


def run(
    site: str, spec: BlockSpec, *imports: Import, n: int = 1, expected_s: float = 0.0, only: str = ""
) -> ev.TellSite:
    """Return the order to run a block as attempt ``n``, for all its outputs or ``only`` some."""
    return ev.TellSite(site, RunBlock(spec, Attempt(0, n), imports, expected_s, keys(only)))


def cancel(site: str, name: str, n: int = 1) -> ev.TellSite:
    """Return the order to stop a block."""
    return ev.TellSite(site, CancelBlock(name, Attempt(0, n)))


def stop(site: str, name: str, names: str, n: int = 1) -> ev.TellSite:
    """Return the order to stop making some outputs of a block."""
    return ev.TellSite(site, StopKeys(name, Attempt(0, n), keys(names)))


def recall(site: str, name: str, n: int = 1) -> ev.TellSite:
    """Return the request to give a block back."""
    return ev.TellSite(site, RecallBlock(name, Attempt(0, n)))


def release(site: str, names: str) -> ev.TellSite:
    """Return the order to release keys."""
    return ev.TellSite(site, ReleaseKeys(keys(names)))


def told(names: str, client: str = "c") -> ev.TellClient:
    """Return the good news: these keys are in memory."""
    return ev.TellClient(client, ev.Outcome.IN_MEMORY, keys(names))


def told_failed(names: str, client: str = "c") -> ev.TellClient:
    """Return the bad news: these keys failed."""
    return ev.TellClient(client, ev.Outcome.FAILED, keys(names))


def told_cancelled(names: str, client: str = "c", reason: str = "", msg: str | None = None) -> ev.TellClient:
    """Return the news that these keys were cancelled."""
    return ev.TellClient(client, ev.Outcome.CANCELLED, keys(names), reason, msg)


def forget(names: str) -> ev.ForgetKeys:
    """Return the command to drop what is stored for keys."""
    return ev.ForgetKeys(keys(names))


def forget_block(name: str, client: str = "c") -> ev.ForgetBlock:
    """Return the command to drop a block's payload, here and at the client that submitted it."""
    return ev.ForgetBlock(name, client)


def lost_for_good(key: str, site: str, actor: bool = False) -> ev.FailKeys:
    """Return the error of a key that was at a site which is gone, and that nobody can make again."""
    advice = "create the actor again" if actor else "scatter it with replicas=2, or keep its client connected"
    why = f"{key!r} was at site {site!r}, which is gone, and cannot be computed again: {advice}"
    return ev.FailKeys((key,), "SiteLostError", why)


# -- what happens ------------------------------------------------------------------------------------------------------


class Stage:
    """A hub with sites, whose invariants are verified after every event."""

    def __init__(self, *sites: str, policy: Policy | None = None, **report: Any) -> None:
        self.core = HubCore(policy=policy)
        self.now = 0.0
        self(ev.ClientJoined("c", "ann"))
        for site in sites:
            self.join(site, **report)

    def __call__(self, *events: ev.Event) -> Commands:
        """Give events to the core and return all its commands, but for the numbers that submitted blocks get."""
        commands: Commands = []
        for event in events:
            commands += self.core.handle(event, self.now)
            self.core.check()
        return [command for command in commands if not isinstance(command, ev.BlocksArrived)]

    def later(self, seconds: float) -> Commands:
        """Time goes by."""
        self.now += seconds
        return self(ev.Tick())

    def join(self, site: str, greeting: SiteHello | None = None, **report: Any) -> Commands:
        """A site joins and reports."""
        joined = ev.SiteJoined(greeting or hello(site))
        return self(joined, ev.FromSite(site, status(**report)))

    def leave(self, site: str) -> Commands:
        """A site is gone."""
        return self(ev.SiteLeft(site, f"{site}-1"))

    def drain(self, site: str) -> Commands:
        """A site wants to leave."""
        return self(ev.FromSite(site, status(draining=True)))

    def submit(self, *blocks: BlockSpec, wanted: str, client: str = "c", wait: bool = False) -> Commands:
        """A client submits a graph."""
        return self(ev.BlocksSubmitted(client, blocks, keys(wanted), wait))

    def desire(self, names: str, client: str = "c") -> Commands:
        """A client wants keys."""
        return self(ev.KeysDesired(client, keys(names)))

    def drop(self, names: str, client: str = "c") -> Commands:
        """A client releases keys."""
        return self(ev.KeysReleased(client, keys(names)))

    def scatter(self, site: str, names: str, nbytes: int = 8, client: str = "c") -> Commands:
        """A client's data reached a site."""
        return self(ev.KeysScattered(client, site, tuple((key, nbytes) for key in keys(names))))

    def says(self, site: str, message: Message) -> Commands:
        """A site reports; of an import, that it is the latest one which the hub asked it for."""
        if isinstance(message, KeyImported | ImportFailed) and (key := self.core.ledger.keys.get(message.key)):
            message = replace(message, number=message.number or key.importing.get(site, 0))
        return self(ev.FromSite(site, message))

    def started(self, name: str) -> Commands:
        """The site of a block handed its tasks to the scheduler."""
        return self.says(self.site_of(name), BlockStarted(name, self.attempt(name)))

    def made(self, name: str, names: str, nbytes: int = 8) -> Commands:
        """The site of a block made outputs of it."""
        made = tuple(MadeKey(key, nbytes) for key in keys(names))
        return self.says(self.site_of(name), KeysMade(name, self.attempt(name), made))

    def failed(self, name: str, names: str, blame: str | None = None) -> Commands:
        """Outputs of a block raised; with ``blame``, since workers died that ran this task."""
        return self.says(self.site_of(name), KeysFailed(name, self.attempt(name), keys(names), blame))

    def gave_back(self, name: str, given: bool = True) -> Commands:
        """The site of a block answered a recall."""
        return self.says(self.site_of(name), BlockRecalled(name, self.attempt(name), given))

    def lost(self, name: str, reason: str = "its worker died") -> Commands:
        """The site of a block cannot finish it."""
        return self.says(self.site_of(name), BlockLost(name, self.attempt(name), reason))

    # -- looking -----------------------------------------------------------------------------------------------------

    def block(self, name: str) -> BlockState:
        """Return what the hub knows of a block."""
        return self.core.ledger.blocks[name]

    def key(self, name: Key) -> KeyState:
        """Return what the hub knows of a key."""
        return self.core.ledger.keys[name]

    def site_of(self, name: str) -> str:
        """Return where a block is."""
        return str(self.block(name).site)

    def attempt(self, name: str) -> Attempt:
        """Return the present attempt of a block."""
        return self.block(name).attempt

    @property
    def empty(self) -> bool:
        """Whether nothing is remembered."""
        ledger = self.core.ledger
        return not (ledger.keys or ledger.blocks or ledger.wants or self.core.dispatcher.queues)
