"""A site for real: agent, cluster host, stock scheduler and workers, under a hub that does what the test says."""

from __future__ import annotations

import asyncio
import operator
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from distributed.protocol.serialize import Serialized, serialize

from daskfed.comm.opaque import OpaqueError, connect_opaque
from daskfed.errors import ConfigurationError, ConnectionRefused, SiteStartError
from daskfed.messages import (
    BlockRecalled,
    BlockStarted,
    CancelBlock,
    CloseSite,
    Import,
    ImportFailed,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    Learned,
    RecallBlock,
    ReleaseKeys,
    SiteHoldings,
    SiteStatus,
)
from daskfed.profile import SiteOptions
from daskfed.site.agent import Agent
from daskfed.site.clusters import ClusterSpec
from tests.system.commands import NO_DASHBOARD
from tests.system.scripted_hub import Needs, ScriptedHub, SiteLink, opened
from tests.system.waiting import alive

LOCAL = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}
BIG = 12_500_000  # doubles: 100 MB

pytestmark = pytest.mark.system
T = TypeVar("T")


def spec(**options: Any) -> ClusterSpec:
    return ClusterSpec.of(SiteOptions(options={**LOCAL, **options}))


class Sites:
    """A hub and two sites of one worker each, on an event loop in a thread of its own; shared by the tests here."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.hub = self.run(self._make_hub())
        self.agents = [Agent(name, spec(), hub=self.hub.address, labels={"test": name}) for name in ("north", "south")]
        self.run(self._start())

    async def _make_hub(self) -> ScriptedHub:
        return await ScriptedHub().__aenter__()

    async def _start(self) -> None:
        await asyncio.gather(*(agent.start() for agent in self.agents))
        for agent in self.agents:
            await agent.joined()
        self.north, self.south = [await self.hub.site(agent.name) for agent in self.agents]

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 100) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    async def _close(self) -> None:
        await asyncio.gather(*(agent.close() for agent in self.agents))
        await self.hub.close()

    def forget_addresses(self) -> None:
        for agent in self.agents:
            assert agent.session.fetcher is not None
            for other in self.agents:
                agent.session.fetcher.forget(other.name)

    def close(self) -> None:
        self.run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def clean(self) -> None:
        """Release everything; each site must then be as empty as it was before."""
        for agent, site in zip(self.agents, (self.north, self.south), strict=True):
            core = agent.session.core
            for block in list(core.blocks.values()):
                site.send(CancelBlock(block.spec.id, block.attempt))
            site.send(ReleaseKeys(tuple(core.keys)))
            async with asyncio.timeout(10):
                while core.keys or core.blocks or agent.session.parcels:
                    await asyncio.sleep(0.01)
            core.check()
            site.told.clear()
            site.outcomes.clear()
        self.hub.relayed, self.hub.hide_addresses = 0, False


@pytest.fixture(scope="module")
def pair() -> Iterator[Sites]:
    pair = Sites()
    yield pair
    pair.close()


@pytest.fixture
def sites(pair: Sites) -> Iterator[Sites]:
    yield pair
    pair.run(pair.clean())


def failing(x: int) -> None:
    raise ZeroDivisionError("on purpose")


def numbers(n: int) -> Any:
    return np.arange(n, dtype="f8")


def total(x: Any) -> float:
    return float(x.sum())


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def run(coroutine: Any, timeout_s: float = 120) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout_s))


def test_a_block_runs_and_its_outputs_are_held_until_they_are_released(sites: Sites) -> None:
    async def check() -> None:
        hub, north = sites.hub, sites.north
        assert dict(north.hello.labels) == {"test": "north"}
        assert {"dask", "distributed", "python"} <= dict(north.hello.versions).keys()
        status = await north.told_of(SiteStatus)
        assert (status.workers, status.threads, status.draining) == (1, 1, False)
        assert status.memory_limit > 0 and 0 < status.round_trip_s < 10
        graph = {
            "x": (operator.add, 1, 2),
            "inner": (operator.add, Needs("x"), 1),
            "y": (operator.mul, Needs("inner"), 5),
        }
        block = hub.run_block(north, graph, outputs=("x", "y"))
        await north.outcome("x")
        message, payload = await north.outcome("y")
        assert isinstance(message, KeysMade) and message.attempt == block.attempt
        assert message.keys[-1].nbytes == sys.getsizeof(20)
        assert pickle.loads(payload["types"]["y"]) is int
        assert await north.told_of(BlockStarted) == BlockStarted(block.block.id, block.attempt)
        assert (await north.value("x"), await north.value("y")) == (3, 20)
        learned = await north.told_of(Learned)
        assert {prefix for prefix, *_ in learned.durations} == {"x", "inner", "y"}

        north.send(ReleaseKeys(("x",)))
        await gone(north, "x")
        assert await north.value("y") == 20
        assert await north.call("gather", keys=["x", "y"]) == {"status": "error", "keys": ("x",)}
        hub.run_block(north, {"x": (operator.add, 1, 2)})
        await north.outcome("x")
        assert await north.value("x") == 3

    sites.run(check())


async def has_workers(site: SiteLink, n: int) -> None:
    await site.wait_for(lambda message: isinstance(message, SiteStatus) and message.workers == n)


async def gone(site: SiteLink, key: str) -> None:
    while (await site.call("scheduler_rpc", scheduler_op="who_has", kwargs={"keys": [key]}))[key]:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("relayed", [False, True])
def test_keys_move_from_site_to_site(sites: Sites, relayed: bool) -> None:
    async def check() -> None:
        hub, north, south = sites.hub, sites.north, sites.south
        hub.hide_addresses = relayed
        sites.forget_addresses()
        hub.run_block(north, {"small": (operator.add, 1, 2), "big": (numbers, BIG), "nothing": (numbers, 0)})
        await asyncio.gather(*(north.outcome(key) for key in ("small", "big", "nothing")))
        sizes = {"small": 28, "big": 8 * BIG, "nothing": 0}
        wanted = tuple(Import(key, "north", nbytes) for key, nbytes in sizes.items())
        graph = {
            "sum": (total, Needs("big")),
            "more": (operator.add, Needs("small"), 10),
            "zero": (total, Needs("nothing")),
        }
        hub.run_block(south, graph, imports=wanted)
        await asyncio.gather(*(south.outcome(key) for key in graph))
        assert await south.value("sum") == BIG * (BIG - 1) / 2
        assert (await south.value("more"), await south.value("zero")) == (13, 0)
        reports = {report.key: report for report in [await south.told_of(KeyImported) for _ in wanted]}
        assert reports.keys() == {"small", "big", "nothing"}
        assert reports["big"].nbytes >= 8 * BIG and reports["big"].source == "north"
        assert [report.relayed for report in reports.values()] == [relayed] * 3
        assert (hub.relayed > 8 * BIG / 2**22) is relayed
        assert not [message for message, _ in south.told if isinstance(message, ImportFailed)]

    sites.run(check())


def test_a_failing_task_fails_what_depends_on_it_at_every_site(sites: Sites) -> None:
    async def check() -> None:
        hub, north, south = sites.hub, sites.north, sites.south
        graph = {"bad": (failing, 1), "after": (operator.add, Needs("bad"), 1), "good": (operator.add, 1, 1)}
        hub.run_block(north, graph)
        message, error = await north.outcome("bad")
        assert isinstance(message, KeysFailed) and set(message.keys) == {"bad", "after"}
        assert isinstance((await north.outcome("good"))[0], KeysMade)

        hub.run_block(
            south,
            {"elsewhere": (operator.add, Needs("bad"), 1)},
            imports=(Import("bad", "", 0, failed=True),),
            errors={"bad": error},
        )
        message, error = await south.outcome("elsewhere")
        assert isinstance(message, KeysFailed)
        exception, traceback = pickle.loads(opened(error["exception"])), pickle.loads(opened(error["traceback"]))
        assert isinstance(exception, ZeroDivisionError) and str(exception) == "on purpose"
        names = []
        while traceback is not None:
            names.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
        assert "failing" in names  # where it was raised, at the other site

    sites.run(check())


def test_an_import_that_nobody_has_is_reported_and_its_block_given_back(sites: Sites) -> None:
    async def check() -> None:
        hub, south = sites.hub, sites.south
        for source in ("north", "nowhere"):
            hub.run_block(south, {"y": (operator.add, Needs("x"), 1)}, imports=(Import("x", source, 28),))
            failed = await south.told_of(ImportFailed)
            assert (failed.key, failed.source) == ("x", source)
        hub.run_block(south, {"z": (operator.add, 1, 1)})
        await south.outcome("z")

    sites.run(check())


def test_queued_blocks_are_recalled_and_running_ones_cancelled(sites: Sites) -> None:
    async def check() -> None:
        hub, north = sites.hub, sites.north
        blocks = [hub.run_block(north, {f"s{i}-{j}": (slow, 0.5) for j in range(10)}) for i in range(3)]
        await north.told_of(BlockStarted)
        ids = [(block.block.id, block.attempt) for block in blocks]
        north.send(RecallBlock(*ids[2]))
        assert await north.told_of(BlockRecalled) == BlockRecalled(*ids[2], given=True)
        north.send(RecallBlock(*ids[0]))
        assert await north.told_of(BlockRecalled) == BlockRecalled(*ids[0], given=False)
        north.send(CancelBlock(*ids[0]))
        north.send(CancelBlock(*ids[1]))
        hub.run_block(north, {"x": (operator.add, 1, 1)})
        started = time.monotonic()
        await north.outcome("x")
        assert time.monotonic() - started < 4  # not behind twenty tasks of half a second

    sites.run(check())


def test_the_hub_calls_the_scheduler_and_the_cluster_through_channels(sites: Sites) -> None:
    async def check() -> None:
        hub, north = sites.hub, sites.north
        data = {"d": Serialized(*serialize([1, 2, 3])), "e": Serialized(*serialize(7))}
        reply = await north.call("scatter_keys", data=data)
        assert reply["nbytes"].keys() == {"d", "e"} and min(reply["nbytes"].values()) > 0
        hub.run_block(north, {"n": (len, Needs("d"))})
        await north.outcome("n")
        assert await north.value("n") == 3
        identity = await north.call("scheduler_rpc", scheduler_op="identity", kwargs={"n_workers": -1})
        assert len(identity["workers"]) == 1
        with pytest.raises(OpaqueError):
            await north.call("scheduler_rpc", scheduler_op="retire_workers", kwargs={"nonsense": 1})
        calls = [north.call("scheduler_rpc", scheduler_op="who_has", kwargs={"keys": ["d"]}) for _ in range(20)]
        assert {len(found["d"]) for found in await asyncio.gather(*calls)} == {1}
        logs = await north.call("cluster", method="logs", kwargs={})
        assert any("worker" in log.lower() for log in logs.values())
        for n in (2, 1):
            assert await north.call("cluster", method="scale", kwargs={"n": n}) is None
            await has_workers(north, n)
        with pytest.raises(OpaqueError, match="rockets"):
            await north.call("cluster", method="rockets", kwargs={})

    sites.run(check())


def test_strangers_get_nothing_at_the_door(sites: Sites) -> None:
    async def check() -> None:
        hub, north = sites.hub, sites.north
        hub.run_block(north, {"x": (operator.add, 1, 2)})
        await north.outcome("x")
        comm = await connect_opaque(north.hello.data_address)
        await comm.write({"op": "get_keys", "keys": ["x"], "token": "guessed", "site": "north", "reply": False})
        answer = await comm.read()
        assert answer["end"] and "does not know the caller" in answer["error"]
        await comm.write({"op": "get-import", "key": "x", "token": "guessed"})
        assert (await comm.read())["status"] == "error"
        await comm.write({"op": "gather", "keys": ["x"], "reply": False})  # only over a channel that it dialled
        await comm.write({"op": "echo", "data": "still there"})
        assert await comm.read() == "still there"
        await comm.close()

    sites.run(check())


def test_a_lost_import_is_told_and_what_uses_it_given_back(sites: Sites) -> None:
    async def check() -> None:
        hub, north, south = sites.hub, sites.north, sites.south
        hub.run_block(north, {"x": (numbers, 100_000)})
        await north.outcome("x")
        hub.run_block(south, {"y": (total, Needs("x"))}, imports=(Import("x", "north", 800_000),))
        await south.outcome("y")
        how = {"stimulus_id": "test", "timeout": 30}
        await south.call("scheduler_rpc", scheduler_op="restart_workers", kwargs=how)
        assert (await south.told_of(KeysLost)).keys == ("x",)
        again = (Import("x", "north", 800_000),)
        south.send(ReleaseKeys(("y",)))
        hub.run_block(south, {"y": (total, Needs("x"))}, imports=again)
        await south.outcome("y")
        assert await south.value("y") == 100_000 * 99_999 / 2

    sites.run(check())


def test_a_site_is_refused_joins_joins_again_and_drains() -> None:
    async def check() -> None:
        async with ScriptedHub(refuse="a site named 'north' is connected already") as hub:
            agent = Agent("north", spec(), hub=hub.address)
            await agent.start()
            with pytest.raises(ConnectionRefused, match="is connected already"):
                await agent.joined()
            hub.refuse = ""
            await agent.joined()
            await check_rejoin(hub, await hub.site("north"))
            await check_drain(agent, await hub.site("north"))
            await agent.close()

    run(check())


async def check_rejoin(hub: ScriptedHub, first: SiteLink) -> None:
    hub.run_block(first, {"x": (operator.add, 1, 2)})
    await first.outcome("x")
    assert first.stream is not None
    first.stream.comm.abort()
    while hub.sites.get("north") in (first, None):
        await asyncio.sleep(0.05)
    second = hub.sites["north"]
    assert second.hello.incarnation == first.hello.incarnation
    held = await second.told_of(SiteHoldings)  # to a hub that does not know its session: what is there
    assert [(each.kept, each.open) for each in held.blocks] == [(("x",), ())]
    assert await second.value("x") == 3
    hub.run_block(second, {"y": (operator.add, Needs("x"), 2)})
    await second.outcome("y")
    assert await second.value("y") == 5


async def check_drain(agent: Agent, north: SiteLink) -> None:
    draining = asyncio.create_task(agent.drain())
    await north.wait_for(lambda message: isinstance(message, SiteStatus) and message.draining)
    assert not draining.done()
    north.send(CloseSite("drained"))
    await draining
    assert await agent.finished() == "drained"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster": "dask.distributed.NoCluster"}, "dask.distributed.NoCluster cannot be imported"),
        ({"options": {"n_workers": 1, "threads": 3}}, "unexpected keyword argument 'threads'"),
        ({"options": {**LOCAL, "processes": False}}, "leave out processes=False"),
    ],
)
def test_a_cluster_that_cannot_start_is_explained(options: dict[str, Any], said: str) -> None:
    async def check() -> None:
        agent = Agent("north", ClusterSpec.of(SiteOptions(**options)), hub="tcp://127.0.0.1:1")
        with pytest.raises(SiteStartError, match=said):
            await agent.start()

    run(check())


def test_what_a_cluster_prints_does_not_disturb_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatty.py").write_text(CHATTY)
    monkeypatch.syspath_prepend(str(tmp_path))

    async def check() -> None:
        cluster = ClusterSpec.of(SiteOptions(cluster="chatty.Chatty", options=LOCAL, directory=tmp_path)).adapter()
        await cluster.start()
        assert await cluster.call("scale", {"n": 1}) is None
        with pytest.raises(ConfigurationError, match="unexpected keyword"):
            await cluster.call("scale", {"workers": 1})
        await cluster.close()
        with pytest.raises(SiteStartError, match="has ended"):
            await cluster.call("scale", {"n": 1})

    run(check())


CHATTY = """
from distributed import LocalCluster

