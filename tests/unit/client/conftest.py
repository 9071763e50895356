"""Sites that are nothing but a process in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

CODE = """
import os, pickle, sys, cloudpickle
os.chdir(sys.argv[1])
given, answer = sys.argv[2:]
with open(given, "rb") as file:
    function, args, kwargs = pickle.load(file)
try:
    result = (True, function(*args, **kwargs))
except BaseException as exc:
    result = (False, exc)
with open(answer, "wb") as file:
    cloudpickle.dump(result, file)
"""


class SiteFolder:
    """A site's folder, and a way to run something in it; hidden, its path leads nowhere in the meantime."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.name = path.name

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in a process of its own, in this folder; raises what it raises."""
        given, answer = self.path.parent / "given", self.path.parent / "answer"
        given.write_bytes(cloudpickle.dumps((function, args, kwargs)))
        command = [sys.executable, "-W", "ignore", "-c", CODE, str(self.path), str(given), str(answer)]
        subprocess.run(command, check=True, timeout=100)
        done, result = cloudpickle.loads(answer.read_bytes())
        if not done:
            raise result
        return result

    def hide(self) -> None:
        """Move the folder away, or back."""
        away = self.path.with_name(self.name + ".away")
        os.rename(*((away, self.path) if away.exists() else (self.path, away)))


@pytest.fixture
def site_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, SiteFolder]:
    """Return two empty sites; the test itself runs in a third folder."""
    (tmp_path / "client").mkdir()
    monkeypatch.chdir(tmp_path / "client")
    return {name: SiteFolder(tmp_path / name) for name in ("north", "south")}
