"""The hub and the agents never open a payload; at least one worker or client opens each (the control).

Hub and sites run in processes of their own. Pickles that write the pid of the process that opens them go through every
way in which a user's data travels.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Queue, Variable, get_task_metadata, get_worker, wait, warn
from distributed.protocol.serialize import Serialize, ToPickle

from daskfed import Client, at
from daskfed.comm.opaque import connect_opaque
from tests.system.commands import NO_DASHBOARD
from tests.system.hostile import Raw

pytestmark = pytest.mark.system

OPTIONS = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}


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
        "dataset": lambda: _published(client, canary),
        "variable": lambda: _taken(Variable(canary.name, client=client), canary),
        "queue": lambda: _taken(Queue(canary.name, client=client), canary),
        "topic": lambda: _told(client, canary),
        "topic of a task": lambda: _told_by_a_task(client, canary),
        "warning of a task": lambda: _warned(client, canary),
    }
    ways[way]()


def _make(folder: str, name: str) -> Canary:
    return Canary(Path(folder), name)


def _across(canary: Canary) -> Any:
    with at("north"):
        first = dask.delayed(lambda c: c)(canary)
    with at("south"):
        return dask.delayed(repr)(first)


def _fail(folder: str, name: str) -> None:
    raise CanaryError(_make(folder, name))


def _expect_error(client: Client, canary: Canary) -> None:
    with pytest.raises(CanaryError):
        client.submit(_fail, canary.folder, canary.name, site="north").result()


def _annotated(client: Client, canary: Canary) -> None:
    with dask.annotate(canary=canary):
        client.submit(repr, os.urandom(4), site="south").result()


def _expect_error_reply(client: Client, canary: Canary) -> None:
    """What a call raises at the workers is the hub's reply to the client."""
    with pytest.raises(CanaryError):
        client.run(_fail, canary.folder, canary.name)


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


def _published(client: Client, canary: Canary) -> None:
    client.publish_dataset(canary, name=canary.name)
    assert isinstance(client.get_dataset(canary.name), Canary)


def _taken(shared: Any, canary: Canary) -> None:
    (shared.set if isinstance(shared, Variable) else shared.put)([canary])
    shared.get(timeout=30)


def _told(client: Client, canary: Canary) -> None:
    _heard(client, canary, lambda: client.log_event(canary.name, pickle.dumps(canary)))
    client.get_events(canary.name)


def _told_by_a_task(client: Client, canary: Canary) -> None:
    def tell(folder: str, name: str) -> None:
        get_worker().log_event(name, pickle.dumps(_make(folder, name)))

    task = functools.partial(client.submit, tell, canary.folder, canary.name, pure=False)
    _heard(client, canary, lambda: task(site="north").result(timeout=30))


def _heard(client: Client, canary: Canary, tell: Callable[[], None]) -> None:
    """Tell again until it is heard: a stream and calls may overtake each other.

    Messages are what msgpack writes: pickles that their readers open, as those of warnings are.
    """
    heard: list[Any] = []
    client.subscribe_topic(canary.name, lambda event: heard.append(pickle.loads(event[1])))
    deadline = time.monotonic() + 30
    while not heard:
        tell()
        assert time.monotonic() < deadline, "nobody heard it"
        time.sleep(0.1)
    client.unsubscribe_topic(canary.name)


class CanaryWarning(UserWarning):
    """A category that carries a canary; how a task's warning arrives is pickled."""


def _warned(client: Client, canary: Canary) -> None:
    def warn_of(folder: str, name: str) -> None:
        import distributed

        distributed.worker.warn(CanaryWarning(_make(folder, name)))

    with pytest.warns(CanaryWarning):
        client.submit(warn_of, canary.folder, canary.name, pure=False).result(timeout=30)
        deadline = time.monotonic() + 10
        while not opened_by(Path(canary.folder), canary.name) and time.monotonic() < deadline:
            time.sleep(0.1)


WAYS = ["submit", "map", "graph", "scatter", "result", "exception", "annotation", "metadata", "error reply", "dataset"]
WAYS += ["variable", "queue", "topic", "topic of a task", "warning of a task", "replay", "looking"]


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


OPS = [  # of a stock scheduler, which opens what comes with them, or has workers open it
    "register_scheduler_plugin", "register_worker_plugin", "register_nanny_plugin", "unregister_worker_plugin",
    "workers_to_close", "retire_workers", "feed", "run_function", "broadcast", "proxy", "profile", "story", "get_story",
    "performance_report", "get_runspec", "get_error_cause", "adaptive_target", "update_data", "retry", "replicate",
    "rebalance", "call_stack", "get_task_stream", "dump_cluster_state_to_url", "benchmark_hardware", "gather", "scatter",
    "publish_put", "publish_get", "variable_set", "queue_put", "event_set", "log_event", "events", "set_metadata",
    "get_metadata", "who_has", "nbytes", "fed_explain", "fed_cluster", "fed_progress", "no such op",
]  # fmt: skip
STREAM_OPS = ["update-graph", "fed-submit", "fed-back", "fed-hello", "client-desires-keys", "cancel-keys", "report-key"]
STREAM_OPS += ["subscribe-topic", "variable_delete", "queue-future-release", "publish_flush_batched_send", "no such op"]
NAMES = (
    "plugin",
    "key",
    "function",
    "setup",
    "minimum",
    "attribute",
    "msg",
    "topic",
    "data",
    "value",
    "method",
    "args",
)


@pytest.mark.parametrize("op", OPS)
def test_no_call_has_the_hub_open_what_comes_with_it(federation: Any, tmp_path: Path, op: str) -> None:
    """Whatever the call is, and whatever comes of it: a pickle, a serialised value, or bytes that are a pickle."""
    client, pids = federation
    canary = Canary(tmp_path, "op")

    async def call() -> None:
        for value in (ToPickle(canary), Serialize(canary), pickle.dumps(canary)):
            for names in ({name: value for name in NAMES}, {"name": value}, {"keys": [value]}):
                comm = await connect_opaque(client.scheduler.address)
                await comm.write({"op": op, "reply": True, **names})
                with contextlib.suppress(OSError, TimeoutError):
                    await asyncio.wait_for(comm.read(), 2)
                comm.abort()

    asyncio.run(call())
    assert not opened_by(tmp_path, "op") & set(pids.values())
    assert client.submit(int, 1, pure=False).result(timeout=60) == 1, "the federation works no more"


@pytest.mark.parametrize("op", STREAM_OPS)
def test_nothing_said_on_a_stream_has_the_hub_open_it(federation: Any, tmp_path: Path, op: str) -> None:
    """Exotic keys and payloads where a name is expected: an error at most, and the next message is heard."""
    client, pids = federation
    canary = Canary(tmp_path, "op")

    async def say() -> None:
        async with Raw(client.scheduler.address) as raw:
            for value in (ToPickle(canary), Serialize(canary), canary):
                for fields in ({"keys": [value]}, {"key": value}, {"keys": value}, {"name": value}, {"topic": value}):
                    await raw.say({"op": op, **fields})
            if op != "report-key":
                await raw.settled()

    asyncio.run(asyncio.wait_for(say(), 60))
    assert not opened_by(tmp_path, "op") & set(pids.values())
    assert client.submit(int, 1, pure=False).result(timeout=60) == 1, "the federation works no more"


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)
