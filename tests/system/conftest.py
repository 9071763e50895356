"""What system tests share; a file that needs another ``client`` makes its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daskfed import Client, Federation


@pytest.fixture(scope="module")
def client(federation: Federation) -> Iterator[Client]:
    """A client of the file's ``federation``, the default one while its tests run."""
    with Client(federation) as client:
        yield client
