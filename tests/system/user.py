"""A user of ``daskfed up`` in tests: a configuration, keys and processes in the background of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import psutil
import yaml

from daskfed import Client
from daskfed.reach.runs import Run

DASKFED = (sys.executable, "-m", "daskfed")


class User:
    """A user with a profile, and the commands that they type."""

    def __init__(
        self, folder: Path, name: str, profiles: dict[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder / name
        self.environment = environment or {}
        (self.folder / "config").mkdir(parents=True)
        own = {"state": str(self.folder / "state"), "keys": str(self.folder / "keys"), "profiles": profiles}
        self.config = {"daskfed": {**own, "default-profile": next(iter(profiles), None)}}
        (self.folder / "config" / "daskfed.yaml").write_text(yaml.safe_dump(self.config))

    def run(self, *command: str, ok: bool = True) -> str:
        """Type a command, and return what it said; raises AssertionError where it fails and should not."""
        own = {"HOME": str(self.folder), "DASK_CONFIG": str(self.folder / "config")}
        done = subprocess.run(
            [*DASKFED, *command], env={**os.environ, **self.environment, **own}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def client(self, **options: Any) -> Client:
        """Return a client of the default profile."""
        with dask.config.set(self.config):
            return Client(set_as_default=False, **options)

    def pid(self, *names: str) -> int:
        """Return the process id of the hub, or of a site."""
        with dask.config.set(self.config):
            pid = Run("profiles", self.config["daskfed"]["default-profile"], *names).pid()
        assert pid is not None, f"{names} does not run"
        return pid

    def down(self) -> None:
        """End what runs, joined sites as well."""
        for joined in (self.folder / "state" / "joined").glob("*"):
            self.run("site", "stop", joined.name)
        if self.config["daskfed"]["profiles"]:
            self.run("down")


def descendants(pid: int) -> list[int]:
    """Return the processes of a session, which one in the background has of its own."""
    return [process.pid for process in psutil.process_iter() if session_of(process.pid) == pid]


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended
        return 0
