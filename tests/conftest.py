"""What all tests share: nothing may be left running at the end, and what a test needs is named."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from hypothesis import configuration, settings

ROOT = Path(__file__).resolve().parents[1]
MARK = "DASKFED_TEST_RUN"  # variable that every process started by the tests inherits
GRACE_S = 10.0
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # live as long as the test process

configuration.set_hypothesis_home_dir(ROOT / ".venv" / "cache" / "hypothesis")
settings.register_profile("daskfed", derandomize=True, deadline=None, database=None)
settings.load_profile("daskfed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script: what tests start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Some programs that tests need lie where only root's shells look.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

# Workers in processes of their own find functions of test modules by name.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``needs(name)`` where that is missing; fail it where DASKFED_REQUIRE has the name or "all"."""
    names = [name for marker in item.iter_markers("needs") for name in marker.args]
    for name in names:
        if shutil.which(name) is None and find_spec(name) is None:
            required = os.environ.get("DASKFED_REQUIRE", "").split(",")
            give_up = pytest.fail if {name, "all"}.intersection(required) else pytest.skip
            give_up(f"needs {name}, which is not installed")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fail the run where a process that a test started, directly or not, outlives the tests; end it."""
    run = os.environ[MARK] = uuid.uuid4().hex
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := processes_of(run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    stories = [f"{process.pid} {' '.join(cmdline)}"[:200] for process, cmdline in left]
    for process, _ in left:
        process.kill()
    assert not left, "still running after the tests:\n" + "\n".join(stories)


def processes_of(run: str) -> list[tuple[psutil.Process, list[str]]]:
    """Return the processes that carry the mark of this run, also those whose parent ended, and their command lines."""
    found: list[tuple[psutil.Process, list[str]]] = []
    for process in psutil.process_iter():
        try:
            cmdline = process.cmdline()
            helper = any(name in " ".join(cmdline) for name in HELPERS)
            if process.pid != os.getpid() and not helper and process.environ().get(MARK) == run:
                found.append((process, cmdline))
        except psutil.Error:  # it ended meanwhile, or is not ours
            continue
    return found
