"""What a user says of a site is checked, and a mistake is named with what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import pytest

from daskfed.config import DEFAULT_CLUSTER, fusion, lanes, largest_message, parse_labels
from daskfed.dask_private import MAX_BUFFER_SIZE
from daskfed.errors import ConfigurationError
from daskfed.profile import site_options


class TestOptions:
    def test_none_are_needed(self) -> None:
        assert site_options("north", {}).model_dump() == {
            "cluster": DEFAULT_CLUSTER, "options": {}, "scale": None, "labels": {}, "environments": ["default"],
            "resources": {}, "directory": None, "reach": "local", "python": "", "install": False,
            "orphan_timeout": None, "data": [], "data_binding": "prefer",
        }  # fmt: skip

    def test_all_that_is_given_is_kept(self, tmp_path: Path) -> None:
        given: dict[str, Any] = {
            "cluster": int, "options": {"cores": 4}, "labels": {"country": "de"}, "environments": ["torch"],
            "resources": {"GPU": 2}, "directory": str(tmp_path),
        }  # fmt: skip
        assert site_options("north", given).model_dump(exclude_unset=True) == {**given, "directory": tmp_path}

    def test_defaults_are_not_shared_between_sites(self) -> None:
        site_options("north", {}).environments.append("torch")
        assert site_options("south", {}).environments == ["default"]

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            ({"optoins": {}}, "unknown option 'optoins'; did you mean 'options'?"),
            ({"n_workers": 2}, "unknown option 'n_workers'; options are reach, python, install, orphan-timeout, cluster"),
            ({"n_workers": 2}, "(keywords of the Cluster class go into 'options')"),
            ({"options": [1]}, "option 'options': Input should be a valid dictionary"),
            ({"labels": {"disk": 7}}, "option 'labels.disk': Input should be a valid string"),
            ({"environments": "torch"}, "option 'environments': Input should be a valid list"),
            ({"resources": {"GPU": "many"}}, "option 'resources.GPU': Input should be a valid number"),
            ({"directory": "/no/such/folder"}, "there is no directory '/no/such/folder'; create it first"),
            ({"reach": "sssh://host"}, "option 'reach': 'sssh://host' is none of local, ssh://[user@]host[:port], wait"),
            ({"orphan-timeout": "soon"}, "option 'orphan-timeout': Input should be a duration"),
            ({1: 2}, "option '1': Keys should be strings"),
            (["cluster"], "expected a dict of options, got ['cluster']"),
            (None, "expected a dict of options, got None"),
        ],
    )
    def test_a_mistake_names_the_site_and_the_option(self, given: Any, complaint: str) -> None:
        with pytest.raises(ConfigurationError) as failed:
            site_options("north", given)
        assert str(failed.value).startswith("site 'north': ")
        assert complaint in str(failed.value)

    def test_several_mistakes_are_told_at_once(self) -> None:
        with pytest.raises(ConfigurationError, match="'options': .*; .*'lables'; did you mean 'labels'"):
            site_options("north", {"options": 7, "lables": {}})

    def test_a_file_is_no_directory(self) -> None:
        with pytest.raises(ConfigurationError, match="there is no directory"):
            site_options("north", {"directory": __file__})


class TestNames:
    @pytest.mark.parametrize("name", ["north", "gpu-1.example_b", "7", "Zürich"])
    def test_names_of_sites(self, name: str) -> None:
        assert site_options(name, {}).options == {}

    @pytest.mark.parametrize("name", ["", " ", "a/b", "country=de", "-n", "a b", "fed://x", "north\n", None, 7])
    def test_what_cannot_name_a_site(self, name: Any) -> None:
        with pytest.raises(ConfigurationError, match="cannot name a site"):
            site_options(name, {})


class TestLargestMessage:
    def test_it_is_as_configured_or_what_a_stream_takes(self) -> None:
        assert largest_message() == MAX_BUFFER_SIZE
        with dask.config.set({"daskfed.comm.largest-message": "1 MiB"}):
            assert largest_message() == 2**20


class TestLabels:
    def test_pairs_are_split_at_the_first_sign(self) -> None:
        assert parse_labels(("country=de", "disk=a=b", "note=")) == {"country": "de", "disk": "a=b", "note": ""}
        assert parse_labels(()) == {}

    @pytest.mark.parametrize("pair", ["country", "=de", ""])
    def test_what_is_no_pair(self, pair: str) -> None:
        with pytest.raises(ConfigurationError, match=f"label '{pair}' must be written name=value"):
            parse_labels(("disk=fast", pair))


def test_when_tasks_are_bundled_and_calls_go_down_lanes() -> None:
    assert (fusion(), lanes()) == ("never", "auto")
    with dask.config.set({"daskfed.client.fusion": "always", "daskfed.client.lanes": "auto"}):
        assert (fusion(), lanes()) == ("always", "auto")
    with (
        dask.config.set({"daskfed.client.fusion": "allways"}),
        pytest.raises(ConfigurationError, match="daskfed.client.fusion is 'allways': did you mean 'always'"),
    ):
        fusion()
