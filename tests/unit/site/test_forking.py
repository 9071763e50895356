"""What workers that are forked need, and when they are not forked."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster, SpecCluster

from daskfed.profile import SiteOptions
from daskfed.site.clusters import ClusterSpec
from daskfed.site.forking import BEFORE_START, METHOD, WANTED, environment, possible


def test_the_environment_is_what_a_nanny_sets() -> None:
    with dask.config.set({BEFORE_START: {"OMP_NUM_THREADS": 1, "OWN": "x", "NOT": None}}):
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
        ({"PYTHONHASHSEED": None}, {}, "6640"),
    ],
)
def test_hashes_have_the_seed_that_dask_gives_them(
    configured: dict[str, int | None], present: dict[str, str], seed: str
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
    for setting in ({METHOD: "forkserver"}, {WANTED: False}):
        with dask.config.set(setting):
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


PROGRAM = """
    import atexit, logging, multiprocessing, pathlib, random, sys, tempfile

    HERE = pathlib.Path(__file__).parent
    CONTEXT = multiprocessing.get_context("forkserver")

    def answer(pipe, function):
        pipe.send(function())

    def in_a_new_process(function):
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=answer, args=(there, function))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        return here.recv()

    def look():
        imported = "some_package" in sys.modules
        import some_package
        return imported, some_package.VERSION

    def draw():
        import numpy
        return random.random(), numpy.random.random()

    def log():
        logging.getLogger("some").warning("from a worker")

    def register():
        global kept
        kept = tempfile.TemporaryDirectory(dir=HERE / "scratch")
        atexit.register((HERE / "ended").touch)

    def variable():
        import os
        return os.environ["OF_THE_HOST"]

    def lock_is_free():
        return not multiprocessing.forkserver._forkserver._lock.locked()

    def main():
        import numpy.random, some_package
        from daskfed.site.forking import fork_workers

        logging.getLogger("some").addHandler(logging.FileHandler(HERE / "log"))
        atexit.register((HERE / "log").unlink)
        fork_workers()
        {}

    if __name__ == "__main__":
        main()
        print("done")
    """

ALIKE = {
    "packages that are there": """
        assert in_a_new_process(look) == (True, 1)
        (HERE / "some_package" / "__init__.py").write_text("VERSION = 'two'")
        assert in_a_new_process(look) == (True, 1)  # an edit is no installation
        (HERE / "some_package-2.dist-info").mkdir()
        assert in_a_new_process(look) == (False, "two") == in_a_new_process(look)
        """,
    "the environment that the host has": """
        import os
        assert in_a_new_process(look)[0]
        os.environ["OF_THE_HOST"] = "x"
        assert in_a_new_process(variable) == "x"
        assert in_a_new_process(look)[0] is False
        """,
    "chances of its own": """
        one, other = in_a_new_process(draw), in_a_new_process(draw)
        assert not set(one).intersection(other), (one, other)
        """,
    "the files of a log": """
        in_a_new_process(log)
        assert (HERE / "log").read_text() == "from a worker\\n"
        """,
    "an end in order": """
        in_a_new_process(register)
        assert (HERE / "ended").exists() and (HERE / "log").exists()
        assert not list((HERE / "scratch").iterdir())
        """,
    "locks of its own": """
        assert in_a_new_process(lock_is_free)
        """,
}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("what", ALIKE)
def test_a_worker_has(what: str, tmp_path: Path) -> None:
    """What one that was started as a new Python would have."""
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").write_text("VERSION = 1")
    for folder in ("some_package-1.dist-info", "scratch"):
        (tmp_path / folder).mkdir()
    lines = textwrap.indent(textwrap.dedent(ALIKE[what]), " " * 4)
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM).replace("    {}", lines))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_where_there_can_be_no_socket_dask_starts_workers(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    program = "import dask; from daskfed.site.forking import METHOD, fork_workers; fork_workers(); print(dask.config.get(METHOD))"
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "spawn\n", done.stderr
