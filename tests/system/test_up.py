"""``daskfed up`` and what belongs to it: sites in the background, each an own process, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.system.commands import NO_DASHBOARD
from tests.system.user import User, descendants
from tests.system.waiting import alive, until

pytestmark = pytest.mark.system

WORKER = {"options": {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}}


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    found = User(tmp_path, "ann", {"two": {"sites": {"north": WORKER, "south": WORKER}}})
    yield found
    found.down()


def free_address() -> str:
    """Return an address of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"zmq://127.0.0.1:{server.getsockname()[1]}"


def test_up_is_used_by_clients_and_down_ends_it(user: User) -> None:
    said = user.run("up")
    assert "site north joined" in said and "site south joined" in said
    pids = [user.pid("hub"), user.pid("sites", "north"), user.pid("sites", "south")]
    for _ in range(2):
        with user.client() as client:
            assert sorted(client.sites()) == ["north", "south"] and client.cluster is None
            assert client.submit(sum, [20, 22], site="south").result(timeout=60) == 42
    assert user.run("up").count("runs already") == 2
    assert sorted(json.loads(user.run("status", "two", "--json"))) == ["north", "south"]
    assert "north" in user.run("status") and "south" in user.run("status")
    assert pids == [user.pid("hub"), user.pid("sites", "north"), user.pid("sites", "south")]
    sessions = {pid: descendants(pid) for pid in pids}
    assert user.run("down").count("has ended") == 3
    until(lambda: not any(alive(pid) for each in sessions.values() for pid in each), 20)
    assert "has ended" not in user.run("down")


def test_one_site_is_ended_and_started_again(user: User) -> None:
    user.run("up")
    assert "site south has ended" in user.run("site", "stop", "south")
    assert "does not run" in user.run("site", "stop", "south")
    with user.client() as client:
        until(lambda: list(client.sites()) == ["north"], 20)
        user.run("site", "start", "south")
        until(lambda: sorted(client.sites()) == ["north", "south"], 20)
    assert "did you mean 'south'" in user.run("site", "start", "soth", ok=False)


def test_a_hub_that_was_killed_is_started_again_and_nothing_is_lost(user: User) -> None:
    user.run("up")
    north = user.pid("sites", "north")
    with user.client() as client:
        futures = client.map(slow, range(16), pure=False)
        os.kill(user.pid("hub"), signal.SIGKILL)
        time.sleep(0.5)
        assert "north runs already" in user.run("up")
        assert sum(client.gather(futures)) == sum(range(16))
    assert user.pid("sites", "north") == north


def test_a_site_that_was_killed_is_started_again_and_nothing_is_lost(user: User) -> None:
    user.run("up")
    with user.client() as client:
        futures = client.map(slow, range(16), pure=False)
        os.kill(user.pid("sites", "north"), signal.SIGKILL)
        assert "site north joined" in user.run("up")
        assert sum(client.gather(futures)) == sum(range(16))
        assert sorted(client.sites()) == ["north", "south"]


def test_a_site_that_does_not_start_says_why_and_the_others_do(tmp_path: Path) -> None:
    bad = {"options": {**WORKER["options"], "n_wrokers": 3}}
    user = User(tmp_path, "ann", {"mixed": {"sites": {"good": WORKER, "bad": bad}}})
    try:
        said = user.run("up", ok=False)
        assert "site bad did not start:" in said and "n_wrokers" in said and "site good joined" in said
        with user.client() as client:
            assert list(client.sites()) == ["good"]
    finally:
        user.down()


def test_what_is_configured_no_more_is_ended_all_the_same(user: User) -> None:
    user.run("up")
    file = user.folder / "config" / "daskfed.yaml"
    written = file.read_text()
    file.write_text(yaml.safe_dump({"daskfed": {**user.config["daskfed"], "profiles": {}}}))
    said = user.run("down", "two")
    file.write_text(written)
    assert said.count("has ended") == 3


