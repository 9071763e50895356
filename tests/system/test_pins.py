"""Where every IO task ran: at the site that its collection was built for, whichever way it was built and ended.

Each site has files of the same names in a working directory of its own, with other values in them. The workers write
down which data files they open, so what is compared is where the reading was done, not where a key was meant to be.
"""

from __future__ import annotations

import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import futures_of

from daskfed import Client, Federation, at
from tests.system.commands import NO_DASHBOARD
from tests.system.journal import Journal

pytestmark = [pytest.mark.system, pytest.mark.needs("xarray", "zarr", "pyarrow")]

WORKER = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD, "preload": ["tests.system.journal"]}
GPU = {"GPU": 1}
SCALE = {"north": 1.0, "south": 10.0}  # what the values in a site's files are multiplied with
VALUES = np.arange(48.0).reshape(8, 6)
TABLE = pd.DataFrame({"k": np.arange(24) % 3, "x": np.arange(24.0)})


@dataclass
class Sites:
    """A federation of two sites, a client of it, and what each site's workers do."""

    client: Client
    journals: dict[str, Journal]

    def folder(self, site: str) -> Path:
        return self.journals[site].folder

    def clear(self) -> None:
        for journal in self.journals.values():
            journal.clear()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    folders = {name: tmp_path_factory.mktemp(name, numbered=False) for name in SCALE}
    for site, folder in folders.items():
        write(folder, SCALE[site])
    gpu = {"options": {**WORKER, "resources": GPU}, "resources": GPU}
    options = {"north": {"options": WORKER}, "south": gpu}
    profile = {site: {**options[site], "directory": folder} for site, folder in folders.items()}
    with Federation(profile) as federation, Client(federation) as client:
        yield Sites(client, {site: Journal(folder) for site, folder in folders.items()})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder that has none of the files."""
    monkeypatch.chdir(tmp_path)


def write(folder: Path, scale: float) -> None:
    ds = xr.Dataset({"t": (("a", "b"), scale * VALUES)}, {"a": range(8)})
    da.from_array(scale * VALUES, chunks=(4, 3)).to_zarr(folder / "x.zarr")
    ds.chunk(a=4).to_zarr(folder / "ds.zarr", consolidated=False, zarr_format=2)
    for i in range(2):
        ds.isel(a=slice(4 * i, 4 * i + 4)).to_netcdf(folder / f"{i}.nc", engine="scipy")
        TABLE.assign(x=scale * TABLE.x)[12 * i : 12 * i + 12].to_csv(folder / f"{i}.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dd.from_pandas(TABLE.assign(x=scale * TABLE.x), npartitions=3).to_parquet(folder / "t.parquet")


def open_many(paths: list[str]) -> xr.Dataset:
    return xr.open_mfdataset(paths, engine="scipy", combine="by_coords", chunks={})


@dataclass(frozen=True)
class Source:
    """One way to read: the call, the files that hold the values, and what becomes of the data of two sites."""

    function: Callable[..., Any]
    argument: Any
    files: str  # pattern of the files that hold the values
    combined: Callable[[Any, Any], Any]

    def files_at(self, folder: Path) -> set[Path]:
        found = {path.resolve() for path in folder.glob(self.files) if path.is_file()}
        assert found, f"no {self.files} in {folder}"
        return found


def summed(north: Any, south: Any) -> Any:
    return north + south


def summed_by_key(north: Any, south: Any) -> Any:
    return dd.concat([north, south]).groupby("k").x.sum()


SOURCES = {
    "from_zarr": Source(da.from_zarr, "x.zarr", "x.zarr/c/*/*", summed),
    "open_zarr": Source(xr.open_zarr, "ds.zarr", "ds.zarr/t/[0-9]*", summed),
    "open_mfdataset": Source(open_many, ["0.nc", "1.nc"], "*.nc", summed),
    "read_parquet": Source(dd.read_parquet, "t.parquet", "t.parquet/part*", summed_by_key),
    "read_csv": Source(dd.read_csv, "*.csv", "*.csv", summed_by_key),
}


def assert_right(source: Source, result: Any) -> None:
    factor = sum(SCALE.values())
    if source.combined is summed_by_key:
        expected = TABLE.groupby("k").x.sum() * factor
        pd.testing.assert_series_equal(result.sort_index(), expected, check_dtype=False, check_index_type=False)
    else:
        np.testing.assert_array_equal(result.t if isinstance(result, xr.Dataset) else result, factor * VALUES)


def built_here(sites: Sites, source: Source, site: str) -> Any:
    """Open the files of a site in this process, inside ``at``."""
    before = Path.cwd()
    os.chdir(sites.folder(site))
    try:
        with at(site):
            return source.function(source.argument)
    finally:
        os.chdir(before)


def built_there(sites: Sites, source: Source, site: str) -> Any:
    """Open the files at the site; the path is relative to the site's working directory."""
    return sites.client.open(source.function, source.argument, site=site)


