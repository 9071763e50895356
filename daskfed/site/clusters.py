"""A site's cluster, whatever Dask Cluster class it is: in a host process of its own, or in this event loop."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import cloudpickle
from distributed.security import Security

from daskfed.errors import SiteStartError
from daskfed.site.host import HostError, start_cluster

if TYPE_CHECKING:
    from daskfed.config import SiteOptions

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 30.0


class ClusterAdapter(Protocol):
    """A running cluster, as an agent sees it."""

    scheduler_address: str
    dashboard: str  # URL; empty if it has none
    name: str
    security: Security | None

    async def start(self) -> None:
        """Start the cluster and its workers; raises SiteStartError with what was wrong."""
        ...

    async def scale(self, n: int) -> None:
        """Scale to ``n`` workers."""
        ...

    async def adapt(self, **kwargs: Any) -> None:
        """Scale by itself, between bounds; keywords of ``Cluster.adapt``."""
        ...

    async def logs(self) -> dict[str, str]:
        """Return the logs of the cluster, its scheduler and its workers."""
        ...

    async def close(self) -> None:
        """End the cluster with its workers and batch jobs."""
        ...

    async def finished(self) -> str:
        """Return, when the cluster has ended without being asked to, why."""
        ...


@dataclass(frozen=True)
class ClusterSpec:
    """Which cluster a site has: a class (or its name) and keywords, pickled, since only the host opens them."""

    pickled: str  # base64 of a cloudpickled {"cluster": class or name, "options": keywords}
    in_process: bool = False  # run it on this event loop

    @classmethod
    def of(cls, options: SiteOptions, in_process: bool = False) -> ClusterSpec:
        """Return the spec of a site's options."""
        opened = {"cluster": options.cluster, "options": options.options}
        return cls(base64.b64encode(cloudpickle.dumps(opened)).decode(), in_process)

    @classmethod
    def packed(cls, pickled: str) -> ClusterSpec:
        """Return the spec that a parent process packed."""
        return cls(pickled)

    def adapter(self) -> ClusterAdapter:
        """Return a cluster that can be started."""
        return InProcessCluster(self) if self.in_process else HostedCluster(self)


class InProcessCluster:
    """A cluster on this event loop: the embedded default."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.scheduler_address = self.dashboard = self.name = ""
        self.security: Security | None = None
        self._cluster: Any = None

    async def start(self) -> None:
        """Start it; raises SiteStartError."""
        opened = cloudpickle.loads(base64.b64decode(self.spec.pickled))
        try:
            self._cluster = await start_cluster(opened["cluster"], opened["options"])
        except HostError as exc:
            raise SiteStartError(str(exc)) from exc
        self.scheduler_address = self._cluster.scheduler_address
        self.dashboard = self._cluster.dashboard_link or ""
        self.name = str(self._cluster.name)
        self.security = self._cluster.security

    async def scale(self, n: int) -> None:
        """Scale to ``n`` workers."""
        self._cluster.scale(n)
        await self._cluster

    async def adapt(self, **kwargs: Any) -> None:
        """Scale by itself."""
        self._cluster.adapt(**kwargs)

    async def logs(self) -> dict[str, str]:
        """Return the logs."""
        return {str(name): str(log) for name, log in (await self._cluster.get_logs()).items()}

    async def close(self) -> None:
        """End it."""
        if self._cluster is not None:
            await self._cluster.close()

    async def finished(self) -> str:
        """Never returns: it ends with this process."""
        await asyncio.Event().wait()
        return ""


class HostedCluster:
    """A cluster in a host process, which ends with this one."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.scheduler_address = self.dashboard = self.name = ""
        self.security: Security | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._replies: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._ids = itertools.count()
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the host."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the host and its cluster; raises SiteStartError with what was wrong."""
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "daskfed.site.host")
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, start_new_session=True, limit=2**26
        )
        self._write({"pickled": self.spec.pickled})
        try:
            facts = await asyncio.wait_for(self._read_line(), START_TIMEOUT_S)
        except TimeoutError:
            facts = {"error": f"the cluster did not start within {START_TIMEOUT_S:g} s"}
        if "error" in facts:
            await self.close()
            raise SiteStartError(str(facts["error"]))
        self.scheduler_address, self.dashboard = facts["scheduler_address"], facts["dashboard"]
        self.name = facts["name"]
        files = facts["security"]
        self.security = Security(require_encryption=True, **files) if files else None
        self._reader = asyncio.create_task(self._read_replies())

    async def _read_line(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        ended = {"error": "the cluster's host process ended; its messages are above"}
        return json.loads(line) if line else ended

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read_replies(self) -> None:
        while "id" in (reply := await self._read_line()):
            self._replies.pop(reply["id"]).set_result(reply)
        for waiting in self._replies.values():
            waiting.set_exception(SiteStartError(reply["error"]))
        self._replies.clear()

    async def _call(self, method: str, **kwargs: Any) -> Any:
        number = next(self._ids)
        self._replies[number] = asyncio.get_running_loop().create_future()
        waiting = self._replies[number]
        self._write({"id": number, "method": method, "kwargs": kwargs})
        reply = await waiting
        if "error" in reply:
            raise RuntimeError(f"cluster {self.name!r}: {reply['error']}")
        return reply["result"]

    async def scale(self, n: int) -> None:
        """Scale to ``n`` workers."""
        await self._call("scale", n=n)

    async def adapt(self, **kwargs: Any) -> None:
        """Scale by itself."""
        await self._call("adapt", **kwargs)

    async def logs(self) -> dict[str, str]:
        """Return the logs."""
        return dict(await self._call("logs"))

    async def finished(self) -> str:
        """Return, when the host process has ended, how."""
        assert self._process is not None
        return f"the cluster's host process ended with status {await self._process.wait()}"

    async def close(self) -> None:
        """Have the host close its cluster and end; kill it if it takes too long."""
        process = self._process
        if process is None:
            return
        if process.returncode is None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if self._reader is not None:
            self._reader.cancel()
