"""The cluster host: the process in which a site's Cluster object and its scheduler live.

An agent starts it (``python -m daskfed.site.host``) and talks to it in JSON lines: the first line on standard input
says which cluster, the first on standard output where its scheduler listens or what went wrong; then commands, replies.
The host ends when its standard input closes, so it never outlives its agent; the cluster is closed first, workers and
batch jobs included. Only here, and at the workers, user code is opened.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

import cloudpickle
from distributed.core import Status
from distributed.deploy import Cluster, LocalCluster

CLOSE_TIMEOUT_S = 20.0
SECURITY_FIELDS = ("tls_ca_file", "tls_client_cert", "tls_client_key", "tls_scheduler_cert", "tls_scheduler_key")


class HostError(Exception):
    """What went wrong with a cluster, in words for its user."""


def resolve_cluster(cluster: Any) -> type[Any]:
    """Return the Cluster class that ``cluster`` is or names; raises HostError where there is none."""
    if not isinstance(cluster, str):
        found = cluster
    else:
        module, _, name = cluster.rpartition(".")
        if not module:
            raise HostError(f"{cluster!r} names no class: write it with its module, as 'dask.distributed.LocalCluster'")
        found = _import(module, name)
    if not (inspect.isclass(found) and hasattr(found, "scale") and hasattr(found, "close")):
        raise HostError(f"{cluster!r} is no Dask Cluster class")
    return found


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as exc:
        raise HostError(f"module {module!r} of the cluster class cannot be imported: {exc}; install it here") from exc
    except AttributeError:
        raise HostError(f"module {module!r} has no class {name!r}") from None


async def start_cluster(cluster: Any, options: Mapping[str, Any]) -> Cluster:
    """Start a cluster on this event loop; raises HostError naming the class and what it said."""
    cls = resolve_cluster(cluster)
    name = f"{cls.__module__}.{cls.__name__}"
    keywords = dict(options)
    if issubclass(cls, LocalCluster):
        keywords.setdefault("dashboard_address", ":0")  # several sites of one machine need several ports
    try:
        started = cls(asynchronous=True, **keywords)
        return await started
    except Exception as exc:
        raise HostError(f"{name} did not start: {_in_words(exc)}; its options were {sorted(keywords)}") from exc


def _in_words(exc: BaseException) -> str:
    """Return an error and what it came from, innermost last."""
    words = [f"{type(exc).__name__}: {exc}"]
    while (cause := exc.__cause__ or exc.__context__) is not None:
        exc = cause
        words.append(f"{type(exc).__name__}: {exc}")
    return ", caused by ".join(dict.fromkeys(words))


class Host:
    """Serves one cluster to an agent."""

    def __init__(self, cluster: Cluster, out: TextIO) -> None:
        self.cluster = cluster
        self.out = out

    def facts(self) -> dict[str, Any]:
        """Return what the agent needs to know."""
        security = getattr(self.cluster, "security", None)
        files = {name: value for name in SECURITY_FIELDS if (value := getattr(security, name, None))}
        return {
            "scheduler_address": self.cluster.scheduler_address,
            "dashboard": self.cluster.dashboard_link or "",
            "name": str(self.cluster.name),
            "security": files,
        }

    async def serve(self, lines: asyncio.StreamReader) -> None:
        """Answer commands until the input ends or one asks to close."""
        while line := await lines.readline():
            request = json.loads(line)
            if request["method"] == "close":
                return
            write_line(self.out, {"id": request["id"], **await self._answer(request)})

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": await self._call(request["method"], request["kwargs"])}
        except Exception as exc:
            return {"error": f"{type(exc).__name__}: {exc}"}

    async def _call(self, method: str, kwargs: dict[str, Any]) -> Any:
        if method == "scale":
            result = self.cluster.scale(**kwargs)
        elif method == "adapt":
            self.cluster.adapt(**kwargs)
            result = None
        elif method == "logs":
            logs = self.cluster.get_logs(**kwargs)
            found = await logs if inspect.isawaitable(logs) else logs
            return {str(name): str(log) for name, log in found.items()}
        else:
            raise HostError(f"a cluster has no method {method!r} that can be called from elsewhere")
        if inspect.isawaitable(result):
            await result
        return None

    async def close(self) -> None:
        """Close the cluster, with its workers and batch jobs."""
        with suppress(asyncio.TimeoutError, OSError):
            if self.cluster.status not in (Status.closed, Status.closing):
                await asyncio.wait_for(self.cluster.close(), CLOSE_TIMEOUT_S)


def write_line(out: TextIO, message: Mapping[str, Any]) -> None:
    """Write one JSON line; an agent that is gone reads no more."""
    with suppress(BrokenPipeError):
        out.write(json.dumps(message) + "\n")
        out.flush()


def protocol_output() -> TextIO:
    """Keep standard output for the protocol, and send whatever else is printed to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


async def standard_input() -> asyncio.StreamReader:
    """Return standard input as a stream of lines."""
    reader = asyncio.StreamReader(limit=2**26)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    return reader


async def run(out: TextIO) -> int:
    """Start the cluster that standard input names and serve it; returns the exit status."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C reaches the whole group; the agent decides
    lines = await standard_input()
    line = await lines.readline()
    if not line:
        return 0
    serving = asyncio.ensure_future(_run(json.loads(line), lines, out))
    loop.add_signal_handler(signal.SIGTERM, serving.cancel)
    with suppress(asyncio.CancelledError):
        return await serving
    return 0


async def _run(spec: Mapping[str, Any], lines: asyncio.StreamReader, out: TextIO) -> int:
    try:
        opened = cloudpickle.loads(base64.b64decode(spec["pickled"]))
        cluster = await start_cluster(opened["cluster"], opened["options"])
    except Exception as exc:
        why = str(exc) if isinstance(exc, HostError) else f"{type(exc).__name__}: {exc}"
        write_line(out, {"error": why})
        return 1
    host = Host(cluster, out)
    try:
        write_line(out, host.facts())
        await host.serve(lines)
    finally:
        await host.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(run(protocol_output())))
