"""Settings in Dask's configuration, and small things that a user writes, checked; :mod:`daskfed.profile` has sites."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf
from typing import Any
from urllib.parse import urlparse

import dask
from dask.utils import parse_bytes, parse_timedelta

from daskfed.dask_private import MAX_BUFFER_SIZE
from daskfed.errors import ConfigurationError

STOCK_INTERVALS = {"tick": "20ms", "system_monitor": "500ms"}
LOST_WORKER = "5m"
AUTO, ALWAYS, NEVER = WHEN = ("auto", "always", "never")
DEFAULT_GRACE = "1h"
DEFAULT_SITE_TIMEOUT = "5m"
DEFAULT_ORPHAN_TIMEOUT = "1h"
DEFAULT_HUB_MEMORY = "512 MiB"
DEFAULT_CLIENT_MEMORY = "1 GiB"
DEFAULT_CACHE = "~/.cache/daskfed/memo"
DEFAULT_CACHE_SIZE = "10 GiB"
DEFAULT_CACHED_VALUE = "256 MiB"
DEFAULT_CLUSTER = "dask.distributed.LocalCluster"


def hint_for(wrong: str, known: Sequence[str], these_are: str) -> str:
    """Return what to say to somebody who wrote ``wrong``: the nearest known name, or all of them."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{these_are} {', '.join(known)}"


def parse_labels(pairs: tuple[str, ...]) -> dict[str, str]:
    """Return labels given as ``name=value``; raises ConfigurationError where one is not."""
    bad = [pair for pair in pairs if pair.find("=") < 1]
    if bad:
        raise ConfigurationError(f"label {bad[0]!r} must be written name=value")
    return dict(pair.split("=", 1) for pair in pairs)


def calm(**intervals: str) -> None:
    """Have the servers of this process look after themselves less often than Dask's do, while they idle too.

    ``intervals`` are for ``tick``, the lag of the event loop (Dask: 20 ms), and ``system_monitor``, CPU and memory for
    the dashboard (Dask: 500 ms). Where the user has set another one, that stays.
    """
    for name, interval in intervals.items():
        setting = f"distributed.admin.{name.replace('_', '-')}.interval"
        if dask.config.get(setting, STOCK_INTERVALS[name]) == STOCK_INTERVALS[name]:
            dask.config.set({setting: interval})


@contextmanager
def patient_clusters() -> Iterator[None]:
    """Have the clusters of this process wait longer for lost workers, unless the user has set how long.

    After Dask's 15 s they give one up for good, also if it is on its way: killed once, restarted, and killed once more.
    """
    setting, stock = "distributed.deploy.lost-worker-timeout", "15s"
    longer = {setting: LOST_WORKER} if dask.config.get(setting, stock) == stock else {}
    with dask.config.set(longer):
        yield


def check_listen(address: str, security: Any, has_key: Callable[[], bool] = lambda: False) -> None:
    """Raise ConfigurationError where others could connect and nothing is encrypted and authenticated.

    That is ``tls://`` with certificates, or ``zmq://`` where the hub ``has_key``, which is looked for only then.
    """
    parsed = urlparse(address if "://" in address else f"tcp://{address}")
    if parsed.scheme == "inproc" or is_loopback(parsed.hostname or ""):
        return
    if (security and parsed.scheme == "tls") or (parsed.scheme == "zmq" and has_key()):
        return
    raise ConfigurationError(
        f"{address} can be reached from other machines and would be neither encrypted nor authenticated: listen on "
        "127.0.0.1, use zmq://… with keys (daskfed keys new hub), or tls://… with certificates"
    )


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach ``host``."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def hub_memory() -> str:
    """Return how much the hub keeps of the graphs that it may have to run again; the rest goes to disk.

    ``daskfed.hub.memory`` in Dask's configuration, by default "512 MiB".
    """
    return str(dask.config.get("daskfed.hub.memory", DEFAULT_HUB_MEMORY))


def client_memory() -> str:
    """Return how much a client keeps of its graphs, and of the data that it scattered; the rest goes to disk.

    ``daskfed.client.memory`` in Dask's configuration, by default "1 GiB" for each of both.
    """
    return str(dask.config.get("daskfed.client.memory", DEFAULT_CLIENT_MEMORY))


def cache_directory() -> str:
    """Return the folder of the results that ``cache=True`` keeps between runs.

    ``daskfed.cache.directory`` in Dask's configuration, by default ``~/.cache/daskfed/memo``.
    """
    return str(dask.config.get("daskfed.cache.directory", DEFAULT_CACHE))


def cache_size() -> int:
    """Return how many bytes of results are kept; beyond, those go that were not used for longest.

    ``daskfed.cache.size`` in Dask's configuration, by default "10 GiB".
    """
    return int(parse_bytes(dask.config.get("daskfed.cache.size", DEFAULT_CACHE_SIZE)))


def largest_cached() -> int:
    """Return how many bytes a result may have to be kept.

    ``daskfed.cache.max-value`` in Dask's configuration, by default "256 MiB".
    """
    return int(parse_bytes(dask.config.get("daskfed.cache.max-value", DEFAULT_CACHED_VALUE)))


def largest_message() -> int:
    """Return the most bytes that one message to a hub or an agent may have; its sender is cut off beyond.

    ``daskfed.comm.largest-message`` in Dask's configuration, by default half of the memory of the machine, which is
    what Dask's own streams take. What a stock client gathers at once is one message; else values travel in pieces, and
    none of them may be larger.
    """
    given = dask.config.get("daskfed.comm.largest-message", None)
    return int(MAX_BUFFER_SIZE) if given is None else int(parse_bytes(given))


def lanes() -> str:
    """Return whether calls of ``submit`` and ``map`` go down lanes: "auto", where they are short, "always" or "never".

    ``daskfed.client.lanes`` in Dask's configuration, by default "auto". Raises ConfigurationError for another word.
    """
    return _when("daskfed.client.lanes", AUTO)


def fusion() -> str:
    """Return whether tiny tasks of graphs run several as one: "auto", once it is known how long they take; or not.

    ``daskfed.client.fusion`` in Dask's configuration; also "always", whatever may run so, and "never". Raises
    ConfigurationError for another word.
    """
    return _when("daskfed.client.fusion", NEVER)


def _when(setting: str, default: str) -> str:
    given = str(dask.config.get(setting, default))
    if given not in WHEN:
        raise ConfigurationError(f"{setting} is {given!r}: {hint_for(given, WHEN, 'it may be')}")
    return given


def site_timeout_s() -> float:
    """Return how long work waits where no site meets its constraint any more before it fails, in seconds.

    ``daskfed.client.site-timeout`` in Dask's configuration, by default "5m"; "inf" waits for ever.
    """
    given = dask.config.get("daskfed.client.site-timeout", DEFAULT_SITE_TIMEOUT)
    return inf if str(given) == "inf" else float(parse_timedelta(given))


def client_grace_s() -> float:
    """Return how long a client and its hub wait for each other after their connection broke, in seconds.

    ``daskfed.client.grace`` in Dask's configuration, by default "1h".
    """
    return float(parse_timedelta(dask.config.get("daskfed.client.grace", DEFAULT_GRACE)))


def orphan_timeout_s() -> float:
    """Return how long a site goes on without a hub before it ends itself and its jobs, in seconds.

    ``daskfed.site.orphan-timeout`` in Dask's configuration, by default "1h", as long as a client is waited for.
    """
    return float(parse_timedelta(dask.config.get("daskfed.site.orphan-timeout", DEFAULT_ORPHAN_TIMEOUT)))
