"""Starting ``daskfed site`` as a child process, and ending it on every path."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from daskfed import errors
from daskfed.errors import SiteStartError
from daskfed.profile import SiteOptions
from daskfed.reach.agents import spec_of
from daskfed.site.clusters import credentials

CLOSE_TIMEOUT_S = 20.0


class SiteProcess:
    """A site of this machine in a process of its own, which ends when this process does.

    The child reads what it is from its standard input and then watches it: when the pipe closes, the parent is gone.
    """

    def __init__(self, name: str, hub: str, options: SiteOptions, security: Any = None) -> None:
        self.name = name
        self.hub = hub
        self.options = options
        self.security = security
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the agent."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the site and wait until it is connected to the hub; raises SiteStartError with what it said."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "daskfed", "site", "--spec", "-",
            stdin=pipe, stdout=pipe, cwd=self.options.directory, env=child_environment(), start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._spec()).encode() + b"\n")
        reply = await self._process.stdout.readline()
        told = json.loads(reply) if reply.strip() else {"error": "it ended at once; its messages are above"}
        if "error" in told:
            await self.close()
            kind = getattr(errors, told.get("kind", ""), SiteStartError)
            raise kind(f"site {self.name!r}: {told['error']}")

    def _spec(self) -> dict[str, Any]:
        return spec_of(self.name, self.hub, self.options, security=credentials(self))  # on a pipe: keys need no files

    async def close(self) -> None:
        """Ask the site to end, and kill it if it does not within some seconds."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def child_environment() -> dict[str, str]:
    """Return an environment in which a child imports what this process can import, as multiprocessing would do."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}
