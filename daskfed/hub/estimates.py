"""What the hub has learnt: durations and sizes per function, and the speed of links between sites. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from daskfed.messages import BlockSpec

UNKNOWN_DURATION_S = 0.1  # of one task whose function never ran; only relative cost matters until then
DEFAULT_BANDWIDTH_BPS = 100e6  # bytes a second, until a link was measured
DEFAULT_LATENCY_S = 0.01
LANDING_S = 0.004  # that a worker takes for each import, however small
MIN_MEASURED_BYTES = 64 * 1024  # a smaller transfer tells the latency of a link, not its bandwidth
MEMORY = 0.5  # weight of the newest observation


@dataclass(slots=True)
class FunctionBook:
    """Durations of tasks, in seconds of one thread, per Dask key prefix."""

    durations: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    def learn_duration(self, prefix: str, count: int, seconds: float) -> None:
        """Take in that ``count`` tasks of ``prefix`` took ``seconds`` in all."""
        self.durations[prefix] = _blend(self.durations.get(prefix), seconds / max(1, count))

    def learn_size(self, prefix: str, count: int, nbytes: int) -> None:
        """Take in that ``count`` results of ``prefix`` had ``nbytes`` in all."""
        self.sizes[prefix] = _blend(self.sizes.get(prefix), nbytes / max(1, count))

    def block_s(self, spec: BlockSpec) -> float:
        """Return the estimated seconds of one thread for all tasks of a block."""
        return sum(count * self.durations.get(prefix, UNKNOWN_DURATION_S) for prefix, count in spec.prefixes)

    def known(self, spec: BlockSpec) -> bool:
        """Say whether every function of the block has run somewhere."""
        return all(prefix in self.durations for prefix, _ in spec.prefixes)


@dataclass(slots=True)
class LinkTotals:
    """All movements from one site to another."""

    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    relayed: int = 0  # how many went through the hub


@dataclass(slots=True)
class LinkBook:
    """Speeds and totals per (from, to) pair of sites."""

    bandwidth_bps: dict[tuple[str, str], float] = field(default_factory=dict)
    latency_s: dict[tuple[str, str], float] = field(default_factory=dict)
    totals: dict[tuple[str, str], LinkTotals] = field(default_factory=dict)

    def learn(self, source: str, target: str, nbytes: int, seconds: float, relayed: bool) -> None:
        """Take in one movement of ``nbytes`` that took ``seconds``."""
        pair = (source, target)
        totals = self.totals.setdefault(pair, LinkTotals())
        totals.count += 1
        totals.nbytes += nbytes
        totals.seconds += seconds
        totals.relayed += relayed
        if nbytes >= MIN_MEASURED_BYTES:
            self.bandwidth_bps[pair] = _blend(self.bandwidth_bps.get(pair), nbytes / max(seconds, 1e-6))
        else:
            self.latency_s[pair] = _blend(self.latency_s.get(pair), seconds)

    def transfer_s(self, source: str, target: str, nbytes: int) -> float:
        """Return the estimated seconds to bring ``nbytes`` from one site to another."""
        pair = (source, target)
        bandwidth = self.bandwidth_bps.get(pair, DEFAULT_BANDWIDTH_BPS)
        return nbytes / bandwidth + self.latency_s.get(pair, DEFAULT_LATENCY_S)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - MEMORY) * old + MEMORY * new
