"""dask.delayed with branches over two sites: each measures its own half, and what comes next depends on the outcome.

Every station makes a series; a branch cleans it, another describes it. Where the description finds outliers, the client
adds a repair to the graph while the rest of it is already there. Stations are bound to sites, everything that follows
runs wherever the hub finds it cheapest.
"""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
from dask import delayed

from daskfed import Client, Federation, at

STATIONS = {"alpine": "north", "arctic": "north", "desert": "south", "ocean": "south"}  # station -> site
BROKEN = {"arctic", "ocean"}  # their sensors jump now and then


@delayed
def measure(station: str) -> np.ndarray:
    """Return a year of hourly values; the same for a station each time."""
    rng = np.random.default_rng(sorted(STATIONS).index(station))
    series = 10 * np.sin(np.arange(8760) * 2 * np.pi / 8760) + rng.normal(size=8760)
    if station in BROKEN:
        series[::500] += 60
    return series


@delayed
def outliers(series: np.ndarray) -> int:
    """Return how many values lie further than five standard deviations from the mean."""
    return int((abs(series - series.mean()) > 5 * series.std()).sum())


@delayed
def repair(series: np.ndarray) -> np.ndarray:
    """Replace what lies far off by the median."""
    far = abs(series - series.mean()) > 5 * series.std()
    return np.where(far, np.median(series), series)


@delayed
def monthly(series: np.ndarray) -> np.ndarray:
    """Return twelve means."""
    return series.reshape(12, -1).mean(axis=1)


@delayed
def warmest(months: dict[str, np.ndarray]) -> dict[str, int]:
    """Return each station's warmest month, 1 to 12."""
    return {station: int(values.argmax()) + 1 for station, values in months.items()}


def year_of(station: str, site: str) -> Any:
    """Return the series of a station, measured at its site."""
    with at(site):
        return measure(station)


def main() -> None:
    """Run the branches over two sites and compare with one plain run."""
    cluster = {"options": {"n_workers": 1, "threads_per_worker": 1}}
    with Federation(sites={"north": cluster, "south": cluster}) as federation, Client(federation) as client:
        series = {station: client.persist(year_of(station, site)) for station, site in STATIONS.items()}
        (found,) = dask.compute({station: outliers(values) for station, values in series.items()})
        for station, count in found.items():
            site = client.explain(series[station].key)["site"]
            print(f"{station}: measured at {site}, {count} outliers{', repaired' if count else ''}")
            assert site == STATIONS[station]
            assert (count > 0) == (station in BROKEN)
        fixed = {station: repair(values) if found[station] else values for station, values in series.items()}
        answer = warmest({station: monthly(values) for station, values in fixed.items()}).compute()

    print("warmest month:", answer)
    plain = {station: repair(measure(station)) if found[station] else measure(station) for station in STATIONS}
    expected = warmest({station: monthly(values) for station, values in plain.items()})
    assert answer == expected.compute(scheduler="synchronous")
    print("the same as one plain run: yes")


if __name__ == "__main__":
    main()