class Chatty(LocalCluster):
    def scale(self, n):
        print("{}")
        return super().scale(n)

print("imported")
"""
AGENT = """
import asyncio, sys
from daskfed.profile import SiteOptions
from daskfed.site.agent import Agent
from daskfed.site.clusters import ClusterSpec

async def main():
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    agent = Agent("north", ClusterSpec.of(SiteOptions(options=options)), hub=sys.argv[1])
    await agent.start()
    await agent.joined()
    print(agent.cluster.pid, flush=True)
    await agent.finished()

asyncio.run(main())
"""


@pytest.mark.parametrize("victim", ["agent", "host"])
def test_nothing_is_left_when_a_process_of_a_site_is_killed(victim: str) -> None:
    async def check() -> None:
        async with ScriptedHub() as hub:
            pipe = asyncio.subprocess.PIPE
            agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, hub.address, stdout=pipe)
            assert agent.stdout is not None
            host = int(await agent.stdout.readline())
            north = await hub.site("north")
            info = await north.call("scheduler_rpc", scheduler_op="identity", kwargs={"n_workers": -1})
            hub.run_block(north, {"pid": (os.getpid,)})
            await north.outcome("pid")
            worker = await north.value("pid")
            assert len(info["workers"]) == 1 and alive(host) and alive(worker)
            os.kill(agent.pid if victim == "agent" else host, signal.SIGKILL)
            while alive(host) or alive(worker) or alive(agent.pid):
                await asyncio.sleep(0.05)
            await agent.wait()

    run(check(), timeout_s=60)
