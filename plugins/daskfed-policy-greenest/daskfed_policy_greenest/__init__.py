"""A placement policy for daskfed: of the sites that are fast enough, the one with the least carbon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dask

from daskfed.hub.placement import Candidate, finish_s
from daskfed.messages import BlockSpec

WORLD_G_PER_KWH = 475.0  # of a site that the configuration does not name: world average of 2018 (IEA, 2019)
PATIENCE = 2.0  # a site may take this many times as long as the fastest
SLACK_S = 1.0  # and this much longer, so that short blocks have a choice at all


class Greenest:
    """Chooses by grams of CO2 per kWh among the sites that need at most ``patience`` times as long as the fastest.

    ``intensity`` maps site -> g/kWh; by default it is read from Dask's configuration, ``daskfed.greenest.intensity``.
    """

    def __init__(self, intensity: Mapping[str, float] | None = None, patience: float = PATIENCE) -> None:
        self.intensity = dict(dask.config.get("daskfed.greenest.intensity", {}) if intensity is None else intensity)
        self.patience = patience

    def choose(self, block: BlockSpec, candidates: Sequence[Candidate]) -> int:
        """Return the index of the greenest candidate that is fast enough; ties go to the faster, then to the name."""
        times = [finish_s(block, candidate) for candidate in candidates]
        limit = self.patience * min(times) + SLACK_S
        ranked = [
            (self.intensity.get(candidate.site, WORLD_G_PER_KWH), time, candidate.site, index)
            for index, (candidate, time) in enumerate(zip(candidates, times, strict=True))
            if time <= limit
        ]
        return min(ranked)[-1]
