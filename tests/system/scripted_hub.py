"""A small hub that does what a test says: it speaks the wire protocol of sites and decides nothing."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status
from distributed.protocol.serialize import Serialized, serialize

from daskfed.comm.control import ControlStream
from daskfed.comm.opaque import OpaqueServer, call_opaque
from daskfed.dask_private import LLGExpr, Task, TaskRef
from daskfed.messages import (
    Attempt,
    BlockKind,
    BlockSpec,
    Import,
    Key,
    KeysFailed,
    KeysMade,
    MadeKey,
    Message,
    RunBlock,
    SiteHello,
    decode,
)

TIMEOUT_S = 60.0


class SiteLink:
    """One registered site: what it told, and its parked channels."""

    def __init__(self, hello: SiteHello) -> None:
        self.hello = hello
        self.told: list[tuple[Message, Any]] = []
        self.outcomes: dict[Key, deque[tuple[Message, Any]]] = defaultdict(deque)
        self.channels: deque[Comm] = deque()
        self.stream: ControlStream | None = None

    def take(self, message: Message, payload: Any) -> None:
        if isinstance(message, KeysMade | KeysFailed):
            for each in message.keys:
                key = each.key if isinstance(each, MadeKey) else each
                self.outcomes[key].append((message, payload))
        else:
            self.told.append((message, payload))

    def send(self, message: Message, payload: Any = None) -> None:
        assert self.stream is not None
        self.stream.send(message, payload)

    async def take_channel(self) -> Comm:
        async with asyncio.timeout(TIMEOUT_S):
            while not self.channels:
                await asyncio.sleep(0.01)
            return self.channels.popleft()

    async def call(self, op: str, **kwargs: Any) -> Any:
        comm = await self.take_channel()
        try:
            return await call_opaque(comm, op, **kwargs)
        finally:
            self.channels.append(comm)

    async def wait_for(self, fits: Callable[[Message], bool]) -> tuple[Message, Any]:
        """Return the first message that fits, and forget it."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for entry in self.told:
                    if fits(entry[0]):
                        self.told.remove(entry)
                        return entry
                await asyncio.sleep(0.005)

    async def told_of(self, kind: type[Message]) -> Any:
        """Return the first message of a kind, and forget it."""
        return (await self.wait_for(lambda message: isinstance(message, kind)))[0]

    async def outcome(self, key: Key) -> tuple[Message, Any]:
        """Return the next report that says what became of an output."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self.outcomes[key]:
                await asyncio.sleep(0.005)
        return self.outcomes[key].popleft()

    async def value(self, key: Key) -> Any:
        """Gather a key and open it."""
        reply = await self.call("gather", keys=[key])
        assert reply["status"] == "OK", reply
        return opened(reply["data"][key])


class ScriptedHub(OpaqueServer):
    """Registers sites, keeps their channels, relays; ``async with ScriptedHub() as hub``."""

    def __init__(self, refuse: str = "", hide_addresses: bool = False) -> None:
        self.refuse = refuse
        self.hide_addresses = hide_addresses  # so that every transfer is relayed
        self.sites: dict[str, SiteLink] = {}
        self.secret = secrets.token_hex(8)
        self.relayed = 0  # messages
        self._blocks = itertools.count()
        self._sessions = itertools.count()
        super().__init__(
            {
                "register-site": self.register_site,
                "park-channel": self.park_channel,
                "site-address": self.site_address,
                "relay-fetch": self.relay_fetch,
            }
        )

    async def __aenter__(self) -> ScriptedHub:
        await self.listen("tcp://127.0.0.1:0")
        await self.start()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.close()

    async def site(self, name: str) -> SiteLink:
        async with asyncio.timeout(TIMEOUT_S):
            while name not in self.sites:
                await asyncio.sleep(0.01)
        return self.sites[name]

    async def register_site(
        self, comm: Comm, hello: dict[str, Any], token: str, session: str, received: int
    ) -> Status:
        if self.refuse:
            await comm.write({"status": "error", "reason": self.refuse})
            return Status.dont_reply
        decoded = decode(hello)
        assert isinstance(decoded, SiteHello)
        fresh = f"{decoded.site}/{decoded.incarnation}/{next(self._sessions)}"  # this hub takes up nothing again
        known = {"epoch": 1, "federation": self.secret, "door": self.secret}
        await comm.write({"status": "OK", "session": fresh, "received": 0, **known})
        link = SiteLink(decoded)
        link.stream = ControlStream(comm, fresh, link.take)
        self.sites[decoded.site] = link
        try:
            await link.stream.serve()
        except CommClosedError:
            if self.sites.get(decoded.site) is link:
                del self.sites[decoded.site]
        return Status.dont_reply

    async def park_channel(self, comm: Comm, site: str, incarnation: str, token: str) -> Status:
        link = self.sites[site]
        assert (token, incarnation) == (self.secret, link.hello.incarnation)
        link.channels.append(comm)
        while not comm.closed():
            await asyncio.sleep(0.05)
        return Status.dont_reply

    async def site_address(self, site: str, token: str, network: str = "") -> dict[str, str]:
        assert token == self.secret
        if site not in self.sites:
            return {"status": "error", "reason": f"no site {site!r}"}
        address = "" if self.hide_addresses else self.sites[site].hello.data_address
        return {"status": "OK", "address": address, "door": self.secret}

    async def relay_fetch(self, comm: Comm, site: str, keys: list[Key], token: str) -> Status:
        channel = await self.sites[site].take_channel()
        await channel.write({"op": "get_keys", "keys": keys, "token": token, "reply": False})
        message: dict[str, Any] = {}
        while not message.get("end"):
            message = await channel.read()
            self.relayed += 1
            await comm.write(message)
        self.sites[site].channels.append(channel)
        return Status.dont_reply

    def run_block(
        self,
        site: SiteLink,
        graph: Mapping[Any, Any],
        *,
        outputs: tuple[Key, ...] | None = None,
        imports: tuple[Import, ...] = (),
        errors: dict[Key, Any] | None = None,
    ) -> RunBlock:
        """Have a site run a graph of (function, *args), where an argument that is a key of ours is that key."""
        expr, inputs = block_of(graph)
        name = f"block-{next(self._blocks)}"
        spec = BlockSpec(name, "c", "u", BlockKind.GRAPH, inputs, outputs or tuple(graph), len(graph), ())
        message = RunBlock(spec, Attempt(1, 1), imports, 1.0)
        payload = {"expr": Serialized(*serialize(expr)), "priorities": {key: i for i, key in enumerate(graph)}}
        site.send(message, {"block": payload, "errors": errors or {}})
        return message


class Needs(str):
    """The name of a key that a task needs."""


def block_of(graph: Mapping[Any, Any]) -> tuple[Any, tuple[Key, ...]]:
    """Return the expression of a graph, and the keys that it needs from elsewhere."""
    tasks = {}
    inputs: dict[Key, None] = {}
    for key, (function, *args) in graph.items():
        refs = [TaskRef(str(arg)) if isinstance(arg, Needs) else arg for arg in args]
        tasks[key] = Task(key, function, *refs)
        inputs.update({str(arg): None for arg in args if isinstance(arg, Needs) and str(arg) not in graph})
    return LLGExpr(tasks, _determ_token=secrets.token_hex(8)), tuple(inputs)


def opened(value: Any) -> Any:
    """Open what an agent passed on, as a client would."""
    from daskfed.data.fetch import open_import
    from daskfed.data.parcels import Parcel

    parcel = Parcel.of(value)
    return open_import(parcel.header, list(parcel.frames), parcel.checksum)
