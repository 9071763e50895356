"""The bars for a run of a foreign suite: what counts, and what misses them."""

from __future__ import annotations

from pathlib import Path

from tests.suites.results import Row, Summary, read, read_deselected, summary, write


def rows(passed: int = 0, failed: int = 0, alone: int = 0, computing_alone: int = 0) -> list[Row]:
    """Return rows of tests that used both sites, or none."""
    both = {"north": 1, "south": 2}
    return [
        *(Row(f"passed-{i}", "passed", 1.0, 1, both, 1) for i in range(passed)),
        *(Row(f"failed-{i}", "failed", 1.0, 1, both) for i in range(failed)),
        *(Row(f"alone-{i}", "passed", 0.0) for i in range(alone)),
        *(Row(f"elsewhere-{i}", "passed", 0.0, 1) for i in range(computing_alone)),
    ]


def sums(*args: int, **kwargs: int) -> Summary:
    """Return the summary of such rows, nothing deselected."""
    return summary(rows(*args, **kwargs), ())


def test_what_passes_without_a_block_does_not_count() -> None:
    """Only tests that sent a block are counted as passed, and without any nothing is."""
    found = sums(passed=99, failed=1, alone=50)
    assert (found.tests, found.passed, found.passed_alone, found.imported) == (150, 99, 50, 99)
    assert found.blocks == {"north": 100, "south": 200}
    assert found.problems() == []
    assert len(sums(alone=50).problems()) == 2  # no site ran anything, and nothing counts


def test_one_failure_in_a_hundred_is_the_most() -> None:
    """99 of 100 will do, 98 of 99 will not."""
    assert sums(passed=98, failed=1).problems() == ["only 98 of 99 tests that count have passed"]


def test_a_failure_counts_also_where_no_block_was_sent() -> None:
    """What fails before anything is sent has failed."""
    failure = Row("early", "failed", 0.0)
    assert len(summary([*rows(passed=10), failure], ()).problems()) == 1


def test_what_is_listed_is_left_out() -> None:
    """Tests that a stock cluster does not pass either make no difference."""
    found = summary(rows(passed=10, failed=3), {f"failed-{i}" for i in range(3)})
    assert found.problems() == [] and found.deselected == 3


def test_a_fifth_of_the_computing_tests_may_compute_elsewhere() -> None:
    """At least 80 % of the tests that compute anything must send a block."""
    assert sums(passed=8, computing_alone=2).problems() == []
    assert sums(passed=79, computing_alone=21).problems() == [
        "only 79 of 100 computing tests sent a block to the hub"
    ]


def test_both_sites_must_have_run_blocks() -> None:
    """A federation of which one site did everything proves nothing."""
    lonely = Row("lonely", "passed", 1.0, 1, {"north": 5})
    assert summary([lonely], ()).problems() == ["1 of 2 sites ran no block"]


def test_the_last_result_of_a_test_is_read(tmp_path: Path) -> None:
    """A test that was run again counts once."""
    file = tmp_path / "rows.jsonl"
    assert read(file) == {}
    for outcome in ("failed", "passed"):
        write(file, Row("a[x y]", outcome, 1.0))
    assert read(file) == {"a[x y]": Row("a[x y]", "passed", 1.0)}


def test_lists_may_have_comments_and_need_not_exist(tmp_path: Path) -> None:
    """Lines that start with # are for people."""
    assert read_deselected(tmp_path / "none") == frozenset()
    (tmp_path / "list").write_text("# dask 1\na::b[c d]\n\ne::f\n")
    assert read_deselected(tmp_path / "list") == {"a::b[c d]", "e::f"}
