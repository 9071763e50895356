"""A script written for dask.distributed in which one line was changed: the import of Client.

Futures, as_completed, a bag, an array and a dataframe, on an embedded hub and one local site that Client() starts.
"""

from __future__ import annotations

import operator

import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.distributed import as_completed

from daskfed import Client  # was: from dask.distributed import Client


def collatz(n: int) -> int:
    """Return how many steps lead from ``n`` to 1."""
    steps = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        steps += 1
    return steps


def main() -> None:
    """Use each of Dask's interfaces once and check what it returns."""
    with Client(n_workers=1, threads_per_worker=2) as client:
        futures = client.map(collatz, range(1, 200))
        longest = max(future.result() for future in as_completed(futures))
        total = client.submit(sum, futures).result()
        print(f"futures:   at most {longest} steps, {total} in all")
        assert (longest, total) == (max(map(collatz, range(1, 200))), sum(map(collatz, range(1, 200))))

        x = da.random.default_rng(7).normal(size=(2000, 2000), chunks=(500, 500))
        spread = float((x - x.mean(axis=0)).std().compute())
        print(f"array:     spread {spread:.4f}")
        assert abs(spread - 1) < 0.01

        words = db.from_sequence(["to", "be", "or", "not", "to", "be"], npartitions=3)
        counts = dict(words.frequencies().topk(2, key=operator.itemgetter(1)).compute())
        print(f"bag:       {counts}")
        assert counts == {"to": 2, "be": 2}

        table = pd.DataFrame({"group": np.arange(1000) % 7, "value": np.arange(1000.0)})
        means = dd.from_pandas(table, npartitions=4).groupby("group")["value"].mean().compute().sort_index()
        print(f"dataframe: mean of group 0 is {means[0]:.2f}")
        pd.testing.assert_series_equal(means, table.groupby("group")["value"].mean(), check_index_type=False)


if __name__ == "__main__":
    main()
