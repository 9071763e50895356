"""Sites' answers are merged into one."""

from __future__ import annotations

from typing import Any

import pytest

from daskfed.hub.merging import (
    add_series,
    first_or_last,
    merge_benchmarks,
    merge_stories,
    merge_task_metadata,
    merge_task_streams,
    page_of_reports,
)


def shown(site: str, worker: str) -> str:
    return f"{site}:{worker}"


def record(key: str, *stops: float) -> dict[str, Any]:
    return {"key": key, "worker": "w", "startstops": [{"action": "compute", "start": 0.0, "stop": s} for s in stops]}


def test_task_streams_are_in_the_order_of_their_ends() -> None:
    merged = merge_task_streams({"a": [record("x", 1.0, 5.0), record("y", 6.0)], "b": [record("z", 5.5)]}, shown)
    assert [(each["key"], each["worker"]) for each in merged] == [("x", "a:w"), ("z", "b:w"), ("y", "a:w")]
    assert merge_task_streams({}, shown) == []


@pytest.mark.parametrize(
    ("count", "first", "keys"),
    [(None, False, "xyz"), (2, True, "xy"), (2, False, "yz"), (9, True, "xyz"), (9, False, "xyz"), (0, False, "")],
)
def test_a_count_takes_the_first_or_the_last(count: int | None, first: bool, keys: str) -> None:
    records = [record(key, 1.0) for key in "xyz"]
    assert "".join(each["key"] for each in first_or_last(records, count, first=first)) == keys


@pytest.mark.parametrize("imported_first", [True, False])
def test_metadata_of_an_import_does_not_hide_that_of_the_task(imported_first: bool) -> None:
    made = {"metadata": {"x": {"rows": 3}, "y": {}}, "state": {"x": "memory", "y": "erred"}}
    imported: dict[str, Any] = {"metadata": {"x": {}}, "state": {"x": "memory"}}
    merged = merge_task_metadata([imported, made] if imported_first else [made, imported])
    assert merged == {"metadata": {"x": {"rows": 3}, "y": {}}, "state": {"x": "memory", "y": "erred"}}


def test_stories_say_who_tells_them() -> None:
    schedulers = {"a": [("x", "released", "waiting")], "b": RuntimeError("it does not tell")}
    workers = {"a": {"w": [("x", "fetch")]}, "b": RuntimeError("nor these")}
    merged = merge_stories(schedulers, workers, shown, alone=False)
    assert merged == [("scheduler at a", "x", "released", "waiting"), ("a:w", "x", "fetch")]
    assert merge_stories(schedulers, {}, shown, alone=True)[0][0] == "scheduler"


def test_benchmarks_are_means_over_workers() -> None:
    one = {"disk": {"1 kiB": 10.0}, "memory": {"2 kiB": 5.0}, "network": {}}
    three = {"disk": {"1 kiB": 30.0}, "memory": {}, "network": {"1 kiB": 7.0}}
    merged = merge_benchmarks([(one, 1), (three, 3)])
    assert merged == {"disk": {"1 kiB": 25.0}, "memory": {"2 kiB": 5.0}, "network": {"1 kiB": 7.0}}


def test_series_are_added_though_clocks_differ() -> None:
    near = [(100.0, 1), (101.0, 2), (103.0, 4)]
    far = [(5000.0, 10), (5002.0, 30)]
    assert add_series([near, far], 50.0) == [(50.0, 11), (51.0, 12), (52.0, 32), (53.0, 34)]
    assert add_series([near], 100.0) == near
    assert add_series([], 100.0) == []


def test_a_page_of_reports_escapes_what_sites_say() -> None:
    page = page_of_reports({"south": "<html>\"quoted\" <script>run()</script></html>", "<b>": ImportError("no <bokeh>")})
    assert page.count("<iframe") == 1 and 'srcdoc="&lt;html&gt;&quot;quoted&quot; &lt;script&gt;' in page
    assert "<script" not in page and "<b>&" not in page and "no &lt;bokeh&gt;" in page
    assert page.index("&lt;b&gt;") < page.index("south")
