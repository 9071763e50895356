"""A Cluster class that cannot scale, for a site that is to."""

from __future__ import annotations

from typing import Any

from distributed import LocalCluster


class Unscalable(LocalCluster):
    """A LocalCluster that has as many workers as it started with."""

    def scale(self, n: int = 0, **kwargs: Any) -> None:
        """Refuse."""
        raise NotImplementedError("it has its workers from the start")