def assert_read_at_home(sites: Sites, source: Source) -> None:
    """Every file was opened at its own site, and nothing of it at the other."""
    for journal in sites.journals.values():
        own = source.files_at(journal.folder)
        reads = journal.reads()
        assert own <= reads, f"not all files of {journal.folder.name} were read there"
        assert all(journal.folder.resolve() in path.parents for path in reads), (
            f"read at {journal.folder.name}: {reads}"
        )


both_ways = pytest.mark.parametrize("built", [built_here, built_there])
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@every_source
@both_ways
def test_compute_reads_each_file_at_its_own_site(sites: Sites, source: Source, built: Callable[..., Any]) -> None:
    north, south = (built(sites, source, site) for site in SCALE)
    sites.clear()
    (result,) = dask.compute(source.combined(north, south))
    assert_right(source, result)
    assert_read_at_home(sites, source)


@every_source
@both_ways
def test_persist_reads_each_file_at_its_own_site_once(sites: Sites, source: Source, built: Callable[..., Any]) -> None:
    opened = [built(sites, source, site) for site in SCALE]
    sites.clear()
    kept = dask.persist(*opened)
    for site, collection in zip(SCALE, kept, strict=True):
        for future in futures_of(collection):
            future.result()
            assert sites.client.explain(future)["site"] == site
    assert_read_at_home(sites, source)
    sites.clear()
    (result,) = dask.compute(source.combined(*kept))
    assert_right(source, result)
    assert not any(source.files_at(journal.folder) & journal.reads() for journal in sites.journals.values())


def folder_of_a_task(_: Any = None) -> str:
    """Return the working directory that the task runs in: its site's."""
    return os.path.basename(os.getcwd())


def folders(blocks: int, token: str) -> Any:
    """An array of the working directories in which its blocks are made; Dask names arrays of one token alike."""
    return da.map_blocks(block_of_a_task, token, chunks=((1,) * blocks,), dtype="<U8", meta=np.empty(0, "<U8"))


def block_of_a_task(token: str, block_info: Any = None) -> Any:
    return np.array([folder_of_a_task()])


def frame_of_a_task(i: int) -> pd.DataFrame:
    return pd.DataFrame({"i": [i], "folder": [folder_of_a_task()]})


def test_delayed_runs_at_its_site(sites: Sites) -> None:
    calls = []
    for site in ("north", "south", "north"):
        with at(site):
            calls += [dask.delayed(folder_of_a_task)(len(calls)) for _ in range(4)]
    expected = ["north"] * 4 + ["south"] * 4 + ["north"] * 4
    assert dask.delayed(list)(calls).compute() == expected
    assert list(dask.compute(*calls)) == expected
    futures = futures_of(dask.persist(*calls))
    assert [future.result() for future in futures] == expected
    assert [sites.client.explain(future)["site"] for future in futures] == expected


def test_custom_readers_run_at_their_site(sites: Sites) -> None:
    arrays, frames = [], []
    for site in SCALE:
        with at(site):
            arrays.append(folders(4, site))
            frames.append(dd.from_map(frame_of_a_task, range(3), meta=frame_of_a_task(0)))
    array, frame = dask.compute(da.concatenate(arrays), dd.concat(frames))
    assert list(array) == ["north"] * 4 + ["south"] * 4
    assert list(frame.folder) == ["north"] * 3 + ["south"] * 3


def test_the_inner_at_wins_and_compute_inside_at_does_not_move_what_was_bound(sites: Sites) -> None:
    with at("north"):
        mine = dask.delayed(folder_of_a_task)("outer")
        with at("south"):
            inner = dask.delayed(folder_of_a_task)("inner")
    with at("south"):
        assert dask.compute(mine, inner) == ("north", "south")


# -- other constraints -------------------------------------------------------------------------------------------------


def ones_of_this_site(block: Any) -> Any:
    return block * SCALE[folder_of_a_task()]


def fails_twice(name: str, value: Any) -> Any:
    """Raise the first two times that it is called in this folder."""
    marks = [Path(f"{name}.{i}") for i in range(2)]
    for mark in marks:
        if not mark.exists():
            mark.touch()
            raise OSError(f"{mark} was not there")
    return value


def flaky_block(block: Any, name: str) -> Any:
    return fails_twice(name, block)


def flaky_frame(i: int, name: str) -> pd.DataFrame:
    return pd.DataFrame({"i": [fails_twice(f"{name}-{i}", i)]})


def flaky_collections(name: str) -> tuple[Any, Any, Any]:
    """Collections whose tasks fail twice: a delayed call, an array, a dataframe."""
    call = dask.delayed(fails_twice)(f"{name}-delayed", 7.0)
    array = da.ones(3, chunks=3).map_blocks(flaky_block, f"{name}-array", meta=np.ones(0))
    return call, array, dd.from_map(flaky_frame, [7], name=f"{name}-frame", meta=pd.DataFrame({"i": [0]}))


