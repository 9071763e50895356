"""Profiles in Dask's configuration: what is written there is found, and a mistake is named with its file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import pytest

from daskfed.client.profiles import profile_for
from daskfed.errors import ConfigurationError
from daskfed.profile import Scale, named_profile, profile_names, site_options
from daskfed.settings import where_set

GOOD = """\
daskfed:
  default-profile: climate
  profiles:
    climate:
      policy: data-only
      sites:
        laptop:
        campus:
          cluster: dask_jobqueue.SLURMCluster
          options: {queue: long, cores: 32, walltime: "02:00:00"}
          scale: {minimum: 0, maximum: 40, idle-timeout: 5m}
          labels: {scratch: era5}
          data: [/scratch/era5, "s3://campus-bucket"]
          data-binding: strict
    away:
      hub: tls://hub.example.org:8700
"""


class Configured:
    """Files of Dask's configuration in folders, of which later ones count more."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.paths: list[str] = []
        monkeypatch.setattr(dask.config, "paths", self.paths)
        monkeypatch.setattr(dask.config, "config", {})

    def write(self, text: str, name: str = "daskfed.yaml", folder: str = "first") -> Path:
        """Write a file, read all, and return its path."""
        path = self.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        if str(path.parent) not in self.paths:
            self.paths.append(str(path.parent))
        dask.config.refresh(paths=self.paths, env={})
        return path


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    return Configured(tmp_path, monkeypatch)


def message(name: str | None = None) -> str:
    """Return what is wrong with a profile."""
    with pytest.raises(ConfigurationError) as raised:
        named_profile(name)
    return str(raised.value)


def with_site(*lines: str) -> str:
    """Return a configuration with a site ``campus``; the first of ``lines`` is line 5."""
    return "\n".join(["daskfed:", "  profiles:", "    p:", "      sites: {campus: {", *lines, "      }}", ""])


class TestFinding:
    def test_what_is_written_is_found(self, configured: Configured) -> None:
        configured.write(GOOD)
        profile = named_profile("climate")
        assert profile.embedded and profile.policy == "data-only"
        assert list(profile.sites) == ["laptop", "campus"]
        assert profile.sites["laptop"] == site_options("laptop", {})
        campus = profile.sites["campus"]
        assert campus.cluster == "dask_jobqueue.SLURMCluster" and campus.options["walltime"] == "02:00:00"
        assert campus.scale == Scale(minimum=0, maximum=40, idle_timeout=300)
        assert (campus.data, campus.data_binding) == (["/scratch/era5", "s3://campus-bucket"], "strict")
        assert (profile.sites["laptop"].data, profile.sites["laptop"].data_binding) == ([], "prefer")

    def test_the_default_one(self, configured: Configured) -> None:
        configured.write(GOOD)
        assert named_profile() == named_profile("climate")
        assert profile_names() == ["away", "climate"]

    def test_a_hub_elsewhere(self, configured: Configured) -> None:
        configured.write(GOOD)
        assert not named_profile("away").embedded

    def test_a_client_takes_it_only_where_nothing_else_is_said(self, configured: Configured) -> None:
        configured.write(GOOD)
        assert profile_for(None, None, {"timeout": 3}) == named_profile("climate")
        assert profile_for(None, "away", {}) == named_profile("away")
        for address, kwargs in [("tcp://x:1", {}), (None, {"scheduler_file": "f"}), (None, {"n_workers": 2})]:
            assert profile_for(address, None, kwargs) is None
            with pytest.raises(TypeError, match="profile= does not go with"):
                profile_for(address, "climate", kwargs)
        with dask.config.set({"scheduler-address": "tcp://x:1"}):
            assert profile_for(None, None, {}) is None
        configured.write("daskfed: {default-profile: null}", "last.yaml")
        assert profile_for(None, None, {}) is None


