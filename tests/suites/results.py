"""What became of each test, and what that says of a suite: sums, and the bars that must be met. Pure, but for files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

MIN_SENT = 0.8  # of the computing tests, which must have sent a block to the hub
MIN_PASSED = 0.99  # of those that count
SITES = 2  # that must have run blocks


@dataclass(frozen=True, slots=True)
class Row:
    """One test."""

    test: str  # as pytest names it, below site-packages
    outcome: str  # "passed", "failed", "skipped", "xfailed" or "xpassed"
    seconds: float
    computations: int = 0  # that it asked Dask for
    blocks: dict[str, int] = field(default_factory=dict)  # site -> blocks that ran there
    imported: int = 0  # keys that crossed between sites
    why: str = ""  # it failed or was skipped


@dataclass(slots=True)
class Summary:
    """A suite, or a part of one, over two sites."""

    tests: int = 0
    deselected: int = 0  # since they do not pass over a stock LocalCluster either
    skipped: int = 0
    xfailed: int = 0  # as the suite expects
    computing: int = 0  # of those that are not deselected
    sent: int = 0  # of these, tests that sent a block to the hub
    passed: int = 0  # tests that sent a block and passed: only these count
    passed_alone: int = 0  # passed, and no block was sent
    failed: list[Row] = field(default_factory=list)
    blocks: Counter[str] = field(default_factory=Counter)  # by site
    imported: int = 0
    seconds: float = 0.0

    def take(self, row: Row, deselected: bool) -> None:
        """Count one test."""
        self.tests += 1
        self.seconds += row.seconds
        self.blocks.update(row.blocks)
        self.imported += row.imported
        if deselected:
            self.deselected += 1
            return
        sent = bool(row.blocks)
        self.computing += row.computations > 0
        self.sent += sent
        match row.outcome:
            case "skipped":
                self.skipped += 1
            case "xfailed" | "xpassed":
                self.xfailed += 1
            case "passed":
                self.passed += sent
                self.passed_alone += not sent
            case _:
                self.failed.append(row)

    def problems(self) -> list[str]:
        """Return the bars that are not met, in words."""
        found = []
        idle = SITES - sum(count > 0 for count in self.blocks.values())
        if idle:
            found.append(f"{idle} of {SITES} sites ran no block")
        if self.sent < MIN_SENT * self.computing:
            found.append(f"only {self.sent} of {self.computing} computing tests sent a block to the hub")
        counted = self.passed + len(self.failed)
        if self.passed < MIN_PASSED * counted or not counted:
            found.append(f"only {self.passed} of {counted} tests that count have passed")
        return found

    def __str__(self) -> str:
        blocks = ", ".join(f"{site} {count}" for site, count in sorted(self.blocks.items())) or "none"
        return (
            f"{self.tests} tests in {self.seconds:.0f} s: {self.deselected} deselected, {self.skipped} skipped, "
            f"{self.xfailed} expected to fail; {self.computing} computed, {self.sent} of them sent blocks; "
            f"{self.passed} of these passed, {len(self.failed)} failed; {self.passed_alone} passed without blocks; "
            f"blocks: {blocks}; cross-site keys: {self.imported}"
        )


def summary(rows: Iterable[Row], deselected: Collection[str]) -> Summary:
    """Return the sums over some tests."""
    found = Summary()
    for row in rows:
        found.take(row, row.test in deselected)
    return found


def write(path: Path, row: Row) -> None:
    """Add a row to a file of results."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> dict[str, Row]:
    """Return the last row of each test in a file of results, which may not exist."""
    return {row.test: row for row in _rows(path)}


def _rows(path: Path) -> Iterator[Row]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Row(**json.loads(line))


def read_deselected(path: Path) -> frozenset[str]:
    """Return the tests that a list names; none where there is no list."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return frozenset(line for line in lines if line and not line.startswith("#"))
