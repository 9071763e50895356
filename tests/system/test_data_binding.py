"""What reads below a site's ``data`` is read at that site, without a word in the script about where.

The files are those of ``test_pins``: two sites, a folder of data for each; here the paths say where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag as db
import numpy as np
import pandas as pd
import pytest

from daskfed import Client, Federation, at
from daskfed.errors import ConfigurationError
from tests.system.commands import BIN, Command, hub, site
from tests.system.journal import Journal
from tests.system.test_pins import (
    SCALE,
    SOURCES,
    TABLE,
    WORKER,
    Sites,
    Source,
    assert_read_at_home,
    assert_right,
    every_source,
    folder_of_a_task,
    write,
)

pytestmark = [pytest.mark.system, pytest.mark.needs("xarray", "zarr", "pyarrow")]


@pytest.fixture(scope="module", params=["prefer", "strict"])
def sites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """Two sites whose ``data`` is their folder: given as a path by one, relative to its directory by the other."""
    folders = {name: tmp_path_factory.mktemp(request.param) / name for name in SCALE}
    for name, folder in folders.items():
        folder.mkdir()
        write(folder, SCALE[name])
    given = {"north": str(folders["north"]), "south": "."}
    profile = {
        name: {"options": WORKER, "directory": folder, "data": [given[name]], "data-binding": request.param}
        for name, folder in folders.items()
    }
    with Federation(profile) as federation, Client(federation) as client:
        yield Sites(client, {name: Journal(folder) for name, folder in folders.items()})


def binding(sites: Sites) -> Any:
    return sites.client.sites()["north"]["data_binding"]


def test_the_client_knows_what_sites_have(sites: Sites) -> None:
    told = sites.client.sites()
    has = {name: list(facts["data"]) for name, facts in told.items()}
    assert has == {name: [str(sites.folder(name))] for name in SCALE}
    assert {facts["data_binding"] for facts in told.values()} <= {"prefer", "strict"}


def opened(sites: Sites, source: Source, name: str) -> Any:
    folder = sites.folder(name)
    paths = [str(folder / one) for one in source.argument] if isinstance(source.argument, list) else None
    return source.function(paths or str(folder / source.argument))


@every_source
def test_each_file_is_read_at_the_site_that_has_it(sites: Sites, source: Source) -> None:
    north, south = (opened(sites, source, name) for name in SCALE)
    sites.clear()
    (result,) = dask.compute(source.combined(north, south))
    assert_right(source, result)
    assert_read_at_home(sites, source)


def test_calls_go_where_their_path_is(sites: Sites) -> None:
    paths = [str(sites.folder(name) / f"{i}.csv") for i in range(2) for name in SCALE]
    sites.clear()
    tables = sites.client.gather(sites.client.map(pd.read_csv, paths))
    expected = [(TABLE.x[12 * i : 12 * i + 12] * SCALE[name]).tolist() for i in range(2) for name in SCALE]
    assert [table.x.tolist() for table in tables] == expected
    assert_read_at_home(sites, SOURCES["read_csv"])
    assert [sites.client.submit(where, Path(path)).result() for path in paths] == ["north", "south"] * 2
    lazy = [dask.delayed(where)(path) for path in paths]
    assert list(dask.compute(*lazy)) == ["north", "south"] * 2
    lines = db.read_text(paths).str.count("\n").sum()
    assert lines.compute() == 4 * 13


def where(path: Any) -> str:
    return folder_of_a_task()


def test_at_wins_over_data(sites: Sites) -> None:
    path = sites.folder("north") / "0.csv"
    with at("south"):
        bound = dask.delayed(where)(path)
    assert bound.compute() == "south"
    assert sites.client.submit(where, path, site="south").result() == "south"


def test_a_reader_whose_path_cannot_be_told(sites: Sites) -> None:
    task = dask.delayed(np.load)("no-such-file.npy", dask_key_name="mine")
    if binding(sites) == "strict":
        with pytest.raises(ConfigurationError, match=r"task 'mine' reads files \(numpy.load\)"):
            task.compute()
        with pytest.raises(ConfigurationError, match="from what path cannot be told"):
            sites.client.submit(np.load, "no-such-file.npy")
    with pytest.raises(FileNotFoundError), at("north"):
        task.persist().compute()


def test_data_of_a_site_that_a_command_started(tmp_path: Path) -> None:
    commands = [hub()]
    try:
        address = commands[0].line(r"tcp://[\d.]+:\d+").group()
        options = ("--data", "era5/", "--data", "s3://bucket/x", "--data-binding", "strict")
        commands.append(site("north", address, "--directory", str(tmp_path), *options))
        commands[-1].line("joined")
        told = Command(str(BIN / "daskfed"), "status", "--hub", address, "--json")
        assert told.wait() == 0
        north = json.loads(told.output)["north"]
        assert (north["data"], north["data_binding"]) == ([f"{tmp_path}/era5", "s3://bucket/x"], "strict")
    finally:
        for command in reversed(commands):
            command.press()
            command.wait()
            command.kill()
