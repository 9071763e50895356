"""What a pickle refers to, where work goes by it, and what a package that is sent consists of."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from daskfed.client import packages as module
from daskfed.client.packages import Packages, Unasked, mentioned, packed, referred
from daskfed.client.submission import Submission
from daskfed.client.versions import PYTHON
from daskfed.errors import ConfigurationError, MissingPackageError
from daskfed.messages import BlockKind, BlockSpec, Constraint
from daskfed.site.packages import UPLOADED, UploadedPackage, install, look

SOURCE = "def f(*args):\n    return args\nclass C:\n    pass\n"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A package of this machine with a module in it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "only_mine" / "data").mkdir(parents=True)
    (folder / "only_mine" / "__init__.py").write_text("from . import inner\n" + SOURCE)
    (folder / "only_mine" / "inner.py").write_text(SOURCE)
    (folder / "only_mine" / "data" / "d.txt").write_text("data")
    (folder / "only_mine" / "__pycache__").mkdir()
    (folder / "only_mine" / "__pycache__" / "x.pyc").write_text("")
    (folder / "one_file.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("only_mine")
    sys.path.remove(str(folder))


def in_main(mine: ModuleType) -> Any:
    """Return a function that is pickled by value and uses the module."""
    source = "def user(x):\n    import json\n    return only_mine.f(x)\n"
    names: dict[str, Any] = {"only_mine": mine, "__name__": "__main__"}
    exec(source, names)
    return names["user"]


class TestPickles:
    def test_what_is_referred_to(self, mine: ModuleType) -> None:
        inner = mine.inner
        for thing in (mine.f, [1, mine.C()], {"x": (mine.C, mine.C)}):
            frame = pickle.dumps(thing)
            assert referred(frame) == {"only_mine"} and mentioned(frame, set()) == {"only_mine"}
        assert referred(pickle.dumps([mine.f, inner.f, inner.C(), inner.C])) == {"only_mine", "only_mine.inner"}

    def test_modules_that_functions_of_main_use(self, mine: ModuleType) -> None:
        frame = cloudpickle.dumps([in_main(mine), in_main(mine.inner), in_main(mine)])
        assert "only_mine" in referred(frame) and "json" not in referred(frame)
        assert mentioned(frame, set()) == {"only_mine"}

    def test_words_are_no_modules(self, mine: ModuleType) -> None:
        frame = pickle.dumps(["only_mine", "only_mine.inner", len, "f"])
        assert mentioned(frame, set()) == {"only_mine"}  # it may be one
        assert referred(frame) == {"builtins"}

    def test_words_that_name_nothing_here(self) -> None:
        skipped: set[bytes] = set()
        frame = pickle.dumps(["no_such_module", "x-1", "json", "json.decoder", "numpyish.x"])
        assert mentioned(frame, skipped) == set()
        assert {match[2:-1] for match in skipped} == {b"no_such_module", b"json", b"json.decoder", b"numpyish.x"}
        assert mentioned(frame, skipped) == set()

    def test_modules_of_a_long_pickle(self, mine: ModuleType) -> None:
        frame = pickle.dumps([[f"key-{i}" for i in range(1000)], [mine.C() for _ in range(300)], mine.inner.f])
        assert referred(frame) == {"only_mine", "only_mine.inner"}


class Payload:
    def __init__(self, thing: Any) -> None:
        self.frames = [pickle.dumps(thing)]


def submission(*things: Any, **constraint: Any) -> Submission:
    blocks = [
        BlockSpec(str(i), "c", "o", BlockKind.CALLS, (), (f"k{i}",), 1, (), Constraint(python=PYTHON, **constraint))
        for i in range(len(things))
    ]
    return Submission(blocks, [{"expr": Payload(thing)} for thing in things])


def sites(**versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"status": "running", "labels": {"kind": name[0]}, "versions": {"python": PYTHON + ".0", **has}}
        for name, has in versions.items()
    }


def known(answers: dict[str, dict[str, str | None]], *asked: str) -> tuple[Packages, dict[str, dict[str, Any]]]:
    there = sites(**{site: {} for site in answers})
    packages = Packages()
    packages.sites_changed(there)
    packages.learn(asked, answers, there)
    return packages, there


class TestPlacing:
    def test_what_is_not_known_is_asked(self, mine: ModuleType) -> None:
        packages, there = known({"north": {}, "south": {}})
        with pytest.raises(Unasked) as caught:
            packages.place(submission(mine.f), there, may_ask=True)
        assert caught.value.packages == {"only_mine"}
        asked = submission(mine.f)
        assert packages.place(asked, there, may_ask=False) == {"only_mine"}
        assert asked.blocks == submission(mine.f).blocks

    def test_what_every_site_has_is_not(self) -> None:
        packages, there = known({"north": {}, "south": {}})
        assert packages.place(submission(len, Path, Constraint()), there, may_ask=True) == set()

    def test_what_a_site_told_when_it_joined_is_not(self) -> None:
        import numpy as np

        packages, there = Packages(), sites(north={"numpy": np.__version__})
        packages.sites_changed(there)
        assert packages.place(submission(np.sum), there, may_ask=True) == set()

    def test_work_goes_where_the_package_is(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": None}, "south": {"only_mine": ""}}, "only_mine")
        planned = submission(mine.f, len)
        assert packages.place(planned, there, may_ask=True) == set()
        assert [block.constraint.sites for block in planned.blocks] == [("south",), ()]

    def test_or_anywhere_where_all_have_it(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": ""}, "south": {"only_mine": ""}}, "only_mine")
        planned = submission(mine.f)
        packages.place(planned, there, may_ask=True)
        assert planned.blocks == submission(mine.f).blocks

    def test_a_word_binds_nothing(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": None}, "south": {"only_mine": None}}, "only_mine")
        planned = submission("only_mine")
        packages.place(planned, there, may_ask=True)
        assert planned.blocks == submission("only_mine").blocks

    def test_no_site_has_it(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": None}, "south": {"only_mine": None}}, "only_mine")
        with pytest.raises(MissingPackageError) as caught:
            packages.place(submission(mine.f), there, may_ask=True)
        said = str(caught.value)
        assert str(mine.__file__) in said and "'north', 'south'" in said
        assert "client.upload_package('only_mine')" in said
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.name) == (said, "only_mine") and isinstance(again, ModuleNotFoundError)

    def test_what_a_site_answers_while_it_joins_says_nothing(self, mine: ModuleType) -> None:
        """It was asked before it had what was sent, and had it when the answer came."""
        packages, there = known({"north": {}})
        joining = there | {"late": {**there["north"], "status": "joining"}}
        packages.sites_changed(joining)
        ready = tuple(packages.sites)
        there = sites(north={}, late={})
        packages.sites_changed(there)
        packages.learn({"only_mine"}, {"north": {"only_mine": ""}, "late": {"only_mine": None}}, ready)
        with pytest.raises(Unasked):
            packages.place(submission(mine.f, sites=("late",)), there, may_ask=True)

    def test_a_site_that_is_back_is_asked_for_what_it_could_not_say(self, mine: ModuleType) -> None:
        packages, there = known({"north": {}, "south": {}})
        away = there | {"south": {**there["south"], "status": "away"}}
        packages.sites_changed(away)
        packages.learn({"only_mine"}, {"north": {"only_mine": ""}}, away)
        assert packages.place(submission(mine.f), away, may_ask=True) == set()  # it is taken to have it
        packages.sites_changed(away)
        assert packages.place(submission(mine.f), away, may_ask=True) == set()
        packages.sites_changed(there)
        with pytest.raises(Unasked):
            packages.place(submission(mine.f), there, may_ask=True)

    def test_an_old_answer_is_asked_for_again_before_it_is_an_error(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": None}}, "only_mine")
        packages._asked["only_mine"] -= 2 * module.STALE_S
        with pytest.raises(Unasked):
            packages.place(submission(mine.f), there, may_ask=True)

    @pytest.mark.parametrize("where", ["north", "kind=n"])
    def test_no_site_of_those_that_are_named(self, mine: ModuleType, where: str) -> None:
        packages, there = known({"north": {"only_mine": None}, "south": {"only_mine": "1.0"}}, "only_mine")
        with pytest.raises(MissingPackageError, match=r"missing at 'north' \(site 'south' has version 1.0\)"):
            packages.place(submission(mine.f, sites=(where,)), there, may_ask=True)

    def test_an_environment_brings_its_own(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": None}}, "only_mine")
        planned = submission(mine.f, environment="gpu")
        packages.place(planned, there, may_ask=True)
        assert planned.blocks[0].constraint.sites == ()

    def test_a_package_that_was_sent_is_asked_for_again(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": None}}, "only_mine")
        packages.forget("only_mine")
        with pytest.raises(Unasked):
            packages.place(submission(mine.f), there, may_ask=True)

    def test_a_site_that_joins_is_asked_and_one_that_is_joining_is_not(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": ""}}, "only_mine")
        late = sites(north={}, late={})
        packages.sites_changed({**late, "late": {**late["late"], "status": "joining"}})
        assert packages.place(submission(mine.f), late, may_ask=True) == set()
        packages.sites_changed(late)
        with pytest.raises(Unasked):
            packages.place(submission(mine.f), late, may_ask=True)

    def test_a_site_that_does_not_answer_is_taken_to_have_it(self, mine: ModuleType) -> None:
        packages, there = known({"north": {"only_mine": ""}, "south": {}}, "only_mine")
        planned = submission(mine.f)
        assert packages.place(planned, there, may_ask=True) == set()
        assert planned.blocks == submission(mine.f).blocks


class TestSending:
    def test_a_package_with_its_files(self, mine: ModuleType) -> None:
        for given in (mine, mine.inner, "only_mine", "only_mine.inner"):
            sent = packed(given)
            assert sent.package == "only_mine"
            names = zipfile.ZipFile(io.BytesIO(sent.data)).namelist()
            assert sorted(names) == ["only_mine/__init__.py", "only_mine/data/d.txt", "only_mine/inner.py"]

    def test_the_same_files_are_the_same_package(self, mine: ModuleType) -> None:
        before = packed(mine)
        file = Path(str(mine.__file__)).parent / "data" / "d.txt"
        file.touch()
        assert packed(mine).digest == before.digest
        file.write_text("other")
        assert packed(mine).digest != before.digest
        file.write_text("data")

    def test_a_module_that_is_a_file(self, mine: ModuleType) -> None:
        sent = packed("one_file")
        assert zipfile.ZipFile(io.BytesIO(sent.data)).namelist() == ["one_file.py"]

    @pytest.mark.parametrize("name", ["no_such_module", "sys", "__main__"])
    def test_what_is_not_there(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match=f"no module or package '{name}'"):
            packed(name)

    def test_what_is_no_python(self) -> None:
        name = next(n for n in ("_json", "_bisect", "_heapq", "_ssl") if n not in sys.builtin_module_names)
        with pytest.raises(ConfigurationError, match="not made of Python files"):
            packed(name)

    def test_one_that_is_too_large(self, mine: ModuleType) -> None:
        large = Path(str(mine.__file__)).parent / "large.bin"
        with large.open("wb") as file:
            file.truncate(11 * module.LARGEST_BYTES)
        try:
            with pytest.raises(ConfigurationError, match="its largest file is .*large.bin: install it at the sites"):
                packed(mine)
        finally:
            large.unlink()


class TestAtASite:
    def test_installing_and_replacing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        name = "sent_package"
        for number, source in enumerate(("VALUE = 1", "VALUE = 2", "VALUE = 1")):
            package = UploadedPackage(name, f"digest{source[-1]}", zipped({f"{name}/__init__.py": source}))
            install(package, str(tmp_path))
            assert not list(tmp_path.iterdir()) or number, "it was installed where it comes from"
            package.process = "another"
            install(package, str(tmp_path))
            install(package, str(tmp_path))  # once more does nothing
            value = importlib.import_module(name).VALUE
            assert value == int(source[-1]), number
            assert sum("sent_package" in entry for entry in sys.path) == 1
        assert look({name: ("", False)}) == {name: UPLOADED}
        del sys.modules[name]

    def test_looking(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "just_a_folder").mkdir()
        monkeypatch.syspath_prepend(str(tmp_path))
        asked = ("json", "just_a_folder", "no_such_module", "dask")
        found = look({name: (name, False) for name in asked})
        import dask

        assert found == {"json": "", "just_a_folder": None, "no_such_module": None, "dask": dask.__version__}
        assert look({"just_a_folder": ("", True)}) == {"just_a_folder": ""}


def zipped(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()
