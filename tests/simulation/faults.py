"""What goes wrong in a history: the weather of the wires, partitions, slow, late and leaving sites, bad transfers."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from daskfed.testing.transport import Weather


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one history; times in seconds of virtual time."""

    weather: tuple[Weather, ...]  # of the link of each site
    joins_at: tuple[float, ...]  # per site
    drains_at: tuple[float | None, ...]  # per site; None: it stays
    slowness: tuple[float, ...]  # per site: factor on the duration of its tasks
    partitions: tuple[tuple[int, float, float], ...]  # (site, from, until)
    crashes: tuple[tuple[int, float, float | None], ...]  # (site, at, seconds until it is back; None: never)
    worker_losses: tuple[tuple[int, float, float], ...]  # (site, at, share of what it has that is lost)
    hub_crashes: tuple[tuple[float, float], ...]  # (at, seconds until it is back)
    fetch_failure: float  # probability that a transfer fails
    bandwidth_bps: float  # of transfers between sites, bytes per second

    @property
    def calm_at(self) -> float:
        """When the last partition heals, the last worker is lost, the last site is there, gone or back."""
        drains = [at for at in self.drains_at if at is not None]
        healed = [until for _, _, until in self.partitions] + [at for _, at, _ in self.worker_losses]
        back = [at + (after or 0.0) for _, at, after in self.crashes] + [at + after for at, after in self.hub_crashes]
        return max([*self.joins_at, *drains, *healed, *back, 0.0])


def random_plan(rng: Random) -> Plan:
    """Return the faults of a history: some histories are calm, most have a few kinds of trouble at once."""
    nsites = rng.choice([3, 3, 3, 4, 5])
    return Plan(
        weather=tuple(random_weather(rng) for _ in range(nsites)),
        joins_at=tuple(0.0 if n == 0 or rng.random() < 0.7 else rng.uniform(0.0, 8.0) for n in range(nsites)),
        drains_at=tuple(rng.uniform(1.0, 8.0) if n > 1 and rng.random() < 0.3 else None for n in range(nsites)),
        slowness=tuple(rng.choice([0.3, 1.0, 1.0, 4.0]) for _ in range(nsites)),
        partitions=tuple(random_partition(rng, nsites) for _ in range(rng.choice([0, 1, 2]))),
        crashes=tuple(random_crash(rng, nsites) for _ in range(rng.choice([0, 1, 1, 2, 3]))),
        worker_losses=tuple(random_worker_loss(rng, nsites) for _ in range(rng.choice([0, 1, 2, 4]))),
        hub_crashes=random_hub_crashes(rng),
        fetch_failure=rng.choice([0.0, 0.0, 0.1]),
        bandwidth_bps=rng.choice([1e6, 1e7, 1e9]),
    )


def random_weather(rng: Random) -> Weather:
    """Return a stream or a datagram wire, near or far, good or bad."""
    longest = rng.choice([0.002, 0.02, 0.2])
    delay_s = (longest / rng.choice([1, 4]), longest)
    if rng.random() < 0.5:
        return Weather(delay_s)
    return Weather(delay_s, loss=rng.choice([0.0, 0.1, 0.3]), duplicate=rng.choice([0.0, 0.1]), ordered=False)


def random_partition(rng: Random, nsites: int) -> tuple[int, float, float]:
    """Return when which site is cut off, and until when."""
    start = rng.uniform(0.0, 8.0)
    return rng.randrange(nsites), start, start + rng.choice([0.1, 1.0, 3.0])


def random_crash(rng: Random, nsites: int) -> tuple[int, float, float | None]:
    """Return which site crashes, when, and when it is back."""
    n = rng.randrange(nsites)
    return n, rng.uniform(1.0, 12.0), None if n > 1 and rng.random() < 0.3 else rng.choice([0.2, 1.5, 5.0])


def random_worker_loss(rng: Random, nsites: int) -> tuple[int, float, float]:
    """Return which site loses a worker, when, and which share of its tasks and values."""
    return rng.randrange(nsites), rng.uniform(0.5, 12.0), rng.choice([0.2, 0.5, 1.0])


def random_hub_crashes(rng: Random) -> tuple[tuple[float, float], ...]:
    """Return when the hub crashes and how long it is away, no two at the same time."""
    found, at = [], 0.0
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        at += rng.uniform(0.5, 8.0)
        away = rng.choice([0.1, 1.0, 4.0])
        found.append((at, away))
        at += away
    return tuple(found)
