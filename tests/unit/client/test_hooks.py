"""The hooks wait for Dask's collections to be imported: nobody pays for pandas who does not use it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

import pytest

from daskfed.client.hooks import _once_imported


def in_a_new_python(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_collections_imported_after_the_hooks_are_hooked() -> None:
    in_a_new_python(
        """
        import sys
        from daskfed import at
        with at("north"):
            heavy = {"pandas", "xarray", "dask.array", "dask.dataframe"}.intersection(sys.modules)
            assert not heavy, heavy
            import dask.dataframe as dd
            from dask import array, bag
            frame = dd.from_dict({"x": [1, 2]}, npartitions=2)  # would warn that it ignores annotations
        from daskfed.client import fusion
        from daskfed.client.frames import Pinned
        assert isinstance(frame.expr, Pinned), type(frame.expr)
        hooked = [array.ones(3), bag.from_sequence([1]), bag.from_sequence([1]).sum()]
        want = [fusion.optimise_array, fusion.optimise_bag, fusion.optimise_bag]
        assert [type(each).__dict__["__dask_optimize__"]._default for each in hooked] == want
        """
    )


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that nobody has imported; importing it fails while there is a file "closed"."""
    (tmp_path / "late_module.py").write_text(
        "import os\nif os.path.exists(os.path.join(os.path.dirname(__file__), 'closed')): raise OSError('closed')\nx = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "late_module", raising=False)
    return "late_module"


def test_the_hook_is_called_once_and_leaves_no_trace(late: str) -> None:
    finders, seen = list(sys.meta_path), list[object]()
    _once_imported(late, lambda module: seen.append(module.x))
    spec = importlib.util.find_spec(late)
    assert spec is not None and os.path.basename(spec.loader.get_filename(late)) == "late_module.py"  # type: ignore[union-attr]
    assert not seen
    module = importlib.import_module(late)
    importlib.reload(module)
    assert seen == [1]
    assert sys.meta_path == finders
    assert isinstance(module.__loader__, SourceFileLoader)


def test_a_module_that_failed_to_import_is_hooked_when_it_succeeds(late: str, tmp_path: Path) -> None:
    seen: list[object] = []
    _once_imported(late, seen.append)
    (tmp_path / "closed").touch()
    with pytest.raises(OSError, match="closed"):
        importlib.import_module(late)
    (tmp_path / "closed").unlink()
    assert not seen
    assert [importlib.import_module(late)] == seen


def test_one_that_was_imported_is_hooked_at_once(late: str) -> None:
    module, seen = importlib.import_module(late), list[object]()
    _once_imported(late, seen.append)
    assert seen == [module]


class Asking(MetaPathFinder):
    """Finds what the others find, as those do that watch imports for other purposes."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if self._busy:
            return None
        self._busy = True
        try:
            return importlib.util.find_spec(fullname)
        finally:
            self._busy = False


@pytest.mark.parametrize("first", [True, False])
def test_others_may_watch_imports_too(late: str, first: bool) -> None:
    seen: list[object] = []
    if first:
        sys.meta_path.insert(0, Asking())
    _once_imported(late, seen.append)
    if not first:
        sys.meta_path.insert(0, Asking())
    assert [importlib.import_module(late)] == seen


def test_finders_may_be_replaced_meanwhile(late: str) -> None:
    seen: list[object] = []
    _once_imported(late, seen.append)
    spec = importlib.util.find_spec(late)
    assert spec is not None and spec.loader is not None
    sys.meta_path[:] = sys.meta_path[1:]
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert [module] == seen
