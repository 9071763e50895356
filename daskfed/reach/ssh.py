"""Another machine, over SSH: commands there, and a port there that leads here.

The user's ``~/.ssh/config``, agent, keys and ``known_hosts`` count, as for ``ssh`` itself. A host key that is not known
is never accepted.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import shlex
import sys
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import asyncssh

from daskfed.errors import ConfigurationError, SiteStartError
from daskfed.reach import probe

CONNECT_S = 20.0
KEEPALIVE_S = 10.0  # three without an answer end a connection
CALL_S = 300.0
LOGIN_SHELL = (  # where modules are loaded; whatever shell the user has, it sees a plain line
    'exec sh -c \'c=$(printf %s {} | base64 -d); if command -v bash >/dev/null 2>&1; then exec bash -lc "$c"; '
    'else exec sh -lc "$c"; fi\''
)
CONFIGS = ("~/.ssh/config", "/etc/ssh/ssh_config")  # what the first says counts


class Shell:
    """A connection to ``ssh://[user@]host[:port]``, where ``host`` may be a name of the user's SSH configuration."""

    def __init__(self, url: str, connection: asyncssh.SSHClientConnection) -> None:
        self.url = url
        self.connection = connection

    @classmethod
    async def connect(cls, url: str) -> Shell:
        """Log in; raises SiteStartError, which says what to do about it."""
        user, host, port = parts(url)
        configs = [str(path) for path in map(Path.expanduser, map(Path, CONFIGS)) if path.is_file()]
        given: dict[str, Any] = {"username": user, "port": port, "config": configs}
        try:
            connection = await asyncssh.connect(
                host, **{name: value for name, value in given.items() if value}, connect_timeout=CONNECT_S,
                login_timeout=CONNECT_S, keepalive_interval=KEEPALIVE_S,
            )  # fmt: skip
        except (OSError, asyncssh.Error, TimeoutError, ValueError) as exc:  # ValueError: of what is in its files
            command = f"-p {port} {host}" if port else host
            raise SiteStartError(f"{url}: {_in_words(exc, command)}") from exc
        return cls(url, connection)

    async def run(self, command: str, given: str = "", timeout_s: float = CALL_S) -> tuple[int, str, str]:
        """Run a command in a login shell; return its exit status, output and errors. Raises SiteStartError."""
        shell = LOGIN_SHELL.format(base64.b64encode(command.encode()).decode())
        try:
            done = await self.connection.run(shell, input=given, timeout=timeout_s, encoding="utf-8", errors="replace")
        except (asyncssh.TimeoutError, TimeoutError):
            raise SiteStartError(f"{self.url}: {command.split()[0]} did not end within {timeout_s:g} s") from None
        except (OSError, asyncssh.Error) as exc:
            raise SiteStartError(f"{self.url}: the connection ended: {exc}") from exc
        status = done.exit_status if done.exit_status is not None else -1
        return status, str(done.stdout or ""), str(done.stderr or "")

    async def show(self, command: str, path: str) -> None:
        """Run a command on a file there, and pass on what it writes; raises SiteStartError where it fails."""
        try:
            done = await self.connection.run(f"{command} {shlex.quote(path)}", stdout=sys.stdout, stderr=asyncssh.PIPE)
        except (OSError, asyncssh.Error) as exc:
            raise SiteStartError(f"{self.url}: the connection ended: {exc}") from exc
        if done.exit_status:
            raise SiteStartError(f"{self.url}: {str(done.stderr).strip()}")

    async def call(self, command: str, given: str = "", timeout_s: float = CALL_S) -> dict[str, Any]:
        """Run a command that prints a line of JSON, and return that; raises SiteStartError with what it said else."""
        status, output, errors = await self.run(command, given, timeout_s)
        if (told := last_object(output)) is not None:
            return told
        said = "\n".join((errors or output).strip().splitlines()[-5:])
        raise SiteStartError(f"{self.url}: {command.split(' - ')[0]} ended with status {status}: {said or 'no word'}")

    async def facts(self, python: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the Python there knows of itself and of what a site needs (:mod:`daskfed.reach.probe`)."""
        status, output, errors = await self.run(f"{shown(python)} -", probe_source(given), CALL_S)
        if (told := last_object(output)) is not None:
            return told
        said = "\n".join((errors or output).strip().splitlines()[-3:])
        raise SiteStartError(
            f"{self.url}: {python} does not run there (status {status}: {said or 'no word'}); name another Python "
            "with option 'python'"
        )

    async def put(self, files: Sequence[Path], folder: str) -> None:
        """Send files into a folder there, where nobody needs SFTP; raises SiteStartError."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for file in files:
                archive.add(file, file.name)
        command = f"mkdir -p {shown(folder)} && tar -xf - -C {shown(folder)}"
        try:
            done = await self.connection.run(command, input=packed.getvalue(), encoding=None, timeout=CALL_S)
        except (OSError, asyncssh.Error) as exc:
            raise SiteStartError(f"{self.url}: files cannot be sent to {folder}: {exc}") from exc
        if done.exit_status != 0:
            said = bytes(done.stderr or b"").decode(errors="replace")  # type: ignore[arg-type]
            raise SiteStartError(f"{self.url}: files cannot be written to {folder}: {said.strip()}")

    async def lead_here(self, host: str, port: int) -> int:
        """Have a port of the other machine's loopback lead to ``host:port`` as seen from here; return it."""
        try:
            listener = await self.connection.forward_remote_port("127.0.0.1", 0, host, port)
        except (OSError, asyncssh.Error) as exc:
            raise SiteStartError(
                f"{self.url}: its SSH server forwards no port ({exc}): have its keeper allow that "
                "(AllowTcpForwarding), or use reach: waiting with a hub that the site can dial"
            ) from exc
        return int(listener.get_port())

    async def close(self) -> None:
        """End the connection."""
        self.connection.close()
        with suppress(Exception):
            await asyncio.wait_for(self.connection.wait_closed(), 5)


def last_object(output: str) -> dict[str, Any] | None:
    """Return the last line that is an object of JSON: a login shell may have said something before."""
    for line in reversed(output.splitlines()):
        with suppress(ValueError):
            if isinstance(told := json.loads(line), dict):
                return told
    return None


def parts(url: str) -> tuple[str, str, int]:
    """Return user, host and port of ``ssh://…``, empty and 0 where not given; raises ConfigurationError."""
    try:
        parsed = urlparse(url)
        host = parsed.netloc.rpartition("@")[2]  # as it is written: names of the SSH configuration may have capitals
        host = host if host.startswith("[") else host.partition(":")[0]
        found = parsed.username or "", host.strip("[]").partition("]")[0], parsed.port or 0
    except ValueError as exc:
        raise ConfigurationError(f"{url!r} is no address: {exc}") from None
    if parsed.scheme != "ssh" or not found[1] or parsed.path.strip("/") or parsed.password is not None:
        raise ConfigurationError(f"{url!r} should be like ssh://me@login.example.edu, or with a port: ssh://host:2222")
    return found


def shown(path: str) -> str:
    """Return a path as a shell takes it; ``~`` is the home folder there."""
    if path.startswith("~/"):
        return '"$HOME"/' + shlex.quote(path[2:])
    return shlex.quote(path)


def probe_source(given: Mapping[str, Any]) -> str:
    """Return the program that finds out what there is."""
    return f"{inspect.getsource(probe)}\n\nshow(json.loads({json.dumps(dict(given))!r}))\n"


def _in_words(exc: BaseException, host: str) -> str:
    """Return what went wrong and what to do about it."""
    if isinstance(exc, asyncssh.HostKeyNotVerifiable):
        return (
            f"its host key is not known here: log in once with ssh {host} and compare the fingerprint that it shows "
            f"with that which the site publishes ({exc})"
        )
    if isinstance(exc, asyncssh.PermissionDenied):
        return f"it lets nobody in with the keys that there are: see that ssh -o BatchMode=yes {host} works ({exc})"
    if isinstance(exc, asyncio.TimeoutError):
        return f"nobody answers within {CONNECT_S:g} s: does ssh {host} work from here?"
    if isinstance(exc, ValueError):
        return f"your SSH configuration or a key has a mistake: {exc}"
    return f"cannot log in: {exc or type(exc).__name__}; does ssh {host} work from here?"
