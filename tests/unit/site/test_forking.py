"""What workers that are forked need, and when they are not forked."""

from __future__ import annotations

import sys

import dask
import pytest
from distributed import LocalCluster, SpecCluster

from daskfed.profile import SiteOptions
from daskfed.site.clusters import ClusterSpec
from daskfed.site.forking import BEFORE_START, METHOD, environment, possible


def test_the_environment_is_what_a_nanny_sets() -> None:
    with dask.config.set({BEFORE_START: {"OMP_NUM_THREADS": 1, "OWN": "x"}}):
        assert environment({"PATH": "p"}) == {"PATH": "p", "OMP_NUM_THREADS": "1", "OWN": "x", "PYTHONHASHSEED": "6640"}
        assert environment({"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("configured", "present", "seed"),
    [
        ({}, {}, "6640"),
        ({}, {"PYTHONHASHSEED": "7"}, "6640"),
        ({"PYTHONHASHSEED": 8}, {}, "8"),
        ({"PYTHONHASHSEED": 8}, {"PYTHONHASHSEED": "9"}, "9"),
        ({"PYTHONHASHSEED": 8}, {"PYTHONHASHSEED": "0"}, "6640"),
        ({"PYTHONHASHSEED": 0}, {}, "6640"),
    ],
)
def test_hashes_have_the_seed_that_dask_gives_them(
    configured: dict[str, int], present: dict[str, str], seed: str
) -> None:
    from distributed import Nanny  # what it would do with the same

    with dask.config.set({BEFORE_START: configured}), pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONHASHSEED", raising=False)
        for name, value in present.items():
            patch.setenv(name, value)
        assert environment(present)["PYTHONHASHSEED"] == seed
        assert Nanny("tcp://127.0.0.1:1", loop=None).pre_spawn_env["PYTHONHASHSEED"] == seed


def test_who_wants_another_way_to_start_workers_gets_it() -> None:
    assert possible() == (sys.platform == "linux")
    with dask.config.set({METHOD: "forkserver"}):
        assert not possible()


@pytest.mark.parametrize(
    ("given", "forks"),
    [
        ({}, True),
        ({"cluster": LocalCluster, "options": {"processes": True}}, True),
        ({"options": {"processes": False}}, False),
        ({"cluster": SpecCluster}, False),
        ({"cluster": "dask_jobqueue.SLURMCluster"}, False),
    ],
)
def test_workers_of_a_local_cluster_are_forked(given: dict[str, object], forks: bool) -> None:
    assert ClusterSpec.of(SiteOptions(**given)).forks is forks  # type: ignore[arg-type]
