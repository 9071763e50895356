"""Run Dask's and xarray's own tests over two sites: ``python -m tests.suites run SUITE``, ``list SUITE``, ``report``.

``run`` adds to the results in a folder, so that a suite may be run in shards or file by file, and fails where a bar is
not met. ``run --stock`` runs over a stock LocalCluster; ``list`` writes from its results which tests of the suite are
deselected from then on: those that fail there too. ``report`` sums up everything that was run so far.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.suites.catalogue import HERE, SUITES, Suite, tests_folder
from tests.suites.results import read, read_deselected, summary

RESULTS = HERE.parents[1] / ".venv" / "cache" / "suites"


def main() -> int:
    """Do what the command line says; return the exit status."""
    args = _arguments()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.command == "report":
        return max(_report(suite, args.results) for suite in SUITES.values())
    suite = SUITES[args.suite]
    if args.command == "list":
        return _list(suite, args.results)
    return _run(suite, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description=__doc__)
    parser.add_argument(
        "--results", type=lambda given: Path(given).resolve(), default=RESULTS, help="folder of results"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="sum up all results")
    for name in ("run", "list"):
        command = commands.add_parser(name)
        command.add_argument("suite", choices=SUITES)
    run = commands.choices["run"]
    run.add_argument("tests", nargs="*", help="files, or tests in them, below site-packages; by default all")
    run.add_argument("--slice", action="store_true", help="only what CI runs")
    run.add_argument("--stock", action="store_true", help="over a stock LocalCluster")
    run.add_argument("--failed", action="store_true", help="only what has failed over two sites so far")
    run.add_argument("--new", action="store_true", help="only what was not run so far")
    run.add_argument("--shard", default="1/1", help="i/n: every n-th test, from the i-th on")
    run.add_argument("--timeout", default="60", help="seconds for one test")
    return parser.parse_args()


def _run(suite: Suite, args: argparse.Namespace) -> int:
    """Run tests of a suite in a folder of their own, and say what came out."""
    rows = results_file(suite, args.results, args.stock)
    before = read(rows)
    folder = tests_folder()
    chosen = [str(folder / test) for test in args.tests or (suite.slice if args.slice else ())]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        status = pytest.main([
            "-c", str(HERE / "suites.ini"), "--rootdir", str(folder), "-p", "tests.suites.plugin",
            "--rows", str(rows), "--shard", args.shard, "--timeout", args.timeout,
            "--threads", str(suite.threads), *_restrictions(suite, args, Path(work)),
            *(chosen or ["--pyargs", *suite.modules]),
        ])  # fmt: skip
        os.chdir(folder)
    after = read(rows)
    done = summary((row for test, row in after.items() if row != before.get(test)), _deselected(suite))
    print(f"\n{suite.name} with {suite.versions}\n{done}")
    if args.stock or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return 0 if args.stock else int(status)
    return _tell(done.problems())


def _restrictions(suite: Suite, args: argparse.Namespace, work: Path) -> list[str]:
    """Return options that leave tests out."""
    options = ["--stock"] if args.stock else []
    without = set() if args.stock else set(_deselected(suite))
    if args.new:
        without |= read(results_file(suite, args.results, args.stock)).keys()
    if without:
        (work / "without.txt").write_text("\n".join(without))
        options += ["--without", str(work / "without.txt")]
    if args.failed:
        rows = read(results_file(suite, args.results, stock=False)).values()
        (work / "just.txt").write_text("\n".join(row.test for row in rows if row.outcome == "failed"))
        options += ["--just", str(work / "just.txt")]
    return options


def _list(suite: Suite, results: Path) -> int:
    """Write the list of tests that are deselected, from the results over a stock LocalCluster."""
    rows = read(results_file(suite, results, stock=True)).values()
    failed = sorted({row.test for row in rows if row.outcome == "failed"})
    head = f"# Tests of {suite.name} that fail over a stock LocalCluster in the same harness.\n# {suite.versions}\n"
    suite.deselected_file.write_text(head + "".join(f"{test}\n" for test in failed))
    print(f"{len(failed)} tests in {suite.deselected_file}")
    return 0


def _report(suite: Suite, results: Path) -> int:
    """Sum up what was run of a suite over two sites; return 1 where a bar is not met."""
    rows = read(results_file(suite, results, stock=False))
    if not rows:
        print(f"{suite.name}: not run\n")
        return 0
    found = summary(rows.values(), _deselected(suite))
    print(f"{suite.name} with {suite.versions}\n{found}")
    for row in found.failed:
        print(f"  failed: {row.test}\n      {row.why}")
    return _tell(found.problems())


def _tell(problems: list[str]) -> int:
    print("\n".join(f"  BAR MISSED: {problem}" for problem in problems) or "  all bars met", end="\n\n")
    return 1 if problems else 0


def _deselected(suite: Suite) -> frozenset[str]:
    return read_deselected(suite.deselected_file)


def results_file(suite: Suite, results: Path, stock: bool) -> Path:
    """Return the file with the results of a suite, over two sites or over a stock LocalCluster."""
    return results / f"{suite.name}{'.stock' if stock else ''}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
