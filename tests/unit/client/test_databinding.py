"""Where tasks go by what they read: among several sites, beside ``at``, in fused tasks, in calls, and into blocks."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from dask.base import collections_to_expr

from daskfed import at
from daskfed.client import hooks
from daskfed.client.constraints import EMPTY
from daskfed.client.databinding import DataSites, Place, bound_to_data, calls_by_place
from daskfed.client.graphs import MaterialisedGraph, materialise
from daskfed.client.notes import flat_keys
from daskfed.client.submission import plan_calls, plan_graph
from daskfed.dask_private import LLGExpr, MapExpr, Task, TaskRef
from daskfed.errors import ConfigurationError
from daskfed.hub.placement import Candidate, LowestCost
from daskfed.messages import Constraint

hooks.install()

NORTH, SOUTH = "/data/north", "/data/south"


def sites(north: str = "prefer", south: str = "prefer", /, **data: list[str]) -> DataSites:
    has = {"north": [NORTH, "s3://bucket/a"], "south": [SOUTH], **data}
    binding = {"north": north, "south": south}
    return DataSites.of({name: {"data": has[name], "data_binding": binding.get(name, "prefer")} for name in has})


def graph_of(*collections: Any) -> MaterialisedGraph:
    expr = collections_to_expr(collections).optimize()
    return materialise(expr, flat_keys(expr.__dask_keys__()))


def placed(collection: Any, data: DataSites) -> tuple[Constraint | None, tuple[str, ...]]:
    """Return the constraint of a single task, and near what it is."""
    graph = bound_to_data(graph_of(collection), data)
    (key,) = graph.tasks
    return graph.constraints.get(key), graph.near.get(key, ())


@pytest.mark.parametrize(
    ("paths", "data", "expected"),
    [
        ([f"{NORTH}/x"], sites(), Place(("north",), False)),
        ([f"{NORTH}/x"], sites("strict"), Place(("north",), True)),
        ([NORTH], sites(), Place(("north",), False)),
        ([NORTH + "2"], sites(), None),
        (["/data"], sites(), None),
        ([], sites(), None),
        (["s3://bucket/a/x"], sites(), Place(("north",), False)),
        (["s3://bucket/ab"], sites(), None),
        (["/bucket/a"], sites(), None),
        ([f"{NORTH}/x", "/elsewhere"], sites(), Place(("north",), False)),
        ([f"{NORTH}/x", f"{NORTH}/y", f"{SOUTH}/x"], sites(), Place(("north",), False)),
        ([f"{NORTH}/x", f"{SOUTH}/x"], sites(), Place(("north", "south"), False)),
        ([f"{NORTH}/x", f"{SOUTH}/x"], sites("strict"), Place(("north",), True)),
        ([f"{NORTH}/x", f"{SOUTH}/x"], sites("strict", "strict"), None),
        ([f"{NORTH}/x"], sites(third=["/data"]), Place(("north", "third"), False)),
        ([f"{NORTH}/x"], sites("strict", third=["/data"]), Place(("north", "third"), True)),
        ([f"{NORTH}/x"], sites(third=["/"]), Place(("north", "third"), False)),
    ],
)
def test_the_place_of_paths(paths: Iterable[str], data: DataSites, expected: Place | None) -> None:
    assert data.place(paths) == expected


def test_without_data_the_graph_is_not_looked_at() -> None:
    graph = graph_of(delayed(open)("x"))
    assert bound_to_data(graph, DataSites.of({"north": {"data": [], "data_binding": "strict"}})) is graph


@pytest.mark.parametrize("binding", ["prefer", "strict"])
@pytest.mark.parametrize("where", [{"sites": "south"}, {"sites": "role=io"}, {"workers": "somewhere"}])
def test_what_the_user_bound_stays(binding: str, where: dict[str, Any]) -> None:
    with at(**where):
        task = delayed(open)(f"{NORTH}/x")
    constraint, near = placed(task, sites(binding))
    assert constraint is not None and (constraint.sites or constraint.workers)
    assert "north" not in constraint.sites and near == ()


def test_other_constraints_are_kept_beside_the_site() -> None:
    with at(environment="gpu", retries=3):
        task = delayed(open)(f"{NORTH}/x")
    assert placed(task, sites("strict"))[0] == Constraint(sites=("north",), environment="gpu", retries=3)


def test_tasks_that_take_results_are_not_looked_at() -> None:
    loaded = delayed(open)(f"{NORTH}/x")
    graph = bound_to_data(graph_of(delayed(print)(delayed(len)(loaded), loaded, f"{SOUTH}/x")), sites())
    assert list(graph.near.values()) == [("north",)]


def zarr_at(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        da.ones(8, chunks=4).to_zarr(str(folder))
    return da.from_zarr(str(folder))


@pytest.mark.parametrize("binding", ["prefer", "strict"])
def test_what_dask_fused_from_two_sites_is_taken_apart(tmp_path: Path, binding: str) -> None:
    north, south = zarr_at(tmp_path / "north"), zarr_at(tmp_path / "south")
    data = sites(binding, binding, north=[str(tmp_path / "north")], south=[str(tmp_path / "south")])
    graph = graph_of(north + south)
    bound = bound_to_data(graph, data)
    places = [bound.constraints[key].sites if key in bound.constraints else bound.near.get(key) for key in bound.tasks]
    readers = [place for key, place in zip(bound.tasks, places, strict=True) if isinstance(bound.tasks[key], Task)]
    assert sorted(map(str, readers)) == sorted(map(str, 2 * [("north",)] + 2 * [("south",)] + 2 * [None]))
    assert bound.wanted <= bound.tasks.keys()
    values = dask.get({key: node for key, node in bound.tasks.items()}, sorted(bound.wanted))
    np.testing.assert_array_equal(np.concatenate(values), 2 * np.ones(8))


def test_a_task_that_reads_at_two_strict_sites_is_an_error() -> None:
    task = delayed(pd.concat)([f"{NORTH}/x", f"{SOUTH}/y"])
    with pytest.raises(
        ConfigurationError, match=f"task 'concat-.*' reads {NORTH}/x, {SOUTH}/y, which are at different"
    ):
        placed(task, sites("strict", "strict"))
    assert placed(task, sites()) == (None, ("north", "south"))


def test_partitions_of_two_sites_go_to_theirs(tmp_path: Path) -> None:
    paths = []
    for site, part in itertools.product(("north", "south"), range(2)):
        os.makedirs(tmp_path / site, exist_ok=True)
        paths.append(str(tmp_path / site / f"{part}.csv"))
        pd.DataFrame({"a": [part]}).to_csv(paths[-1], index=False)
    data = sites(north=[str(tmp_path / "north")], south=[str(tmp_path / "south")])
    graph = bound_to_data(graph_of(dd.read_csv(paths)), data)
    assert sorted(graph.near.values()) == [("north",)] * 2 + [("south",)] * 2


# -- blocks ------------------------------------------------------------------------------------------------------------


def blocks_of(graph: MaterialisedGraph) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
    blocks = plan_graph(graph, map(str, itertools.count())).blocks
    return [(block.near, block.constraint.sites, block.ntasks) for block in blocks]


@pytest.mark.parametrize("binding", ["prefer", "strict"])
def test_blocks_read_at_one_site_and_what_follows_is_near(tmp_path: Path, binding: str) -> None:
    """Stores that lie in the graph are copied into the blocks of their site."""
    data = sites(binding, binding, north=[str(tmp_path / "north")], south=[str(tmp_path / "south")])
    parts = [zarr_at(tmp_path / site).sum() for site in ("north", "south")]
    blocks = blocks_of(bound_to_data(graph_of(*parts), data))
    assert {near for near, _, _ in blocks} == {("north",), ("south",)}
    strict = binding == "strict"
    assert {bound for _, bound, _ in blocks} == ({("north",), ("south",)} if strict else {()})


def test_the_policy_keeps_a_block_where_its_data_is() -> None:
    graph = bound_to_data(graph_of(delayed(open)(f"{SOUTH}/x")), sites())
    (block,) = plan_graph(graph, map(str, itertools.count())).blocks
    common: dict[str, Any] = {"threads": 1, "bring_nbytes": 0, "bring_s": 0.0, "run_s": 1.0}
    busy = Candidate("south", backlog_s=3.0, near="south" in block.near, **common)
    idle = Candidate("north", backlog_s=0.0, near="north" in block.near, **common)
    assert LowestCost().choose(block, [idle, busy]) == 1


# -- calls -------------------------------------------------------------------------------------------------------------


def planned(expr: Any, data: DataSites, constraint: Constraint = EMPTY, size: int = 10) -> list[Any]:
    batches = calls_by_place(expr, constraint, data, size)
    blocks = plan_calls(batches, {}, map(str, itertools.count())).blocks
    return [(block.outputs, block.constraint.sites, block.near) for block in blocks]


def mapped(func: Any, *columns: Any, **kwargs: Any) -> Any:
    keys = [f"k{i}" for i in range(len(columns[0]))]
    return MapExpr(func, columns, key=keys, pure=False, annotations={}, kwargs=kwargs)


def test_a_map_over_paths_is_divided_by_site() -> None:
    paths = [f"{NORTH}/0", f"{SOUTH}/1", "/elsewhere/2", f"{NORTH}/3", f"{SOUTH}/4"]
    expr = mapped(open, paths, range(5))
    north, south, other = ("k0", "k3"), ("k1", "k4"), ("k2",)
    assert planned(expr, sites()) == [(north, (), ("north",)), (south, (), ("south",)), (other, (), ())]
    assert planned(expr, sites("strict"))[0] == (north, ("north",), ())
    assert planned(expr, sites(), size=1)[:2] == [(("k0",), (), ("north",)), (("k3",), (), ("north",))]
    at_south = Constraint(sites=("south",))
    assert planned(expr, sites("strict"), at_south) == [((*expr.keys,), ("south",), ())]
    assert planned(expr, DataSites()) == [((*expr.keys,), (), ())]


def test_the_calls_of_a_divided_map_keep_their_arguments() -> None:
    paths = [f"{NORTH}/0", f"{SOUTH}/1", f"{NORTH}/2"]
    found = {}
    expr = mapped(lambda *args, **kwargs: (args, kwargs), paths, range(3), {"a": 0, "b": 1, "c": 2}, mode="r")
    for calls, _, _ in calls_by_place(expr, Constraint(), sites(), 10):
        found |= {key: task() for key, task in calls.expr.__dask_graph__().items()}
    expected = {f"k{i}": ((paths[i], i, "abc"[i]), {"mode": "r"}) for i in range(3)}
    assert found == expected


def test_a_path_in_a_keyword_or_in_the_function_is_for_all_calls() -> None:
    assert planned(mapped(print, range(3), file=Path(f"{SOUTH}/x")), sites())[0][2] == ("south",)


def test_a_single_call() -> None:
    expr = LLGExpr({"k": Task("k", open, f"{NORTH}/x")})
    assert planned(expr, sites()) == [(("k",), (), ("north",))]
    assert planned(expr, sites("strict")) == [(("k",), ("north",), ())]


def test_calls_of_readers_without_a_path_under_strict_data() -> None:
    with pytest.raises(ConfigurationError, match=r"task 'k1' reads files \(io.open\)"):
        planned(mapped(open, [f"{NORTH}/0", "relative"]), sites("strict"))
    of_a_future = LLGExpr({"k": Task("k", open, TaskRef("future"))})
    assert planned(of_a_future, sites("strict")) == [(("k",), (), ())]