def test_the_same_call_at_another_site_is_another_call(sites: Sites) -> None:
    """What a relative path means depends on the site, so the results must not be taken for each other."""
    submit = sites.client.submit
    assert [submit(folder_of_a_task, site=site).result() for site in ("north", "south", "north")] == [
        "north",
        "south",
        "north",
    ]
    mapped = {site: sites.client.map(folder_of_a_task, range(3), site=site) for site in SCALE}
    assert sites.client.gather(mapped) == {site: [site] * 3 for site in SCALE}
    assert submit(folder_of_a_task, 1, site="north").key == submit(folder_of_a_task, 1, site="north").key
    assert sites.client.submit(folder_of_a_task, site="north", key="my-key").key == "my-key"


def test_what_is_built_alike_at_two_sites_is_two_things(sites: Sites) -> None:
    """Also where Dask names it by its function and arguments: a pure call, an array."""
    pure, arrays = {}, {}
    for site in SCALE:
        with at(site):
            pure[site] = dask.delayed(folder_of_a_task, pure=True)(1)
            arrays[site] = da.ones(3, chunks=1, dtype=float).map_blocks(ones_of_this_site, dtype=float)
    assert dask.compute(pure)[0] == {site: site for site in SCALE}
    held = {site: pure[site].persist() for site in SCALE}
    assert {site: call.compute() for site, call in held.items()} == {site: site for site in SCALE}
    assert {site: array.sum().compute() for site, array in arrays.items()} == {"north": 3.0, "south": 30.0}
    with at("north"):
        assert dask.delayed(folder_of_a_task, pure=True)(1).key == pure["north"].key


@pytest.mark.parametrize("site", SCALE)
def test_retries_survive(sites: Sites, site: str) -> None:
    with at(site, retries=2):
        call, array, frame = flaky_collections("enough")
    assert call.compute() == 7
    assert (array + 1).sum().compute() == 6
    assert int((frame.i + 1).sum().compute()) == 8
    assert (sites.folder(site) / "enough-frame-7.1").exists()


def test_too_few_retries_raise_what_the_task_raised(sites: Sites) -> None:
    with at("north", retries=1):
        call, array, frame = flaky_collections("few")
    for collection in (call, array.sum(), frame.i.sum()):
        with pytest.raises(OSError, match=r"few-.*\.1 was not there"):
            collection.compute()


def test_retries_of_a_submission(sites: Sites) -> None:
    with pytest.raises(OSError, match=r"once\.0 was not there"):
        sites.client.submit(fails_twice, "once", 7, site="south").result()
    assert sites.client.submit(fails_twice, "again", 8, site="south", retries=2).result() == 8
    x = dask.delayed(fails_twice)("compute", 9)
    assert sites.client.compute(x, retries=2).result() == 9


def test_resources_choose_the_site_that_has_them(sites: Sites) -> None:
    """Only the south has a GPU; nothing else says where these are to run."""
    with at(resources=GPU):
        calls = [dask.delayed(folder_of_a_task)(f"gpu {i}") for i in range(4)]
        array = folders(4, "gpu")
        frame = dd.from_map(frame_of_a_task, range(3), meta=frame_of_a_task(0))
    assert set(dask.compute(*calls)) == {"south"}
    assert set(array.compute()) == {"south"}
    assert set(frame.folder.compute()) == {"south"}
    future = sites.client.submit(folder_of_a_task, "gpu", resources=GPU)
    assert future.result() == "south"


def test_priority_of_a_collection_is_that_of_its_tasks(sites: Sites) -> None:
    """While the only thread of a site is busy, what has the higher priority overtakes what was submitted before."""
    with at("north"):
        busy = dask.delayed(time.sleep)(0.6)
    named: dict[str, Any] = {}
    for name, priority in (("low", -5), ("high", 5)):
        with at("north", priority=priority):
            named[name] = dask.delayed(operator.neg)(priority, dask_key_name=f"{name}-priority")
    blocker = sites.client.compute(busy)
    sites.clear()
    low, high = (sites.client.compute(named[name]) for name in ("low", "high"))
    assert (low.result(), high.result(), blocker.result()) == (5, -5, None)
    ran = [key for key in sites.journals["north"].ran() if key.endswith("-priority")]
    assert ran == ["high-priority", "low-priority"]


def test_workers_choose_the_worker_and_its_site(sites: Sites) -> None:
    """A worker is named as the federation shows it: by an address that is unique across the sites."""
    info = sites.client.scheduler_info(n_workers=-1)["workers"]
    for address, facts in info.items():
        site = facts["site"]
        assert sites.client.submit(folder_of_a_task, address, workers=[address]).result(timeout=60) == site
        with at(workers=address):
            array = folders(2, address)
        assert set(array.compute()) == {site}
    assert len(info) == 2
