"""Which Cluster class a site starts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from daskfed.errors import ConfigurationError, SiteStartError
from daskfed.profile import SiteOptions
from daskfed.site.clusters import ClusterSpec, HostedCluster, InProcessCluster, call_cluster, resolve, start_cluster


class Slow:
    """A cluster that never gets ready."""

    scheduler_address = ""
    closed = False

    def __init__(self, asynchronous: bool) -> None:
        pass

    def __await__(self) -> Any:
        return asyncio.sleep(1000).__await__()

    async def close(self) -> None:
        Slow.closed = True


class Plain:
    """A cluster whose methods are not coroutines."""

    scheduler_address = ""

    def scale(self, n: int) -> None:
        self.n = n

    def get_logs(self) -> dict[str, str]:
        return {"Scheduler": "all is well"}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ("LocalCluster", "is not the dotted name of a class"),
        ("dask.distributed.NoCluster", "NoCluster cannot be imported"),
        ("no_such_package.Cluster", "No module named 'no_such_package'; is it spelt right"),
        ("dask.distributed.Client", "is no Dask Cluster class"),
        (len, "is no Dask Cluster class"),
    ],
)
def test_what_is_no_cluster_class_is_explained(cluster: Any, said: str) -> None:
    with pytest.raises(SiteStartError, match=said):
        resolve(cluster)


def test_a_class_is_found_by_name_and_as_it_is() -> None:
    assert resolve("dask.distributed.LocalCluster") is resolve(LocalCluster) is LocalCluster


def test_options_that_are_not_json_travel_pickled(tmp_path: Path) -> None:
    options = SiteOptions(cluster=LocalCluster, options={"n_workers": 2, "hook": print}, directory=tmp_path)
    spec = ClusterSpec.of(options)
    assert ClusterSpec(spec.pickle).opened() == (LocalCluster, {"n_workers": 2, "hook": print}, None)
    assert spec.directory == tmp_path
    assert isinstance(spec.adapter(), HostedCluster)
    assert isinstance(ClusterSpec.of(options, in_process=True).adapter(), InProcessCluster)


def test_a_pickle_that_cannot_be_opened_is_explained() -> None:
    with pytest.raises(SiteStartError, match="cannot be opened at the site"):
        ClusterSpec("bm90IGEgcGlja2xl").opened()


def test_a_cluster_that_takes_too_long_is_closed() -> None:
    options = SiteOptions(cluster=Slow)
    spec = ClusterSpec(ClusterSpec.of(options).pickle, timeout_s=0.05)
    with pytest.raises(SiteStartError, match=r"Slow did not start within 0.05 s"):
        asyncio.run(start_cluster(spec))
    assert Slow.closed


def test_options_that_the_class_rejects_are_named() -> None:
    spec = ClusterSpec.of(SiteOptions(cluster=Slow, options={"colour": "red"}))
    with pytest.raises(SiteStartError, match=r"rejected its options .*colour.*unexpected keyword argument"):
        asyncio.run(start_cluster(spec))


def test_errors_show_options_but_no_secrets() -> None:
    options = {"colour": "red", "api_token": "hunter2", "Password": "hunter2", "env": {"X": "hunter2"}, "extra": ["a"]}
    with pytest.raises(SiteStartError) as failed:
        asyncio.run(start_cluster(ClusterSpec.of(SiteOptions(cluster=Slow, options=options))))
    assert "colour='red', api_token=…, Password=…, env=…, extra=…" in str(failed.value)
    assert "hunter2" not in str(failed.value)


def test_methods_may_be_coroutines_or_not_and_refusals_are_explained() -> None:
    async def check() -> None:
        cluster = Plain()
        assert await call_cluster(cluster, "scale", {"n": 3}) is None and cluster.n == 3
        assert await call_cluster(cluster, "logs", {}) == {"Scheduler": "all is well"}
        with pytest.raises(ConfigurationError, match="has no 'explode'; there are scale, adapt, logs"):
            await call_cluster(cluster, "explode", {})
        with pytest.raises(ConfigurationError, match="Plain.adapt.* failed"):
            await call_cluster(cluster, "adapt", {"minimum": 1})

    asyncio.run(check())
