"""What system tests share; a file that needs another ``client`` makes its own.

Most sites here have no dashboard, which takes a second to import, and look after themselves less often than Dask's do,
which would take a tenth of a processor from the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from daskfed import Client, Federation

for name, interval in {"ADMIN__TICK": "100ms", "WORKER__PROFILE": "50ms"}.items():  # for the processes that tests start
    os.environ.setdefault(f"DASK_DISTRIBUTED__{name}__INTERVAL", interval)


LONG = ("test_chaos.py", "test_suites.py")  # begin first, so that nothing else is over long before them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that take longest first."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module")
def client(federation: Federation) -> Iterator[Client]:
    """A client of the file's ``federation``, the default one while its tests run."""
    with Client(federation) as client:
        yield client
