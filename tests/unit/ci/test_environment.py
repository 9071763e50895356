"""Which environment the scripts of ci/ use: .venv, and one beside it for another Dask or another Python."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
THIS = f"python{platform.python_version()}"


def source(**variables: str) -> subprocess.CompletedProcess[str]:
    """Source ci/environment.sh with just these variables and print the folder that it chose."""
    command = ["bash", "-euo", "pipefail", "-c", 'source ci/environment.sh; echo "$venv"']
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, ".venv"),
        ({"PYTHON": "", "DASKFED_DASK": ""}, ".venv"),
        ({"DASKFED_DASK": "2026.7.0"}, ".venvs/dask2026.7.0"),
        ({"PYTHON": sys.executable}, f".venvs/{THIS}"),
        ({"PYTHON": sys.executable, "DASKFED_DASK": "2026.7.0"}, f".venvs/{THIS}-dask2026.7.0"),
    ],
)
def test_another_dask_or_python_has_a_folder_of_its_own(variables: dict[str, str], folder: str) -> None:
    assert source(**variables).stdout == f"{folder}\n"


def test_a_python_that_does_not_run_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "python4")
    ran = source(PYTHON=missing)
    assert ran.returncode == 1 and not ran.stdout
    assert f"PYTHON={missing} does not run" in ran.stderr
