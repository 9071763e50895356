"""A slice of Dask's and of xarray's own tests, over two sites; ``python -m tests.suites`` runs all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.suites.catalogue import SUITES
from tests.suites.results import read, summary

pytestmark = pytest.mark.system


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SUITES)
def test_a_slice_of_a_foreign_suite_passes_over_two_sites(name: str, tmp_path: Path) -> None:
    """Both sites run blocks, keys cross between them, and every test that a stock cluster passes passes."""
    command = [sys.executable, "-m", "tests.suites", "--results", str(tmp_path), "run", name, "--slice"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280
    )
    found = summary(read(tmp_path / f"{name}.jsonl").values(), ())
    told = f"{ended.stdout[-6000:]}\n{ended.stderr[-2000:]}"
    assert ended.returncode == 0 and not found.failed, told
    assert found.imported > 0, told
