"""A user sees what a federation of two sites does, by the means that stock Dask has for one cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import operator
import re
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import msgpack
import pytest
from dask.utils import key_split
from distributed import get_task_metadata, get_task_stream, performance_report, span, wait
from distributed.diagnostics import MemorySampler

from daskfed import Client, Federation
from tests.system import commands
from tests.system.commands import Command
from tests.system.waiting import until

pytestmark = pytest.mark.system

ONE = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
SITES = ("north", "south")


@pytest.fixture(scope="module")
def federation() -> Any:
    """Two sites of one worker each; one says of itself what would be markup."""
    labels = {"north": {"note": "<script>alert(1)</script>"}, "south": {}}
    with Federation(sites={site: {"options": ONE, "labels": labels[site]} for site in SITES}) as fed:
        yield fed


@pytest.fixture
def other(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of another user."""
    monkeypatch.setenv("LOGNAME", "mallory")
    with Client(federation.scheduler_address, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def embedded() -> Any:
    """The embedded default."""
    with Client(processes=False, set_as_default=False, **ONE) as client:
        yield client


def at_both(client: Client, function: Callable[..., Any] = operator.neg) -> list[Any]:
    """Run a function once at each site and return the futures."""
    with client.as_current():
        futures = [client.submit(function, n, site=site, pure=False) for n, site in enumerate(SITES)]
        wait(futures)
    return futures


def sites_of(workers: Any) -> set[str]:
    """Return the sites in ``fed://site/…`` addresses."""
    return {worker.removeprefix("fed://").split("/")[0] for worker in workers}


def said(client: Client) -> None:
    """Wait until the hub has heard what a client said on its stream; its calls may come sooner."""
    client.submit(operator.neg, 1, pure=False).result()


def spin(seconds: float) -> float:
    """Be busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
    return seconds


# -- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.needs("bokeh")
def test_task_stream(client: Client, tmp_path: Path) -> None:
    """The records of both sites, in the order in which the tasks ended, as data and as a plot."""
    with get_task_stream(client, plot="save", filename=str(tmp_path / "stream.html")) as stream:
        futures = at_both(client)
    assert {record["key"] for record in stream.data} == {future.key for future in futures}
    assert sites_of(record["worker"] for record in stream.data) == set(SITES)
    assert all(record["worker"].startswith("fed://") and record["status"] == "OK" for record in stream.data)
    assert "fed://north" in (tmp_path / "stream.html").read_text()
    latest = client.get_task_stream(count=2)
    assert [record["key"] for record in latest] == [record["key"] for record in stream.data]
    assert len(client.get_task_stream(start="1 hour", count=1)) == 1
    data, figure = client.get_task_stream(plot=True)
    assert len(data) >= 2 and figure is not None


def test_task_metadata(client: Client) -> None:
    """Keys of both sites with how they ended; a name that nobody started is an error."""
    with get_task_metadata() as tasks:
        good = at_both(client)
        bad = client.submit(operator.truediv, 1, 0, site="south")
        wait(bad)
    assert tasks.state == {good[0].key: "memory", good[1].key: "memory", bad.key: "erred"}
    assert set(tasks.metadata) == set(tasks.state)
    with pytest.raises(ValueError, match="'nobody'"):
        client.sync(client.scheduler.stop_task_metadata, name="nobody")


@pytest.fixture
def join(federation: Federation) -> Iterator[Callable[[str], None]]:
    """Have a site join the federation until the test is over."""
    joined: list[Command] = []

    def join(name: str) -> None:
        joined.append(commands.site(name, federation.scheduler_address))
        joined[-1].line(f"daskfed site {name} joined")

    yield join
    for command in joined:
        command.press()
        command.wait()


def test_a_site_that_joins_late_is_recorded_too(client: Client, join: Callable[[str], None]) -> None:
    with get_task_metadata() as tasks, get_task_stream(client) as stream:
        join("late")
        future = client.submit(operator.neg, 5, site="late", pure=False)
        wait(future)
    assert tasks.state == {future.key: "memory"}
    assert [(record["key"], *sites_of([record["worker"]])) for record in stream.data] == [(future.key, "late")]


def test_story(client: Client) -> None:
    """What schedulers and workers of the sites noted of a key that crossed."""
    x = client.submit(operator.neg, 5, site="north", pure=False)
    y = client.submit(operator.neg, x, site="south", pure=False)
    assert y.result() == 5
    story = client.story(x.key)
    tellers = {entry[0] for entry in story}
    assert {"scheduler at north", "scheduler at south"} <= tellers
    assert sites_of(teller for teller in tellers if teller.startswith("fed://")) == set(SITES)
    assert all(x.key in repr(entry) for entry in story)
    with pytest.raises(ValueError, match="on_error"):
        client.story(x.key, on_error="explode")


def test_spans(tmp_path: Path) -> None:
    """The spans extension of each site's scheduler sees the spans that tasks were submitted in."""
    sites = {site: {"options": {**ONE, "processes": False, "dashboard_address": None}} for site in SITES}
    with Federation(sites=sites, in_process=True) as fed, Client(fed, set_as_default=False) as client:
        with span("whole"), span("part"):
            futures = at_both(client)
            total = dask.delayed(sum)([dask.delayed(operator.neg)(n) for n in range(4)])
            assert client.compute(total).result() == -6
        for site, future in zip(SITES, futures, strict=True):
            scheduler = fed._agents[site].cluster._cluster.scheduler
            assert ("whole", "part") in scheduler.extensions["spans"].spans_search_by_name
            (found,) = scheduler.extensions["spans"].find_by_tags("part")
            assert key_split(future.key) in {group.prefix.name for group in found.groups}


# -- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.needs("bokeh")
def test_profile(client: Client, tmp_path: Path) -> None:
    """One tree for both sites, one for some workers, or one for each worker."""
    wait([client.submit(spin, 0.4, site=site, pure=False) for site in SITES])
    merged = until(lambda: (tree := client.profile())["count"] and tree)
    by_worker = client.profile(merge_workers=False)
    assert sites_of(by_worker) == set(SITES)
    assert merged["count"] <= sum(tree["count"] for tree in client.profile(merge_workers=False).values())
    north = next(worker for worker in by_worker if worker.startswith("fed://north/"))
    assert 0 < client.profile(workers=north)["count"] < client.profile()["count"]
    assert client.profile(workers=["north"])["count"] == client.profile(workers=[north])["count"]
    assert until(lambda: client.profile(key="spin")["count"])  # workers sum these up every second
    assert client.profile(scheduler=True)["identifier"] == "root"
    client.profile(filename=str(tmp_path / "profile.html"))
    assert "Dask Profile" in (tmp_path / "profile.html").read_text()
    with pytest.raises(ValueError, match=r"no worker 'nroth'; there are fed://north/.*, or name a site"):
        client.profile(workers=["nroth"])


@pytest.mark.needs("bokeh")
def test_performance_report_of_the_sites(client: Client, tmp_path: Path) -> None:
    """One page with the report of each site in a frame of its own, which has the code escaped."""
    client.get_task_stream()  # from then on sites record the tasks that run
    start = time.time()
    futures = at_both(client)
    how = {"start": start, "last_count": 0, "code": "x < y"}
    page = client.sync(client.scheduler.performance_report, **how)
    assert page.count("<iframe") == 2 and page.count('sandbox="allow-scripts') == 2
    assert 'href="#site-0">north</a>' in page and 'href="#site-1">south</a>' in page
    since = client.get_task_stream(start=start)  # and what ended before, as far as the clocks of workers are not known
    assert {future.key for future in futures} <= {record["key"] for record in since}
    counts = Counter(record["worker"].split("/")[2] for record in since)
    told = re.findall(r"number of tasks: (\d+)", page)
    assert told and told == [str(counts[site]) for site in SITES for _ in range(len(told) // 2)]


def test_dump_cluster_state(client: Client, tmp_path: Path) -> None:
    """The state of each site's scheduler and workers, in one file that the client writes."""
    futures = at_both(client)
    client.dump_cluster_state(str(tmp_path / "dump"))
    import gzip

    with gzip.open(tmp_path / "dump.msgpack.gz") as file:
        state = msgpack.unpackb(file.read(), strict_map_key=False)
    assert set(state["sites"]) == set(SITES) == set(state["hub"]["sites"])
    for site, future in zip(SITES, futures, strict=True):
        assert future.key in state["sites"][site]["scheduler"]["tasks"]
        assert len(state["sites"][site]["workers"]) == 1
    client.dump_cluster_state(str(tmp_path / "dump"), format="yaml", exclude=("tasks",))
    assert "north" in (tmp_path / "dump.yaml").read_text()
    with pytest.raises(ValueError, match="this client writes"):
        client.dump_cluster_state(str(tmp_path / "dump"), write_from_scheduler=True)


def test_benchmark_hardware(client: Client) -> None:
    """Bandwidths, over the workers of both sites; a network has two workers at least, which no site has here."""
    result = client.benchmark_hardware()
    assert set(result) == {"disk", "memory", "network"}
    assert result["disk"] and result["memory"] and min(*result["disk"].values(), *result["memory"].values()) > 0


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_sampler(client: Client) -> None:
    """The memory of both sites together; a measure that Dask does not have is an error, and leaves nothing behind."""
    sampler = MemorySampler()
    with sampler.sample("both", client=client, interval=0.1):
        time.sleep(0.5)
    samples = list(sampler.samples["both"])
    assert len(samples) >= 4 and samples == sorted(samples)
    used = sum(site["memory_used"] for site in client.sites().values())
    assert used / 2 < samples[-1][1] < used * 2
    assert len(sampler.to_pandas()) >= 4
    with pytest.raises(AttributeError, match="beauty"), sampler.sample(client=client, measure="beauty"):
        pass
    with pytest.raises(KeyError, match="no series of memory samples 'nothing'"):
        client.sync(client.scheduler.memory_sampler_stop, key="nothing")


def test_memory_samples_end_with_their_client(federation: Federation, client: Client) -> None:
    """A client that goes without a word leaves no sampler behind, neither at the hub nor at the sites."""
    assert federation.hub is not None
    series = federation.hub.gateway.observing._samplers
    with Client(federation, set_as_default=False) as gone:
        gone.sync(gone.scheduler.memory_sampler_start, client=gone.id, measure="process", interval=0.1)
        assert len(series) == 1
    until(lambda: not series)


# -- topics ----------------------------------------------------------------------------------------------------------


def say(text: str, topic: str = "other") -> None:
    """Print, warn, and log events."""
    distributed.print(text, "!", sep="")
    distributed.warn(f"{text} warns", RuntimeWarning)
    distributed.get_worker().log_event(topic, {"text": text})
    distributed.get_worker().log_event(topic, len(text))


def test_print_and_warn_say_which_site(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """What a task prints, and its warnings, reach the client with the site's name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for site in SITES:
            client.submit(say, f"hello from {site}", site=site, pure=False).result()
        printed = ""

        def come() -> bool:
            nonlocal printed
            printed += capsys.readouterr().out
            return printed.count("\n") >= 2 and sum("warns" in str(each.message) for each in caught) >= 2

        until(come)
    assert sorted(printed.splitlines()) == [f"[{site}] hello from {site}!" for site in SITES]
    told = {str(each.message): each for each in caught}
    for site in SITES:
        warning = told[f"hello from {site} warns"]
        assert warning.category is RuntimeWarning and warning.filename.startswith(f"[{site}] fed://{site}/")


def test_topics_belong_to_their_owner(client: Client, other: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither what tasks log nor what clients log is read or received by a client of another user."""
    mine: list[Any] = []
    theirs: list[Any] = []
    client.subscribe_topic("mine", mine.append)
    other.subscribe_topic("mine", theirs.append)
    said(client)
    client.log_event("mine", "from the client")
    client.submit(say, "mine", "mine", site="north", pure=False).result()
    other.submit(say, "theirs", "mine", site="north", pure=False).result()
    until(lambda: len(mine) == 3 and len(theirs) == 2)
    shown = [(event if not isinstance(event, dict) else (event["text"], event["site"])) for _, event in mine]
    assert shown == ["from the client", ("mine", "north"), 4]
    assert theirs[0][1]["text"] == "theirs" and theirs[0][1]["worker"].startswith("fed://north/")
    assert [event for _, event in other.get_events("mine")] == [event for _, event in theirs]
    assert "from the client" not in repr(other.get_events())
    client.unsubscribe_topic("mine")
    said(client)
    other.log_event("mine", 1)
    client.log_event("mine", 2)
    until(lambda: len(theirs) == 3)
    assert len(mine) == 3 and len(client.get_events("mine")) == len(mine) + 1
    with pytest.raises(ValueError, match="No event handler known"):
        client.unsubscribe_topic("nothing")
    with pytest.raises(TypeError, match="msgpack"):
        client.log_event("mine", object())


def test_an_event_that_comes_after_its_key_was_released_is_its_owners(
    federation: Federation, client: Client, other: Client
) -> None:
    """Events and results come from a site on different ways, and nobody waits for the events."""
    hub = federation.hub
    assert hub is not None
    keys = {}
    for each in (client, other):
        future = each.submit(operator.neg, 1, site="north", pure=False)
        future.result()
        keys[future.key] = hub.owner_of(each.id)
        del future
    until(lambda: not any(key in hub.core.ledger.keys for key in keys))
    assert {key: hub.owner_at("north", key) for key in keys} == keys and len(set(keys.values())) == 2
    assert hub.owner_at("north", "nobody's") is None


def test_a_stranger_reads_no_events(federation: Federation, other: Client) -> None:
    """A call without a secret, or with a wrong one, is the user's at the other end: it reads no events of another."""

    async def ask(**secret: Any) -> Any:
        async with distributed.core.rpc(federation.scheduler_address) as hub:
            return await hub.events(topic="mine", **secret)

    other.log_event("mine", "secret")
    assert "secret" in [event for _, event in other.get_events("mine")]
    assert "secret" not in [event for _, event in asyncio.run(ask())]
    assert "secret" not in [event for _, event in asyncio.run(ask(fed_session="wrong"))]


# -- running a task again --------------------------------------------------------------------------------------------


def fail_with(x: float, y: float) -> float:
    """Divide."""
    return x / (y - 3)


def test_recreate_error_locally(client: Client) -> None:
    """The task to blame runs here, with inputs from two sites; so too where its failure was imported elsewhere."""
    x = client.submit(operator.add, 1, 1, site="north", pure=False)
    y = client.submit(operator.add, 1, 2, site="south", pure=False)
    bad = client.submit(fail_with, x, y, site="south", pure=False)
    after = client.submit(operator.neg, bad, site="north", pure=False)
    for future in (bad, after):
        wait(future)
        with pytest.raises(ZeroDivisionError) as caught:
            client.recreate_error_locally(future)
        assert any(entry.name == "fail_with" for entry in caught.traceback)
    assert client.sync(client._get_errored_future, after) == bad.key
    with pytest.raises(ValueError, match="No errored futures"):
        client.recreate_error_locally(x)


@pytest.mark.parametrize("which", ["client", "embedded"])
def test_recreate_what_only_a_site_knows(which: str, request: pytest.FixtureRequest) -> None:
    """A task inside a block, whose inputs were never outputs, and whose values the site has released."""
    client = request.getfixturevalue(which)
    parts = [dask.delayed(operator.add)(n, 1, dask_key_name=f"part-{n}") for n in range(2)]
    bad = dask.delayed(fail_with)(parts[0], dask.delayed(operator.add)(parts[1], 1), dask_key_name="the-bad-one")
    end = dask.delayed(operator.neg)(bad, dask_key_name="the-end")
    future = client.compute(end, optimize_graph=False)
    with client.as_current():
        wait(future)
    assert client.sync(client._get_errored_future, future) == "the-bad-one"
    with pytest.raises(ZeroDivisionError):
        client.recreate_error_locally(future)
    runspec, inputs = client.sync(client._get_components_from_future, "the-bad-one")
    assert sorted(inputs.values()) == [1, 3]
    until(lambda: not any("part" in str(key) for keys in client.has_what().values() for key in keys))


def test_recreate_task_locally(client: Client) -> None:
    """A task that succeeded, of a call and of a collection; one that nobody knows is an error."""
    x = client.submit(operator.add, 1, 1, site="north", pure=False)
    y = client.submit(operator.mul, x, 21, site="south", pure=False)
    assert client.recreate_task_locally(y) == 42
    import dask.array as da

    total = client.compute(da.ones(100, chunks=10).sum())
    assert float(client.recreate_task_locally(total)) == 100.0
    with pytest.raises(KeyError, match="no site knows how 'never-heard-of'"):
        client.recreate_task_locally("never-heard-of")


# -- what there is ---------------------------------------------------------------------------------------------------


def test_scheduler_file_and_metadata(client: Client, tmp_path: Path) -> None:
    """Another client finds the federation by a file; metadata and datasets are the federation's."""
    client.write_scheduler_file(str(tmp_path / "hub.json"))
    client.scheduler_file = None
    client.set_metadata(["run", "one"], {"x": 1})
    client.publish_dataset(numbers=[1, 2])
    with Client(scheduler_file=str(tmp_path / "hub.json"), set_as_default=False) as second:
        assert set(second.sites()) == set(SITES)
        assert second.get_metadata(["run", "one"]) == {"x": 1}
        assert second.get_metadata(["run", "two"], default=None) is None
        assert list(second.list_datasets()) == ["numbers"]
        assert second.dashboard_link == client.dashboard_link
    with pytest.raises(KeyError):
        client.get_metadata("nothing")
    client.unpublish_dataset("numbers")


def fetch(url: str) -> Any:
    """Return the response to a GET."""
    return urllib.request.urlopen(url, timeout=10)


def test_dashboard(client: Client, federation: Federation) -> None:
    """The hub's page lists the sites, links their dashboards, and shows what they say as text."""
    link = client.dashboard_link
    assert link == federation.dashboard_link and link.startswith("http://127.0.0.1:") and link.endswith("/status")
    response = fetch(link)
    page = response.read().decode()
    assert "script-src" not in response.headers["Content-Security-Policy"]
    assert "note=&lt;script&gt;alert(1)" in page and "<script" not in page
    for site in SITES:
        dashboard = client.sites()[site]["dashboard"]
        assert f"<td>{site}</td><td>running</td>" in page and f'href="{dashboard}"' in page
    root = link.removesuffix("/status")
    plots = json.load(fetch(f"{root}/individual-plots.json"))
    assert plots["Sites"] == "/individual-sites" and b"<table>" in fetch(root + plots["Sites"]).read()
    north = fetch(root + plots["Site north"])
    assert north.url.startswith(client.sites()["north"]["dashboard"].removesuffix("/status"))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(f"{root}/individual-site/nowhere")
    assert client.scheduler_info()["services"]["dashboard"] == int(link.split(":")[2].split("/")[0])
    assert link in client._repr_html_()


# -- asynchronously, and embedded ------------------------------------------------------------------------------------


async def _observe(address: str, folder: Path) -> None:
    async with Client(address, asynchronous=True, set_as_default=False) as client:
        async with get_task_stream(client) as stream:
            await client.gather([client.submit(operator.neg, n, site=site, pure=False) for n, site in enumerate(SITES)])
        assert sites_of(record["worker"] for record in stream.data) == set(SITES)
        assert (await client.profile())["identifier"] == "root"
        sampler = MemorySampler()
        async with sampler.sample("all", client=client, interval=0.05):
            await asyncio.sleep(0.2)
        assert len(sampler.samples["all"]) > 1
        await client.dump_cluster_state(str(folder / "async"))
        assert (folder / "async.msgpack.gz").exists()
        heard: list[Any] = []
        client.subscribe_topic("async", heard.append)
        async with asyncio.timeout(10):
            while not heard:  # what subscribes goes another way than what is logged
                await client.log_event("async", 1)
                await asyncio.sleep(0.05)
        assert set(await client.get_events("async")) >= set(heard)
        assert await client.story("nothing") == []


def test_asynchronous_client(client: Client, federation: Federation, tmp_path: Path) -> None:
    """The same through an asynchronous client in a loop of its own."""
    asyncio.run(_observe(federation.scheduler_address, tmp_path))


def test_embedded(embedded: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the one site of the embedded default, all is as in stock Dask."""
    (worker,) = embedded.scheduler_info()["workers"]
    with get_task_stream(embedded) as stream:
        future = embedded.submit(operator.neg, 1)
        assert future.result() == -1
    assert [(record["key"], record["worker"]) for record in stream.data] == [(future.key, worker)]
    assert {entry[0] for entry in embedded.story(future.key)} == {"scheduler", worker}
    embedded.dump_cluster_state(str(tmp_path / "dump"), format="yaml")
    assert (tmp_path / "dump.yaml").read_text().startswith("scheduler:")
    embedded.submit(say, "hello", "mine", pure=False).result()
    assert capsys.readouterr().out.splitlines()[0] == "hello!"
    assert [event["worker"] for _, event in embedded.get_events("mine") if isinstance(event, dict)] == [worker]
    assert set(embedded.profile(merge_workers=False)) == {worker}
    with pytest.raises(ZeroDivisionError):
        embedded.recreate_error_locally(embedded.submit(operator.truediv, 1, 0))
    assert embedded.dashboard_link == embedded.cluster.dashboard_link == embedded.sites()["local"]["dashboard"]


# -- with what other parts bring -------------------------------------------------------------------------------------


@pytest.mark.needs("bokeh")
def test_performance_report(client: Client, embedded: Client, tmp_path: Path) -> None:
    """One file with a report of each site, and of the embedded default the one report that stock Dask makes."""
    with performance_report(str(tmp_path / "two.html")):
        at_both(client)  # x < y
    page = (tmp_path / "two.html").read_text()
    assert page.count("<iframe") == 2 and "at_both(client)" in page
    with embedded.as_current(), performance_report(str(tmp_path / "one.html")):
        embedded.submit(operator.neg, 1, pure=False).result()
    page = (tmp_path / "one.html").read_text()
    assert "<iframe" not in page and "number of tasks: 1" in page and "Dask Performance Report" in page


def complain(text: str) -> None:
    """Log a warning and something less."""
    logger = logging.getLogger("tests.observing")
    logger.setLevel(logging.INFO)
    logger.warning("%s is wrong", text)
    logger.info("%s is noted", text)


def test_forward_logging(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """Log records of tasks reach the client's logger with their worker and site, until they are not wanted any more."""
    client.forward_logging("tests.observing", level=logging.WARNING)
    for site in SITES:
        client.submit(complain, site, site=site, pure=False).result()

    def forwarded() -> list[Any]:
        return [record for record in caplog.records if record.name == "tests.observing"]

    until(lambda: len(forwarded()) == 2)
    assert {(record.site, record.getMessage()) for record in forwarded()} == {(s, f"{s} is wrong") for s in SITES}
    assert sites_of(record.worker for record in forwarded()) == set(SITES)
    client.unforward_logging("tests.observing")
    client.submit(complain, "north", site="north", pure=False).result()
    client.log_event("later", 1)
    assert len(forwarded()) == 2
