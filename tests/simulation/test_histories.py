"""Two thousand histories of the whole federation break no rule, use every row of the tables and see every fault."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation import coverage
from tests.simulation.faults import WIRE_FAULTS
from tests.simulation.federation import Result, Simulation
from tests.simulation.playing import play

HISTORIES = int(os.environ.get("DASKFED_HISTORIES", "2000"))
FIRST_SEED = int(os.environ.get("DASKFED_SEED", "0"))
PROCESSES = 2

MANY = 2000  # histories in which each row of the tables and each kind of fault must occur
OFTEN = 20  # times at the least
FAULTS_EACH = 5  # that a history has on average, beside what its wires lose and repeat


@pytest.mark.timeout(1800)  # CI runs it beside other tests, on what these leave of the processors
def test_histories_break_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        seeds = [seed for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES)]
        played = list(pool.map(play, seeds, chunksize=20))
    broken = [each for each in played if isinstance(each, str)]
    assert not broken, f"{len(broken)} of {HISTORIES} histories broke a rule; the first:\n{broken[0]}"
    results = [each for each in played if isinstance(each, Result)]
    faults = sum((result.faults for result in results), Counter[str]())
    counts = coverage.count_all(coverage.merge(result.rows for result in results), faults)
    with capsys.disabled():
        print("", summary(results), *counts, sep="\n")
    assert min(result.sites for result in results) >= 3
    assert min(result.tasks for result in results) >= 200
    assert min(result.events for result in results) >= 200
    assert faults_each(results) >= FAULTS_EACH
    if HISTORIES >= MANY:
        seldom = [str(count) for count in counts if count.times < OFTEN]
        assert not seldom, "\n".join(["these occurred too seldom:", *seldom])


def faults_each(results: list[Result]) -> float:
    """Return how many faults a history had on average, beside those of its wires."""
    total = sum(result.faults.total() - sum(result.faults[kind] for kind in WIRE_FAULTS) for result in results)
    return total / len(results)


def summary(results: list[Result]) -> str:
    """Return one line of totals."""
    total = [sum(getattr(result, name) for result in results) for name in ("sites", "tasks", "events", "seconds")]
    words = "{} sites, {} tasks, {} events, {:.0f} s of virtual time".format(*total)
    words += f", {faults_each(results):.1f} faults each"
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
