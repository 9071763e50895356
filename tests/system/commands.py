"""Commands as a user starts them in a terminal: what they say, what ends them, and what they leave running."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import HELPERS

HOST = "daskfed.site.host"
MARK = "DASKFED_TEST_COMMAND"  # variable that all processes of one command inherit
BIN = Path(sys.executable).parent
MODULE = (sys.executable, "-m", "daskfed")
NO_DASHBOARD = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}  # for sites of LocalCluster
START_S = 60.0  # most seconds for what a machine under load takes 3 s for


class Command:
    """A running command in a process group of its own, like one that was started in a terminal."""

    def __init__(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
            env={**os.environ, **(env or {}), MARK: self.mark, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip
        self.said: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            self._lines.put(line)
        self._lines.put(None)

    @property
    def output(self) -> str:
        """Return everything that it said so far."""
        return "".join(self.said)

    def line(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait for a line with a match of ``pattern``; raises AssertionError where it ends or is late."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} within {timeout_s:g} s in:\n{self.output}") from None
            if line is None:
                raise AssertionError(
                    f"it ended with status {self.process.wait()} and no {pattern!r} in:\n{self.output}"
                )
            if found := re.search(pattern, line):
                return found

    def press(self, number: int = signal.SIGINT) -> None:
        """Send a signal to all its processes, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self, timeout_s: float = START_S) -> int:
        """Wait until it ends and return its exit status."""
        return self.process.wait(timeout_s)

    def processes(self) -> dict[int, str]:
        """Return its processes that still run, whoever started them, also when it has ended: pid -> command line."""
        found = {}
        for process in psutil.process_iter():
            try:
                cmdline = " ".join(process.cmdline())
                if process.environ().get(MARK) == self.mark and not any(name in cmdline for name in HELPERS):
                    found[process.pid] = cmdline
            except psutil.Error:  # it ended meanwhile, or is not ours
                continue
        return found

    def started(self, kind: str, timeout_s: float = START_S) -> int:
        """Wait for a ``host`` of a cluster, or a ``worker`` that one has, and return its process id."""
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(psutil.Error):  # one that we looked at has ended
                hosts = [process for pid in self.processes() if is_host(process := psutil.Process(pid))]
                found = hosts if kind == "host" else [worker for host in hosts for worker in workers_of(host)]
                if found:
                    return found[0].pid
            assert time.monotonic() < deadline, f"no {kind} among {self.processes()}"
            time.sleep(0.05)

    def all_gone(self, timeout_s: float = 20.0) -> bool:
        """Wait until no process of it is left; say whether that came about."""
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            if time.monotonic() > deadline:
                print(f"left after {timeout_s:g} s: {left}\n{self.output}")
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """End all that is left of it."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


def is_host(process: psutil.Process) -> bool:
    """Whether this is the host of a site's cluster: its forks have the same command line."""
    parent = process.parent()
    return HOST in " ".join(process.cmdline()) and (parent is None or HOST not in " ".join(parent.cmdline()))


def workers_of(host: psutil.Process) -> list[psutil.Process]:
    """Return the workers of a host, which are children of its forkserver."""
    return [worker for server in host.children() for worker in server.children()]


def hub(
    address: str = "tcp://127.0.0.1:0",
    *options: str,
    run: Sequence[str] = MODULE,
    env: Mapping[str, str] | None = None,
) -> Command:
    """Start a hub."""
    return Command(*run, "hub", "--listen", address, *options, env=env)


def site(
    name: str,
    hub_address: str,
    *options: str,
    run: Sequence[str] = MODULE,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Command:
    """Start a site of one worker with one thread."""
    cluster = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}
    given = ("--name", name, "--hub", hub_address, "--options", json.dumps(cluster), *options)
    return Command(*run, "site", *given, cwd=cwd, env=env)


@contextmanager
def hub_and_sites(folders: Mapping[str, Path | None]) -> Iterator[str]:
    """Run a hub and a site of each name, in its folder, and yield the address of the hub."""
    running = [hub()]
    try:
        address = running[0].line(r"tcp://[\d.]+:\d+").group()
        running += [site(name, address, cwd=folder) for name, folder in folders.items()]
        yield address
    finally:
        for command in reversed(running):
            command.press()
        for command in reversed(running):
            with suppress(Exception):
                command.wait(20)
            command.kill()
