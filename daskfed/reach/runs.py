"""What runs in the background: a folder for each process, with who it is, what it was told, and what it said.

All lie in one folder of the user (``daskfed.state`` in Dask's configuration, by default ``~/.local/state/daskfed``)::

    profiles/PROFILE/hub/           process     process id, and when that started
    profiles/PROFILE/sites/NAME/    log         what it wrote to standard error
    joined/NAME/                    spec        what an agent was told
                                    address     where its hub is; it may change
                                    addresses   where a hub listens
                                    reached     how one that keeps a site over SSH reaches it
                                    state/      what a hub keeps for its next life

They are readable by their user alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask

from daskfed import errors
from daskfed.errors import ConfigurationError, DaskfedError, SiteStartError
from daskfed.files import locked, write_whole

PROFILES = "profiles"
DEFAULT_STATE = "~/.local/state/daskfed"
STOP_S = 30.0
POLL_S = 0.05

Report = Callable[[dict[str, Any]], None]
Work = Callable[[Report], Coroutine[Any, Any, None]]


def state_folder() -> Path:
    """Return the folder of everything that runs in the background for this user."""
    return Path(dask.config.get("daskfed.state", None) or DEFAULT_STATE).expanduser()


class Run:
    """A process in the background, or its place."""

    def __init__(self, *names: str) -> None:
        self.folder = state_folder().joinpath(*names)

    @property
    def log(self) -> Path:
        """The file that its standard error goes to."""
        return self.folder / "log"

    @property
    def state(self) -> Path:
        """The folder of what must outlive it."""
        return self.folder / "state"

    def pid(self) -> int | None:
        """Return its process id while it runs; raises ConfigurationError where only another machine can tell."""
        told = self.read("process")
        if not isinstance(told, dict) or not {"pid", "started", "host", "boot"} <= told.keys():
            return None
        if told["host"] != socket.gethostname():
            raise ConfigurationError(f"{self.folder} is of a process at {told['host']}: log in there to see to it")
        runs = told["boot"] == boot_id() and _started_at(int(told["pid"])) == told["started"]
        return int(told["pid"]) if runs else None

    def read(self, name: str) -> Any:
        """Return what is written down under a name; None where nothing is."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Write something down, for this user only, so that a reader finds all of it or what was there before."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self.folder / name, json.dumps(value))

    def last_lines(self, count: int = 10) -> list[str]:
        """Return the last lines of its log."""
        try:
            return self.log.read_text(errors="replace").splitlines()[-count:]
        except OSError:
            return []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have others who start or stop it wait."""
        with locked(self.folder / ".lock"):
            yield

    def start(self, work: Work) -> Start:
        """Run ``work`` in the background, in a fork of this process, which must have no threads and no event loop.

        ``work`` is given a function by which it reports, once, a dict for who started it.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            os.close(writing)
            return Start(self, pid, reading)
        status, reports = 1, _Reports(writing)
        try:
            self._detach(writing)
            asyncio.run(work(reports.tell))
            status = 0
        except (DaskfedError, OSError) as exc:
            reports.tell({"error": str(exc), "kind": type(exc).__name__})
            print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with suppress(OSError):
                sys.stderr.flush()
            (self.folder / "process").unlink(missing_ok=True)
            os._exit(status)

    def _detach(self, pipe: int) -> None:
        """Become a process of no terminal and no parent's."""
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, pipe)  # what who forks has open, such as the lock of this folder
        os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
        self.write_own_process()

    def write_own_process(self) -> None:
        """Write down that this process is it."""
        own = {"pid": os.getpid(), "started": _started_at(os.getpid())}
        self.write("process", {**own, "host": socket.gethostname(), "boot": boot_id()})

    def stop(self, timeout_s: float = STOP_S) -> bool:
        """End it in order, or by force when that takes too long; say whether it ran."""
        if (pid := self.pid()) is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.pid() is not None and time.monotonic() < deadline:
            _reap(pid)
            time.sleep(POLL_S)
        if self.pid() is not None:
            with suppress(ProcessLookupError):
                kill = os.killpg if os.getpgid(pid) == pid else os.kill  # one in front is of its shell's group
                kill(pid, signal.SIGKILL)
        (self.folder / "process").unlink(missing_ok=True)
        return True

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self, *names: str) -> None:
        """Delete what was written down under these names."""
        for name in names:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class Start:
    """A process that is starting; its report is awaited."""

    def __init__(self, run: Run, pid: int, pipe: int) -> None:
        self.run, self.pid, self.pipe = run, pid, pipe

    def report(self) -> dict[str, Any]:
        """Wait for the report and return it; raises as the process did, SiteStartError where it ended without one."""
        with os.fdopen(self.pipe) as stream:
            line = stream.readline()
        if not line:
            said = "\n".join(self.run.last_lines())
            raise SiteStartError(f"it ended at once; the end of {self.run.log}:\n{said}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise getattr(errors, told.get("kind", ""), SiteStartError)(told["error"])
        return told


def running(*names: str) -> list[str]:
    """Return the names of the folders below one whose process runs here, or at a machine that they reach."""
    folder = state_folder().joinpath(*names)
    runs = {each.name: Run(*names, each.name) for each in folder.iterdir()} if folder.is_dir() else {}
    return sorted(name for name, run in runs.items() if run.pid() is not None or run.read("reached"))


def boot_id() -> str:
    """Return what this machine has been called since it was started last."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def hub_run(profile: str) -> Run:
    """Return the place of the hub of a profile."""
    return Run(PROFILES, profile, "hub")


def hub_in_background(profile: str) -> str | None:
    """Return the address of the hub of a profile that is up, None where it is not."""
    run = hub_run(profile)
    addresses = run.read("addresses") if run.pid() is not None else None
    return addresses["local"] if addresses else None


class _Reports:
    """Tells who started a process how that went: once."""

    def __init__(self, pipe: int) -> None:
        self._pipe = os.fdopen(pipe, "wb", buffering=0)

    def tell(self, told: dict[str, Any]) -> None:
        if self._pipe.closed:
            return
        with self._pipe, suppress(OSError):  # who started it may have gone
            self._pipe.write(json.dumps(told).encode() + b"\n")


def _started_at(pid: int) -> int | None:
    """Return when a process started, in ticks since the machine did; None where it does not run."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] == "Z" else int(words[19])


def _reap(pid: int) -> None:
    """Take the status of a child that has ended; else it stays."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
