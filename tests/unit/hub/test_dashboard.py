"""The hub's page shows what sites say as text, and links only pages."""

from __future__ import annotations

from typing import Any

import dask
import pytest

from daskfed.errors import ConfigurationError
from daskfed.hub.dashboard import Dashboard, individual_plots, listen_on, page, safe_link
from daskfed.hub.server import Hub

FACTS = {
    "status": "running", "workers": 2, "threads": 4, "running": 1, "queued": 0, "blocks": 3, "memory_used": 2**20,
    "memory_limit": 2**30, "held": 1024, "labels": {}, "dashboard": "http://10.0.0.3:8787/status",
}  # fmt: skip


def site(**facts: Any) -> dict[str, Any]:
    return FACTS | facts


def test_a_page_lists_the_sites() -> None:
    text = page("tcp://hub:1", {"south": site(status="away"), "north": site(labels={"disk": "<i>fast</i>"})}).decode()
    assert text.index("<td>north</td>") < text.index("<td>south</td><td>away</td>")
    assert "disk=&lt;i&gt;fast&lt;/i&gt;" in text and "<i>" not in text
    assert text.count('<a href="http://10.0.0.3:8787/status">') == 2
    assert "1.00 MiB of 1.00 GiB" in text
    assert "No site has joined" in page("tcp://hub:1", {}).decode()


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "//elsewhere", "http://", "", None, "http://[", "http://a/\n"]
)
def test_what_is_no_page_is_not_linked(url: Any) -> None:
    assert safe_link(url) == ""
    assert "href" not in page("h", {"north": site(dashboard=url)}).decode()
    assert individual_plots({"north": site(dashboard=url)}) == {"Sites": "/individual-sites"}


def test_plots_for_jupyterlab() -> None:
    assert individual_plots({"north": FACTS}) == {"Sites": "/individual-sites", "Site north": "/individual-site/north"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ("127.0.0.1", 0)), (8787, ("127.0.0.1", 8787)), (":8787", ("127.0.0.1", 8787)), ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)  # fmt: skip
def test_where_it_listens(setting: Any, expected: tuple[str, int]) -> None:
    assert listen_on(setting) == expected


def test_a_wrong_address_is_named() -> None:
    with (
        dask.config.set({"daskfed.hub.dashboard-address": "nowhere"}),
        pytest.raises(ConfigurationError, match="dashboard-address is 'nowhere': give it as host:port"),
    ):
        Hub()


def test_a_hub_does_without_where_it_cannot_listen(caplog: pytest.LogCaptureFixture) -> None:
    with dask.config.set({"daskfed.hub.dashboard-address": "203.0.113.7:1"}):  # an address of nobody
        dashboard = Dashboard(dict, str)
        dashboard.start()
    assert dashboard.link == "" and dashboard.services == {}
    assert "no page for the hub at 203.0.113.7:1" in caplog.text
