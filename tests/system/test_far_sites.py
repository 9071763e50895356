"""Sites that can only dial out, 40 ms away: they are reached, and what happens to their links and to the hub is borne."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.system.far_sites import DASKFED, PROFILE, ROOT, FarSites, answer, far_sites
from tests.system.waiting import until

FETCH = """
import asyncio
from daskfed.reach import installing, probe
pins = {name: installing.distribution_of(name).version for name in installing.closure(["daskfed"])}
asyncio.run(installing.fetched(pins, probe.facts({})))
"""
pytestmark = [pytest.mark.system, pytest.mark.needs("ip", "nft", "sshd"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarSites]:
    with far_sites(tmp_path_factory.mktemp("far")) as sites:
        yield sites


def test_the_example_gives_the_right_answer_and_no_site_listens(far: FarSites) -> None:
    said = answer(far.example())
    assert "3 sites: login, nat, waiting;" in said
    assert [(found.port, found.process) for found in far.net.listening("ssh")] == [(far.net.port("ssh"), "sshd")]
    assert far.net.listening("waiting") == [] and far.net.listening("nat") == []
    assert [found.port for found in far.net.listening("hub")] == [far.net.port("hub")]


def test_a_profile_with_a_hub_of_its_own_and_what_runs_for_it_ends_with_its_client(far: FarSites) -> None:
    script = str(ROOT / "examples" / "05_sites_of_a_profile.py")
    said = far.hub.run(sys.executable, script, "--profile", "own")
    assert "2 sites: here, login;" in said and "the same as on this machine: yes" in said
    assert far.login_agent()  # the one of the profile that is up, and no other
    assert "ssh://login, " in far.hub.run(*DASKFED, "profile", "check", "own")


def test_a_host_key_that_is_not_known_is_refused(far: FarSites) -> None:
    known = far.server.known_hosts.read_text()
    far.server.known_hosts.write_text("")
    try:
        assert "its host key is not known here: log in once" in far.hub.run(
            *DASKFED, "profile", "check", "own", ok=False
        )
    finally:
        far.server.known_hosts.write_text(known)


def test_a_site_that_has_only_a_python_gets_all_it_needs(far: FarSites) -> None:
    said = far.hub.run(*DASKFED, "profile", "check", "bare")
    assert "daskfed is installed there when it starts" in said
    environment = {**os.environ, **far.hub.environment}
    fetch = [sys.executable, "-c", FETCH]  # here: there is no way out of there
    subprocess.run(fetch, env=environment, check=True, timeout=200)
    try:
        assert "site fresh joined" in far.hub.run(*DASKFED, "up", "bare", timeout_s=200)
        script = "from daskfed import Client; print(Client(profile='bare').submit(lambda: __import__('sys').prefix).result())"
        prefix = far.hub.run(sys.executable, "-c", script).strip().splitlines()[-1]
        assert prefix.startswith(str(far.login_home / ".local" / "share" / "daskfed"))
    finally:
        far.hub.run(*DASKFED, "down", "bare")


def test_a_link_is_cut_for_30_s(far: FarSites) -> None:
    example = far.example("--pause", "2.5")
    time.sleep(8)
    far.net.cut("nat")
    time.sleep(30)
    far.net.mend("nat")
    answer(example)
    until(far.all_running, 60)


def test_the_ssh_session_is_killed(far: FarSites) -> None:
    agent = far.login_agent()
    example = far.example("--pause", "2")
    time.sleep(8)
    for session in far.server.sessions():
        os.kill(session, signal.SIGKILL)
    answer(example)
    until(far.all_running, 60)
    assert far.login_agent() == agent, "another agent was started"
    assert "site login lost its hub" in far.hub.run(*DASKFED, "site", "logs", "login", "--profile", PROFILE)


def test_the_hub_is_killed_and_started_again(far: FarSites) -> None:
    example = far.example("--pause", "2")
    time.sleep(8)
    os.kill(far.hub.process("profiles", PROFILE, "hub"), signal.SIGKILL)
    time.sleep(2)
    said = far.hub.run(*DASKFED, "up", PROFILE)
    assert "site login runs already" in said
    answer(example, 150)
    until(far.all_running, 60)
