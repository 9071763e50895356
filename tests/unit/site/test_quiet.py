"""A worker that ends says nothing of the heartbeat that it was just sending."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest
from distributed import Scheduler, Worker

from daskfed.data.fetch import by_value
from daskfed.site.quiet import LOGGER, QuietEnd


@pytest.fixture
def logger() -> Any:
    """Yield the logger of workers without filters, which workers of other tests may have left; it has them back then."""
    found = logging.getLogger(LOGGER)
    before = list(found.filters)
    found.filters.clear()
    yield found
    found.filters[:] = before


@pytest.mark.parametrize("quiet", [False, True])
def test_a_heartbeat_whose_worker_closes_is_not_logged(
    quiet: bool, logger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(close_amid_heartbeat([QuietEnd(), QuietEnd()] if quiet else []))
    assert ("during heartbeat" in caplog.text) is not quiet


async def close_amid_heartbeat(plugins: list[QuietEnd]) -> None:
    asked = asyncio.Event()

    async def never(**kwargs: Any) -> None:
        asked.set()
        await asyncio.sleep(3600)

    async with Scheduler(port=0, dashboard_address=":0", host="127.0.0.1") as scheduler:
        async with Worker(scheduler.address, host="127.0.0.1") as worker:
            for plugin in plugins:
                plugin.setup(worker)
            scheduler.handlers["heartbeat_worker"] = never
            beating = asyncio.create_task(worker.heartbeat())
            await asyncio.wait_for(asked.wait(), 30)
        await asyncio.wait_for(beating, 30)


def test_a_heartbeat_that_fails_while_the_worker_works_is_logged(logger: Any, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(fail_a_heartbeat())
    assert "during heartbeat" in caplog.text


async def fail_a_heartbeat() -> None:
    async def cut(comm: Any, **kwargs: Any) -> None:
        comm.abort()

    async with Scheduler(port=0, dashboard_address=":0", host="127.0.0.1") as scheduler:
        async with Worker(scheduler.address, host="127.0.0.1") as worker:
            QuietEnd().setup(worker)
            scheduler.handlers["heartbeat_worker"] = cut
            await asyncio.wait_for(worker.heartbeat(), 30)


def test_it_opens_where_daskfed_is_not_installed() -> None:
    code = (
        "import pickle, sys; sys.modules['daskfed'] = None; from distributed import WorkerPlugin; "
        "plugin = pickle.loads(sys.stdin.buffer.read()); assert isinstance(plugin, WorkerPlugin); plugin.setup(None)"
    )
    subprocess.run([sys.executable, "-c", code], input=by_value(QuietEnd()), check=True, timeout=60)
