"""A wide-area network for tests: a hub and three sites that can only dial out, 40 ms apart.

============  ===============  ==================================================================================
site          address          what can be dialled there from elsewhere
============  ===============  ==================================================================================
``hub``       10.81.0.1        port 8700
``ssh``       10.81.0.2        port 2222, for sshd (:mod:`tests.system.ssh_server`)
``waiting``   10.81.0.3        nothing
``nat``       10.81.0.4        nothing; it is 192.168.81.2 behind a router that masks that address
============  ===============  ==================================================================================

Each is a network namespace with a loopback of its own. These addresses mean something inside them only::

    with wan() as net:
        subprocess.run([*net.inside("nat"), "python", "dial.py", net.address("hub"), "8700"])
        with net.entered("nat"):  # the sockets that this thread makes here are at the site
            socket.create_connection((net.address("hub"), net.port("hub")))
        net.cut("nat")  # from now on its packets are lost, without a word to anyone
        net.mend("nat")

A process of its own makes them, and carries the packets: see :mod:`tests.system.wan_keeper`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from ipaddress import ip_address
from typing import NamedTuple

import pytest

from tests.system import namespaces, wan_keeper

DELAY_S = 0.02  # each way
START_S = END_S = 30.0  # most seconds, on a machine under load, for what takes less than one


class Listener(NamedTuple):
    """A TCP port that a process listens at, at an address that is not loopback's."""

    address: str  # "0.0.0.0" or "*" where it is any
    port: int
    process: str  # the name of its program; empty where it has ended meanwhile


class Wan:
    """The network while it exists; made by :func:`wan`."""

    def __init__(self, tag: str, keeper: subprocess.Popen[str], delay_s: float) -> None:
        self.namespaces = wan_keeper.namespaces(tag)  # site -> namespace; with the router of "nat"
        self._keeper = keeper
        self._delay_s = delay_s

    def inside(self, site: str) -> tuple[str, ...]:
        """Return what a command has to begin with to run at a site."""
        return namespaces.inside(self.namespaces[site])

    def entered(self, site: str) -> AbstractContextManager[None]:
        """Have this thread at a site for a while, and the threads and processes that it starts meanwhile."""
        return wan_keeper.entered(self.namespaces[site])

    def address(self, site: str) -> str:
        """Return the address by which other sites see a site."""
        return wan_keeper.ADDRESSES[site]

    def port(self, site: str) -> int:
        """Return the one port that can be dialled from elsewhere, of the hub or of "ssh"."""
        return wan_keeper.OPEN_PORTS[site]

    def cut(self, site: str) -> None:
        """Lose all packets from and to a site, also those on their way, until it is mended."""
        self._tell(f"cut {site}")

    def mend(self, site: str) -> None:
        """Undo :meth:`cut`."""
        self._tell(f"mend {site}")

    @property
    def delay_s(self) -> float:
        """Seconds that each packet is on its way, one way; may be set."""
        return self._delay_s

    @delay_s.setter
    def delay_s(self, value: float) -> None:
        self._tell(f"delay {value}")
        self._delay_s = value

    def listening(self, site: str) -> list[Listener]:
        """Return where processes of a site listen for TCP, but for loopback, ordered by port."""
        lines = wan_keeper.call(*self.inside(site), "ss", "-Hltnp").splitlines()
        return sorted(filter(beyond_loopback, map(listener, lines)), key=lambda found: found.port)

    def _tell(self, line: str) -> None:
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(f"{line}\n")
        self._keeper.stdin.flush()
        answer = self._keeper.stdout.readline().strip()
        assert answer == "ok", f"the network did not do {line!r}: {answer or 'it has ended'}"


def listener(line: str) -> Listener:
    """Read a line of ``ss``: state, two lengths of queues, own address, peer's address, processes."""
    address, _, port = line.split()[3].rpartition(":")
    name = re.search(r'\(\("([^"]*)"', line)
    return Listener(address.partition("%")[0].strip("[]"), int(port), name[1] if name else "")


def beyond_loopback(found: Listener) -> bool:
    """Whether others than the machine itself could reach it."""
    return found.address == "*" or not ip_address(found.address).is_loopback


@contextmanager
def wan(delay_s: float = DELAY_S) -> Iterator[Wan]:
    """Yield the network, ``delay_s`` one way between any two of its sites; skip the test where none can be made.

    Raises AssertionError where processes were left inside it. These are ended, as all is that belongs to it.
    """
    if reason := why_not():
        pytest.fail(reason) if os.environ.get("DASKFED_REQUIRE") == "all" else pytest.skip(reason)
    tag = uuid.uuid4().hex[:8]  # no other run has it: what has this name is taken down
    keeper = start_keeper(tag, delay_s)
    try:
        yield Wan(tag, keeper, delay_s)
    finally:
        left = end_keeper(tag, keeper)
    assert not left, f"still running inside the network after the test:\n{left}"


def why_not() -> str:
    """Return why no such network can be made here; empty where it can."""
    missing = [program for program in ("ip", "nft", "ss", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be used"
    return namespaces.why_not()


def start_keeper(tag: str, delay_s: float) -> subprocess.Popen[str]:
    """Start the process that makes the network, and wait until it has."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.system.wan_keeper", tag, str(delay_s)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for the tests: it has to take the network down after them
    )  # fmt: skip
    try:
        assert keeper.stdout is not None and keeper.stderr is not None
        assert keeper.stdout.readline() == "ready\n", f"no network can be made:\n{keeper.stderr.read()}"
    except BaseException:
        end_keeper(tag, keeper)
        raise
    return keeper


def end_keeper(tag: str, keeper: subprocess.Popen[str]) -> str:
    """Have all taken down, by ourselves where the keeper fails to; return what was left running, a line each."""
    try:
        said, complaint = keeper.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        keeper.kill()
        said, complaint = keeper.communicate()
    left = re.findall(r"(?m)^left (.*)$", said) + wan_keeper.tear_down(tag, os.getpid())
    if keeper.returncode != 0:
        left.append(f"its process failed:\n{complaint}")
    return "\n".join(left)
