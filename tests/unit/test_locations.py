"""Paths and URLs in one form."""

from __future__ import annotations

from pathlib import Path

import pytest

from daskfed.locations import data_locations, location, with_parents


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/scratch/era5", "/scratch/era5"),
        ("/scratch/era5/", "/scratch/era5"),
        ("//scratch//era5/./x/..", "/scratch/era5"),
        ("/..", "/"),
        ("file:///scratch/era5", "/scratch/era5"),
        ("file://localhost/scratch/era5", "/scratch/era5"),
        ("local:///scratch/era5", "/scratch/era5"),
        ("s3://bucket/a/../b/", "s3://bucket/b"),
        ("S3A://bucket//b", "s3://bucket/b"),
        ("gcs://bucket", "gs://bucket"),
        ("s3://", "s3://"),
        ("simplecache::s3://bucket/b", "s3://bucket/b"),
        ("zip://*.csv::file:///a/b.zip", "/a/b.zip"),
        ("filecache::/a/b", "/a/b"),
        ("/a::b", "/a::b"),
        ("era5/x.nc", None),
        ("", None),
        ("/not a path:\nmany lines", None),
        ("/" + 5000 * "x", None),
    ],
)
def test_a_location_has_one_form(given: str, meant: str | None) -> None:
    assert location(given) == meant


@pytest.mark.parametrize(
    ("where", "all_of_them"),
    [
        ("/scratch/era5/x.nc", ["/scratch/era5/x.nc", "/scratch/era5", "/scratch", "/"]),
        ("/", ["/"]),
        ("s3://bucket/a/b", ["s3://bucket/a/b", "s3://bucket/a", "s3://bucket", "s3://"]),
        ("s3://", ["s3://"]),
    ],
)
def test_what_contains_a_location(where: str, all_of_them: list[str]) -> None:
    assert list(with_parents(where)) == all_of_them


def test_data_of_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is relative is below the site's directory; variables and the home are those of the site."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    given = ["era5/", "../other", "$SCRATCH/x", "~/data", "s3://bucket/", "era5"]
    site = tmp_path / "site"
    expected = [f"{site}/era5", f"{tmp_path}/other", "/scratch/me/x", "/home/me/data", "s3://bucket"]
    assert data_locations(given, site) == expected
    monkeypatch.chdir(tmp_path)
    assert data_locations(["era5"], None) == [f"{tmp_path}/era5"]
