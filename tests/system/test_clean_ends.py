"""Ctrl-C at any moment, and the death of any one process, leave nothing behind: no process, no file, no socket."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.system import commands
from tests.system.commands import Command
from tests.system.killable import killable

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

MOMENTS_S = (0.2, 0.6, 1.0, 1.5, 2.0, 2.7, 3.5, 5.0)  # from the start of Python to the middle of the work
SCRIPT = """
import time
from daskfed import Client, Federation

def slow(x):
    time.sleep(0.05)
    return x

if __name__ == "__main__":
    print("imported")
    worker = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with Federation({"north": {"options": worker}, "south": {"options": worker}}) as federation:
        with Client(federation) as client:
            for _ in range(100):
                client.gather(client.map(slow, range(20), pure=False))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for temporary files, which is empty in the end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    os.environ["DASK_TEMPORARY_DIRECTORY"] = str(scratch)
    try:
        yield tmp_path
    finally:
        del os.environ["DASK_TEMPORARY_DIRECTORY"]


def left_in(folder: Path) -> list[str]:
    """Return the files that processes left, but for locks that the next process clears away."""
    found = [path for path in (folder / "scratch").rglob("*") if path.is_file() or path.is_socket()]
    return [str(path) for path in found if not path.name.endswith("lock")]


def press_until_gone(commands: Sequence[Command], moments_s: Sequence[float]) -> bool:
    """Press Ctrl-C at these moments from now; say whether every process has ended then.

    Python itself loses one that comes in a callback of its import locks: in that time it may be pressed twice.
    """
    began, importing = time.monotonic(), []
    for command, moment in zip(commands, moments_s, strict=True):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        if "imported" not in command.output:
            importing.append(command)
        command.press()
    for command in importing:
        if not command.all_gone():
            command.press()
    return all([command.all_gone() for command in commands])


def test_ctrl_c_at_any_moment_of_a_script(folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    running: list[Command] = []
    try:
        for two in zip(MOMENTS_S[::2], MOMENTS_S[1::2], strict=True):
            running += (pair := [Command(sys.executable, str(script)) for _ in two])
            assert press_until_gone(pair, two)
            assert all(command.wait() != 0 for command in pair)
        assert left_in(folder) == []
    finally:
        for command in running:
            command.kill()


def test_ctrl_c_at_any_moment_of_a_hub_and_a_site(folder: Path) -> None:
    running: list[Command] = []
    try:
        for moment in MOMENTS_S[::2]:
            hub = commands.hub("tcp://127.0.0.1:0", "--state", str(folder / "state"))
            running.append(hub)
            address = hub.line(r"daskfed hub at (\S+)")[1]
            site = commands.site("north", address)
            running.append(site)
            time.sleep(moment)
            site.press(signal.SIGTERM if moment > 1 else signal.SIGINT)
            hub.press()
            assert site.all_gone() and hub.all_gone()
        assert left_in(folder) == []
    finally:
        for command in running:
            command.kill()


@pytest.mark.parametrize("kind", ["host", "worker"])
def test_a_process_of_a_site_that_is_killed_leaves_nothing_in_the_end(folder: Path, kind: str) -> None:
    with killable(folder, "north", "south") as fed:
        with fed.client() as client:
            futures = client.map(pow, range(50), range(50), pure=False)
            os.kill(fed.sites["north"].started(kind), signal.SIGKILL)
            assert client.gather(futures) == [n**n for n in range(50)]
        if kind == "host":
            assert fed.sites["north"].all_gone()  # the agent says why it ends, and takes the workers along
            assert "scheduler" in fed.sites["north"].output
    assert left_in(folder) == []