def test_without_a_hub_a_site_ends_itself_after_its_orphan_timeout(tmp_path: Path) -> None:
    user = User(tmp_path, "ann", {"one": {"sites": {"north": {**WORKER, "orphan-timeout": "2s"}}}})
    try:
        user.run("up")
        north = user.pid("sites", "north")
        session = descendants(north)
        assert len(session) > 1
        os.kill(user.pid("hub"), signal.SIGKILL)
        until(lambda: not any(map(alive, session)), 30)
        assert "there was no hub for 2.00 s (its orphan-timeout)" in user.run("site", "logs", "north")
    finally:
        user.down()


def test_a_waiting_site_joins_once_with_a_token_and_runs_again_without(tmp_path: Path) -> None:
    profile = {"listen": free_address(), "sites": {"cloud": {**WORKER, "reach": "waiting"}}}
    user, there = User(tmp_path, "ann", {"mine": profile}), User(tmp_path, "there", {})
    try:
        said = user.run("up")
        token = next(word for word in said.split() if word.startswith("join-"))
        there.run("site", "join", token, "--detach")
        with user.client() as client:
            assert client.submit(sum, [20, 22], site="cloud").result(timeout=60) == 42
        assert "runs already" in there.run("site", "run", "cloud", ok=False)
        assert "site cloud is connected already" in user.run("up")
        assert "has ended" in there.run("site", "stop", "cloud")
        assert "was used or taken back, or has expired" in there.run("site", "join", token, ok=False)
        there.run("site", "run", "cloud", "--detach")
        with user.client() as client:
            until(lambda: "cloud" in client.sites(), 20)
        expired = user.run("site", "invite", "cloud", "--valid", "1ms").split()[-1]
        assert "has expired" in there.run("site", "join", expired, ok=False)
        assert token not in (user.folder / "state" / "profiles" / "mine" / "hub" / "log").read_text()
    finally:
        there.down()
        user.down()


def test_a_token_is_of_use_for_nothing_else(tmp_path: Path) -> None:
    profile = {"listen": free_address(), "sites": {"cloud": {"reach": "waiting"}}}
    user = User(tmp_path, "ann", {"mine": profile})
    try:
        token = next(word for word in user.run("up").split() if word.startswith("join-"))
        script = (
            "import asyncio, sys\n"
            "from daskfed.comm.opaque import call_opaque\n"
            "from daskfed.reach.hubs import connected\n"
            "from daskfed.reach.tokens import Token\n"
            "token = Token.read(sys.argv[1])\n"
            "async def main():\n"
            "    async with connected(token.hub, None, token.keys) as comm:\n"
            "        print(await call_opaque(comm, 'fed_cluster', name='x', method='scale', kwargs={}))\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run([sys.executable, "-c", script, token], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and "OpaqueError" in done.stderr, done.stderr
    finally:
        user.down()


def test_a_profile_is_checked_and_shown(tmp_path: Path) -> None:
    secret = {"options": {"password": "s3cret", "queue": "long", "cores": 1, "memory": "1GB"}}
    sites = {
        "good": WORKER,
        "typo": {"cluster": "dask.distributed.LocalClutser"},
        "down": {"cluster": "tcp://127.0.0.1:9"},
        "far": {"reach": "ssh://nobody@127.0.0.1:9"},
        "dial": {"reach": "waiting", **secret},
    }
    user = User(tmp_path, "ann", {"mine": {"sites": sites}})
    said = user.run("profile", "check", ok=False)
    assert "site good: " in said and "Python 3." in said
    assert "LocalClutser cannot be imported" in said
    assert "no scheduler answers at tcp://127.0.0.1:9" in said
    assert "ssh://nobody@127.0.0.1:9: cannot log in" in said
    assert "the profile has no 'listen'" in said and "4 things to mend" in said
    shown = yaml.safe_load(user.run("profile", "show", "mine"))
    assert shown["mine"]["sites"]["dial"]["options"] == {**secret["options"], "password": "…"}
    assert user.run("profile", "show") == "mine (the default)\n"
    assert "did you mean 'slurm'" in user.run("profile", "template", "slrum", ok=False)
    assert json.dumps(shown).count("s3cret") == 0


def slow(number: int) -> int:
    time.sleep(0.3)
    return number
