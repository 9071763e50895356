"""A real sshd at the site "ssh" of :mod:`tests.system.wan`, and what a client needs to log in there.

Nobody's own keys and settings are read or changed: all files lie in a temporary folder. ::

    with wan() as net, ssh_server(net) as server:
        subprocess.run([*net.inside("hub"), *server.ssh, "hostname"])
        with net.entered("hub"):
            asyncio.run(asyncssh.connect(server.name, config=[server.config]))

It logs in whoever runs the tests. What a session starts has the variables of ``environment``, and the mark by which
processes are found that outlive the tests.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import MARK
from tests.system.wan import Wan
from tests.system.wan_keeper import call

NAME = "login"  # of the host, in the client's files: `ssh -F config login`
SITE = "ssh"
START_S = 20.0  # most seconds, on a machine under load
PRIVILEGE_SEPARATION = Path("/run/sshd")  # compiled into sshd; Debian's service makes it at boot

SSHD_CONFIG = """
Port {port}
ListenAddress 0.0.0.0
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitUserRC no
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
Subsystem sftp internal-sftp
SetEnv {environment}
"""
CLIENT_CONFIG = """
Host {name}
  HostName {host}
  Port {port}
  User {user}
  IdentityFile {folder}/identity
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
"""


class SshServer:
    """An sshd that can be stopped and started again; made by :func:`ssh_server`."""

    def __init__(self, net: Wan, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = NAME
        self.host, self.port = net.address(SITE), net.port(SITE)
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.client = folder / "client"  # the folder of the client's files
        self.config, self.known_hosts = self.client / "config", self.client / "known_hosts"
        self.identity = self.client / "identity"
        self.ssh = ("ssh", "-F", str(self.config), NAME)  # what a command begins with to run there, from another site
        self._net = net
        self._folder = folder / "server"
        self._process: subprocess.Popen[bytes] | None = None
        self._write_files(environment)

    def _write_files(self, environment: Mapping[str, str]) -> None:
        for folder in (self.client, self._folder):
            folder.mkdir()
        variables = {MARK: os.environ.get(MARK, ""), **environment}
        quoted = " ".join(f'"{name}={value}"' for name, value in variables.items())
        settings = SSHD_CONFIG.format(port=self.port, folder=self._folder, environment=quoted)
        (self._folder / "sshd_config").write_text(settings)
        (self._folder / "authorized_keys").write_text(make_key(self.identity))
        host_key = make_key(self._folder / "host_key")
        self.known_hosts.write_text(f"[{self.host}]:{self.port} {host_key}")
        settings = CLIENT_CONFIG.format(name=NAME, host=self.host, port=self.port, user=self.user, folder=self.client)
        self.config.write_text(settings)

    def start(self) -> None:
        """Start it and wait until it listens; raises AssertionError with its log where it does not."""
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)  # stays: a server that others start may want it by then
        sshd = shutil.which("sshd")
        assert sshd is not None, "sshd is not installed"  # it calls itself by this path, which has to be absolute
        with (self._folder / "log").open("wb") as log:
            command = (*self._net.inside(SITE), sshd, "-D", "-e", "-f", str(self._folder / "sshd_config"))
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while "Server listening on" not in self.log():
            assert self._process.poll() is None and time.monotonic() < deadline, f"sshd does not run:\n{self.log()}"
            time.sleep(0.01)

    def stop(self, *, sessions: bool = True) -> None:
        """End it, and the sessions, as when its machine goes down; without these, as when only sshd is updated."""
        if self._process is None:
            return
        for pid in self.sessions() if sessions else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.terminate()
        self._process.wait(START_S)
        self._process = None

    def sessions(self) -> list[int]:
        """Return the processes that serve a connection each; one that is killed is a connection that breaks."""
        if self._process is None or self._process.poll() is not None:
            return []
        return [child.pid for child in psutil.Process(self._process.pid).children()]

    def log(self) -> str:
        """Return what it said since it was started."""
        return (self._folder / "log").read_text(errors="replace")


def make_key(path: Path) -> str:
    """Make a key without a passphrase and return the line of its public half."""
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "daskfed test", "-f", str(path))
    return path.with_suffix(".pub").read_text()


@contextmanager
def ssh_server(net: Wan, environment: Mapping[str, str] | None = None) -> Iterator[SshServer]:
    """Yield an sshd that runs at the site "ssh"; end it and its sessions afterwards."""
    with tempfile.TemporaryDirectory(prefix="daskfed-ssh-") as folder:
        server = SshServer(net, Path(folder), environment or {})
        try:
            server.start()
            yield server
        finally:
            server.stop()
