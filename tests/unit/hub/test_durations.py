"""What clients are told of how long tasks take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from daskfed.hub.clients import ClientSession
from daskfed.hub.durations import MOST_PREFIXES, TELL_S
from daskfed.hub.server import Hub
from daskfed.messages import BlockKind, BlockSpec


class Stream:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        """Take a message."""
        self.sent.append(message)

    def abort(self) -> None:
        """End."""

    def closed(self) -> bool:
        """Whether it has ended."""
        return True


class Scene:
    """A hub with one client that fuses."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.stream = Stream()
        self.session = ClientSession("c", self.stream, "me")
        self.session.federated = self.session.fuses = True
        hub.sessions.sessions["c"] = self.session

    def submits(self, *prefixes: str, kind: BlockKind = BlockKind.GRAPH) -> None:
        """The client submits a block."""
        counts = tuple((prefix, 10) for prefix in prefixes)
        self.hub.durations.used(self.session, [BlockSpec("c/0", "c", "me", kind, (), ("x",), 10, counts)])

    async def learns(self, prefix: str, seconds: float, nbytes: int | None = None) -> list[dict[str, Any]]:
        """The hub learns something; return what it has told the client then."""
        books = self.hub.core.dispatcher.functions
        books.durations[prefix] = seconds
        if nbytes is not None:
            books.sizes[prefix] = nbytes
        self.hub.durations.learnt([prefix])
        await asyncio.sleep(2 * TELL_S)
        sent, self.stream.sent = self.stream.sent, []
        return [message["prefixes"] for message in sent]


def played(play: Callable[[Scene], Any]) -> None:
    """Play on a hub."""

    async def run() -> None:
        async with await Hub(dashboard=False).start_at("inproc://") as hub:
            scene = Scene(hub)
            await play(scene)
            del hub.sessions.sessions["c"]

    asyncio.run(run())


def test_a_client_hears_of_the_prefixes_that_it_uses() -> None:
    async def play(scene: Scene) -> None:
        assert await scene.learns("inc", 0.001, 8) == []
        scene.submits("inc", "add")
        assert await scene.learns("add", 0.002) == [{"inc": [0.001, 8], "add": [0.002, -1]}]
        assert await scene.learns("other", 0.001) == []

    played(play)


def test_it_is_told_what_has_changed_much() -> None:
    async def play(scene: Scene) -> None:
        scene.submits("inc")
        assert await scene.learns("inc", 0.001, 8)
        assert await scene.learns("inc", 0.0012, 9) == []
        assert await scene.learns("inc", 0.0016, 9) == [{"inc": [0.0016, 9]}]
        assert await scene.learns("inc", 0.0016, 90) == [{"inc": [0.0016, 90]}]

    played(play)


def test_who_sends_a_graph_unopened_hears_of_all() -> None:
    async def play(scene: Scene) -> None:
        scene.hub.durations.used_unseen(scene.session)
        assert await scene.learns("inc", 0.001, 8) == [{"inc": [0.001, 8]}]

    played(play)


def test_who_does_not_fuse_hears_of_nothing() -> None:
    async def play(scene: Scene) -> None:
        scene.session.fuses = False
        scene.submits("inc")
        scene.hub.durations.used_unseen(scene.session)
        assert await scene.learns("inc", 0.001, 8) == []

    played(play)


def test_what_is_kept_is_bounded() -> None:
    """Where each task has a name of its own."""

    async def play(scene: Scene) -> None:
        scene.submits(*(f"p{n}" for n in range(MOST_PREFIXES)))
        scene.submits("one", "more")
        scene.hub.durations.used_unseen(scene.session)
        assert await scene.learns("more", 0.001, 8) == []
        assert len(scene.session.told) == MOST_PREFIXES

    played(play)
