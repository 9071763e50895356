"""The wide-area network of the tests is what it claims to be, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.system import wan_keeper
from tests.system.ssh_server import SshServer, make_key, ssh_server
from tests.system.wan import Listener, Wan, wan, why_not

pytestmark = [pytest.mark.system, pytest.mark.needs("ip", "nft", "sshd", "asyncssh")]

SILENCE_S = 0.3  # long enough to know that nothing comes: a round trip is 40 ms
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def net() -> Iterator[Wan]:
    """One network for all tests of this file."""
    with wan() as net:
        yield net


@pytest.fixture(scope="module")
def server(net: Wan) -> Iterator[SshServer]:
    """An sshd in it."""
    with ssh_server(net, {"DASKFED_TEST_WORD": "two words"}) as server:
        yield server


@pytest.fixture
def hub(net: Wan) -> Iterator[socket.socket]:
    """A socket that listens at the hub's open port."""
    with net.entered("hub"), socket.create_server(("0.0.0.0", net.port("hub"))) as hub:
        hub.settimeout(PATIENCE_S)
        yield hub


def dial(net: Wan, site: str, target: str, port: int, timeout_s: float = PATIENCE_S) -> socket.socket:
    with net.entered(site):
        return socket.create_connection((net.address(target), port), timeout_s)


@contextmanager
def connected(net: Wan, site: str, hub: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection from a site to the hub."""
    with dial(net, site, "hub", net.port("hub")) as near, hub.accept()[0] as far:
        far.settimeout(PATIENCE_S)
        yield near, far


def shortest_round_trip_s(near: socket.socket, far: socket.socket) -> float:
    def once() -> float:
        start = time.perf_counter()
        near.sendall(b"?")
        far.sendall(far.recv(1))
        near.recv(1)
        return time.perf_counter() - start

    return min(once() for _ in range(5))


@pytest.mark.parametrize("site", ["ssh", "waiting", "nat"])
def test_every_site_dials_the_hub_and_is_40_ms_away(net: Wan, hub: socket.socket, site: str) -> None:
    with connected(net, site, hub) as (near, far):
        assert far.getpeername()[0] == net.address(site)
        assert 0.040 <= shortest_round_trip_s(near, far) < 0.060


def test_delay_can_be_set(net: Wan, hub: socket.socket) -> None:
    with connected(net, "nat", hub) as ends:
        net.delay_s = 0.1
        try:
            assert 0.2 <= shortest_round_trip_s(*ends) < 0.25
        finally:
            net.delay_s = 0.02


def test_it_carries_bulk(net: Wan, hub: socket.socket) -> None:
    nbytes = 60_000_000
    with connected(net, "nat", hub) as (near, far):
        start = time.perf_counter()
        sender = threading.Thread(target=near.sendall, args=(bytes(nbytes),))
        sender.start()
        while nbytes > 0:
            nbytes -= len(far.recv(1 << 20))
        mb_per_s = 60 / (time.perf_counter() - start)
        assert mb_per_s > 15  # 50 where it has a processor for itself, but others may be using that
        sender.join()


@pytest.mark.parametrize(("source", "target"), [("hub", "waiting"), ("hub", "nat"), ("ssh", "nat"), ("waiting", "ssh")])
def test_sites_cannot_be_dialled(net: Wan, source: str, target: str) -> None:
    """Neither where something listens, nor where nothing does: there is no answer at all."""
    with net.entered(target), socket.create_server(("0.0.0.0", 9000)):
        for port in (9000, 9001):
            with pytest.raises(TimeoutError):
                dial(net, source, target, port, SILENCE_S)


def test_other_ports_of_the_hub_are_closed(net: Wan) -> None:
    with net.entered("hub"), socket.create_server(("0.0.0.0", 9000)), pytest.raises(TimeoutError):
        dial(net, "waiting", "hub", 9000, SILENCE_S)


def test_a_site_reaches_itself(net: Wan) -> None:
    with net.entered("waiting"), socket.create_server((net.address("waiting"), 9000)):
        dial(net, "waiting", "waiting", 9000).close()


@pytest.mark.parametrize("site", ["waiting", "nat"])
def test_the_rest_of_the_world_is_refused_at_once(net: Wan, site: str) -> None:
    with net.entered(site), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("192.0.2.1", 80), PATIENCE_S)


def test_a_cut_is_silent_and_mending_lets_a_connection_go_on(net: Wan, hub: socket.socket) -> None:
    with connected(net, "nat", hub) as (near, far), connected(net, "waiting", hub) as others:
        far.settimeout(SILENCE_S)
        near.settimeout(SILENCE_S)
        net.cut("nat")
        try:
            near.sendall(b"up")
            far.sendall(b"down")
            for end in (near, far):
                with pytest.raises(TimeoutError):
                    end.recv(4)
            with pytest.raises(TimeoutError):
                dial(net, "nat", "hub", net.port("hub"), SILENCE_S)
            assert shortest_round_trip_s(*others) < 0.060
        finally:
            net.mend("nat")
        near.settimeout(PATIENCE_S)
        far.settimeout(PATIENCE_S)
        assert (far.recv(4), near.recv(4)) == (b"up", b"down")


def test_a_misspelt_site_is_an_error_and_the_network_goes_on(net: Wan, hub: socket.socket) -> None:
    with pytest.raises(AssertionError, match="'nta'"):
        net.cut("nta")
    with connected(net, "nat", hub):
        pass


def test_who_listens_is_told(net: Wan, server: SshServer) -> None:
    assert net.listening("ssh") == [Listener("0.0.0.0", net.port("ssh"), "sshd")]
    with net.entered("waiting"), socket.create_server(("127.0.0.1", 9000)):
        assert net.listening("waiting") == []
        with socket.create_server((net.address("waiting"), 9001)):
            assert [found[:2] for found in net.listening("waiting")] == [(net.address("waiting"), 9001)]


def test_login_with_the_ssh_program(net: Wan, server: SshServer) -> None:
    command = (*net.inside("hub"), *server.ssh, 'echo "$DASKFED_TEST_WORD $SSH_CONNECTION"')
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    assert said.startswith(f"two words {net.address('hub')} ")
    assert said.endswith(f"{net.address('ssh')} {net.port('ssh')}\n")


def test_an_unknown_host_key_is_refused(net: Wan, server: SshServer) -> None:
    known = server.known_hosts.read_text()
    another = make_key(server.client / "another")
    server.known_hosts.write_text(f"{known.split()[0]} {another}")
    try:
        command = (*net.inside("hub"), *server.ssh, "true")
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 255 and "Host key verification failed" in done.stderr
        import asyncssh

        with net.entered("hub"), pytest.raises(asyncssh.HostKeyNotVerifiable):
            asyncio.run(asyncssh.connect(server.name, config=[str(server.config)]).__aenter__())
    finally:
        server.known_hosts.write_text(known)


def test_a_reverse_forwarding_of_asyncssh_until_its_session_is_killed(net: Wan, server: SshServer) -> None:
    """A program at the site talks to one at the hub, over the site's own loopback."""
    import asyncssh

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    async def scenario() -> tuple[list[int], bytes, list[Listener]]:
        async with asyncssh.connect(server.name, config=[str(server.config)]) as connection:
            shouting = await asyncio.start_server(shout, "127.0.0.1", 0)
            port = shouting.sockets[0].getsockname()[1]
            forwarded = await connection.forward_remote_port("127.0.0.1", 0, "127.0.0.1", port)
            answer = await asyncio.to_thread(ask, forwarded.get_port())
            sessions, listeners = server.sessions(), net.listening("ssh")
            os.kill(sessions[0], signal.SIGKILL)
            await asyncio.wait_for(connection.wait_closed(), PATIENCE_S)
            return sessions, answer, listeners

    def ask(port: int) -> bytes:
        with net.entered("ssh"), socket.create_connection(("127.0.0.1", port), PATIENCE_S) as near:
            near.sendall(b"word" * 50_000)
            near.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: near.recv(1 << 20), b""))

    with net.entered("hub"):
        sessions, answer, listeners = asyncio.run(scenario())
    assert answer == b"WORD" * 50_000
    assert len(sessions) == 1
    assert [found.process for found in listeners] == ["sshd"]  # what was forwarded listens on loopback only


