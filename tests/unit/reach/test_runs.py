"""Processes in the background: what they report, that they are known again, and that they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest

from daskfed.errors import ConfigurationError
from daskfed.reach.runs import Run, running

START = """
import asyncio, sys, dask
from daskfed.errors import ConfigurationError
from daskfed.reach.runs import Run

async def works(report):
    report({{"fine": 1}})
    report({{"late": 2}})
    print("it works", file=sys.stderr)
    await asyncio.sleep(60)

async def fails(report):
    raise ConfigurationError("a typo")

async def dies(report):
    print("about to die", file=sys.stderr, flush=True)
    import os; os._exit(3)

with dask.config.set({{"daskfed.state": {state!r}}}):
    try:
        print(Run("sites", "north").start({work}).report())
    except Exception as exc:
        print(type(exc).__name__, exc)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Run]:
    with dask.config.set({"daskfed.state": str(tmp_path)}):
        yield Run("sites", "north")
        Run("sites", "north").stop()


def started(work: str) -> str:
    """Start ``work`` from a process of its own, which has no threads, and return what it was told."""
    script = START.format(state=dask.config.get("daskfed.state"), work=work)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout.strip()


def test_it_reports_once_and_goes_on(place: Run) -> None:
    assert started("works") == "{'fine': 1}"
    pid = place.pid()
    assert pid is not None and os.getsid(pid) == pid
    assert running("sites") == ["north"]
    assert place.stop() and place.pid() is None and not place.stop()
    assert running("sites") == []
    assert place.log.read_text() == "it works\n"


def test_an_error_is_raised_where_it_was_started(place: Run) -> None:
    assert started("fails") == "ConfigurationError a typo"
    assert place.pid() is None


def test_one_that_dies_at_once_shows_its_log(place: Run) -> None:
    said = started("dies")
    assert said.startswith("SiteStartError it ended at once; the end of") and said.endswith("about to die")
    assert place.pid() is None


def test_a_process_that_took_the_number_of_another_is_not_taken_for_it(place: Run) -> None:
    place.write_own_process()
    own = place.read("process")
    assert place.pid() == os.getpid()
    for another in ({"started": 1}, {"boot": "before"}):
        place.write("process", {**own, **another})
        assert place.pid() is None and not place.stop()


def test_a_process_at_another_machine_is_left_alone(place: Run) -> None:
    place.write_own_process()
    place.write("process", {**place.read("process"), "host": "login2"})
    with pytest.raises(ConfigurationError, match="of a process at login2: log in there"):
        place.stop()
    place.forget("process")


@pytest.mark.parametrize("damaged", [{}, [], "x", {"pid": 1}])
def test_a_damaged_file_is_none(place: Run, damaged: object) -> None:
    place.write("process", damaged)
    assert place.pid() is None


def test_one_that_does_not_heed_is_killed(place: Run) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
         "time.sleep(60)"], start_new_session=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline()
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    place.write_own_process()
    place.write("process", {**place.read("process"), "pid": child.pid, "started": started})
    assert place.stop(timeout_s=0.3)
    assert child.wait(10) == -signal.SIGKILL


def test_what_is_written_down_is_for_this_user_only(place: Run) -> None:
    place.write("spec", {"password": "s3cret"})
    assert place.read("spec") == {"password": "s3cret"}
    assert (place.folder / "spec").stat().st_mode & 0o077 == 0 == place.folder.stat().st_mode & 0o077
    (place.folder / "spec").write_text("{")
    assert place.read("spec") is None is place.read("nothing")
    place.forget("spec", "nothing")
    assert not (place.folder / "spec").exists()
