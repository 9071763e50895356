"""What goes wrong in a history: the weather of the wires, partitions, crashes, slow, late and leaving peers, bad data."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from daskfed.testing.transport import Weather

WIRE_FAULTS = ("envelope lost", "envelope repeated")
FAULTS = (
    *WIRE_FAULTS,
    "partition",
    "site late",
    "site slow",
    "site drained",
    "site crash",
    "site crash just after the last",
    "worker lost",
    "all workers lost for long",
    "block taken from a deserted site",
    "hub crash",
    "hub crash while it recovers",
    "client left",
    "client crash",
    "client crash while the hub is away",
    "client asleep",
    "cancellation",
    "fetch failed",
    "fetch stalled",
    "key missing",
    "landing failed",
    "value that does not open",
    "task failed by chance",
)
"""The kinds that are counted as they happen."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one history; times in seconds of virtual time, chances between 0 and 1."""

    weather: tuple[Weather, ...]  # of the link of each site
    joins_at: tuple[float, ...]  # per site
    drains_at: tuple[float | None, ...]  # per site; None: it stays
    slowness: tuple[float, ...]  # per site: factor on the duration of its tasks
    partitions: tuple[tuple[int, float, float], ...]  # (site, from, until)
    crashes: tuple[tuple[int, float, float | None], ...]  # (site, at, seconds until it is back; None: never)
    worker_losses: tuple[tuple[int, float, float], ...]  # (site, at, share of what it has that is lost)
    desertions: tuple[tuple[int, float, float], ...]  # (site, at, seconds until it has workers again)
    hub_crashes: tuple[tuple[float, float], ...]  # (at, seconds until it is back)
    departures: tuple[tuple[int, float, bool], ...]  # (client, at, whether without a word)
    sleeps: tuple[tuple[int, float, float], ...]  # (client, at, seconds until its connection is up again)
    fetch_failure: float  # chance that a transfer between sites fails
    fetch_stall: float  # chance that it takes seconds longer
    landing_failure: float  # chance that a worker cannot take a fetched value over
    bandwidth_bps: float  # of transfers between sites, bytes per second

    @property
    def calm_at(self) -> float:
        """When the last partition heals, the last worker is lost, the last site or client is there, gone or back."""
        drains = [at for at in self.drains_at if at is not None]
        healed = [until for _, _, until in self.partitions] + [at for _, at, _ in self.worker_losses]
        healed += [at for _, at, _ in self.desertions]
        back = [at + (after or 0.0) for _, at, after in self.crashes] + [at + after for at, after in self.hub_crashes]
        clients = [at for _, at, _ in self.departures] + [at + after for _, at, after in self.sleeps]
        return max([*self.joins_at, *drains, *healed, *back, *clients, 0.0])


def random_plan(rng: Random, seed: int) -> Plan:
    """Return the faults of a history: some histories are calm, most have a few kinds of trouble at once.

    What was thought of later is drawn from the ``seed`` alone: so histories without it are what they were before.
    """
    nsites = rng.choice([3, 3, 3, 4, 5])
    losses = tuple(random_worker_loss(rng, nsites) for _ in range(rng.choice([0, 1, 2, 4, 6])))
    drains = tuple(random_drain(rng, n, losses) for n in range(nsites))
    losses += tuple(loss for n, at in enumerate(drains) for loss in losses_before_drain(rng, n, at))
    return Plan(
        weather=tuple(random_weather(rng) for _ in range(nsites)),
        joins_at=tuple(0.0 if n == 0 or rng.random() < 0.7 else rng.uniform(0.0, 8.0) for n in range(nsites)),
        drains_at=drains,
        slowness=tuple(rng.choice([0.3, 1.0, 1.0, 4.0]) for _ in range(nsites)),
        partitions=tuple(random_partition(rng, nsites) for _ in range(rng.choice([0, 1, 2]))),
        crashes=tuple(crash for _ in range(rng.choice([0, 1, 1, 2, 3])) for crash in random_crashes(rng, nsites)),
        worker_losses=losses,
        desertions=random_desertions(Random(seed), nsites),
        hub_crashes=random_hub_crashes(rng),
        departures=tuple(random_departure(rng) for _ in range(rng.choice([0, 0, 1, 2]))),
        sleeps=tuple(random_sleep(rng) for _ in range(rng.choice([0, 0, 1, 2]))),
        fetch_failure=rng.choice([0.0, 0.0, 0.1]),
        fetch_stall=rng.choice([0.0, 0.0, 0.1]),
        landing_failure=rng.choice([0.0, 0.03, 0.1]),
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


def random_crashes(rng: Random, nsites: int) -> tuple[tuple[int, float, float | None], ...]:
    """Return which site crashes, when, and when it is back; some crash once more then."""
    n, at = rng.randrange(nsites), rng.uniform(1.0, 12.0)
    if n > 1 and rng.random() < 0.3:
        return ((n, at, None),)
    away = rng.choice([0.2, 1.5, 5.0])
    once_more = ((n, at + away + rng.uniform(0.05, 1.5), rng.choice([0.2, 1.5])),) if rng.random() < 0.3 else ()
    return ((n, at, away), *once_more)


def random_worker_loss(rng: Random, nsites: int) -> tuple[int, float, float]:
    """Return which site loses a worker, when, and which share of its tasks and values."""
    return rng.randrange(nsites), rng.uniform(0.5, 12.0), rng.choice([0.2, 0.5, 1.0])


def random_drain(rng: Random, n: int, losses: tuple[tuple[int, float, float], ...]) -> float | None:
    """Return when a site leaves, None if it stays; some leave just after they lost a worker."""
    if n <= 1 or rng.random() < 0.5:
        return None
    lost = [at for site, at, _ in losses if site == n]
    return lost[0] + rng.uniform(0.0, 1.0) if lost and rng.random() < 0.7 else rng.uniform(1.0, 8.0)


def losses_before_drain(rng: Random, n: int, drains_at: float | None) -> list[tuple[int, float, float]]:
    """Return losses of workers in the last moments of a site: what it made before is asked of it again, and recalled."""
    if drains_at is None or rng.random() < 0.3:
        return []
    return [(n, max(0.5, drains_at - rng.uniform(0.0, 0.6)), rng.choice([0.2, 0.5])) for _ in range(rng.choice([1, 2]))]


def random_desertions(rng: Random, nsites: int) -> tuple[tuple[int, float, float], ...]:
    """Return which sites lose all their workers, when, and for how long: now and then for so long that work moves on."""
    if rng.random() < 0.8:
        return ()
    return tuple((rng.randrange(nsites), rng.uniform(0.5, 8.0), rng.choice([20.0, 40.0, 90.0])) for _ in range(2))


def random_hub_crashes(rng: Random) -> tuple[tuple[float, float], ...]:
    """Return when the hub crashes and how long it is away, no two at the same time."""
    found, at = [], 0.0
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        at += rng.choice([rng.uniform(0.5, 8.0), rng.uniform(0.5, 8.0), 0.05 + rng.random()])
        away = rng.choice([0.1, 1.0, 4.0])
        found.append((at, away))
        at += away
    return tuple(found)


def random_departure(rng: Random) -> tuple[int, float, bool]:
    """Return which client goes, when, and whether it does so without a word."""
    return rng.choice([1, 2]), rng.uniform(0.5, 12.0), rng.random() < 0.6


def random_sleep(rng: Random) -> tuple[int, float, float]:
    """Return which client loses its connection, when, and for how long."""
    return rng.randrange(3), rng.uniform(0.2, 12.0), rng.choice([0.1, 2.0, 8.0])