def test_sshd_stops_and_starts(net: Wan, server: SshServer) -> None:
    command = (*net.inside("hub"), *server.ssh, "echo in; cat")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as session:
        assert session.stdout is not None and session.stdout.readline() == b"in\n"
        server.stop()
        assert session.wait(PATIENCE_S) == 255  # the session went with it
    assert net.listening("ssh") == [] == server.sessions()
    server.start()
    subprocess.run([*net.inside("hub"), *server.ssh, "true"], timeout=PATIENCE_S, check=True, capture_output=True)


def gone(tag: str) -> bool:
    """Wait until none of the namespaces of a run is left; say whether that came about."""
    deadline = time.monotonic() + PATIENCE_S
    while any(wan_keeper.path_of(name).exists() for name in wan_keeper.namespaces(tag).values()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_what_a_test_leaves_running_is_ended_and_named() -> None:
    with pytest.raises(AssertionError, match="sleep 4711"):
        with wan() as net:
            left = subprocess.Popen([*net.inside("nat"), "sleep", "4711"])
    assert left.wait(PATIENCE_S) == -signal.SIGKILL
    assert not any(wan_keeper.path_of(name).exists() for name in net.namespaces.values())


def test_an_error_in_a_test_is_what_is_told() -> None:
    with pytest.raises(KeyboardInterrupt):
        with wan() as net:
            raise KeyboardInterrupt
    assert not any(wan_keeper.path_of(name).exists() for name in net.namespaces.values())


SCRIPT = """
import subprocess, sys, time
from tests.system.wan import Wan, start_keeper
keeper = start_keeper(sys.argv[1], 0.02)
subprocess.Popen([*Wan(sys.argv[1], keeper, 0.02).inside("nat"), "sleep", "4712"])
print("up", flush=True)
time.sleep(60)
"""


def test_nothing_is_left_of_a_test_that_was_killed() -> None:
    if reason := why_not():
        pytest.skip(reason)
    tag = uuid.uuid4().hex[:8]
    with subprocess.Popen([sys.executable, "-c", SCRIPT, tag], stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None and test.stdout.readline() == "up\n"
        test.kill()
    assert gone(tag)
