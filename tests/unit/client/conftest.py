"""Sites that are nothing but a process in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

CODE = """
import os, pickle, sys, cloudpickle
os.chdir(sys.argv[1])
for line in sys.stdin:
    given, answer = line.split()
    with open(given, "rb") as file:
        function, args, kwargs = pickle.load(file)
    try:
        result = (True, function(*args, **kwargs))
    except BaseException as exc:
        result = (False, exc)
    with open(answer, "wb") as file:
        cloudpickle.dump(result, file)
    print("done", file=sys.__stdout__, flush=True)
"""


class SiteFolder:
    """A site's folder, and a process in it; while it is hidden, its path leads nowhere."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.name = path.name
        command = [sys.executable, "-W", "ignore", "-c", CODE, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in the process; raises what it raises."""
        assert self.process.stdin and self.process.stdout
        given, answer = self.path.parent / f"{self.name}.given", self.path.parent / f"{self.name}.answer"
        given.write_bytes(cloudpickle.dumps((function, args, kwargs)))
        print(given, answer, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"
        done, result = cloudpickle.loads(answer.read_bytes())
        if not done:
            raise result
        return result

    def hide(self) -> None:
        """Move the folder away, or back."""
        away = self.path.with_name(self.name + ".away")
        os.rename(*((away, self.path) if away.exists() else (self.path, away)))

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def site_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SiteFolder]]:
    """Return two empty sites; the tests run in another folder."""
    root = tmp_path_factory.mktemp("sites")
    sites = {name: SiteFolder(root / name) for name in ("north", "south")}
    yield sites
    for site in sites.values():
        site.close()
