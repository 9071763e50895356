"""What the suites compute elsewhere is computed at a given place instead.

They name local schedulers (``scheduler="sync"``, also as the default of ``assert_eq``), call them (``dask.get``), and
start clusters of their own (``LocalCluster``, ``cluster()``, ``gen_cluster``, the fixture ``client``). Names are
redirected where test modules import them from, so this must be done before any of those is imported. What a test gives
as a scheduler of its own stays as it is; where that calls a scheduler of Dask, the place gets it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import dask.base
import dask.distributed
import dask.local
import dask.multiprocessing
import dask.threaded
import distributed
import distributed.utils_test
import pytest

from tests.suites.places import Place


class Redirection:
    """The one default client of a place, and everything that leads to it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.client_class = client_class(place)
        self.client = self.client_class()

    def install(self) -> None:
        """Lead local schedulers, clients and clusters to the place, for the rest of this process."""
        for name in dask.base.named_schedulers:
            dask.base.named_schedulers[name] = self.get
        for module in (dask.local, dask.threaded, dask.multiprocessing):
            module.get_async = self.get_async
        for module in (distributed, dask.distributed):
            module.Client = self.client_class
            module.LocalCluster = self.local_cluster
        for name, replacement in {**self.helpers(), **fixtures(self)}.items():
            setattr(distributed.utils_test, name, replacement)

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """Compute as a scheduler of Dask does; how many threads a local one should have does not matter here."""
        return self.client.get(dsk, keys)

    def get_async(self, submit: Any, num_workers: int, dsk: Any, result: Any, **kwargs: Any) -> Any:
        """Compute what any of the local schedulers was called for."""
        return self.client.get(dsk, result)

    def helpers(self) -> dict[str, Any]:
        """Return what tests import to start a cluster, by name."""
        return {"Client": self.client_class, "cluster": self.cluster, "gen_cluster": self.gen_cluster}

    @contextmanager
    def local_cluster(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Stand for a cluster that a test starts and ends."""
        yield self.place.cluster

    @contextmanager
    def cluster(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Stand for ``distributed.utils_test.cluster``."""
        yield {"address": self.place.address}, [{"address": address} for address in self.place.worker_addresses()]

    def gen_cluster(self, *args: Any, client: bool = False, config: Any = None, **kwargs: Any) -> Callable[..., Any]:
        """Stand for ``distributed.utils_test.gen_cluster``."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            given = 3 + client

            @functools.wraps(function)
            def test(*outer: Any, **fixtures: Any) -> None:
                with dask.config.set(config or {}):
                    asyncio.run(self._with_cluster(function, client, outer, fixtures))

            signature = inspect.signature(function)
            test.__signature__ = signature.replace(parameters=list(signature.parameters.values())[given:])  # type: ignore[attr-defined]
            return test

        return decorate

    async def _with_cluster(self, function: Any, client: bool, outer: Any, fixtures: Any) -> None:
        workers = [SimpleNamespace(address=address) for address in self.place.worker_addresses()]
        if not client:
            await function(self.place.scheduler, *workers, *outer, **fixtures)
            return
        async with self.client_class(asynchronous=True) as c:
            await function(c, self.place.scheduler, *workers, *outer, **fixtures)

    def restart(self) -> None:
        """Go on with another cluster."""
        self.client.close()
        self.place.restart()
        self.client = self.client_class()

    def close(self) -> None:
        """End the client and the cluster."""
        self.client.close()
        self.place.close()


def client_class(place: Place) -> type[Any]:
    """Return a class of clients that connect to ``place``, whatever they are told, and count what they compute."""

    class Client(place.client_class):  # type: ignore[misc,name-defined]
        def __init__(self, address: Any = None, *, asynchronous: bool = False, **kwargs: Any) -> None:
            kept = {name: kwargs[name] for name in ("set_as_default", "name") if name in kwargs}
            super().__init__(place.address, asynchronous=asynchronous, **kept)

        def _graph_to_futures(self, *args: Any, **kwargs: Any) -> Any:
            place.computations += 1
            # The suite of dask.dataframe forbids pickling while it makes a graph: local schedulers do without.
            with dask.config.set({"dask-expr-no-serialize": False}):
                return super()._graph_to_futures(*args, **kwargs)

    return Client


def fixtures(redirection: Redirection) -> dict[str, Any]:
    """Return the fixtures of ``distributed.utils_test`` that lead to a cluster, by name."""

    @pytest.fixture
    def cleanup() -> None:
        """Nothing is started by a test, so that nothing is to be ended."""

    @pytest.fixture
    def loop() -> None:
        """Clients take the loop that they would anyway."""

    @pytest.fixture
    def cluster_fixture() -> Iterator[Any]:
        with redirection.cluster() as addresses:
            yield addresses

    @pytest.fixture
    def client() -> Iterator[Any]:
        with redirection.client_class() as client:
            yield client

    return {
        "cleanup": cleanup,
        "loop": loop,
        "loop_in_thread": loop,
        "cluster_fixture": cluster_fixture,
        "client": client,
    }
