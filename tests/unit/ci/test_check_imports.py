"""The import check passes what is allowed and names each thing that is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "ci" / "tools"))

from check_imports import LAYERS, ORDER, problems  # noqa: E402


def package(tmp_path: Path, **modules: str) -> Path:
    root = tmp_path / "daskfed"
    for name, text in modules.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_imports_downwards_are_fine(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        errors="class E(Exception): ...",
        hub__core="from daskfed.errors import E",
        hub__server="import socket\nfrom daskfed.hub.core import E",
        client__client="from daskfed.hub import server\nimport dask.array\nfrom distributed import Client",
        cli="from daskfed.client import client",
    )
    assert problems(root) == []


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"hub__core": "from daskfed.hub import server", "hub__server": ""}, "imports hub/server.py (shells)"),
        ({"hub__server": "import daskfed.client.client", "client__client": ""}, "imports client/client.py (client)"),
        ({"hub__server": "def f():\n    from ..cli import x", "cli": "x = 1"}, "imports cli.py (top)"),
        ({"hub__server": "from daskfed.site.agent import x", "site__agent": "x = 1"}, "hub/* never imports site/*"),
        ({"site__agent": "from daskfed.hub import server", "hub__server": ""}, "site/* never imports hub/*"),
        ({"hub__a": "from . import b", "hub__b": "from . import a"}, "in a circle"),
        ({"hub__core": "import socket"}, "not pure: hub/core.py -> socket"),
        ({"hub__core": "from daskfed import errors", "errors": "import time"}, "hub/core.py -> errors.py -> time"),
        ({"hub__a": "from dask._task_spec import Task"}, "hub/a.py:1 uses dask._task_spec.Task"),
        ({"hub__a": "import dask._expr as e"}, "uses dask._expr"),
        ({"hub__a": "from distributed.comm.inproc import _EOF"}, "uses distributed.comm.inproc._EOF"),
        ({"hub__a": "import distributed\n\nx = distributed.client._get_global_client()"}, "hub/a.py:3 uses"),
        ({"hub__a": "from distributed import Client\nClient._release_key"}, "uses distributed.Client._release_key"),
    ],
)
def test_each_rule_has_teeth(tmp_path: Path, modules: dict[str, str], said: str) -> None:
    found = problems(package(tmp_path, **modules))
    assert any(said in line for line in found), found


def test_what_only_type_checkers_read_may_go_anywhere(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from daskfed.hub.server import Hub\n"
    assert problems(package(tmp_path, hub__clients=text, hub__server="from . import clients")) == []


def test_the_private_module_may_use_private_names(tmp_path: Path) -> None:
    modules = {"dask_private": "from dask._task_spec import Task", "hub__a": "from daskfed.dask_private import Task"}
    assert problems(package(tmp_path, **modules)) == []


def test_every_layer_has_its_place_in_the_order() -> None:
    assert sorted(name for name, _ in LAYERS) == sorted(ORDER)
