"""The pytest plugin that runs a suite at a place and writes down what became of each test."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.suites.places import Stock, TwoSites
from tests.suites.redirection import Redirection
from tests.suites.results import Row, read_deselected, write


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take what ``python -m tests.suites`` has decided."""
    group = parser.getgroup("suites")
    group.addoption("--stock", action="store_true", help="run over a stock LocalCluster")
    group.addoption("--rows", type=Path, help="file that a line is added to for each test")
    group.addoption("--without", type=Path, help="file with tests that are not run")
    group.addoption("--just", type=Path, help="file with the only tests that are run")
    group.addoption("--threads", type=int, help="of each worker")
    group.addoption("--shard", default="1/1", help="i/n: only every n-th test, from the i-th on")


def pytest_configure(config: pytest.Config) -> None:
    """Start the place before any test is imported."""
    if not config.option.collectonly:
        config.pluginmanager.register(Recorder(config), "suites-recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is listed, and what belongs to other shards."""
    without = read_deselected(config.option.without) if config.option.without else ()
    just = read_deselected(config.option.just) if config.option.just else None
    first, of = map(int, config.option.shard.split("/"))
    mine = [item for i, item in enumerate(items) if i % of == first - 1 and item.nodeid not in without]
    kept = [item for item in mine if just is None or item.nodeid in just]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class Recorder:
    """Watches each test, and starts another cluster after one that was ended for taking too long."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.option.rows
        place = Stock if config.option.stock else TwoSites
        self.redirection = Redirection(place(config.option.threads))
        self.redirection.install()
        self.reports: list[pytest.TestReport] = []

    def pytest_unconfigure(self) -> None:
        """End the place."""
        self.redirection.close()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what became of a step of the present test."""
        self.reports.append(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be imported is a failure, not an absence."""
        if report.failed:
            write(self.path, Row(report.nodeid, "failed", 0.0, why=_why(report)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Write a row for a test."""
        place = self.redirection.place
        blocks, imported, computations = Counter(place.blocks), place.imported, place.computations
        self.reports.clear()
        result = yield
        row = Row(
            item.nodeid, outcome(self.reports), round(sum(report.duration for report in self.reports), 3),
            place.computations - computations, dict(place.blocks - blocks), place.imported - imported,
            next((_why(report) for report in self.reports if not report.passed), ""),
        )  # fmt: skip
        write(self.path, row)
        self._tidy(row)
        return result

    def _tidy(self, row: Row) -> None:
        """Let go what the test has left, which a traceback may hold."""
        if "Timeout" in row.why:
            self.redirection.restart()
        elif self.redirection.client.futures:
            gc.collect()


def outcome(reports: list[pytest.TestReport]) -> str:
    """Return the one word for the steps of a test."""
    if any(report.failed for report in reports):
        return "failed"
    skipped = any(report.skipped for report in reports)
    if any(hasattr(report, "wasxfail") for report in reports):
        return "xfailed" if skipped else "xpassed"
    return "skipped" if skipped else "passed"


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the last lines of a traceback, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])[:200]
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return " | ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)[:400]
