"""A thousand histories of the whole federation break no rule, and between them use the transition tables."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from daskfed.hub import states as hub_states
from daskfed.site import states as site_states
from tests.simulation import coverage
from tests.simulation.federation import Result, Simulation
from tests.simulation.playing import play

HISTORIES = int(os.environ.get("DASKFED_HISTORIES", "1000"))
FIRST_SEED = int(os.environ.get("DASKFED_SEED", "0"))
PROCESSES = 2

TABLES = (
    ("hub block", hub_states.BLOCK_MOVES),
    ("hub key", hub_states.KEY_MOVES),
    ("site block", site_states.BLOCK_MOVES),
    ("site key", site_states.KEY_MOVES),
)
ROWS = 45  # of the tables' 65 that histories without crashes and lost workers go through at the least


@pytest.mark.timeout(600)
def test_histories_break_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        seeds = [seed for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES)]
        played = list(pool.map(play, seeds, chunksize=20))
    broken = [each for each in played if isinstance(each, str)]
    assert not broken, f"{len(broken)} of {HISTORIES} histories broke a rule; the first:\n{broken[0]}"
    results = [each for each in played if isinstance(each, Result)]
    rows = coverage.merge(result.rows for result in results)
    with capsys.disabled():
        print(f"\n{summary(results)}\n{coverage.report(TABLES, rows)}")
    assert min(result.sites for result in results) >= 3
    assert min(result.tasks for result in results) >= 200
    assert min(result.events for result in results) >= 200
    if HISTORIES >= 1000:
        covered = sum(len(table) - len(coverage.uncovered(table, rows[name])) for name, table in TABLES)
        assert covered >= ROWS, f"the histories went through {covered} rows of the tables only"


def summary(results: list[Result]) -> str:
    """Return one line of totals."""
    total = [sum(getattr(result, name) for result in results) for name in ("sites", "tasks", "events", "seconds")]
    words = "{} sites, {} tasks, {} events, {:.0f} s of virtual time".format(*total)
    return f"{len(results)} histories: {words}; least of one: " + ", ".join(
        f"{min(getattr(result, name) for result in results)} {name}" for name in ("sites", "tasks", "events")
    )


def story(seed: int) -> str:
    """Return a digest of all that happens in a history."""
    lines: list[str] = []
    Simulation(seed, story=lines).run()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("seed", [3, 14, 15])
def test_a_seed_replays_exactly_also_in_another_process(seed: int) -> None:
    """Neither the order of sets nor the hash of strings may leak into a history."""
    code = f"from tests.simulation.test_histories import story; print(story({seed}))"
    run = [sys.executable, "-c", code]
    digests = {
        subprocess.run(
            run, env={**os.environ, "PYTHONHASHSEED": hashed}, capture_output=True, text=True, timeout=100, check=True
        ).stdout.strip()
        for hashed in ("1", "2")
    }
    assert digests == {story(seed)}


def test_different_seeds_are_different_histories() -> None:
    assert len({story(seed) for seed in range(5)}) == 5
