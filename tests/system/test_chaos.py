"""Processes of a federation are killed at random while it works: every result is right, and nothing is left.

``DASKFED_CHAOS_ROUNDS`` says how many rounds are played in all, those with an even seed over two sites, the others over
three, both at once; each prints its seed where it fails, and ``DASKFED_SEED=<seed> DASKFED_CHAOS_ROUNDS=1`` plays that
one again.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daskfed import Client
from tests.system.chaos import Killer, Siege, plan, told
from tests.system.chaos_load import Load

pytestmark = pytest.mark.system

ROUNDS = int(os.environ.get("DASKFED_CHAOS_ROUNDS", "30"))
SEED = int(os.environ.get("DASKFED_SEED", "1000"))
ROUND_S = 120.0  # within which a round must be over, whatever was killed
LEASE = {"timeout": "4s", "validation_interval": "1s"}  # after which a Lock whose holder was killed is free again
SIEGES = {2: ("north", "south"), 3: ("north", "south", "west")}


@pytest.fixture
def besiege(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Siege]]:
    """Start federations, of which nothing is left after the test."""
    for name, value in LEASE.items():
        monkeypatch.setenv(f"DASK_DISTRIBUTED__SCHEDULER__LOCKS__LEASE_{name.upper()}", value)
    sieges: list[Siege] = []

    def started(nsites: int) -> Siege:
        sieges.append(Siege(SIEGES[nsites], tmp_path / f"state-{nsites}", threads=4 - nsites))
        return sieges[-1]

    yield started
    for siege in sieges:
        siege.destroy()


@pytest.mark.timeout(60 + ROUNDS * ROUND_S)
def test_work_goes_on_whoever_is_killed(besiege: Callable[[int], Siege], tmp_path: Path) -> None:
    """Hub, agents, cluster hosts and workers are killed while calls, arrays, dataframes and Locks are at work."""
    seeds: dict[int, list[int]] = {}
    for seed in range(SEED, SEED + ROUNDS):
        seeds.setdefault(2 + seed % 2, []).append(seed)
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(hold, besiege, nsites, mine, tmp_path) for nsites, mine in seeds.items()]
    failures = [failure for each in held if (failure := each.exception()) is not None]
    assert not failures, "\n".join("".join(traceback.format_exception(failure)) for failure in failures)


def hold(besiege: Callable[[int], Siege], nsites: int, seeds: list[int], folder: Path) -> None:
    """Play one round after the other in one federation, and end it. Raises AssertionError where that fails."""
    start = time.monotonic()
    siege = besiege(nsites)
    with Client(siege.address, timeout=30, set_as_default=False) as client:
        tasks = sum(play(siege, client, seed, folder) for seed in seeds)
    problems = siege.close()
    assert not problems, "\n".join(problems)
    kills = ", ".join(f"{count} {kind}" for kind, count in sorted(siege.kills.items()))
    print(f"\n{nsites} sites: {len(seeds)} rounds in {time.monotonic() - start:.0f} s, {tasks} tasks, kills: {kills}")
    print("scheduler and worker disagreed:", *siege.said("Scheduler and worker disagree"), sep="\n  ")


def play(siege: Siege, client: Client, seed: int, folder: Path) -> int:
    """Play one round; return how many futures it had. Raises AssertionError with all that is known if it fails."""
    kills = plan(seed, len(siege.sites))
    load = Load(client, seed, folder / f"round-{seed}")
    start = time.monotonic()
    with Killer(siege, kills) as killer:
        try:
            load.check(ROUND_S)
            failure = None
        except Exception as exc:
            failure = exc
    if failure is not None:
        raise AssertionError(f"seed {seed}: {failure!r}\n{told(siege, client, load.futures, killer)}") from failure
    print(f"seed {seed}: {time.monotonic() - start:.1f} s", *killer.story, sep="\n  ")
    return len(load.futures)
