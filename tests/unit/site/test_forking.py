"""What workers that are forked need, and when they are not forked."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

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


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_worker_does_not_have_packages_that_were_replaced(tmp_path: Path) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").write_text("VERSION = 1")
    program = """
        import multiprocessing, pathlib, sys

        def look(pipe):
            imported = "some_package" in sys.modules
            import some_package
            pipe.send((imported, some_package.VERSION))

        def in_a_new_process():
            context = multiprocessing.get_context("forkserver")
            here, there = context.Pipe()
            process = context.Process(target=look, args=(there,))
            process.start()
            process.join(30)
            return here.recv()

        if __name__ == "__main__":
            import some_package
            from daskfed.site.forking import fork_workers

            fork_workers()
            folder = pathlib.Path(some_package.__file__).parent
            assert in_a_new_process() == (True, 1)
            folder.joinpath("__init__.py").write_text("VERSION = 'two'")
            assert in_a_new_process() == (True, 1)  # an edit is no installation
            folder.with_name("some_package-2.dist-info").mkdir()
            assert in_a_new_process() == (False, "two") == in_a_new_process()
            print("done")
        """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr
