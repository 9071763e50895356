"""A site whose workers are jobs of a real Slurm: they come and go with the work, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.commands import is_host
from tests.system.slurm import Slurm, slurm
from tests.system.user import User, descendants
from tests.system.waiting import alive, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.needs("slurmctld", "slurmd", "sbatch", "munged", "setpriv"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run jobs as whoever submits them"),
]

WAIT_S = 60.0  # for what takes seconds


@pytest.fixture(scope="module")
def batch() -> Iterator[Slurm]:
    with slurm() as batch:
        yield batch


def user_of(batch: Slurm, folder: Path, **options: Any) -> User:
    """Return a user with a profile of one site, whose jobs are of the batch system."""
    profiles = {"hpc": {"sites": {"campus": {**site(folder), **options}}}}
    return User(folder, "ann", profiles, batch.environment)


@contextmanager
def running(user: User, batch: Slurm) -> Iterator[User]:
    """End what a user runs, and see that no job and no process of one is left."""
    try:
        yield user
    finally:
        user.down()
    until(lambda: not batch.jobs() and not batch.processes(), WAIT_S)


def site(folder: Path, **options: Any) -> dict[str, Any]:
    """Return a site of a profile with at most two jobs, which are idle for a second."""
    folders = {"log_directory": str(folder / "logs"), "local_directory": str(folder / "scratch")}
    job = {"cores": 1, "memory": "500MB", "interface": "lo", "walltime": "00:10:00", **folders}
    return {
        "cluster": "dask_jobqueue.SLURMCluster",
        "options": {**job, "scheduler_options": {"dashboard": False}, **options},
        "scale": {"minimum": 0, "maximum": 2, "idle-timeout": "1s"},
        "orphan-timeout": "1s",
        "directory": str(folder),
    }


def test_jobs_come_with_the_work_and_go_without_it(batch: Slurm, tmp_path: Path) -> None:
    with running(user_of(batch, tmp_path), batch) as user:
        user.run("up")
        assert not batch.jobs()
        with user.client() as client:
            futures, where = client.map(slow, range(8), pure=False), client.submit(os.getcwd)
            until(lambda: len(batch.jobs("RUNNING")) == 2, WAIT_S)
            assert client.gather(futures) == [number * 10 for number in range(8)]
            assert where.result() == str(tmp_path)
            del futures, where
            until(lambda: not batch.jobs(), WAIT_S)
            future = client.submit(time.sleep, 600)
            until(batch.processes, WAIT_S)
            session = descendants(user.pid("sites", "campus"))
            assert not future.done() and "site campus has ended" in user.run("down")
        assert not batch.jobs("RUNNING") and not batch.jobs("PENDING")
        until(lambda: not batch.processes() and not any(map(alive, session)), WAIT_S)


@pytest.mark.parametrize(("killed", "jobs", "seconds"), [("agent", 3, 600), ("host", 1, 3), ("hub", 3, 600)])
def test_no_job_outlives_what_is_killed(batch: Slurm, tmp_path: Path, killed: str, jobs: int, seconds: float) -> None:
    """The third job waits. Without the host nobody cancels any: a worker ends when its task has, or after 30 s."""
    with running(user_of(batch, tmp_path, scale={"fixed": jobs}), batch) as user:
        user.run("up")
        agent, hub = user.pid("sites", "campus"), user.pid("hub")
        (host,) = [child.pid for child in psutil.Process(agent).children() if is_host(child)]
        with user.client() as client:
            future = client.submit(mark, tmp_path / "mark", seconds)
            until((tmp_path / "mark").exists, WAIT_S)
            assert not future.done() and len(batch.jobs()) == jobs
            os.kill({"agent": agent, "host": host, "hub": hub}[killed], signal.SIGKILL)
            until(lambda: not batch.jobs() and not batch.processes(), WAIT_S)
            until(lambda: not alive(agent) and not alive(host), WAIT_S)


def test_a_job_that_is_cancelled_is_replaced_and_its_tasks_run_again(batch: Slurm, tmp_path: Path) -> None:
    """Its site has no other job, and ``fixed`` is what Dask would not keep up by itself."""
    with running(user_of(batch, tmp_path, scale={"fixed": 1}), batch) as user:
        user.run("up")
        with user.client() as client:
            future = client.submit(mark, tmp_path / "mark", 2)
            until((tmp_path / "mark").exists, WAIT_S)
            (first,) = batch.jobs()
            batch.cancel(first)
            (tmp_path / "mark").unlink()
            until(lambda: batch.jobs().keys() - {first}, WAIT_S)
            assert future.result(timeout=WAIT_S) == "done" and (tmp_path / "mark").exists()


def test_a_profile_is_checked_by_the_batch_system_itself(batch: Slurm, tmp_path: Path) -> None:
    sites = {"right": site(tmp_path), "wrong": site(tmp_path, queue="lnog")}
    user = User(tmp_path, "ann", {"hpc": {"sites": sites}}, batch.environment)
    said = user.run("profile", "check", ok=False)
    assert "1 thing to mend" in said and "sbatch --test-only" in said and "invalid partition specified: lnog" in said
    assert not batch.jobs()


def mark(path: Path, seconds: float) -> str:
    path.touch()
    time.sleep(seconds)
    return "done"


def slow(number: int, seconds: float = 1.6) -> int:
    time.sleep(seconds)
    return number * 10
