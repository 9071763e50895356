"""The paths that tasks read are found, whichever way the data was opened; and readers whose paths cannot be told."""

from __future__ import annotations

import functools
import io
import operator
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.bytes
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask import delayed
from dask.base import collections_to_expr

from daskfed.client import hooks
from daskfed.client.databinding import DataSites, bound_to_data
from daskfed.client.graphs import MaterialisedGraph, materialise
from daskfed.client.notes import flat_keys
from daskfed.client.reading import Finder, is_reader
from daskfed.dask_private import Task
from daskfed.errors import ConfigurationError

hooks.install()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same numbers in files of many kinds."""
    folder = tmp_path_factory.mktemp("data")
    table = pd.DataFrame({"a": range(8), "b": range(8)})
    table.to_csv(folder / "t.csv", index=False)
    dd.from_pandas(table, npartitions=2).to_parquet(folder / "t.parquet")
    array = da.arange(8, chunks=4)
    da.to_npy_stack(str(folder / "npy"), array)
    grid = xr.Dataset({"v": ("x", np.arange(8.0))})
    grid.to_netcdf(folder / "v.nc", engine="scipy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array.to_zarr(str(folder / "a.zarr"))
        grid.chunk(x=4).to_zarr(folder / "v.zarr")
    return folder


def read(*args: Any, **kwargs: Any) -> Any:
    """A user's own reader."""
    return args


def netcdf(path: Path, **how: Any) -> Any:
    return xr.open_dataset(path, engine="scipy", **how).v.data


def mfdataset(data: Path) -> Any:
    return xr.open_mfdataset([data / "v.nc"], engine="scipy", combine="nested", concat_dim="x").v.data


def in_folder(data: Path) -> Any:
    return fsspec.filesystem("dir", path=str(data), fs=fsspec.filesystem("file"))


