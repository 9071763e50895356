"""Opening collections on the client: constraints through every optimisation, futures, aliases, payloads of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from operator import add
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import distributed
import numpy as np
import pytest
import xarray as xr
from dask._expr import HLGExpr, LLGExpr
from dask.array.core import getter
from dask.highlevelgraph import HighLevelGraph
from hypothesis import given
from hypothesis import strategies as st

from daskfed.client.constraints import at
from daskfed.client.graphs import BlockExpr, MaterialisedGraph, block_payload, external_futures, materialise
from daskfed.client.notes import noted_tasks, put_note
from daskfed.dask_private import Alias, DataNode, Task, TaskList, TaskRef
from daskfed.messages import Constraint
from tests.unit.client.graph_tools import (
    ALL_CONSTRAINED,
    ALL_FIELDS,
    NORTH,
    SOUTH,
    WEST,
    assert_blocks,
    assert_bound,
    assert_clean,
    computed,
    computing,
    name_of,
    opened,
    persisting,
    sites_by_prefix,
    sites_of,
    tasks_with,
)

VALUES = np.arange(64.0).reshape(8, 8)


def read(site: str, block_info: Any = None) -> np.ndarray:
    """Stand in for reading a chunk: the name of the site is an argument, so it can be found in the task."""
    (rows, columns) = block_info[None]["array-location"]
    return VALUES[slice(*rows), slice(*columns)]


def source(site: str) -> da.Array:
    with at(site):
        return da.map_blocks(read, site, chunks=((4, 4), (4, 4)), dtype=float, name=f"read-{site}")


@pytest.fixture
def zarr(tmp_path: Path) -> str:
    da.from_array(VALUES, chunks=4).to_zarr(tmp_path / "x.zarr")
    return str(tmp_path / "x.zarr")


@pytest.fixture
def dataset(tmp_path: Path) -> xr.Dataset:
    return xr.Dataset({"t": (("a", "b"), VALUES)}, coords={"a": range(8), "lon": (("a", "b"), VALUES + 1)})


# -- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persist", [False, True])
def test_from_zarr_keeps_its_site_when_everything_is_fused(zarr: str, persist: bool) -> None:
    with at("north", retries=2):
        x = da.from_zarr(zarr)
    graph = opened(((x + 1) * 2)[1:5, 2:7], persist=persist)
    reading = tasks_with(graph, getter)
    assert len(reading) == 4  # the chunks: reading, arithmetic and slicing are one task
    assert_bound(graph, reading, NORTH)
    assert {graph.constraints[key].retries for key in reading} == {2}
    assert_bound(graph, [key for key in graph.tasks if name_of(key).startswith("original")], NORTH)
    assert_clean(graph)


@pytest.mark.parametrize("persist", [False, True])
@pytest.mark.parametrize("annotate", [at, dask.annotate])
@pytest.mark.parametrize("reduce", [False, True])
def test_every_field_reaches_the_blocks_that_read(zarr: str, reduce: bool, annotate: Any, persist: bool) -> None:
    with annotate(**ALL_FIELDS):
        x = da.from_zarr(zarr)
    y = ((x + 1) * 2)[1:5, 2:7]
    graph = opened(y.sum(axis=0) if reduce else y, persist=persist)
    assert_blocks(graph, tasks_with(graph, getter), ALL_CONSTRAINED)


def test_the_store_is_never_read_while_the_graph_is_made(zarr: str) -> None:
    with at("north"):
        x = da.from_zarr(zarr)
    graph = opened(x)
    Path(zarr).rename(zarr + ".away")
    assert len(opened(x).tasks) == len(graph.tasks)


def test_from_array_keeps_its_site() -> None:
    with at("north"):
        x = da.from_array(VALUES, chunks=4)
    graph = opened(x.T.sum(axis=0))
    assert_bound(graph, tasks_with(graph, np.ndarray), NORTH)


def test_arrays_of_two_sites_meet_in_a_task_that_is_free() -> None:
    graph = opened((source("north") + 1) * source("south").T)
    assert_bound(graph, tasks_with(graph, "north"), NORTH)
    assert_bound(graph, tasks_with(graph, "south"), SOUTH)
    assert sites_by_prefix(graph, "mul") == {()}
    assert len(tasks_with(graph, "north")) == len(tasks_with(graph, "south")) == 4


def test_an_unbound_operand_is_fused_into_the_bound_one() -> None:
    graph = opened(source("north") * da.ones((8, 8), chunks=4) + 1, persist=True)
    assert len(graph.tasks) == 4
    assert_bound(graph, graph.tasks, NORTH)


def test_what_meets_two_sites_is_not_dragged_to_a_third() -> None:
    both = source("north") + source("south")
    graph = opened(both * source("west"), persist=True)
    assert sites_by_prefix(graph, "add") == {()}
    assert sites_by_prefix(graph, "mul") in ({()}, {WEST})
    assert_bound(graph, tasks_with(graph, "west"), WEST)


def test_reductions_are_free_and_their_first_step_stays_with_the_data() -> None:
    x = source("north")
    graph = opened(x.mean(axis=0))
    assert sites_by_prefix(graph, "mean_chunk") == {NORTH}  # fused with reading
    assert sites_by_prefix(graph, "mean_agg") == {()}
    graph = opened(x - x.mean(axis=0))
    assert sites_by_prefix(graph, "read") == {NORTH}  # used twice, so fused with nothing
    assert sites_by_prefix(graph, "mean_chunk") == sites_by_prefix(graph, "sub") == {()}


def test_each_part_of_a_concatenated_array_stays_at_its_site() -> None:
    with at("north"):
        north = da.from_array(VALUES, chunks=4)
    with at("south"):
        south = da.from_array(-VALUES, chunks=4)
    graph = opened(da.concatenate([north + 1, south + 1]).rechunk((16, 2)).sum())
    for key in tasks_with(graph, np.ndarray):
        values = next(part for part in _arrays(graph.tasks[key]))
        assert sites_of(graph, key) == (SOUTH if values.min() < 0 else NORTH)


def _arrays(node: Any) -> Iterator[np.ndarray]:
    from tests.unit.client.graph_tools import inside

    return (part for part in inside(node) if isinstance(part, np.ndarray) and part.any())


def test_different_retries_are_different_constraints() -> None:
    with at(retries=3):
        x = da.from_array(VALUES, chunks=4)
    with at(retries=5):
        y = x + 1
    graph = opened(y * 2, persist=True)
    assert {graph.constraints[key].retries for key in graph.tasks if name_of(key).startswith("array")} == {3}
    assert {graph.constraints[key].retries for key in graph.tasks if name_of(key).startswith("mul")} == {5}


def test_the_user_may_turn_fusion_off(zarr: str) -> None:
    with at("north"):
        x = da.from_zarr(zarr)
    with dask.config.set({"optimization.fuse.active": False}):
        graph = opened((x + 1)[1:4], persist=True)
    assert_bound(graph, tasks_with(graph, getter), NORTH)
    assert sites_by_prefix(graph, "getitem") == {()}


def test_what_no_annotation_touches_is_what_stock_dask_makes() -> None:
    x = da.from_array(VALUES, chunks=4)
    expr, keys = persisting(((x + 1) * 2)[1:5].rechunk(3))
    stock = {key for key, node in expr.__dask_graph__().items() if not isinstance(node, Alias)}
    graph = materialise(expr, keys)
    assert len(graph.tasks) <= len(stock)
    assert graph.constraints == {} and graph.annotations == {} and graph.finals == frozenset()


def test_a_graph_made_with_stock_optimisers_is_optimised_by_ours() -> None:
    from dask.array.optimization import optimize

    x = source("north") + 1
    expr = HLGExpr(x.dask, low_level_optimizer=optimize, output_keys=x.__dask_keys__())
    graph = materialise(expr, list(x.dask.layers[x.name]))
    assert len(graph.tasks) == 4
    assert_bound(graph, graph.tasks, NORTH)


def test_an_unknown_optimiser_gets_the_constraints_inside_the_tasks() -> None:
    seen = []

    def optimiser(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        seen.append(keys)
        return dict(dsk)

    x = source("north") + 1
    with dask.config.set(array_optimize=optimiser):
        graph = opened(x, persist=True)
    assert seen
    assert_bound(graph, tasks_with(graph, "north"), NORTH)


@given(data=st.data())
def test_random_expressions_keep_every_source_at_its_site(data: st.DataObject) -> None:
    names = ("north", "south", "west")
    pool = [(source(name), VALUES) for name in names] + [(da.ones((8, 8), chunks=4), np.ones((8, 8)))]
    for _ in range(data.draw(st.integers(1, 6))):
        (x, x_), (y, y_) = (data.draw(st.sampled_from(pool)) for _ in range(2))
        operation = data.draw(st.sampled_from(OPERATIONS))
        pool.append((operation(x, y), operation(x_, y_)))
    x, expected = pool[-1]
    for persist in (False, True):
        graph = opened(x, persist=persist)
        assert_clean(graph)
        for name in names:
            for key in tasks_with(graph, name):
                assert sites_of(graph, key) == (name,), key
    np.testing.assert_allclose(computed(x)[0], expected)


OPERATIONS = [
    lambda x, y: x + y,
    lambda x, y: x - x.mean(axis=0),
    lambda x, y: (x.T * 2 + 1) / 4,
    lambda x, y: x @ y / 64,
    lambda x, y: x[::-1] + y[2:3],
    lambda x, y: x.sum() / 64 + y,
]


# -- xarray ----------------------------------------------------------------------------------------------------------


def test_open_zarr_keeps_its_site(tmp_path: Path, dataset: xr.Dataset) -> None:
    path = str(tmp_path / "ds.zarr")
    dataset.chunk(a=4).to_zarr(path, consolidated=False, zarr_format=2)
    with at("north"):
        ds = xr.open_zarr(path, consolidated=False)
    for result in (ds + 1, ds.t.isel(b=slice(2, 5)).mean("a"), ds.t - ds.t.groupby("a").mean()):
        graph = opened(result)
        assert_bound(graph, tasks_with(graph, getter), NORTH)
        assert_bound(graph, [key for key in graph.tasks if name_of(key).startswith("original")], NORTH)
    xr.testing.assert_identical(computed(ds * 2)[0], dataset * 2)


@pytest.mark.parametrize("persist", [False, True])
def test_open_mfdataset_keeps_its_site(tmp_path: Path, dataset: xr.Dataset, persist: bool) -> None:
    for i in range(2):
        dataset.isel(a=slice(4 * i, 4 * i + 4)).to_netcdf(tmp_path / f"{i}.nc", engine="scipy")
    with at("south", environment="ocean"):
        ds = xr.open_mfdataset(str(tmp_path / "*.nc"), engine="scipy", chunks={"a": 2})
    graph = opened(ds[["t"]].sel(a=slice(1, 6)) * 2, persist=persist)
    reading = tasks_with(graph, getter)
    assert_bound(graph, reading, SOUTH)
    assert {graph.constraints[key].environment for key in reading} == {"ocean"}


def test_datasets_of_two_sites_are_combined(tmp_path: Path, dataset: xr.Dataset) -> None:
    opened_at = {}
    for site in ("north", "south"):
        path = str(tmp_path / f"{site}.zarr")
        dataset.chunk(a=4).to_zarr(path, consolidated=False, zarr_format=2)
        with at(site):
            opened_at[site] = xr.open_zarr(path, consolidated=False)
        opened_at[site] = opened_at[site].drop_vars("lon")
    both = opened_at["north"].t + opened_at["south"].t.mean()
    graph = opened(both)
    bound = {site: [key for key in tasks_with(graph, getter) if sites_of(graph, key) == (site,)] for site in opened_at}
    assert len(bound["north"]) == len(bound["south"]) == 2
    assert len(tasks_with(graph, getter)) == 4
    np.testing.assert_allclose(computed(both)[0], VALUES + VALUES.mean())


def kept(graph: MaterialisedGraph) -> set[str]:
    """Return the names of tasks whose results are to be kept."""
    return {name_of(key) for key in graph.annotations["cache"]}


def test_what_uses_a_result_that_is_to_be_kept_is_not_fused_with_it() -> None:
    with dask.annotate(cache=True):
        x = da.map_blocks(np.negative, da.ones((8, 8), chunks=4), dtype=float, name="kept")
    for lazy in (x + 1, (x + 1).sum(), x[:5].sum(), x):
        graph = opened(lazy, persist=True)
        assert kept(graph) == {"kept"}
    with dask.config.set({"optimization.fuse.delayed": True}), dask.annotate(cache=True):
        middle = dask.delayed(add)(dask.delayed(add)(1, 2), 3, dask_key_name="kept")
    with dask.config.set({"optimization.fuse.delayed": True}):
        graph = opened(dask.delayed(add)(middle, 4))
    assert kept(graph) == {"kept"} and len(graph.tasks) == 2
    items = db.from_sequence(range(4), npartitions=2)
    with dask.annotate(cache=True):
        items = items.map(abs)
    assert {name.split("-")[0] for name in kept(opened(items.map(str).map(len)))} == {"abs"}


# -- delayed and bags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
def test_delayed_objects_keep_their_sites(fuse: bool) -> None:
    with at("north"):
        parts = [dask.delayed(add)(i, 1) for i in range(3)]
    with at("south", priority=4):
        total = dask.delayed(sum)(parts)
    with dask.config.set({"optimization.fuse.delayed": fuse}):
        graph = opened(total + 1, parts[0])
    assert_bound(graph, tasks_with(graph, sum), SOUTH)
    assert {sites_of(graph, part.key) for part in parts} == {NORTH}
    assert {graph.constraints[key].priority for key in tasks_with(graph, sum)} == {4}
    assert computed(total + 1) == (7,)


def test_a_chain_of_delayed_objects_is_fused_only_within_a_site() -> None:
    with at("north"):
        x = dask.delayed(add)(1, 1)
    with at("south"):
        y = dask.delayed(add)(x, 1)
    z = dask.delayed(add)(y, 1)
    with dask.config.set({"optimization.fuse.delayed": True}):
        graph = opened(z)
    assert sorted(map(len, [tasks_with(graph, add)])) == [2]
    assert {sites_of(graph, key) for key in graph.tasks} == {NORTH, SOUTH}
    assert sites_of(graph, z.key) == SOUTH


def test_arrays_inside_delayed_calls_keep_their_sites() -> None:
    x, y = source("north"), source("south")
    total = dask.delayed(lambda x, y, z: x.sum() + y[0].sum() + z["a"][0, 0])(x, [y], {"a": x + 1})
    graph = opened(total)
    assert_bound(graph, tasks_with(graph, "north"), NORTH)
    assert_bound(graph, tasks_with(graph, "south"), SOUTH)
    assert computed(total) == (VALUES.sum() * 2 + 1,)


def test_to_delayed_and_optimize_keep_sites() -> None:
    x = source("north") + 1
    graph = opened(*x.to_delayed().ravel())
    assert_bound(graph, tasks_with(graph, "north"), NORTH)
    (again,) = dask.optimize(x)
    graph = opened(again * source("south"))
    assert_bound(graph, tasks_with(graph, "north"), NORTH)
    assert_bound(graph, tasks_with(graph, "south"), SOUTH)
    np.testing.assert_allclose(computed(again * 2)[0], (VALUES + 1) * 2)


def test_bags_keep_their_sites() -> None:
    with at("north"):
        north = db.from_sequence(["north"] * 6, npartitions=3)
    with at("south"):
        south = db.from_sequence(["south"] * 6, npartitions=3)
    for persist in (False, True):
        graph = opened(north.map(str.upper).filter(len), db.zip(north, south), persist=persist)
        assert_bound(graph, tasks_with(graph, "north"), NORTH)
        assert_bound(graph, tasks_with(graph, "south"), SOUTH)
    with at("south"):
        upper = north.map(str.upper)
    graph = opened(upper.count())
    assert sites_by_prefix(graph, "from_sequence") == {NORTH}
    assert_bound(graph, tasks_with(graph, str.upper), SOUTH)


# -- annotations -----------------------------------------------------------------------------------------------------


def test_annotations_of_the_whole_submission_give_way_to_those_of_a_collection() -> None:
    with at("north", retries=1):
        x = dask.delayed(add)(1, 1)
    y = dask.delayed(add)(x, 1)
    graph = opened(y, sites=("south",), retries=7, workers=["w1"])
    assert graph.constraints == {
        x.key: Constraint(sites=NORTH, retries=1, workers=("w1",)),
        y.key: Constraint(sites=SOUTH, retries=7, workers=("w1",)),
    }


def test_annotations_may_be_functions_of_the_key() -> None:
    with dask.annotate(priority=lambda key: key[1]):
        x = da.ones((4, 4), chunks=2)
    graph = opened(x, persist=True, retries=lambda key: key[2])
    for _, i, j in graph.tasks:
        constraint = graph.constraints.get((x.name, i, j), Constraint())
        assert (constraint.priority, constraint.retries) == (i, j)


def test_other_annotations_are_kept_apart() -> None:
    with dask.annotate(colour="blue"), at("north"):
        x = dask.delayed(add)(1, 1)
    graph = opened(x + 1, shape="round")
    assert graph.annotations == {"colour": {x.key: "blue"}, "shape": dict.fromkeys(graph.tasks, "round")}
    assert graph.constraints == {x.key: Constraint(sites=NORTH)}


def test_the_annotations_around_compute_do_not_stick_to_layers() -> None:
    x = source("north") + 1
    y = da.ones(4, chunks=2).rechunk(4)
    with at("south"):
        graph = opened(x, y, persist=True)
    assert set(graph.constraints.values()) == {Constraint(sites=NORTH)}


# -- keys, futures, aliases ------------------------------------------------------------------------------------------


def test_tasks_that_nobody_needs_are_dropped() -> None:
    graph = materialise(LLGExpr({"x": 1, "y": (add, "x", 1), "z": (add, "x", 2)}), ["y"])
    assert set(graph.tasks) == {"x", "y"}
    assert graph.tasks["y"].dependencies == {"x"}


def test_aliases_vanish_where_only_they_refer_to_a_task() -> None:
    tasks = {
        "a": Task("a", add, 1, 2),
        "b": Alias("b", "a"),
        "c": Alias("c", "b"),
        "d": Task("d", add, TaskRef("c"), TaskRef("c")),
        "e": Alias("e", "gone"),
        "f": Alias("f", "d"),
    }
    graph = materialise(LLGExpr(tasks), ["d", "e", "f"])
    assert set(graph.tasks) == {"c", "d", "e", "f"}
    assert graph.tasks["c"].func is add
    assert isinstance(graph.tasks["f"], Alias) and isinstance(graph.tasks["e"], Alias)  # "d" is wanted itself
    assert external_futures(graph) == {"gone"}
    assert dask.get({**graph.tasks, "gone": 5}, ["d", "e", "f"]) == (6, 5, 6)


def test_an_alias_that_stays_is_bound_as_its_target_is() -> None:
    with at("north"):
        x = dask.delayed(add)(1, 1)
    tasks = {**x.dask.to_dict(), "a": Alias("a", x.key), "b": Alias("b", "a"), "c": Task("c", add, *map(TaskRef, "ab"))}
    layered = HighLevelGraph.merge(x.dask, {key: tasks[key] for key in "abc"})
    graph = materialise(HLGExpr(layered), ["a", "b", "c", x.key])
    assert [sites_of(graph, key) for key in (x.key, "a", "b", "c")] == [NORTH, NORTH, NORTH, ()]


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None, set_as_default=False
    ) as client:
        yield client


def test_futures_become_references_to_their_keys(client: distributed.Client) -> None:
    f, g = client.scatter([1, 2])
    nested = dask.delayed(add)(dask.delayed(sum)([f, g]), f)
    raw = LLGExpr({"x": Task("x", add, f, TaskRef("y")), "y": Task("y", sum, TaskList(g)), "z": (add, "x", g)})
    for graph in (opened(nested), materialise(raw, ["z"])):
        assert external_futures(graph) == {f.key, g.key}
        assert tasks_with(graph, distributed.Future) == []


def test_a_future_inside_a_fused_task_is_replaced_too(client: distributed.Client) -> None:
    f = client.scatter(1)
    fused = Task.fuse(Task("a", add, f, 1), Task("b", add, TaskRef("a"), 1))
    graph = materialise(LLGExpr({"b": fused}), ["b"])
    assert external_futures(graph) == {f.key}
    assert tasks_with(graph, distributed.Future) == []
    assert graph.tasks["b"]({f.key: 5}) == 7


def test_what_was_persisted_is_known_elsewhere(client: distributed.Client) -> None:
    x = client.persist(da.ones((4, 4), chunks=2))
    graph = opened(x + 1, persist=True)
    assert len(graph.tasks) == 4
    assert external_futures(graph) == set(x.dask.layers[x.name])
    graph = opened(x, persist=True)
    assert graph.tasks == {} and external_futures(graph) == graph.wanted


# -- tasks with notes ------------------------------------------------------------------------------------------------


def test_a_task_in_which_two_sites_were_fused_is_taken_apart() -> None:
    parts = {
        "a": put_note(Task("a", add, TaskRef("out"), 1), {"sites": NORTH}),
        "b": put_note(DataNode("b", 10), {"sites": SOUTH}),
        "c": Task("c", add, TaskRef("a"), TaskRef("b")),
    }
    tasks, notes = noted_tasks({"c": Task.fuse(*parts.values()), "out": DataNode("out", 5)})
    assert {key: note["sites"] for key, note in notes.items()} == {
        key: NORTH if add is getattr(tasks[key], "func", None) else SOUTH for key in tasks if key not in ("c", "out")
    }
    assert len(tasks) == 4
    assert dask.get(tasks, "c") == 16


# -- payloads --------------------------------------------------------------------------------------------------------


def test_a_payload_is_small_where_all_tasks_agree() -> None:
    tasks = {f"x-{i}": Task(f"x-{i}", add, i, 1) for i in range(1000)}
    plain = MaterialisedGraph(tasks, set(tasks))
    noted = MaterialisedGraph(
        tasks,
        set(tasks),
        dict.fromkeys(tasks, Constraint(sites=NORTH, retries=3)),
        {"colour": dict.fromkeys(tasks, "blue")},
    )
    sizes = [len(distributed.protocol.pickle.dumps(block_payload(graph, tasks))) for graph in (plain, noted)]
    assert sizes[1] - sizes[0] < 200
    assert block_payload(noted, tasks).__dask_annotations__() == {
        "retries": dict.fromkeys(tasks, 3),
        "colour": dict.fromkeys(tasks, "blue"),
    }


def test_a_payload_keeps_what_differs_by_key() -> None:
    tasks = {key: Task(key, add, 1, 1) for key in "abc"}
    graph = MaterialisedGraph(
        tasks,
        set(tasks),
        {"a": Constraint(retries=3), "b": Constraint(resources=(("GPU", 1.0),)), "c": Constraint(retries=3)},
        {"colour": {"b": "blue"}},
    )
    expr = distributed.protocol.pickle.loads(distributed.protocol.pickle.dumps(block_payload(graph, ["a", "b"])))
    assert set(expr.__dask_graph__()) == {"a", "b"}
    assert expr.__dask_annotations__() == {
        "retries": {"a": 3},
        "resources": {"b": {"GPU": 1.0}},
        "colour": {"b": "blue"},
    }
    again = BlockExpr.of(expr.__dask_graph__(), expr.__dask_annotations__())
    assert again.__dask_annotations__() == expr.__dask_annotations__()
    assert again._name != expr._name


def test_a_stock_scheduler_opens_a_payload(client: distributed.Client) -> None:
    with at("north", retries=2, resources={}):
        x = source("north")
    graph = opened((x + 1).sum(axis=0), persist=True, colour="blue")
    futures = client._graph_to_futures(block_payload(graph, graph.tasks), list(graph.wanted), span_metadata={})
    values = client.gather(futures)
    np.testing.assert_allclose(np.concatenate([values[key] for key in sorted(values)]), (VALUES + 1).sum(axis=0))
    scheduler = client.cluster.scheduler
    assert all(scheduler.tasks[key].annotations["colour"] == "blue" for key in graph.wanted)
    half = {key: node for key, node in graph.tasks.items() if not node.dependencies}
    futures = client._graph_to_futures(block_payload(graph, half), list(half), span_metadata={})
    client.gather(futures)
    assert {scheduler.tasks[key].annotations["retries"] for key in half} == {2}


def test_layered_and_plain_graphs_are_opened(client: distributed.Client) -> None:
    layered = HighLevelGraph.from_collections("x", {"x": (add, 1, 1)}, [])
    assert materialise(HLGExpr(layered), ["x"]).tasks["x"]() == 2
    expr, keys = computing(da.ones(4, chunks=2))
    assert materialise(expr, keys).finals == set(keys)
