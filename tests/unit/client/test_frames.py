"""Dataframes: the constraint of every reader through query planning, and of what is fused or repartitioned."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from daskfed.client import hooks
from daskfed.client.constraints import at
from daskfed.client.frames import Pinned
from daskfed.client.graphs import MaterialisedGraph
from daskfed.dask_private import Alias
from daskfed.messages import Key
from tests.unit.client.graph_tools import (
    ALL_CONSTRAINED,
    ALL_FIELDS,
    NORTH,
    SOUTH,
    assert_blocks,
    assert_bound,
    assert_clean,
    computed,
    name_of,
    opened,
    sites_by_prefix,
    sites_of,
    tasks_with,
)

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # Dask's own use of pandas

TABLE = pd.DataFrame({"i": range(40), "x": np.arange(40) / 4, "s": list("abcd") * 10, "z": 1.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dd.from_pandas(TABLE, npartitions=4).to_parquet(folder / "t.parquet")
    for i in range(4):
        TABLE[10 * i : 10 * i + 10].to_csv(folder / f"{i}.csv", index=False)
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "read_parquet": lambda folder: dd.read_parquet(folder / "t.parquet"),
    "read_parquet with arrow": lambda folder: dd.read_parquet(str(folder / "t.parquet"), filesystem="arrow"),
    "read_csv": lambda folder: dd.read_csv(str(folder / "*.csv")),
    "from_pandas": lambda folder: dd.from_pandas(TABLE, npartitions=4),
    "from_map": lambda folder: dd.from_map(pd.read_csv, sorted(map(str, folder.glob("*.csv"))), meta=TABLE[:0]),
    "from_delayed": lambda folder: dd.from_delayed(
        [dask.delayed(pd.read_csv)(path) for path in sorted(map(str, folder.glob("*.csv")))], meta=TABLE[:0]
    ),
}

QUERIES: dict[str, Callable[[Any], Any]] = {
    "all": lambda df: df,
    "columns": lambda df: df[["x", "i"]],
    "one column": lambda df: df.x + 1,
    "filter": lambda df: df[(df.i > 7) & (df.s == "a")].x,
    "groupby": lambda df: df.groupby("s").x.mean(),
    "map_partitions": lambda df: df.map_partitions(lambda part: part[["x"]] * 2),
    "partitions": lambda df: df.partitions[1:3].i,
    "merge": lambda df: df.merge(df[["i"]].rename(columns={"i": "j"}), left_on="i", right_on="j"),
    "sort": lambda df: df.sort_values("x"),
    "optimised": lambda df: (df.x + df.i).optimize(),
}


@pytest.fixture(autouse=True)
def hooked() -> None:
    """As in a program that has made a client, or used ``at``."""
    hooks.install()


@pytest.fixture(autouse=True)
def shuffle() -> Iterator[None]:
    """Shuffle by tasks: what Dask does without a client needs a disk that all workers share."""
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        yield


def roots(graph: MaterialisedGraph) -> list[Key]:
    """Return the tasks that need no other: in these graphs, the readers."""
    return [key for key, node in graph.tasks.items() if not node.dependencies]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_keeps_its_site(folder: Path, reader: str, query: str) -> None:
    with at("north", retries=2):
        df = READERS[reader](folder)
    for persist in (False, True):
        graph = opened(QUERIES[query](df), persist=persist)
        assert_bound(graph, roots(graph), NORTH)
        assert {graph.constraints[key].retries for key in roots(graph)} == {2}
        assert_clean(graph)


@pytest.mark.parametrize("annotate", [at, dask.annotate])
@pytest.mark.parametrize("query", ["all", "filter", "groupby", "merge"])
@pytest.mark.parametrize("reader", READERS)
def test_every_field_reaches_the_blocks_that_read(folder: Path, reader: str, query: str, annotate: Any) -> None:
    with annotate(**ALL_FIELDS):
        df = READERS[reader](folder)
    for persist in (False, True):
        graph = opened(QUERIES[query](df), persist=persist)
        assert_blocks(graph, roots(graph), ALL_CONSTRAINED)


@pytest.mark.parametrize("reader", READERS)
def test_the_results_are_those_of_stock_dask(folder: Path, reader: str) -> None:
    with at("north"):
        df = READERS[reader](folder)
    plain = READERS[reader](folder)
    for query in QUERIES.values():
        (ours,), stock = computed(query(df)), query(plain).compute(scheduler="sync")
        if isinstance(ours, pd.DataFrame):
            ours, stock = ours.sort_values("x"), stock.sort_values("x")
            pd.testing.assert_frame_equal(ours, stock)
        else:
            pd.testing.assert_series_equal(ours.sort_index(), stock.sort_index())


@pytest.mark.parametrize("reader", ["read_parquet", "read_csv", "from_pandas"])
@pytest.mark.parametrize("fuse", [False, True])
def test_frames_of_two_sites_meet_in_tasks_that_are_free(folder: Path, reader: str, fuse: bool) -> None:
    frames = {}
    for site in ("north", "south"):
        with at(site):
            frames[site] = READERS[reader](folder)
    both = frames["north"].i * 2 + frames["south"].i
    graph = opened(both.optimize() if fuse else both)
    sites = [sites_of(graph, key) for key in roots(graph)]
    assert sites.count(NORTH) == sites.count(SOUTH) >= 2
    assert sites.count(NORTH) + sites.count(SOUTH) == len(sites)
    assert sites_by_prefix(graph, "add") == {()} if not fuse else True
    (result,) = computed(both)
    assert sorted(result) == [3 * i for i in range(40)]


def test_frames_of_two_sites_are_concatenated_merged_and_grouped(folder: Path) -> None:
    with at("north"):
        left = dd.read_parquet(folder / "t.parquet")
    with at("south"):
        right = dd.read_csv(str(folder / "*.csv"))
    for result in (
        dd.concat([left, right]).x.sum(),
        left.merge(right, on="i").groupby("s_x").x_y.sum(),
    ):
        graph = opened(result)
        sites = [sites_of(graph, key) for key in roots(graph)]
        assert set(sites) == {NORTH, SOUTH}
    assert computed(dd.concat([left, right]).x.sum()) == (2 * TABLE.x.sum(),)


def test_the_same_file_at_two_sites_has_two_names(folder: Path) -> None:
    frames = []
    for site in (None, "north", "north", "south"):
        if site is None:
            frames.append(dd.read_parquet(folder / "t.parquet"))
        else:
            with at(site):
                frames.append(dd.read_parquet(folder / "t.parquet"))
    plain, north, again, south = (frame.expr._name for frame in frames)
    assert north == again
    assert len({plain, north, south}) == 3
    assert {name.rsplit("-", 1)[0] for name in (plain, north, south)} == {"read_parquet"}


def test_what_is_built_inside_later_does_not_move_the_reader(folder: Path) -> None:
    with at("north"):
        df = dd.read_parquet(folder / "t.parquet")
    with at(environment="gpu"):
        df = df.map_partitions(lambda part: part * 2, meta=df._meta)
    graph = opened(df)
    assert_bound(graph, roots(graph), NORTH)
    assert {graph.constraints[key].environment for key in roots(graph)} == {None}
    mapped = [key for key, constraint in graph.constraints.items() if constraint.environment == "gpu"]
    assert len(mapped) == len(roots(graph)) and {sites_of(graph, key) for key in mapped} == {()}


@pytest.mark.parametrize(
    "build",
    [
        lambda df: df.groupby("s").x.mean(),
        lambda df: df.groupby("s").apply(lambda part: part.x.max(), meta=("x", float)),
        lambda df: df.merge(df[["i"]], on="i"),
        lambda df: df.sort_values("x"),
        lambda df: df.x.rolling(3).sum(),
        lambda df: df.x.cumsum().sum(),
        lambda df: df.describe(),
        lambda df: dd.get_dummies(df.categorize("s")),
    ],
)
def test_operations_that_are_built_inside_are_bound(build: Callable[[Any], Any]) -> None:
    with at("north"):
        df = dd.from_pandas(TABLE, npartitions=4)
    with at("south"):
        result = build(df)
    graph = opened(result)
    assert_bound(graph, [key for key in roots(graph) if name_of(key).startswith("frompandas")], NORTH)
    tasks = [key for key, node in graph.tasks.items() if not isinstance(node, Alias)]  # an alias is where its target is
    elsewhere = {name_of(key).split("-")[0] for key in tasks if sites_of(graph, key) != SOUTH}
    assert elsewhere <= {"frompandas", "getitem", "repartitiontofewer"}  # the planner selects columns, concatenates
    (ours,), stock = computed(result), build(dd.from_pandas(TABLE, npartitions=4)).compute(scheduler="sync")
    assert rows(ours) == rows(stock)


def rows(result: Any) -> list[str]:
    return sorted(map(repr, np.asarray(result).tolist())) if np.ndim(result) else [repr(result)]


def test_a_plain_annotation_of_dask_counts_too(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dask annotations")  # stock Dask would warn that it ignores them
        with dask.annotate(resources={"GPU": 1}, colour="blue"):
            df = dd.read_parquet(folder / "t.parquet")
    graph = opened(df.x)
    assert {graph.constraints[key].resources for key in roots(graph)} == {(("GPU", 1.0),)}
    assert set(graph.annotations["colour"]) == set(roots(graph))


def test_pinned_expressions_are_pickled_and_rewritten(folder: Path) -> None:
    with at("north"):
        df = dd.read_parquet(folder / "t.parquet")
    again = pickle.loads(pickle.dumps(df))
    assert isinstance(again.expr, Pinned) and again.expr._name == df.expr._name
    assert type(again.expr) is type(df.expr)
    projected = df[["x"]].optimize(fuse=False).expr
    assert not any(type(node).__name__ == "Projection" for node in projected.walk())  # it moved into the reader
    graph = opened(again)
    assert_bound(graph, roots(graph), NORTH)


def test_delayed_parts_keep_their_own_sites(folder: Path) -> None:
    parts = []
    for i, site in enumerate(["north", "south", "north", "south"]):
        with at(site):
            parts.append(dask.delayed(pd.read_csv)(str(folder / f"{i}.csv")))
    graph = opened(dd.from_delayed(parts, meta=TABLE[:0]).x.sum())
    for i, site in enumerate([NORTH, SOUTH, NORTH, SOUTH]):
        assert_bound(graph, tasks_with(graph, str(folder / f"{i}.csv")), site)
    with at("north"):
        total = dask.delayed(sum)([1, 2])
    x = dd.from_pandas(TABLE, npartitions=2).x
    added = x.map_partitions(lambda part, number: part + number, total, meta=x._meta)
    graph = opened(added)
    assert_bound(graph, tasks_with(graph, sum), NORTH)


def test_arrays_keep_their_sites_as_frames_and_frames_as_arrays(folder: Path) -> None:
    with at("north"):
        x = da.from_array(np.ones((8, 2)), chunks=(4, 2))
    for frame in (dd.from_dask_array(x, columns=["a", "b"]).a, x.to_dask_dataframe()):
        graph = opened(frame)
        assert_bound(graph, tasks_with(graph, np.ndarray), NORTH)
    with at("south"):
        frame = dd.from_dask_array(da.zeros(4, chunks=2))
    graph = opened(frame)
    assert_bound(graph, roots(graph), SOUTH)
    with at("north"):
        df = dd.read_parquet(folder / "t.parquet")
    graph = opened(df[["x"]].to_dask_array() + 1)
    assert_bound(graph, roots(graph), NORTH)
    graph = opened(*df.to_delayed())
    assert_bound(graph, roots(graph), NORTH)
    graph = opened(df.to_bag())
    assert_bound(graph, roots(graph), NORTH)


def test_frames_arrays_and_delayed_objects_are_computed_together(folder: Path) -> None:
    with at("north"):
        df, x = dd.read_parquet(folder / "t.parquet"), da.from_array(np.ones(4), chunks=2)
    with at("south"):
        total = dask.delayed(sum)([1, 2])
    with pytest.warns(UserWarning, match="mixed collections"):
        graph = opened(df.x, x, total)
    assert {sites_of(graph, key) for key in roots(graph)} == {NORTH, SOUTH}
    assert_bound(graph, [key for key in roots(graph) if name_of(key).startswith("read_parquet")], NORTH)
    with pytest.warns(UserWarning, match="mixed collections"):
        frame, array, number = computed(df.x, x, total)
    assert (frame.sum(), array.sum(), number) == (TABLE.x.sum(), 4, 3)


def test_statistics_are_read_where_the_files_are(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "t.parquet", tmp_path / "new.parquet")  # Dask remembers statistics by path and time
    seen = []

    def get(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        seen.append(dask.get_annotations())
        return dask.get(dict(dsk.__dask_graph__()), keys)

    with at("north"):
        df = dd.read_parquet(str(tmp_path / "new.parquet"), filesystem="arrow")
    with dask.config.set(scheduler=get):
        opened(df.x)
    assert seen and all(annotations == {"sites": NORTH} for annotations in seen)
