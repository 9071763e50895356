"""``client.open``: lazy objects that a site opened, used where their files cannot be seen."""

from __future__ import annotations

import asyncio
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import distributed
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask.array.core import getter

from daskfed.client.assembly import split_final
from daskfed.client.graphs import MaterialisedGraph, block_payload, materialise
from daskfed.client.opening import by_name, open_at
from daskfed.client.portable import open_and_pack
from daskfed.errors import ConfigurationError
from tests.unit.client.graph_tools import NORTH, SOUTH, assert_bound, computing, opened, persisting, tasks_with

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # Dask's own use of pandas

VALUES = np.arange(64.0).reshape(8, 8)
TABLE = pd.DataFrame({"i": range(20), "x": np.arange(20.0), "s": list("abcd") * 5})


@pytest.fixture(scope="module")
def sites(site_folders: dict[str, Any]) -> dict[str, Any]:
    """Return two sites with files of the same names; those of the south hold the negative numbers."""
    for site, sign in (("north", 1), ("south", -1)):
        write(site_folders[site].path, sign)
    return site_folders


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder without any file of those names."""
    monkeypatch.chdir(tmp_path)


def write(path: Path, sign: int) -> None:
    ds = xr.Dataset({"t": (("a", "b"), sign * VALUES)}, {"a": range(8), "lon": (("a", "b"), VALUES)}, {"title": "sea"})
    da.from_array(sign * VALUES, chunks=4).to_zarr(path / "x.zarr")
    ds.chunk(a=4).to_zarr(path / "ds.zarr", consolidated=False, zarr_format=2)
    for i in range(2):
        ds.isel(a=slice(4 * i, 4 * i + 4)).to_netcdf(path / f"{i}.nc", engine="scipy")
    table = TABLE.assign(x=sign * TABLE.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dd.from_pandas(table, npartitions=4).to_parquet(path / "t.parquet")
    table.to_csv(path / "t.csv", index=False)


def open_there(site: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return pickle.loads(site.run(open_and_pack, by_name(function), args, kwargs, {"sites": (site.name,)}))


def compute_there(site: Any, collection: Any) -> Any:
    """Plan here, while the site's files are away; run there; put together here."""
    site.hide()
    try:
        expr, (key,) = computing(collection)
        graph, assemblies = split_final(materialise(expr, [key]))
        payload = pickle.loads(pickle.dumps(block_payload(graph, graph.tasks)))
    finally:
        site.hide()
    assert_bound(graph, [key for key, node in graph.tasks.items() if not node.dependencies], (site.name,))
    values = site.run(run_payload, payload, list(graph.wanted))
    return assemblies[key].run(values) if assemblies else values[key]


def run_payload(payload: Any, keys: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, dask.get(dict(payload.__dask_graph__()), keys), strict=True))


def keys_of(collection: Any) -> set[Any]:
    graph: MaterialisedGraph = materialise(*persisting(collection))
    return set(graph.tasks)


def test_an_array(sites: dict[str, Any]) -> None:
    x = open_there(sites["north"], da.from_zarr, "x.zarr")
    np.testing.assert_array_equal(compute_there(sites["north"], (x + 1)[2:5].T), (VALUES + 1)[2:5].T)
    graph = opened((x + 1) * 2, persist=True)
    assert len(tasks_with(graph, getter)) == 4 and len(graph.tasks) == 5  # its layers are still fused


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "rows"),
    [
        (xr.open_zarr, ("ds.zarr",), {"consolidated": False}, 8),
        (xr.open_zarr, ("ds.zarr",), {"consolidated": False, "chunks": None}, 8),
        (xr.open_dataset, ("0.nc",), {"engine": "scipy"}, 4),
        (xr.open_mfdataset, ("?.nc",), {"engine": "scipy", "combine": "by_coords"}, 8),
        (xr.open_dataarray, ("0.nc",), {"engine": "scipy", "drop_variables": ["lon"]}, 4),
    ],
)
def test_xarray(sites: dict[str, Any], function: Any, args: Any, kwargs: Any, rows: int) -> None:
    there = open_there(sites["north"], function, *args, **kwargs)
    result = compute_there(sites["north"], there.isel(b=slice(1, 4)))
    values = result.t if isinstance(result, xr.Dataset) else result
    np.testing.assert_array_equal(values, VALUES[:rows, 1:4])
    if isinstance(result, xr.Dataset):
        assert result.attrs == {"title": "sea"}
        np.testing.assert_array_equal(result.lon, VALUES[:rows, 1:4])
    np.testing.assert_array_equal(there.a, range(rows))  # indexes came along


READERS: dict[str, Callable[[], Any]] = {
    "read_parquet": lambda: dd.read_parquet("t.parquet"),
    "with columns": lambda: dd.read_parquet("t.parquet", columns=["x", "s"]),
    "with arrow": lambda: dd.read_parquet(os.path.abspath("t.parquet"), filesystem="arrow"),
    "read_csv": lambda: dd.read_csv("t.csv", blocksize=200),
    "from_map": lambda: dd.from_map(pd.read_csv, ["t.csv", "t.csv"]),
    "from_delayed": lambda: dd.from_delayed([dask.delayed(pd.read_csv)("t.csv")] * 2),
    "derived": lambda: dd.read_parquet("t.parquet").assign(y=lambda df: df.x * 2),
}


@pytest.mark.parametrize("reader", READERS)
def test_dataframes(sites: dict[str, Any], reader: str) -> None:
    df = open_there(sites["north"], READERS[reader])
    times = 2 if reader.startswith("from_") else 1
    filtered = compute_there(sites["north"], df[df.x > 3].s)  # Arrow lists files in no particular order
    assert sorted(filtered) == sorted(TABLE[TABLE.x > 3].s.tolist() * times)
    assert compute_there(sites["north"], df.groupby("s").x.sum()).to_dict() == (
        TABLE.groupby("s").x.sum() * times
    ).to_dict()