class Tells:
    """An object of a user that says what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __daskfed_paths__(self) -> Iterable[str]:
        return [str(self.path)]


Way = Callable[[Path], Any]
FS: Any = fsspec.filesystem("file")

WAYS: dict[str, Way] = {
    "open": lambda data: delayed(open)(str(data / "t.csv")),
    "Path": lambda data: delayed(read)(data / "t.csv"),
    "in a dict of a keyword": lambda data: delayed(read)(what={"from": [data / "t.csv"]}),
    "a method of Path": lambda data: delayed((data / "t.csv").read_text)(),
    "a partial": lambda data: delayed(functools.partial(pd.read_csv, str(data / "t.csv")))(),
    "file URL": lambda data: delayed(pd.read_csv)(f"file://{data}/t.csv"),
    "OpenFile": lambda data: delayed(read)(fsspec.open(str(data / "t.csv"))),
    "OpenFiles": lambda data: delayed(read)(fsspec.open_files(str(data / "*.csv"))),
    "a mapper": lambda data: delayed(read)(fsspec.get_mapper(str(data))),
    "behind a cache": lambda data: delayed(read)(fsspec.open(f"simplecache::file://{data}/t.csv")),
    "a file system's method": lambda data: delayed(FS.cat)(str(data / "t.csv")),
    "a folder as a file system": lambda data: delayed(in_folder(data).cat)("t.csv"),
    "what tells its paths": lambda data: delayed(read)(Tells(data / "t.csv")),
    "read_bytes": lambda data: dask.bytes.read_bytes(str(data / "t.csv"))[1][0][0],
    "da.from_zarr": lambda data: da.from_zarr(str(data / "a.zarr")),
    "da.from_zarr, reduced": lambda data: da.from_zarr(str(data / "a.zarr")).sum(),
    "da.from_npy_stack": lambda data: da.from_npy_stack(str(data / "npy")) + 1,
    "np.memmap": lambda data: delayed(np.memmap)(data / "npy" / "0.npy", mode="r"),
    "xr.open_zarr": lambda data: xr.open_zarr(data / "v.zarr").v.mean().data,
    "xr.open_dataset": lambda data: netcdf(data / "v.nc", chunks={"x": 4}) + 1,
    "xr.open_dataset, one chunk": lambda data: netcdf(data / "v.nc", chunks={}),
    "xr.open_mfdataset": mfdataset,
    "dd.read_parquet": lambda data: dd.read_parquet(data / "t.parquet"),
    "dd.read_parquet, a column": lambda data: dd.read_parquet(data / "t.parquet")[["a"]] + 1,
    "dd.read_parquet, arrow": lambda data: dd.read_parquet(data / "t.parquet", filesystem="arrow")[["a"]],
    "dd.read_csv": lambda data: dd.read_csv(data / "*.csv").a.sum(),
    "dd.from_map": lambda data: dd.from_map(pd.read_csv, [str(data / "t.csv")] * 2)[["a"]],
    "dask.bag.read_text": lambda data: db.read_text(str(data / "t.csv")).map(str.strip),
    "da.from_delayed": lambda data: da.from_delayed(delayed(np.load)(str(data / "npy" / "0.npy")), (4,), int) * 2,
}


def graph_of(*collections: Any) -> MaterialisedGraph:
    expr = collections_to_expr(collections).optimize()
    return materialise(expr, flat_keys(expr.__dask_keys__()))


def at_north(folder: Path, binding: str = "prefer") -> DataSites:
    facts = {"north": {"data": [str(folder)], "data_binding": binding}, "south": {"data": [], "data_binding": "prefer"}}
    return DataSites.of(facts)


def readers(graph: MaterialisedGraph) -> set[Any]:
    """Return the tasks that take nothing but values."""
    values = {key for key, node in graph.tasks.items() if not isinstance(node, Task)}
    return {key for key, node in graph.tasks.items() if node.dependencies <= values and key not in values}


every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@every_way
def test_the_path_of_each_way_to_read_is_found(data: Path, way: Way) -> None:
    graph = graph_of(way(data))
    bound = bound_to_data(graph, at_north(data))
    assert readers(graph)
    assert {key: bound.near.get(key) for key in readers(graph)} == dict.fromkeys(readers(graph), ("north",))
    assert not bound.constraints
    assert all(key in readers(graph) or not isinstance(graph.tasks[key], Task) for key in bound.near)


@every_way
def test_strict_data_binds(data: Path, way: Way) -> None:
    graph = graph_of(way(data))
    bound = bound_to_data(graph, at_north(data, "strict"))
    assert all(bound.constraints[key].sites == ("north",) for key in readers(graph))
    assert not bound.near


@every_way
def test_a_folder_with_a_longer_name_is_another_one(data: Path, way: Way) -> None:
    graph = graph_of(way(data))
    other = bound_to_data(graph, at_north(Path(str(data)[:-1]), "strict"))
    assert not other.near and not other.constraints


@pytest.mark.parametrize(
    ("way", "named"),
    [
        (lambda: delayed(pd.read_csv)("t.csv"), "pandas.read_csv"),
        (lambda: delayed(open)("t.csv"), "io.open"),
        (lambda: delayed(np.load)(delayed(read)(1)), "numpy.load"),
        (lambda: delayed(read)(fsspec.filesystem("file")), "LocalFileSystem"),
        (lambda: delayed(fsspec.filesystem("file").ls)(3), "ls"),
        (lambda: delayed(functools.partial(np.loadtxt, skiprows=1))(3), "numpy.loadtxt"),
    ],
    ids=["relative", "open", "a path that is computed", "a file system", "its method", "a partial"],
)
def test_strict_data_and_a_reader_whose_path_cannot_be_told(way: Callable[[], Any], named: str, tmp_path: Path) -> None:
    with dask.config.set({"optimization.fuse.delayed": True}):
        graph = graph_of(way())
    assert not bound_to_data(graph, at_north(tmp_path)).near  # it may go anywhere
    with pytest.raises(ConfigurationError) as caught:
        bound_to_data(graph, at_north(tmp_path, "strict"))
    said = str(caught.value)
    assert named in said and repr(next(iter(graph.tasks))) in said
    assert "with at('north'):" in said and "absolute path or a URL" in said


@pytest.mark.parametrize(
    "way",
    [
        lambda: delayed(pd.read_csv)(io.StringIO("a,b")),
        lambda: delayed(operator.add)(1, 2),
        lambda: delayed(read)("t.csv"),
        lambda: delayed(pd.read_csv)("/elsewhere/t.csv"),
        lambda: da.ones(8, chunks=4) + 1,
        lambda: da.from_array(np.ones(8), chunks=4),
        lambda: dd.from_pandas(pd.DataFrame({"a": range(4)}), npartitions=2),
    ],
)
def test_strict_data_leaves_alone_what_reads_no_files_or_others(way: Callable[[], Any], tmp_path: Path) -> None:
    graph = graph_of(way())
    bound = bound_to_data(graph, at_north(tmp_path, "strict"))
    assert not bound.near and not bound.constraints


def test_urls_of_file_systems_that_need_no_network() -> None:
    class Bucket(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = ("s3", "s3a")

    bucket = Bucket()
    for thing in (fsspec.core.OpenFile(bucket, "b/x.csv"), fsspec.FSMap("b/x.csv", bucket)):
        assert list(Finder().reads(thing).paths) == ["s3://b/x.csv"]
    assert list(Finder().call(bucket.cat, ["b/x.csv"]).paths) == ["s3://b/x.csv"]


def test_an_object_that_breaks_when_it_is_looked_at_tells_nothing() -> None:
    class Broken(fsspec.core.OpenFile):  # type: ignore[misc]
        path = property(lambda self: 1 / 0, lambda self, value: None)

    found = Finder().reads(Broken(FS, "/x"))
    assert not found.paths and found.unclear == [Broken.__qualname__]


def test_readers() -> None:
    assert all(map(is_reader, (open, io.open, pd.read_csv, xr.open_dataset, np.load, functools.partial(open, "x"))))
    assert not any(map(is_reader, (len, read, pd.read_sql, np.sum, pd.DataFrame, None)))
