"""A hub and sites in processes of their own, which tests kill one by one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from daskfed import Client
from tests.system import commands
from tests.system.commands import Command


class Killable:
    """A hub that keeps its state in a folder, and sites of one worker with one thread."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.sites: dict[str, Command] = {}
        self.all: list[Command] = []
        self.address = "tcp://127.0.0.1:0"
        self.start_hub()

    def start_hub(self) -> None:
        """Start a hub, on the address of the one before if there was one."""
        self.hub = commands.hub(self.address, "--state", str(self.state))
        self.all.append(self.hub)
        self.address = self.hub.line(r"daskfed hub at (\S+)")[1]

    def add(self, *names: str) -> Killable:
        """Start sites, and wait until they have joined."""
        for name in names:
            self.sites[name] = commands.site(name, self.address)
            self.all.append(self.sites[name])
        for name in names:
            self.sites[name].line(rf"daskfed site {name} joined")
        return self

    def kill_site(self, name: str) -> None:
        """Kill a site with everything that it consists of."""
        for pid in self.sites[name].processes():
            with suppress(ProcessLookupError):  # it ended as others did
                os.kill(pid, signal.SIGKILL)
        self.sites[name].process.wait(10)

    def kill_hub(self, away_s: float = 1.0) -> None:
        """Kill the hub, and start another one after a while."""
        self.hub.process.kill()
        self.hub.process.wait(10)
        time.sleep(away_s)
        self.start_hub()

    def client(self, **options: Any) -> Client:
        """Return a connected client."""
        return Client(self.address, **options)

    def close(self) -> None:
        """End everything, as with Ctrl-C, and look that nothing is left."""
        for command in reversed(self.all):
            if command.process.poll() is None:
                command.press()
        assert all([command.all_gone() for command in self.all])


@contextmanager
def killable(folder: Path, *sites: str) -> Iterator[Killable]:
    """Run a federation, and see that nothing of it is left in the end."""
    federation = Killable(folder / "state")
    try:
        yield federation.add(*sites)
        federation.close()
    finally:
        for command in federation.all:
            command.kill()
