"""The last step of compute(): which tasks the client keeps for itself, and that they give what stock Dask gives."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from daskfed.client.assembly import Assembly, split_final
from daskfed.client.graphs import materialise
from tests.unit.client.graph_tools import computed, computing, opened, persisting

VALUES = np.arange(48.0).reshape(4, 12)
TABLE = pd.DataFrame({"x": np.arange(300), "s": pd.Categorical(list("abc") * 100)})


def assemblies_of(*collections: Any) -> list[Assembly]:
    return list(split_final(opened(*collections))[1].values())


def array() -> da.Array:
    return da.from_array(VALUES, chunks=(2, 3))


def dataset() -> xr.Dataset:
    return xr.Dataset({"t": (("a", "b"), VALUES), "p": ("b", VALUES[0])}, {"b": range(12)}, {"title": "sea"}).chunk(b=5)


def frame(npartitions: int = 7) -> dd.DataFrame:
    return dd.from_pandas(TABLE, npartitions=npartitions)


def test_the_client_concatenates_arrays() -> None:
    (assembly,) = assemblies_of(array() + 1)
    assert len(assembly.inputs) == 8
    np.testing.assert_array_equal(computed(array() + 1)[0], VALUES + 1)


def test_the_client_puts_datasets_together() -> None:
    (assembly,) = assemblies_of(dataset())
    assert len(assembly.inputs) == 6
    xr.testing.assert_identical(computed(dataset())[0], dataset().compute())
    xr.testing.assert_identical(computed(dataset().t.T)[0], dataset().t.T.compute())


def test_the_client_concatenates_bags() -> None:
    assert len(assemblies_of(db.range(10, 3))) == 1
    assert computed(db.range(10, 3).map(str)) == (list(map(str, range(10))),)


def test_the_client_concatenates_hundreds_of_partitions_in_one_step() -> None:
    graph, assemblies = split_final(opened(frame(300)))
    (assembly,) = assemblies.values()
    assert len(assembly.inputs) == 300 and set(assembly.inputs) == graph.wanted
    assert all(not node.dependencies for node in graph.tasks.values())
    pd.testing.assert_frame_equal(computed(frame(300))[0], TABLE)


@pytest.mark.parametrize(
    "collection",
    [
        array().sum(),
        da.ones(4, chunks=4),
        dataset().t.sum(),
        frame(1),
        frame().x.sum(),
        frame().x.mean(),
        db.range(10, 3).sum(),
        dask.delayed(sum)([1, 2, 3]),
    ],
    ids=lambda collection: type(collection).__name__,
)
def test_a_result_of_one_part_stays_with_its_site(collection: Any) -> None:
    graph = opened(collection)
    assert split_final(graph) == (graph, {})
    np.testing.assert_array_equal(computed(collection)[0], collection.compute(scheduler="sync"))


def test_everything_at_once() -> None:
    # Dask 2026.8 sorts what is computed together by kind: given in another order, results come out in the wrong places.
    collections = (array() * 2, dataset(), array().sum(), frame(), dask.delayed(sum)([1, 2]), db.range(4, 2))
    with pytest.warns(UserWarning, match="mixed collections"):
        assert len(assemblies_of(*collections)) == 4
    with pytest.warns(UserWarning, match="mixed collections"):
        doubled, sea, total, table, three, numbers = computed(*collections)
    np.testing.assert_array_equal(doubled, VALUES * 2)
    pd.testing.assert_frame_equal(table, TABLE)
    xr.testing.assert_identical(sea, dataset().compute())
    assert (three, total, numbers) == (3, VALUES.sum(), [0, 1, 2, 3])


def test_two_results_share_their_parts() -> None:
    x = array() + 1
    graph, assemblies = split_final(opened(x, x[:2]))
    assert len(assemblies) == 2
    assert {key for each in assemblies.values() for key in each.inputs} == graph.wanted
    first, second = computed(x, x[:2])
    np.testing.assert_array_equal(first[:2], second)


def test_nothing_is_kept_back_from_what_is_persisted() -> None:
    for collection in (array() + 1, frame(), dataset(), db.range(10, 3)):
        graph = materialise(*persisting(collection))
        assert split_final(graph) == (graph, {})


def test_a_concatenation_that_others_use_is_an_ordinary_task() -> None:
    x = array()
    total = dask.delayed(np.sum)(x)  # stock Dask concatenates x for the call
    graph, assemblies = split_final(opened(total))
    assert assemblies == {}
    expr, keys = computing(x)
    graph = materialise(expr, keys)
    (final,) = graph.finals
    used = {**graph.tasks, "more": dask._task_spec.Task("more", np.sum, dask._task_spec.TaskRef(final))}
    assert split_final(graph.restricted(used))[1].keys() == {final}  # "more" is not wanted
    wider = type(graph)(used, {*graph.wanted, "more"}, finals=graph.finals)
    assert split_final(wider)[1] == {}


def test_a_missing_part_is_named() -> None:
    (assembly,) = assemblies_of(array())
    with pytest.raises(KeyError):
        assembly.run({assembly.inputs[0]: 1})
