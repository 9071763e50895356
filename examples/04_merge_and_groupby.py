"""Merge two tables that lie at two sites, and group the result: rows meet wherever that moves the fewest bytes.

Site "shop" has a million sales as Parquet, site "office" a price list. Both are opened where they are; the sales stay,
the short list travels.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd

from daskfed import Client, Federation

OUT = Path(__file__).resolve().parents[1] / "out" / "04"
ROWS, ARTICLES = 1_000_000, 500


def make_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return sales (day, article, pieces) and prices (article, price, kind); the same each time."""
    rng = np.random.default_rng(4)
    day, article = rng.integers(0, 365, ROWS), rng.integers(0, ARTICLES, ROWS)
    sales = pd.DataFrame({"day": day, "article": article, "pieces": rng.integers(1, 9, ROWS)})
    kind = np.array(["bread", "fruit", "milk", "tea"])[np.arange(ARTICLES) % 4]
    prices = pd.DataFrame({"article": np.arange(ARTICLES), "price": rng.integers(1, 50, ARTICLES), "kind": kind})
    return sales, prices


def write_sites(sales: pd.DataFrame, prices: pd.DataFrame) -> None:
    """Write each table into the folder of its site; what was there before goes."""
    shutil.rmtree(OUT, ignore_errors=True)
    for site in ("shop", "office"):
        (OUT / site).mkdir(parents=True)
    dd.from_pandas(sales, npartitions=8).to_parquet(OUT / "shop" / "sales.parquet", write_index=False)
    dd.from_pandas(prices, npartitions=1).to_parquet(OUT / "office" / "prices.parquet", write_index=False)


def main() -> None:
    """Compute the turnover per kind over both sites and compare with plain pandas."""
    sales, prices = make_tables()
    write_sites(sales, prices)
    cluster = {"options": {"n_workers": 1, "threads_per_worker": 1}}
    sites = {site: {**cluster, "directory": str(OUT / site)} for site in ("shop", "office")}
    with Federation(sites=sites) as federation, Client(federation) as client:
        sold = client.open(dd.read_parquet, "sales.parquet", site="shop")
        listed = client.open(dd.read_parquet, "prices.parquet", site="office")
        both = sold.merge(listed, on="article")
        turnover = both.assign(turnover=both["pieces"] * both["price"]).groupby("kind")["turnover"].sum().compute()
        moved = {pair: facts["nbytes"] for pair, facts in client.transfers().items()}

    print(turnover.sort_index().to_string())
    for (source, target), nbytes in moved.items():
        print(f"{source} to {target}: {nbytes / 1e3:.1f} kB")
    both_here = sales.merge(prices, on="article")
    expected = (both_here["pieces"] * both_here["price"]).groupby(both_here["kind"]).sum()
    assert turnover.to_dict() == expected.to_dict()
    assert sum(moved.values()) < sales.memory_usage(deep=True).sum() / 10, "the sales should have stayed at their site"
    print("the same as plain pandas: yes")


if __name__ == "__main__":
    main()
