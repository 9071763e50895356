"""Sites that can only dial out, 40 ms away: they are reached, and what happens to their links and to the hub is borne."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.system.far_sites import DASKFED, PROFILE, FarSites, answer, far_sites
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.needs("ip", "nft", "sshd")]


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


def test_a_link_is_cut_for_30_s(far: FarSites) -> None:
    example = far.example("--pause", "4")
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


def test_the_hub_is_killed_and_started_again(far: FarSites) -> None:
    example = far.example("--pause", "3")
    time.sleep(8)
    os.kill(far.hub.process("profiles", PROFILE, "hub"), signal.SIGKILL)
    time.sleep(2)
    said = far.hub.run(*DASKFED, "up", PROFILE)
    assert "site login runs already" in said
    answer(example, 150)
    until(far.all_running, 60)
