"""Workers are forked from a process that has imported Dask, and are like workers that were started anew."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from daskfed import Client, Federation
from tests.system.commands import NO_DASHBOARD
from tests.system.waiting import alive, until

pytestmark = pytest.mark.system

TWO = {"n_workers": 2, "threads_per_worker": 1, **NO_DASHBOARD}
SOON_S = 60.0


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with Federation({"north": {"options": TWO}, "south": {"options": {**TWO, "n_workers": 1}}}) as federation:
        yield federation


def servers(client: Client, site: str) -> set[int]:
    """Return the process ids of the parents of a site's workers."""
    return set(client.run(os.getppid, workers=site).values())


def draw() -> list[Any]:
    return [random.random(), np.random.random(), uuid.uuid4().hex, os.urandom(8)]


def test_all_workers_of_a_site_come_from_one_process(client: Client) -> None:
    client.wait_for_workers(3, timeout=SOON_S)
    assert [len(servers(client, site)) for site in ("north", "south")] == [1, 1]
    (server,) = servers(client, "north")
    assert "daskfed.site.host" in " ".join(psutil.Process(server).parent().cmdline())  # type: ignore[union-attr]


def test_hashes_are_alike_at_all_sites_and_chances_are_not(client: Client) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "6640"}
    want = subprocess.run(
        [sys.executable, "-c", "print(hash('key'))"], env=environment, capture_output=True, check=True
    )
    assert set(client.run(hash, "key").values()) == {int(want.stdout)}
    drawn = list(client.run(draw).values())
    assert len(drawn) == 3
    assert all(len(set(each)) == 3 for each in zip(*drawn, strict=True))


def test_they_have_the_environment_and_the_files_of_a_worker(client: Client) -> None:
    for pid in client.run(os.getpid).values():
        started_with = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {b"OMP_NUM_THREADS=1", b"PYTHONHASHSEED=6640"} <= set(started_with)
        host = psutil.Process(pid).parents()[1].pid
        pipes_of_the_host = {link for fd in os.listdir(f"/proc/{host}/fd") if "pipe" in (link := target(host, fd))}
        inherited = {target(pid, fd) for fd in "012"}
        assert not (inherited & pipes_of_the_host) - {target(host, "2")}


def target(pid: int, fd: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_a_worker_that_dies_is_back_from_the_same_process(client: Client) -> None:
    before, server = set(client.run(os.getpid, workers="south").values()), servers(client, "south")
    os.kill(*before, signal.SIGKILL)
    future = client.submit(os.getpid, site="south", pure=False)
    assert future.result(timeout=SOON_S) not in before
    assert servers(client, "south") == server


def test_without_the_process_that_forked_them_others_start(client: Client) -> None:
    """Their nannies take the workers for dead; what they did not end, they would be orphans."""
    before = set(client.run(os.getpid, workers="north").values())
    (server,) = servers(client, "north")
    os.kill(server, signal.SIGKILL)
    assert client.gather(client.map(abs, range(-4, 0), site="north", pure=False)) == [4, 3, 2, 1]
    until(lambda: not any(map(alive, before)), SOON_S)
    until(lambda: len(set(client.run(os.getpid, workers="north", on_error="ignore").values()) - before) == 2, SOON_S)


def test_a_host_that_is_killed_leaves_no_socket() -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:  # a short path
        patch.setenv("TMPDIR", folder)
        with Federation({"north": {"options": TWO}}) as federation, Client(federation, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=SOON_S)
            assert [path for path in Path(folder).rglob("*") if path.is_socket()]
            (server,) = servers(client, "north")
            psutil.Process(server).parent().kill()  # type: ignore[union-attr]
            until(lambda: not alive(server), SOON_S)
        assert [path for path in Path(folder).rglob("*") if path.is_socket()] == []


def test_a_restart(client: Client) -> None:
    before = set(client.run(os.getpid).values())
    client.restart(timeout=SOON_S)
    client.wait_for_workers(3, timeout=SOON_S)
    assert not before.intersection(client.run(os.getpid).values())


def test_a_task_may_run_commands(client: Client) -> None:
    """Also one that waits for them: the server's ways with signals of children are not the workers'."""
    done = client.submit(
        subprocess.run, [sys.executable, "-c", "print(42)"], capture_output=True, site="south", pure=False
    )
    assert done.result(timeout=SOON_S).stdout == b"42\n"
