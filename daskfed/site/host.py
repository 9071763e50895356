"""The process that a site's Dask Cluster lives in, a child of the agent, which runs :func:`main` in it.

It reads lines of JSON on standard input and answers on standard output. The first line says what to start::

    {"pickle": "<base64>", "timeout_s": 60}  ->  {"scheduler_address": ..., "dashboard": ..., "security": {}}
    {"id": 1, "method": "scale", "kwargs": {"n": 2}}  ->  {"id": 1, "result": ...}

or ``{"error": ..., "kind": ...}`` instead, where ``kind`` names a class of :mod:`daskfed.errors`.

When standard input closes, because the agent said so or because it is gone, the cluster is closed, workers included.
What the Cluster class prints goes to standard error. Ctrl-C is for the agent: the host is in another process group.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any, TextIO

from daskfed.config import calm
from daskfed.errors import DaskfedError, SiteStartError
from daskfed.site.clusters import ClusterSpec, call_cluster, credentials, patience_with, start_cluster
from daskfed.site.forking import fork_workers

CLOSE_TIMEOUT_S = 8.0
LINE_BYTES = 2**26


def main(forks: bool = False) -> None:
    """Serve until standard input closes or SIGTERM comes; leaves no worker behind. ``forks``: see :mod:`.forking`."""
    if forks:
        fork_workers()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", "Port .* is already in use")  # several sites of one machine, each a dashboard
    calm(tick="250ms")  # the monitor is for the site's dashboard
    with asyncio.Runner() as runner:
        runner.run(_serve(replies))
        signal.set_wakeup_fd(-1)  # else a SIGTERM that comes while the loop closes prints an error
    last_resort = threading.Timer(CLOSE_TIMEOUT_S, os._exit, [1])  # threads of a Cluster must not keep the process
    last_resort.daemon = True
    last_resort.start()


async def _serve(replies: TextIO) -> None:
    lines = await _standard_input()
    order = json.loads(await lines.readline() or "{}")
    spec = ClusterSpec(order.get("pickle", ""), timeout_s=order.get("timeout_s", 60))
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    ended = asyncio.ensure_future(_end_of(lines, queue))
    starting = asyncio.ensure_future(_start(spec))
    await asyncio.wait([ended, starting], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # Dask logs that its start was called off
        starting.cancel()
    try:
        cluster = await starting
    except DaskfedError as exc:
        _reply(replies, {"error": str(exc), "kind": type(exc).__name__})
        return
    except asyncio.CancelledError:
        return
    _reply(replies, _about(cluster))
    with patience_with(cluster):
        serving = asyncio.ensure_future(_serve_calls(cluster, queue, replies))
        await ended
        serving.cancel()
    with suppress(Exception):
        await asyncio.wait_for(cluster.close(), CLOSE_TIMEOUT_S)


def _about(cluster: Any) -> dict[str, Any]:
    return {
        "scheduler_address": cluster.scheduler_address,
        "dashboard": getattr(cluster, "dashboard_link", None) or "",
        "security": credentials(cluster),
    }


async def _start(spec: ClusterSpec) -> Any:
    cluster = await start_cluster(spec)
    if cluster.scheduler_address.startswith("inproc://"):
        await cluster.close()
        hint = "leave out processes=False, or add protocol='tcp://'"
        raise SiteStartError(f"the scheduler at {cluster.scheduler_address} can only be reached in its process: {hint}")
    return cluster


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _end_of(lines: asyncio.StreamReader, queue: asyncio.Queue[dict[str, Any]]) -> None:
    """Put orders into the queue; return when there will be no more: standard input closed, or SIGTERM came."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lines.feed_eof)
    while line := await lines.readline():
        queue.put_nowait(json.loads(line))


async def _serve_calls(cluster: Any, queue: asyncio.Queue[dict[str, Any]], replies: TextIO) -> None:
    while True:
        order = await queue.get()
        try:
            answer = {"result": await call_cluster(cluster, order["method"], order["kwargs"])}
        except DaskfedError as exc:
            answer = {"error": str(exc), "kind": type(exc).__name__}
        _reply(replies, {"id": order["id"], **answer})


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    with suppress(OSError):
        replies.write(json.dumps(message) + "\n")
        replies.flush()
