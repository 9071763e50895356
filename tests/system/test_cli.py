"""The commands as a user runs them: what they do together, and that every way to end them leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daskfed import Client
from tests.system.commands import BIN, MODULE, NO_DASHBOARD, START_S, Command, hub, site

pytestmark = pytest.mark.system

DASKFED = (str(BIN / "daskfed"),)
DASK_FED = (str(BIN / "dask"), "fed")
SCRIPT = """
import sys, time
from daskfed import Client, Federation

if __name__ == "__main__":
    worker = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    federation = Federation({"north": {"options": worker}})
    client = Client(federation)
    print("answer", client.submit(sum, [20, 22]).result(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start commands that are killed after the test."""
    commands: list[Command] = []

    def started(make: Callable[..., Command], *args: Any, **kwargs: Any) -> Command:
        commands.append(make(*args, **kwargs))
        return commands[-1]

    yield started
    for command in commands:
        command.kill()


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[str]:
    """A hub for the tests that do not harm it."""
    command = hub()
    try:
        yield command.line(r"daskfed hub at (\S+)")[1]
        command.press(signal.SIGTERM)
        assert command.wait() == 0 and command.all_gone()
    finally:
        command.kill()


@pytest.fixture(scope="module", autouse=True)
def in_vain() -> Iterator[tuple[Command, Command]]:
    """A site and a status of a hub that there is not: they try for a while, so they start before the other tests."""
    nowhere = "tcp://127.0.0.1:1"
    commands = (
        site("north", nowhere, "--cluster", "no_such_package.Cluster"),
        Command(*MODULE, "status", "--hub", nowhere),
    )
    yield commands
    for command in commands:
        command.kill()


def status(hub_address: str, *options: str, run: tuple[str, ...] = MODULE) -> str:
    command = [*run, "status", "--hub", hub_address, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def joined(start: Callable[..., Any], name: str, hub_address: str, *options: str, **kwargs: Any) -> Command:
    command = start(site, name, hub_address, *options, **kwargs)
    command.line(f"site {name} joined")
    return command  # type: ignore[no-any-return]


def test_hub_site_and_status_under_each_name_of_the_command(start: Callable[..., Any], tmp_path: Path) -> None:
    """One federation, whose parts are started as ``dask fed``, ``daskfed`` and ``python -m daskfed``; then Ctrl-C."""
    the_hub = start(hub, run=DASK_FED)
    address = the_hub.line(r"daskfed hub at (tcp://127.0.0.1:\d+)")[1]
    assert "no sites have joined" in status(address, run=DASKFED)
    options = (
        "--label",
        "scratch=era5",
        "--environment",
        "default",
        "--environment",
        "gpu",
        "--directory",
        str(tmp_path),
    )
    the_site = joined(start, "north", address, *options, run=DASKFED)
    facts = json.loads(status(address, "--json", run=MODULE))["north"]
    assert facts["labels"] == {"scratch": "era5"} and facts["environments"] == ["default", "gpu"]
    assert (facts["status"], facts["workers"], facts["threads"]) == ("running", 1, 1)
    table = status(address, run=DASK_FED).splitlines()
    assert table[0].split()[:4] == ["site", "status", "workers", "threads"]
    assert table[1].split()[:4] == ["north", "running", "1", "1"]
    with Client(address, set_as_default=False) as client:
        assert client.submit(os.getcwd, site="scratch=era5").result() == str(tmp_path)
        assert client.submit(os.getcwd, environment="gpu", pure=False).result(timeout=START_S) == str(tmp_path)
    for command in (the_site, the_hub):
        command.press(signal.SIGINT)
        assert command.wait() == 0
        assert command.all_gone()
        assert "Traceback" not in command.output and "KeyboardInterrupt" not in command.output


def test_sigterm_ends_a_site_with_its_workers(start: Callable[..., Any], shared_hub: str) -> None:
    command = joined(start, "terminated", shared_hub)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0
    assert command.all_gone()
    assert "Traceback" not in command.output
    assert "terminated" not in json.loads(status(shared_hub, "--json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("what", ["hub", "site"])
def test_a_second_signal_ends_it_at_once(
    start: Callable[..., Any], shared_hub: str, what: str, number: signal.Signals
) -> None:
    command = start(hub) if what == "hub" else joined(start, "hasty", shared_hub)
    if what == "hub":
        command.line("daskfed hub at")
    while command.process.poll() is None:
        command.press(number)
        time.sleep(0.005 if what == "hub" else 0.05)  # a hub ends in a moment
    if what == "hub" and command.process.returncode < 0:  # as it was ending: a shell says 128 + number of both
        assert command.wait() == -number
    else:
        assert command.wait() == 128 + number
    assert command.all_gone()


def test_ctrl_c_while_a_site_starts(start: Callable[..., Any], shared_hub: str, tmp_path: Path) -> None:
    """It need not wait until the cluster has started."""
    slow = tmp_path / "slow.py"  # a worker takes so long that it is seen before the site has joined
    slow.write_text("import time\n\ntime.sleep(1)\n")
    options = json.dumps({"n_workers": 1, "threads_per_worker": 1, "preload": [str(slow)], **NO_DASHBOARD})
    for stage in ("host", "worker"):
        command = start(site, "early", shared_hub, "--options", options)
        command.started(stage)
        command.press(signal.SIGINT)
        assert command.wait() == 0
        assert command.all_gone()
        assert "joined" not in command.output and "Traceback" not in command.output


def test_a_killed_agent_takes_its_cluster_along(start: Callable[..., Any], shared_hub: str) -> None:
    command = joined(start, "north", shared_hub)
    assert command.started("worker")
    command.process.kill()
    command.wait()
    sites = json.loads(status(shared_hub, "--json"))
    assert sites.get("north", {"status": "away"})["status"] == "away"  # on a busy machine it may be given up by now
    assert command.all_gone()
    deadline = time.monotonic() + 30
    while "north" in json.loads(status(shared_hub, "--json")):
        assert time.monotonic() < deadline, "the hub waits for a site that does not come back"


def test_when_the_cluster_is_killed_the_site_says_so_and_ends(start: Callable[..., Any], shared_hub: str) -> None:
    command = joined(start, "north", shared_hub)
    os.kill(command.started("host"), signal.SIGKILL)
    assert command.wait() == 1
    assert command.all_gone()
    assert "Error: site north had to end: its" in command.output
    assert "Traceback" not in command.output


def test_a_site_outlives_its_hub_and_joins_it_again(start: Callable[..., Any]) -> None:
    first = start(hub)
    address = first.line(r"daskfed hub at (\S+)")[1]
    command = joined(start, "north", address)
    first.process.kill()
    command.line(f"site north lost its hub at {address}")
    second = start(hub, address)
    second.line("daskfed hub at")
    with Client(address, set_as_default=False) as client:
        assert client.submit(sum, [20, 22], site="north").result(timeout=START_S) == 42
    second.process.kill()
    command.line(f"site north lost its hub at {address}")
    command.press(signal.SIGINT)
    assert command.wait() == 0
    assert command.all_gone()


def test_a_hub_where_nobody_listens(in_vain: tuple[Command, Command]) -> None:
    """The site says so before it looks at its cluster, which would be started in vain."""
    for command in in_vain:
        assert command.wait() == 1 and command.all_gone()
        assert "Error: " in command.output and "127.0.0.1:1" in command.output
        assert "Traceback" not in command.output and "no_such_package" not in command.output


def test_a_killed_program_leaves_nothing_of_its_federation(start: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    command = start(Command, sys.executable, str(script))
    command.line("answer 42")
    assert len(command.processes()) > 3
    command.process.kill()
    assert command.all_gone()


def test_a_program_killed_while_its_federation_starts(start: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    command = start(Command, sys.executable, str(script))
    command.started("host")
    command.process.kill()
    assert command.all_gone()


def test_ctrl_c_in_a_program_ends_its_federation(start: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    command = start(Command, sys.executable, str(script))
    command.line("answer 42")
    command.press(signal.SIGINT)
    assert command.wait() != 0
    assert command.all_gone()
    assert "KeyboardInterrupt" in command.output and "daskfed/" not in command.output
