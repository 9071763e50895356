"""A federation of real processes, any of which may be killed at any moment and comes back: for the chaos tests.

A :class:`Siege` has a hub with a state folder and some sites. A supervisor starts again whatever has ended, as an init
system would. :func:`plan` draws from a seed which processes are killed when; :class:`Killer` carries that out.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from daskfed import Client
from tests.system.commands import MODULE, NO_DASHBOARD, Command, hub, is_host, workers_of

VERBOSE = (*MODULE, "--verbose")
POLL_S = 0.05
RESTART_S = 0.3  # pause before a site that ended is started again
NOTICED_S = 3.0  # after which a site has noticed that a process of it was killed
BACK_S = 60.0  # within which all sites must have joined again
LOG_LINES = 40
KINDS = ("hub", "agent", "host", "worker")


@dataclass(frozen=True)
class Kill:
    """One kill of a plan; of another site, or another kind, where it would leave no site that stands."""

    after_s: float  # since the one before, or since the beginning
    kind: str  # of process: hub, agent, host (with the scheduler), worker
    site: int  # number of the site whose process it is
    away_s: float  # how long the hub stays away


def plan(seed: int, nsites: int) -> list[Kill]:
    """Return one or two kills, drawn from a seed."""
    draw = random.Random(seed)
    return [
        Kill(draw.uniform(0.5, 2.5), draw.choice(KINDS), draw.randrange(nsites), draw.uniform(0.2, 2.0))
        for _ in range(draw.randint(1, 2))
    ]


class SiteProcess:
    """A site that is started again under its name whenever it ends."""

    def __init__(self, name: str, address: str, threads: int) -> None:
        self.name = name
        options = {"n_workers": 1, "threads_per_worker": threads, **NO_DASHBOARD}
        self._line = (*VERBOSE, "site", "--name", name, "--hub", address, "--options", json.dumps(options))
        self._ended_at: float | None = None
        self.commands = [Command(*self._line)]

    @property
    def command(self) -> Command:
        """The present process, or the one that ended last."""
        return self.commands[-1]

    @property
    def joined(self) -> bool:
        """Whether it runs and has joined the hub at least once."""
        return self.command.process.poll() is None and f"site {self.name} joined" in self.command.output

    def keep_up(self) -> None:
        """Start it again where it has ended a while ago."""
        if self.command.process.poll() is None:
            self._ended_at = None
        elif self._ended_at is None:
            self._ended_at = time.monotonic()
        elif time.monotonic() - self._ended_at > RESTART_S:
            self._ended_at = None
            self.commands.append(Command(*self._line))

    def victim(self, kind: str) -> psutil.Process | None:
        """Return the process of this kind that is to be killed, if there is one."""
        with suppress(psutil.Error):
            agent = psutil.Process(self.command.process.pid)
            if kind == "agent":
                return agent
            host = next(filter(is_host, agent.children()), None)
            if kind == "host" or host is None:
                return host
            return next(iter(workers_of(host)), None)
        return None


class Siege:
    """A federation whose processes are killed, and kept up by a thread."""

    def __init__(self, names: Sequence[str], folder: Path, threads: int) -> None:
        self.address = f"tcp://127.0.0.1:{_free_port()}"
        self.kills: Counter[str] = Counter()
        self._state = ("--state", str(folder))
        self.hubs = [self._new_hub()]
        self.hubs[0].line("daskfed hub at")
        self.sites = [SiteProcess(name, self.address, threads) for name in names]
        self._hub_due: float | None = None
        self._killed_at = 0.0
        self._lock = threading.Lock()
        self._ending = threading.Event()
        for site in self.sites:
            site.command.line(f"site {site.name} joined")
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def _new_hub(self) -> Command:
        return hub(self.address, *self._state, run=VERBOSE)

    def _supervise(self) -> None:
        while not self._ending.wait(POLL_S):
            with self._lock:
                if self.hubs[-1].process.poll() is not None and time.monotonic() >= (self._hub_due or 0):
                    self.hubs.append(self._new_hub())
                for site in self.sites:
                    site.keep_up()

    # -- killing -----------------------------------------------------------------------------------------------------

    def kill(self, kill: Kill) -> bool:
        """Carry out one kill, and say whether there was somebody to kill."""
        with self._lock:
            done = self._kill_hub(kill) if kill.kind == "hub" else self._kill_at_site(kill)
        self.kills[kill.kind if done else "none"] += 1
        self._killed_at = time.monotonic()
        return done

    def _kill_hub(self, kill: Kill) -> bool:
        process = self.hubs[-1].process
        if process.poll() is not None or "daskfed hub at" not in self.hubs[-1].output:
            return False
        self._hub_due = time.monotonic() + kill.away_s
        process.kill()
        process.wait()
        return True

    def _kill_at_site(self, kill: Kill) -> bool:
        joined = [site for site in (*self.sites[kill.site :], *self.sites[: kill.site]) if site.joined]
        if not joined:
            return False
        victim = joined[0].victim(kill.kind if len(joined) > 1 else "worker")
        if victim is None:
            return False
        with suppress(psutil.Error):
            victim.kill()
        return True

    # -- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """End everything with Ctrl-C, the sites first, once all are back; return what went wrong with that."""
        time.sleep(max(0.0, self._killed_at + NOTICED_S - time.monotonic()))
        deadline = time.monotonic() + BACK_S
        while not all(site.joined for site in self.sites) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._ending.set()
        self._supervisor.join()
        problems = [problem for site in self.sites for problem in _ended(f"site {site.name}", site.command)]
        problems += _ended("hub", self.hubs[-1])
        return problems + [f"left: {left}" for command in self.commands if (left := command.processes())]

    @property
    def commands(self) -> list[Command]:
        """Every command that was started."""
        return [*self.hubs, *(command for site in self.sites for command in site.commands)]

    def destroy(self) -> None:
        """Kill whatever is left."""
        self._ending.set()
        for command in self.commands:
            command.kill()

    def said(self, words: str) -> list[str]:
        """Return the lines with ``words`` in them of all that was ever started."""
        return [line.rstrip() for command in self.commands for line in command.said if words in line]

    def logs(self) -> str:
        """Return the last lines of what the latest processes said."""
        named = [("hub", command) for command in self.hubs[-2:]]
        named += [(site.name, command) for site in self.sites for command in site.commands[-2:]]
        return "\n".join(f"--- {name}\n{''.join(command.said[-LOG_LINES:])}" for name, command in named)


def _ended(name: str, command: Command) -> list[str]:
    with suppress(ProcessLookupError):
        command.press(signal.SIGINT)
    try:
        status = command.wait()
    except Exception as exc:
        return [f"{name}: {exc}"]
    return [] if status == 0 and command.all_gone() else [f"{name} ended with {status}:\n{command.output[-2000:]}"]


class Killer:
    """Carries out a plan of kills beside the work that is to bear them; a context."""

    def __init__(self, siege: Siege, kills: Sequence[Kill]) -> None:
        self.story: list[str] = []
        self._siege = siege
        self._kills = kills
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        start = time.monotonic()
        for kill in self._kills:
            time.sleep(kill.after_s)
            done = self._siege.kill(kill)
            self.story.append(f"{time.monotonic() - start:.2f} s: {kill}{'' if done else ' (left out)'}")

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()


def told(siege: Siege, client: Client, futures: Sequence[Any], killer: Killer) -> str:
    """Return all that helps to find out why something failed."""
    pending = [future for future in futures if not future.done()]
    lines = [f"kills: {killer.story}", f"pending: {len(pending)} of {len(futures)}"]
    lines += [f"sites: {_asked(client._fetch_sites, client)}"]
    keys = [key for future in pending[:8] or futures for key in _parts(client, future.key)]
    for key in itertools.islice(keys, 30):  # what they wait for is added meanwhile
        facts = _asked(client._explain, client, key)
        lines.append(f"{key!r} {_state(client, key)}: {facts}")
        if isinstance(facts, dict):
            keys += [each for each in facts.get("waits_for", ())[:2] if each not in keys]
    probes: dict[str, Callable[[], Any]] = {
        "processing": client.processing,
        "call stack": client.call_stack,
        "at workers": partial(client.run, stuck_at),
        "in schedulers": partial(client.run_on_scheduler, stuck_in),
    }
    for name, probe in probes.items():
        try:
            lines.append(f"{name}: {probe()}")
        except Exception as exc:
            lines.append(f"{name}: {exc!r}")
    return "\n".join([*lines, siege.logs()])


def stuck_at(dask_worker: Any) -> list[str]:
    """Return what a worker has not finished, and what that is made from, with the ends of their stories; runs there."""
    state = dask_worker.state
    found = [task for task in state.tasks.values() if task.state not in ("memory", "released")][:6]
    inputs = [each for task in found for each in task.dependencies][:12]
    return [f"{task} from {task.dependencies}: {state.story(task.key)[-16:]}" for task in [*found, *inputs]]


def stuck_in(dask_scheduler: Any) -> list[str]:
    """Return what a scheduler's workers are to run, and what that is made from, likewise; runs there."""
    found = [task for worker in dask_scheduler.workers.values() for task in worker.processing][:6]
    inputs = [each for task in found for each in task.dependencies][:12]
    return [
        f"{task} from {task.dependencies} at {task.who_has}: {dask_scheduler.story(task.key)[-16:]}"
        for task in [*found, *inputs]
    ]


def _parts(client: Client, key: Any) -> list[Any]:
    """Return a key and, where this client puts it together, of what it does so."""
    assembly = client._assemblies.get(key)
    return [key, *(assembly[0].inputs if assembly is not None else ())]


def _state(client: Client, key: Any) -> str:
    return client.futures[key].status if key in client.futures else "unknown"


def _asked(question: Callable[..., Any], client: Client, *args: Any) -> Any:
    """Return an answer of the hub, or why there is none."""
    try:
        return client.sync(question, *args, callback_timeout=10)
    except Exception as exc:
        return repr(exc)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
