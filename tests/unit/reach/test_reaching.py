"""What is decided before anybody logs in anywhere: addresses, programs that are sent, templates, what is wrong."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from daskfed.errors import ConfigurationError, SiteStartError
from daskfed.profile import named_profile, profile_names
from daskfed.reach import installing, probe
from daskfed.reach.joining import service_unit
from daskfed.reach.sites import HubContact, environment_problems
from daskfed.reach.ssh import parts, probe_source, shown
from daskfed.reach.templates import TEMPLATES

FINE: dict[str, Any] = {
    "python": platform.python_version(), "executable": "/usr/bin/python3", "platform": "Linux x86_64",
    "versions": {"daskfed": "1"}, "problems": [],
}  # fmt: skip


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "found"),
        [
            ("ssh://login.example.edu", ("", "login.example.edu", 0)),
            ("ssh://me@login.example.edu:2222/", ("me", "login.example.edu", 2222)),
            ("ssh://alias", ("", "alias", 0)),
            ("ssh://Me@Campus-Login", ("Me", "Campus-Login", 0)),
            ("ssh://[::1]:22", ("", "::1", 22)),
        ],
    )
    def test_parts(self, url: str, found: tuple[str, str, int]) -> None:
        assert parts(url) == found

    @pytest.mark.parametrize("url", ["ssh://", "http://host", "ssh://me:secret@host", "ssh://host/path", "ssh://h:no"])
    def test_what_is_none(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as failed:
            parts(url)
        assert url in str(failed.value)
        assert "secret" not in str(failed.value) or "secret" in url

    def test_paths_as_a_shell_takes_them(self) -> None:
        assert shown("~/my venv/bin/python") == "\"$HOME\"/'my venv/bin/python'"
        assert shown("python3") == "python3"
        said = subprocess.run(
            ["sh", "-c", f"echo {shown('~/a b')}"], env={"HOME": "/h"}, capture_output=True, text=True
        )
        assert said.stdout == "/h/a b\n"

    def test_a_hub_elsewhere_must_be_known(self, tmp_path: Path) -> None:
        with (
            dask.config.set({"daskfed.keys": str(tmp_path)}),
            pytest.raises(SiteStartError, match="daskfed keys trust zmq://hub:1 KEY"),
        ):
            HubContact.elsewhere("zmq://hub:1")


class TestProbe:
    def test_it_runs_alone(self, tmp_path: Path) -> None:
        source = probe_source({"hub": ["127.0.0.1", 1], "cluster": 'it\'s "quoted"', "options": {}})
        done = subprocess.run(
            [sys.executable, "-"], input=source, capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "DASK_DASKFED__KEYS": str(tmp_path / "keys")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout.splitlines()[-1])
        assert facts["python"] == platform.python_version()
        assert facts["reaches_hub"] is False
        assert facts["key"].startswith("pub-") and facts["problems"] == []

    @pytest.mark.parametrize(
        ("cluster", "options", "complaint"),
        [
            ("dask.distributed.LocalClutser", {}, "cannot be imported"),
            ("no.such.Cluster", {}, "is its package installed?"),
            ("dask_jobqueue.SLURMCluster", {"cores": 1}, "rejected its options"),
        ],
    )
    def test_what_is_wrong_with_a_cluster_class(self, cluster: str, options: dict[str, Any], complaint: str) -> None:
        (problem,) = probe.cluster_problems({"cluster": cluster, "options": options})
        assert complaint in problem

    def test_a_batch_system_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        given = {"cluster": "dask_jobqueue.SLURMCluster", "options": {"cores": 1, "memory": "1GB"}}
        (problem,) = probe.cluster_problems(given)
        assert problem.startswith("sbatch is not on the PATH")

    def test_a_batch_system_that_refuses_a_job(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        sbatch = tmp_path / "sbatch"
        sbatch.write_text('#!/bin/sh\ngrep -q "cpus-per-task=3" "$2" || exit 9\necho "no partition x" >&2\nexit 1\n')
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        given = {"cluster": "dask_jobqueue.SLURMCluster", "options": {"cores": 3, "memory": "1GB"}}
        (problem,) = probe.cluster_problems(given)
        assert problem == f"{sbatch} --test-only: no partition x"

    def test_what_is_wrong_with_a_python(self) -> None:
        assert environment_problems(FINE, "python3") == []
        (older,) = environment_problems({**FINE, "python": "3.8.1"}, "python3")
        assert older.startswith("python3 there is Python 3.8.1, here is")
        (missing,) = environment_problems({**FINE, "versions": {"daskfed": None}}, "python3")
        assert "'install: true'" in missing


class TestInstalling:
    def test_all_that_is_required_is_there(self) -> None:
        found = installing.closure(["daskfed"])
        assert {"daskfed", "dask", "distributed", "tornado", "pyzmq", "pydantic-core"} <= set(found)
        assert "pytest" not in found

    def test_a_package_that_is_not_here(self) -> None:
        with pytest.raises(SiteStartError, match="package 'no-such-thing' is not installed here"):
            installing.closure(["daskfed", "no-such-thing"])

    def test_other_packages_or_another_python_go_elsewhere(self) -> None:
        kinds = [({"a": "1"}, FINE), ({"a": "2"}, FINE), ({"a": "1"}, {**FINE, "python": "3.99.1"})]
        pins = [({"click": each["a"]}, facts) for each, facts in kinds]
        assert len({installing._digest(*each) for each in pins}) == 3

    def test_a_machine_without_wheels(self) -> None:
        with pytest.raises(SiteStartError, match="cannot be installed on AIX"):
            installing._target({**FINE, "platform": "AIX ppc"})


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_is_a_profile(kind: str) -> None:
    with dask.config.set(yaml.safe_load(TEMPLATES[kind])):
        assert profile_names() == ["mine"]
        assert named_profile().embedded


def test_a_unit_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_DASKFED__STATE", "/x y")
    unit = service_unit("cloud")
    assert f'ExecStart="{sys.executable}" -m daskfed site run cloud' in unit
    assert 'Environment="DASK_DASKFED__STATE=/x y"' in unit
    assert "Restart=always" in unit and "WantedBy=default.target" in unit
