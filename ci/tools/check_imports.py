#!/usr/bin/env python3
"""Check that imports of a package go one way, that cores are pure, and that private Dask names stay in one module.

    python check_imports.py daskfed

The rules are the tables below. A module belongs to the first row of ``LAYERS`` with a pattern that matches its path;
it may import modules of its own layer and of those that stand before it in ``ORDER``. Prints one line for each import
that breaks a rule and exits 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from measure import find_module, imports_of, impure_imports, python_files

LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("names", ("errors.py", "messages.py")),
    ("Dask's private names", ("dask_private.py",)),
    ("pure cores", (
        "backlog.py", "link.py",
        "hub/arrivals.py", "hub/cancelling.py", "hub/core.py", "hub/desertion.py", "hub/dispatch.py",
        "hub/estimates.py", "hub/events.py", "hub/fairness.py", "hub/inspection.py", "hub/keytable.py",
        "hub/ledger.py", "hub/placement.py", "hub/homes.py", "hub/poison.py", "hub/recovery.py", "hub/states.py",
         "hub/merging.py", "hub/retrying.py", "hub/suspicion.py",
        "site/budget.py", "site/calls.py", "site/core.py", "site/events.py", "site/inspection.py", "site/records.py",
        "site/states.py",
        "client/areas.py", "client/contraction.py", "client/cutting.py", "client/staging.py", "client/packing.py",
    )),
    ("top", ("__init__.py", "__main__.py", "cli.py", "testing/*")),
    ("client", ("client/*", "apps/*", "functions/*", "models/*")),
    ("shells", ("*",)),
)  # fmt: skip
ORDER = ("names", "Dask's private names", "pure cores", "shells", "client", "top")
"""Lowest first: what a row may import stands before it."""

PURE = "pure cores"
"""Modules of this layer reach no socket, clock, file or random number, not even through others."""

APART: tuple[tuple[str, str], ...] = (("hub/*", "site/*"), ("site/*", "hub/*"))
"""Modules that match the first pattern never import those that match the second."""

PRIVATE_OF = ("dask", "distributed")
PRIVATE_ALLOWED_IN = ("dask_private.py", "client/stock.py")  # the second: those that need a collection imported


class Edge(NamedTuple):
    """One module of the package imports another; both are paths relative to the package."""

    source: Path
    target: Path


def layer_of(path: Path) -> str:
    """Return the name of the layer that the module at ``path`` (relative to the package) belongs to."""
    return next(name for name, patterns in LAYERS if any(fnmatch(path.as_posix(), pattern) for pattern in patterns))


def edges_from(root: Path, path: Path, module: ast.Module) -> Iterator[Edge]:
    """Yield the imports that ``module`` makes of other modules of the package at ``root``, at run time."""
    for names in set(imports_of(module, path)):
        targets = (find_module(root, name) for name in names)
        target = next((found for found in targets if found is not None), None)
        if target is not None and target != path:
            yield Edge(path, target)


def against_layers(edges: list[Edge]) -> Iterator[str]:
    """Yield a line for each import of a module that lies in a higher layer."""
    for source, target in edges:
        low, high = layer_of(source), layer_of(target)
        if ORDER.index(high) > ORDER.index(low):
            yield f"{source} ({low}) imports {target} ({high}); imports go {' <- '.join(ORDER)}"


def against_apart(edges: list[Edge]) -> Iterator[str]:
    """Yield a line for each import between folders that must not know each other."""
    for source, target in edges:
        for one, other in APART:
            if fnmatch(source.as_posix(), one) and fnmatch(target.as_posix(), other):
                yield f"{source} imports {target}, but {one} never imports {other}"


def cycles(edges: list[Edge]) -> Iterator[str]:
    """Yield a line for the first circle of imports, if there is one; a package's ``__init__`` is left out."""
    graph: dict[Path, set[Path]] = {}
    for source, target in edges:
        if "__init__.py" not in (source.name, target.name):
            graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        yield f"imports go in a circle: {' <- '.join(map(str, exc.args[1]))}"


def dask_names(module: ast.Module) -> dict[str, str]:
    """Return local name -> dotted name of everything that ``module`` imports from Dask."""
    found: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: dotted for name, dotted in found.items() if dotted.split(".")[0] in PRIVATE_OF}


def is_private(dotted: str) -> bool:
    """Say whether a part of a dotted name starts with an underscore; dunder names are public."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def is_private_of_dask(dotted: str) -> bool:
    """Say whether a dotted name is a private one of Dask."""
    return dotted.split(".")[0] in PRIVATE_OF and is_private(dotted)


def private_names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each private Dask name that ``module`` imports or reaches from a module or class."""
    names = dask_names(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private_of_dask(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            dotted = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node.lineno, name) for name in dotted if is_private_of_dask(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            first, _, rest = ast.unparse(node).partition(".")
            if first in names:
                yield node.lineno, f"{names[first]}.{rest}"


def against_private(path: Path, module: ast.Module) -> Iterator[str]:
    """Yield a line for each private Dask name outside the one module that may use them."""
    if path.as_posix() not in PRIVATE_ALLOWED_IN:
        for line, name in sorted(set(private_names(module))):
            yield f"{path}:{line} uses {name}; private names of Dask go through {PRIVATE_ALLOWED_IN[0]}"


def problems(root: Path) -> list[str]:
    """Return one line for each import under ``root`` that breaks a rule."""
    modules = {path: ast.parse((root / path).read_text(encoding="utf-8")) for path in python_files(root)}
    edges = sorted({edge for path, module in modules.items() for edge in edges_from(root, path, module)})
    lines = [*against_layers(edges), *against_apart(edges), *cycles(edges)]
    for path, module in modules.items():
        lines += against_private(path, module)
        if layer_of(path) == PURE:
            lines += [f"not pure: {chain}" for chain in impure_imports(root, path)]
    return lines


def main() -> int:
    """Print what is wrong; return 1 where something is, else 0."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: check_imports.py PACKAGE_FOLDER", file=sys.stderr)
        return 2
    found = problems(Path(sys.argv[1]))
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
