"""The private names of Dask's collections that daskfed relies on: an annex to :mod:`daskfed.dask_private`.

The collections are heavy and partly optional, so they are imported only when one of them is needed.
"""

from __future__ import annotations

import contextvars
import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

from daskfed.dask_private import current_annotations

T = TypeVar("T")


def without_annotations(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function outside every ``dask.annotate``: a layer that Dask makes anew takes on what is current."""
    context = contextvars.copy_context()
    context.run(current_annotations.set, None)
    return context.run(function, *args, **kwargs)


def imported(name: str) -> ModuleType | None:
    """Return a module if it was imported already."""
    return sys.modules.get(name)


def array_optimisation() -> Any:
    """Return the module with ``optimize`` and ``_optimize_slices``."""
    from dask.array import optimization

    return optimization


def bag_optimise() -> Any:
    """Return the optimiser of bags."""
    from dask.bag.core import optimize

    return optimize


def delayed_optimise() -> Any:
    """Return the optimiser of delayed objects."""
    from dask.delayed import optimize

    return optimize


def tokens() -> Any:
    """Return the module with ``_tokenize``, which makes every token, and whether that has to be deterministic."""
    from dask import tokenize

    return tokenize


@functools.cache
def dataframes() -> Any:
    """Return the private names of ``dask.dataframe``: kinds of expressions, and what makes collections of them."""
    from dask.dataframe.dask_expr import _collection, _expr, _repartition
    from dask.dataframe.dask_expr.io import io, parquet

    return SimpleNamespace(
        FrameBase=_collection.FrameBase,  # base of all collections
        new_collection=_collection.new_collection,
        Blockwise=_expr.Blockwise,  # works on one partition at a time
        ArrowStringConversion=_expr.ArrowStringConversion,  # what Dask puts around a reader of strings
        Repartition=_repartition.Repartition,
        IO=io.IO,  # base of all readers
        FusedIO=io.FusedIO,  # reads several partitions at once
        FusedParquetIO=io.FusedParquetIO,
        FromGraph=io.FromGraph,
        FromMap=io.FromMap,
        FromMapProjectable=io.FromMapProjectable,
        FromPandas=io.FromPandas,
        ReadParquet=parquet.ReadParquet,
        ReadParquetFSSpec=parquet.ReadParquetFSSpec,
        ReadParquetPyarrowFS=parquet.ReadParquetPyarrowFS,
        fragment_to_table=parquet.ReadParquetPyarrowFS._fragment_to_table,
        table_to_pandas=parquet.ReadParquetPyarrowFS._table_to_pandas,
        meta_of_all_columns=io.FromMap._meta.func,  # what a FromMap gives before a selection of columns
    )


def flattening_for_from_dask_array() -> Any:
    """Return the module in which ``dd.from_dask_array`` looks up ``ensure_dict``."""
    from dask.dataframe.io import io

    return io