class TestMistakes:
    @pytest.mark.parametrize(
        ("lines", "line", "complaint"),
        [
            (("optoins: {}",), 5, "unknown option 'optoins'; did you mean 'options'?"),
            (("options: {},", "labels: [a]"), 6, "option 'labels': Input should be a valid dictionary"),
            (("scale: {", "maximun: 3}"), 6, "unknown option 'scale.maximun'; did you mean 'maximum'?"),
            (("scale: {", "maximum: many}"), 6, "option 'scale.maximum': Input should be a valid integer"),
            (("scale: {minimum: 5, maximum: 2}",), 5, "option 'scale': minimum 5 is more than maximum 2"),
            (("scale: {fixed: 5, maximum: 7}",), 5, "option 'scale': 'fixed' does not go with 'maximum'"),
            (("scale: {}",), 5, "option 'scale': say 'fixed: 4', or 'minimum' and 'maximum'"),
            (("scale: {maximum: 1, idle-timeout: soon}",), 5, "Input should be a duration, like '5m' or '30s'"),
            (("directory: /no/such",), 5, "there is no directory '/no/such'; create it first"),
            (("data: /scratch/era5",), 5, "option 'data': Input should be a valid list"),
            (("data: [/x],", "data-binding: hard"), 6, "option 'data-binding': Input should be 'prefer' or 'strict'"),
            (("data: [/x],", "data-bindign: strict"), 6, "option 'data-bindign'; did you mean 'data-binding'?"),
        ],
    )
    def test_of_a_site(self, configured: Configured, lines: tuple[str, ...], line: int, complaint: str) -> None:
        path = configured.write(with_site(*lines))
        said = message("p")
        assert said.startswith(f"{path}, line {line}: profile 'p', site 'campus': ") and complaint in said

    def test_of_a_profile(self, configured: Configured) -> None:
        path = configured.write("daskfed:\n  profiles:\n    p:\n      site: {}\n")
        assert message("p") == f"{path}, line 4: profile 'p': unknown option 'site'; did you mean 'sites'?"
        configured.write("daskfed:\n  profiles:\n    p:\n      hub: example.org\n")
        assert f"{path}, line 4: profile 'p': hub 'example.org' is neither 'embedded' nor an address" in message("p")
        configured.write("daskfed:\n  profiles:\n    p:\n      hub: embedded\n")
        assert message("p") == f"{path}, line 3: profile 'p': it has no sites; name at least one below 'sites'"
        configured.write("daskfed:\n  profiles:\n    p: [campus]\n")
        assert message("p") == f"{path}, line 3: profile 'p': expected 'hub' and 'sites', got ['campus']"
        configured.write("daskfed:\n  profiles: climate\n")
        assert message("p") == f"{path}, line 2: daskfed.profiles should map names to profiles, not 'climate'"

    def test_of_its_name(self, configured: Configured) -> None:
        configured.write(GOOD)
        assert "no profile 'climat'; did you mean 'climate'?" in message("climat")
        assert str(configured.folder) in message("climat")
        configured.write("{}")
        assert "no profile 'climate'; there are none below daskfed.profiles" in message("climate")
        assert "no profile named" in message()

    def test_a_site_whose_name_cannot_be_one(self, configured: Configured) -> None:
        configured.write("daskfed: {profiles: {p: {sites: {'a b': {}}}}}")
        assert "'a b' cannot name a site" in message("p")


class TestPlaces:
    """Where a setting is from: the file that counts, the variable, or this process."""

    path = ("daskfed", "profiles", "p", "sites", "campus", "options")

    def test_the_last_file_that_has_it(self, configured: Configured) -> None:
        first = configured.write(with_site("options: {}"))
        assert where_set(self.path) == f"{first}, line 5"
        second = configured.write(with_site("", "", "options: {}"), folder="second")
        assert where_set(self.path) == f"{second}, line 7"
        configured.write(with_site("labels: {}"), "other.yaml", folder="second")
        assert where_set(self.path) == f"{second}, line 7"

    def test_what_is_above_it_where_it_is_not_there(self, configured: Configured) -> None:
        path = configured.write(with_site("labels: {}"))
        assert where_set((*self.path, "cores")) == f"{path}, line 4"

    def test_hyphens_and_underscores_are_alike(self, configured: Configured) -> None:
        path = configured.write("daskfed:\n  default_profile: x\n")
        assert where_set(("daskfed", "default-profile")) == f"{path}, line 2"

    def test_a_variable(self, configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
        configured.write(with_site("options: {}"))
        monkeypatch.setenv("DASK_DASKFED__PROFILES__P__SITES__CAMPUS__OPTIONS", "{}")
        assert where_set(self.path) == "environment variable DASK_DASKFED__PROFILES__P__SITES__CAMPUS__OPTIONS"

    def test_this_process(self, configured: Configured) -> None:
        with dask.config.set({"daskfed.profiles": {"p": {"sites": {"campus": {"optoins": {}}}}}}):
            assert message("p").startswith("dask.config, set in this process: profile 'p', site 'campus': unknown")

    def test_files_that_cannot_be_read_are_passed_over(self, configured: Configured) -> None:
        path = configured.write(with_site("options: {}"))
        (path.parent / "zzz.yaml").write_text("{")
        assert where_set(self.path) == f"{path}, line 5"


class TestScale:
    @pytest.mark.parametrize(
        ("given", "jobs", "call"),
        [
            ({"fixed": 3}, False, ("scale", {"n": 3})),
            ({"fixed": 3}, True, ("adapt", {"minimum_jobs": 3, "maximum_jobs": 3})),
            ({"minimum": 1}, False, ("adapt", {"minimum": 1})),
            ({"maximum": 4}, True, ("adapt", {"minimum_jobs": 0, "maximum_jobs": 4})),
            ({"maximum": 4, "idle-timeout": "1m"}, False, ("adapt", {"minimum": 0, "maximum": 4, "wait_count": 60})),
        ],
    )
    def test_what_is_asked_of_a_cluster(self, given: Any, jobs: bool, call: tuple[str, Any]) -> None:
        assert Scale.model_validate(given).call(jobs) == call

    def test_how_many_there_are_first(self) -> None:
        assert [Scale(fixed=3).first, Scale(minimum=2).first, Scale(maximum=4).first] == [3, 2, 0]
