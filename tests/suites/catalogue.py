"""Which suites there are, where their tests lie, and which few of them CI runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite, as it is shipped in a wheel."""

    name: str
    modules: tuple[str, ...]  # packages or modules with its tests, in the order in which they run
    needs: tuple[str, ...]  # distributions whose versions its results depend on
    slice: tuple[str, ...]  # test files, or functions in them, that CI runs; paths below site-packages
    threads: int = 2  # of each worker

    @property
    def deselected_file(self) -> Path:
        """The file that lists the tests which a stock LocalCluster does not pass either."""
        return HERE / "deselected" / f"{self.name}.txt"

    @property
    def versions(self) -> str:
        """Return what is installed, in words."""
        return ", ".join([*(f"{name} {version(name)}" for name in self.needs), f"Python {python_version()}"])


DASK = ("dask", "distributed", "numpy", "pandas", "pyarrow")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "dask.bag", ("dask.bag",), DASK,
            (
                "dask/bag/tests/test_text.py",
                "dask/bag/tests/test_bag.py::test_bag_map",
                "dask/bag/tests/test_bag.py::test_foldby_tree_reduction",
                "dask/bag/tests/test_bag.py::test_groupby_tasks_2[1000-20-100]",
            ),
        ),
        Suite(
            "dask.array", ("dask.array",), DASK,
            (
                "dask/array/tests/test_atop.py",
                "dask/array/tests/test_array_core.py::test_matmul",
                "dask/array/tests/test_array_core.py::test_stack",
                "dask/array/tests/test_array_core.py::test_vindex_nd",
            ),
        ),
        Suite(
            "dask.dataframe", ("dask.dataframe",), DASK,
            (
                "dask/dataframe/dask_expr/tests/test_cumulative.py",
                "dask/dataframe/tests/test_dataframe.py::test_gh_517",
                "dask/dataframe/tests/test_dataframe.py::test_array_to_df_conversion",
            ),
        ),
        Suite(
            "xarray", ("xarray.tests.test_distributed", "xarray.tests.test_dask"), ("xarray", *DASK),
            (
                "xarray/tests/test_distributed.py::test_dask_distributed_zarr_integration_test",
                "xarray/tests/test_distributed.py::test_async",
                "xarray/tests/test_dask.py::TestVariable",
                "xarray/tests/test_dask.py::test_map_blocks_errors_bad_template_2",
            ),
            threads=1,  # as in the clusters that its tests start; with two, stock fails to write netCDF4 files as well
        ),
    )
}  # fmt: skip


def tests_folder() -> Path:
    """Return the folder that the installed wheels lie in: paths of tests are relative to it."""
    spec = find_spec("dask")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]
