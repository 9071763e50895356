"""Where data lies: paths and URLs in one form, so that they can be compared.

A *location* is an absolute path, ``/scratch/era5``, or a URL, ``s3://bucket/folder``; without ``.``, ``..``, doubled or
trailing slashes, or ``file://``. It is compared by whole components: ``/scratch/era5`` does not contain
``/scratch/era52``. Links are not followed: what a link means at a site, only that site knows.
"""

from __future__ import annotations

import os.path
import posixpath
import re
from collections.abc import Iterable, Iterator

LONGEST = 4096  # characters of what may still be a path

_URL = re.compile(r"([A-Za-z][\w+.-]*)://(.*)", re.DOTALL)
_SAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "local": "file"}  # other names of a scheme


def location(text: str, base: str | None = None) -> str | None:
    """Return the location that a path or a URL means, or None where it is neither.

    A relative path means one below ``base``; without that, it is none. Of chained URLs (``simplecache::s3://bucket``)
    the last one counts, which says where the bytes come from.
    """
    if not text or len(text) > LONGEST or "\n" in text or "\0" in text:
        return None
    if "::" in text and not text.startswith("/"):
        text = text.rsplit("::", 1)[1]
    if url := _URL.fullmatch(text):
        scheme = _SAME.get(name := url[1].lower(), name)
        if scheme != "file":
            return f"{scheme}://{posixpath.normpath('/' + url[2]).lstrip('/')}"
        text = url[2] if url[2].startswith("/") else url[2].removeprefix("localhost")
    if not text.startswith("/"):
        if base is None:
            return None
        text = f"{base}/{text}"
    return "/" + posixpath.normpath(text).lstrip("/")


def with_parents(where: str) -> Iterator[str]:
    """Yield a location and all that contain it, the nearest first."""
    start = where.index("://") + 3 if "://" in where else 1
    yield where
    while len(where) > start:
        cut = where.rfind("/", start)
        where = where[: max(cut, start)]
        yield where


def data_locations(given: Iterable[str | os.PathLike[str]], directory: str | os.PathLike[str] | None) -> list[str]:
    """Return the locations of a site's ``data``, as they are at this machine: ``~`` and variables are filled in.

    Relative paths are below ``directory``, by default the working directory of this process.
    """
    base = os.path.abspath(directory or ".")
    found = (location(os.path.expanduser(os.path.expandvars(os.fspath(each))), base) for each in given)
    return list(dict.fromkeys(where for where in found if where is not None))
