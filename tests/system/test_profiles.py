"""A client of a profile: its sites start with it, scale as it says, and end with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import distributed
import psutil
import pytest
from distributed import LocalCluster

from daskfed import Client
from daskfed.errors import ConfigurationError, SiteStartError
from tests.conftest import HELPERS
from tests.system.commands import NO_DASHBOARD
from tests.system.waiting import until

pytestmark = pytest.mark.system

LOCAL = {"threads_per_worker": 1, **NO_DASHBOARD}
TWO = {
    "sites": {
        "laptop": {"options": LOCAL, "scale": {"fixed": 2}},
        "campus": {"options": LOCAL, "scale": {"maximum": 1, "idle-timeout": "2s"}, "labels": {"scratch": "era5"}},
    }
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = children()
    yield
    until(lambda: children() <= before, 20)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if not is_helper(child)}


def is_helper(process: psutil.Process) -> bool:
    """Whether it is one of Python's own, which lives as long as the tests do."""
    try:
        return any(name in " ".join(process.cmdline()) for name in HELPERS)
    except psutil.Error:  # it has ended
        return False


def workers_of(client: Client, site: str) -> int:
    return int(client.sites()[site]["workers"])


def test_its_sites_scale_as_it_says() -> None:
    with dask.config.set({"daskfed.profiles.two": TWO}), Client(profile="two", set_as_default=False) as client:
        until(lambda: workers_of(client, "laptop") == 2, 20)
        assert workers_of(client, "campus") == 0
        assert client.submit(sum, [1, 2], site="scratch=era5").result(timeout=60) == 3
        assert workers_of(client, "campus") == 1
        until(lambda: workers_of(client, "campus") == 0, 30)
        assert workers_of(client, "laptop") == 2


def test_the_default_one() -> None:
    one = {"sites": {"laptop": {"options": {"n_workers": 1, **LOCAL}}}}
    with (
        dask.config.set({"daskfed.profiles.one": one, "daskfed.default-profile": "one"}),
        Client(set_as_default=False) as client,
    ):
        assert list(client.sites()) == ["laptop"]


def test_one_that_is_named_counts_more_than_an_address_that_is_configured() -> None:
    one = {"sites": {"laptop": {"options": {"n_workers": 1, **LOCAL}}}}
    with (
        dask.config.set({"daskfed.profiles.one": one, "scheduler-address": "tcp://127.0.0.1:9"}),
        Client(profile="one", set_as_default=False) as client,
    ):
        assert list(client.sites()) == ["laptop"]


def test_a_scheduler_that_runs_already_is_a_site_and_goes_on_afterwards() -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", protocol="tcp://") as cluster:
        theirs = {"sites": {"theirs": {"cluster": cluster.scheduler_address}}}
        with dask.config.set({"daskfed.profiles.one": theirs}), Client(profile="one", set_as_default=False) as client:
            assert client.submit(sum, [1, 2]).result(timeout=60) == 3
            assert workers_of(client, "theirs") == 1
        with distributed.Client(cluster, set_as_default=False) as stock:
            assert stock.submit(sum, [1, 2]).result(timeout=60) == 3
            assert until(lambda: not stock.who_has(), 20)


def test_an_address_where_no_scheduler_is() -> None:
    nobody = {"sites": {"theirs": {"cluster": "tcp://127.0.0.1:9"}}}
    with dask.config.set({"daskfed.profiles.one": nobody}):
        with pytest.raises(SiteStartError, match="site 'theirs': tcp://127.0.0.1:9 did not start"):
            Client(profile="one", set_as_default=False)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"scale": {"minimun": 1}}, ConfigurationError, "unknown option 'scale.minimun'; did you mean 'minimum'?"),
        ({"cluster": "dask.distributed.LocalClutser"}, SiteStartError, "site 'laptop': the Cluster class"),
        ({"cluster": "tests.system.unscalable.Unscalable"}, SiteStartError, "option 'scale': Unscalable.scale("),
    ],
)
def test_a_mistake_is_told_by_the_client(changes: dict[str, Any], error: type[Exception], complaint: str) -> None:
    bad = {"sites": {"laptop": {**TWO["sites"]["laptop"], **changes}}}
    with dask.config.set({"daskfed.profiles.bad": bad}), pytest.raises(error) as raised:
        Client(profile="bad", set_as_default=False)
    assert complaint in str(raised.value)
