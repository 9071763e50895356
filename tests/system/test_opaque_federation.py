"""The hub and the agents never open a payload; at least one worker or client opens each (the control).

Hub and sites run in processes of their own. Pickles that write the pid of the process that opens them go through every
way in which a user's data travels.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import get_task_metadata, get_worker, wait, warn

from daskfed import Client, at

pytestmark = pytest.mark.system

OPTIONS = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}


class Canary:
    """Writes the pid of each process that unpickles it to a file of its own name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = str(folder), name

    def __reduce__(self) -> Any:
        return _hatch, (self.folder, self.name)


class CanaryError(Exception):
    """An error that carries a canary."""

    def __init__(self, canary: Canary) -> None:
        super().__init__(canary)


def _hatch(folder: str, name: str) -> Canary:
    with open(os.path.join(folder, name), "a") as file:
        file.write(f"{os.getpid()}\n")
    return Canary(Path(folder), name)


def opened_by(folder: Path, name: str) -> set[int]:
    """Return the pids of the processes that opened a canary."""
    path = folder / name
    return {int(line) for line in path.read_text().split()} if path.exists() else set()


@contextlib.contextmanager
def running(*arguments: str, cwd: Path) -> Iterator[int]:
    """Run ``python -m daskfed`` with arguments; yields its pid."""
    repository = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([repository, *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-m", "daskfed", *arguments], cwd=cwd, env=env, stdout=subprocess.DEVNULL
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, dict[str, int]]]:
    """A hub and two sites in processes of their own; yields a client and the pids of hub and agents."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    options = json.dumps(OPTIONS)
    with contextlib.ExitStack() as stack:
        pids = {"hub": stack.enter_context(running("hub", "--listen", address, cwd=tmp_path_factory.mktemp("hub")))}
        for name in ("north", "south"):
            command = ("site", "--name", name, "--hub", address, "--options", options)
            pids[name] = stack.enter_context(running(*command, cwd=tmp_path_factory.mktemp(name)))
        client = stack.enter_context(Client(address, timeout=60))
        deadline = time.monotonic() + 60
        while sum(site["workers"] for site in client.sites().values()) < 2:
            assert time.monotonic() < deadline, "the sites did not come up"
            time.sleep(0.1)
        yield client, pids


def send(client: Client, canary: Canary, way: str) -> None:
    """Send a canary through the federation in one way, so that somebody at the end opens it."""
    ways = {
        "submit": lambda: client.submit(repr, canary, site="north").result(),
        "map": lambda: client.gather(client.map(repr, [canary, canary], site="south")),
        "graph": lambda: _across(canary).compute(),
        "scatter": lambda: client.submit(repr, client.scatter(canary, site="north"), site="south").result(),
        "result": lambda: client.submit(_make, canary.folder, canary.name, site="south").result(),
        "exception": lambda: _expect_error(client, canary),
        "annotation": lambda: _annotated(client, canary),
        "metadata": lambda: (client.set_metadata("canary", canary), client.get_metadata("canary")),
        "error reply": lambda: _expect_error_reply(client, canary),
        "replay": lambda: _replayed(client, canary),
        "looking": lambda: _looked_at(client, canary),
    }
    ways[way]()


def _make(folder: str, name: str) -> Canary:
    return Canary(Path(folder), name)


def _across(canary: Canary) -> Any:
    with at("north"):
        first = dask.delayed(lambda c: c)(canary)
    with at("south"):
        return dask.delayed(repr)(first)


def _expect_error(client: Client, canary: Canary) -> None:
    def fail(folder: str, name: str) -> None:
        raise CanaryError(_make(folder, name))

    with pytest.raises(CanaryError):
        client.submit(fail, canary.folder, canary.name, site="north").result()


def _annotated(client: Client, canary: Canary) -> None:
    with dask.annotate(canary=canary):
        client.submit(repr, os.urandom(4), site="south").result()


def _expect_error_reply(client: Client, canary: Canary) -> None:
    class Unsizable(Canary):
        pass

    client.submit(repr, client.scatter({"c": canary}, site="south")).result()


def _replayed(client: Client, canary: Canary) -> None:
    """The recipe of a task comes to the client, with a canary in it and one as input from elsewhere."""

    def fail(one: Canary, other: Canary) -> None:
        raise ZeroDivisionError(f"{one.name} and {other.name}")

    future = client.submit(fail, client.scatter(canary, site="north"), canary, site="south")
    wait(future)
    with pytest.raises(ZeroDivisionError):
        client.recreate_error_locally(future)


def _looked_at(client: Client, canary: Canary) -> None:
    """All that shows what tasks did passes the hub: records, states, stories, dumps and reports."""
    with get_task_metadata() as tasks:
        future = client.submit(_make, canary.folder, canary.name, site="south")
        failed = client.submit(_expect_error_at_site, canary, site="north")
        wait([future, failed])
    assert set(tasks.state) == {future.key, failed.key}
    client.get_task_stream(), client.story(future.key, failed.key), client.profile()
    client.dump_cluster_state(os.path.join(canary.folder, "dump"))
    assert client.get_events("metadata") == ()


def _expect_error_at_site(canary: Canary) -> None:
    get_worker().log_event("seen", {"name": canary.name})
    warn(f"a canary {canary.name}", RuntimeWarning)
    raise CanaryError(canary)


WAYS = ["submit", "map", "graph", "scatter", "result", "exception", "annotation", "metadata", "error reply", "replay"]
WAYS += ["looking"]


@pytest.mark.parametrize("way", WAYS)
def test_neither_hub_nor_agent_opens_a_payload(federation: Any, tmp_path: Path, way: str) -> None:
    """Of all processes, only workers, site schedulers and this client open the canary, and at least one of them does."""
    client, pids = federation
    name = way.replace(" ", "-")
    send(client, Canary(tmp_path, name), way)
    openers = opened_by(tmp_path, name)
    assert not openers & set(pids.values()), f"opened by {[role for role, pid in pids.items() if pid in openers]}"
    at_the_ends = {os.getpid(), *(child.pid for pid in pids.values() for child in _descendants(pid))}
    assert openers and openers <= at_the_ends, "the control: nobody opened it"


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)