def test_a_series_and_a_part_of_a_table(sites: dict[str, Any]) -> None:
    series = open_there(sites["north"], dd.read_parquet, "t.parquet", columns="x")
    assert compute_there(sites["north"], series + 1).tolist() == (TABLE.x + 1).tolist()
    part = open_there(sites["north"], lambda: dd.read_parquet("t.parquet").partitions[1:3])
    assert compute_there(sites["north"], part.i).tolist() == TABLE.i[5:15].tolist()


def test_only_the_columns_that_are_used_are_read(sites: dict[str, Any]) -> None:
    df = open_there(sites["north"], dd.read_parquet, "t.parquet")
    (reader,) = [node for node in df[["x"]].optimize(fuse=False).expr.walk() if not node.dependencies()]
    assert reader.operand("columns") == ["x"]


def test_functions_of_pandas_and_others_come_as_values(sites: dict[str, Any]) -> None:
    pd.testing.assert_frame_equal(open_there(sites["north"], pd.read_csv, "t.csv"), TABLE)
    assert open_there(sites["north"], os.path.basename, "a/b") == "b"


def test_several_objects_at_once(sites: dict[str, Any]) -> None:
    def everything() -> Any:
        return {
            "x": da.from_zarr("x.zarr"),
            "rest": (dd.read_csv("t.csv"), [dask.delayed(pd.read_csv)("t.csv"), db.read_text("t.csv")], 5),
        }

    there = open_there(sites["north"], everything)
    frame, (late, text), five = there["rest"]
    assert five == 5
    np.testing.assert_array_equal(compute_there(sites["north"], there["x"]), VALUES)
    assert compute_there(sites["north"], frame.i.sum()) == TABLE.i.sum()
    assert compute_there(sites["north"], late.x.sum()) == TABLE.x.sum()
    assert compute_there(sites["north"], text.map(str.strip).take(1, compute=False)) == ["i,x,s"]


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (da.from_zarr, ("x.zarr",), {}),
        (xr.open_zarr, ("ds.zarr",), {"consolidated": False}),
        (dd.read_parquet, ("t.parquet",), {}),
        (dd.read_csv, ("t.csv",), {}),
        (lambda: dask.delayed(pd.read_csv, pure=True)("t.csv"), (), {}),
        (lambda: db.read_text("t.csv"), (), {}),
        (lambda: dd.from_delayed([dask.delayed(pd.read_csv, pure=True)("t.csv")], meta=TABLE), (), {}),
    ],
)
def test_the_same_path_at_two_sites_has_different_keys(
    sites: dict[str, Any], function: Any, args: Any, kwargs: Any
) -> None:
    north, again, south = (
        open_there(sites[name], function, *args, **kwargs) for name in ("north", "north", "south")
    )
    assert keys_of(north) == keys_of(again)
    assert not keys_of(north) & keys_of(south)


def test_two_sites_together(sites: dict[str, Any]) -> None:
    north, south = (open_there(site, da.from_zarr, "x.zarr") for site in sites.values())
    graph = opened((north + south.mean())[:4])
    reading = tasks_with(graph, getter)
    assert {graph.constraints[key].sites for key in reading} == {NORTH, SOUTH}
    assert len(reading) == 6
    x, y = (open_there(site, dd.read_parquet, "t.parquet") for site in sites.values())
    graph = opened(dd.merge(x, y, on="i"))
    assert {constraint.sites for constraint in graph.constraints.values()} == {NORTH, SOUTH}


def test_an_error_says_where_and_what(sites: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError) as failed:
        open_there(sites["north"], xr.open_dataset, "nothing.nc", engine="scipy")
    (note,) = failed.value.__notes__
    assert note == f"while open_dataset opened something at north, in {sites['north'].path}"


def broken() -> Any:
    return da.from_array(VALUES, chunks=4).map_blocks(Unpicklable())


class Unpicklable:
    __name__ = "unpicklable"

    def __call__(self, block: Any) -> Any:
        return block

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise ModuleNotFoundError("No module named 'somewhere'")


@pytest.fixture
def client() -> Any:
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None, set_as_default=False
    ) as client:
        yield client


def test_the_whole_way_with_a_stock_client(sites: dict[str, Any], client: Any) -> None:
    with dask.annotate(retries=2):
        x = open_at(client, da.from_zarr, str(sites["north"].path / "x.zarr"), site="north")
    graph = opened(x + 1, persist=True)
    assert_bound(graph, graph.tasks, NORTH)
    assert {constraint.retries for constraint in graph.constraints.values()} == {2}
    np.testing.assert_array_equal(client.compute(x, sync=True), VALUES)
    assert open_at(client, sum, [1, 2], site="north") == 3
    with pytest.raises(FileNotFoundError) as failed:
        open_at(client, pd.read_csv, "nothing.csv", site="north")
    assert "while read_csv opened something at north" in failed.value.__notes__[0]
    with pytest.raises(ConfigurationError, match="No module named 'somewhere'"):
        open_at(client, broken, site="north")
    with pytest.raises(ConfigurationError, match="site"):
        open_at(client, sum, [1, 2], site="")


def test_an_asynchronous_client_awaits() -> None:
    async def main() -> Any:
        async with distributed.Client(
            asynchronous=True, processes=False, n_workers=1, dashboard_address=None, set_as_default=False
        ) as client:
            return await open_at(client, da.ones, (4, 4), chunks=2, site="north")

    x = asyncio.run(main())
    assert_bound(opened(x, persist=True), opened(x, persist=True).tasks, NORTH)
