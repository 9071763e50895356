"""Tokens of functions and values: the same in every process, other ones once something changes that matters."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest

from daskfed.data.content import Walk, digest
from daskfed.errors import NotCacheable


def of(value: Any) -> bytes:
    return Walk().of(value)


def defined(source: str, name: str = "f") -> Any:
    """Return what a piece of source defines, as if it stood in a module of a user."""
    namespace: dict[str, Any] = {"__name__": "users_module", "np": np}
    exec(compile(textwrap.dedent(source), "<test>", "exec"), namespace)
    return namespace[name]


BASE = """
import math
K = 3
TABLE = {"a": [1, 2]}
def helper(x): return x * K
class Model:
    rate = 2
    def run(self, x): return helper(x) * self.rate
def f(x, y=1, *, z=2):
    if x in (1, 2): return len(TABLE)
    return helper(x) + y + Model().run(z) + math.sqrt(16) + np.sin(0)
"""


class TestFunctions:
    def test_the_same_source_is_the_same(self) -> None:
        assert of(defined(BASE)) == of(defined(BASE))

    @pytest.mark.parametrize(
        "before, after",
        [
            ("+ y", "- y"),
            ("sqrt(16)", "sqrt(17)"),
            ("(1, 2)", "(1, 2.0)"),
            ("y=1", "y=2"),
            ("z=2", "z=3"),
            ("x, y=1", "x, w, y=1"),
            ("K = 3", "K = 3.0"),
            ("[1, 2]", "[1, 3]"),
            ("x * K", "x / K"),
            ("rate = 2", "rate = 3"),
            ("* self.rate", "+ self.rate"),
            ("np.sin(0)", "np.cos(0)"),
            ("math.sqrt", "math.exp"),
            ("def f(x", "async def f(x"),
        ],
    )
    def test_what_matters(self, before: str, after: str) -> None:
        assert before in BASE
        assert of(defined(BASE)) != of(defined(BASE.replace(before, after)))

    @pytest.mark.parametrize(
        "before, after",
        [
            ("def helper", "# a comment\n\n\ndef helper"),
            ("z=2):\n", "z=2):\n    'Say what it does.'\n"),
            ("class Model:\n", "class Model:\n    'A model.'\n"),
            ("def f(x", "UNUSED = 4\ndef f(x: int"),
            ("def helper(x)", "def helper(x: float) -> float"),
        ],
    )
    def test_what_does_not_matter(self, before: str, after: str) -> None:
        assert before in BASE
        assert of(defined(BASE)) == of(defined(BASE.replace(before, after)))

    def test_the_name_does_not_matter(self) -> None:
        assert of(defined("def f(x): return x")) == of(defined("def g(x): return x", "g"))

    def test_caught_exceptions_matter(self) -> None:
        source = "def f(x):\n    try:\n        g()\n    except {}:\n        return 1\n"
        assert of(defined(source.format("KeyError"))) != of(defined(source.format("ValueError")))
        function = defined(source.format("KeyError"))
        before = of(function)
        function.__code__ = function.__code__.replace(co_exceptiontable=b"")
        assert of(function) != before, "where they are caught counts too"
        longer = "def f(x):\n    try:\n        a()\n{}        b()\n    except KeyError:\n        return 1\n"
        inside, outside = (
            longer.format(""),
            "def f(x):\n    a()\n    try:\n        b()\n    except KeyError:\n        return 1\n",
        )
        assert of(defined(inside)) != of(defined(outside))

    def test_closures(self) -> None:
        def adder(n: Any) -> Any:
            return lambda x: x + n

        assert of(adder(1)) == of(adder(1))
        assert of(adder(1)) != of(adder(2)) != of(adder(2.0))
        assert of(adder(adder(1))) != of(adder(adder(2)))

    def test_lambdas_partials_and_wrappers(self) -> None:
        assert of(lambda x: x + 1) == of(lambda x: x + 1)
        assert of(lambda x: x + 1) != of(lambda x: x + 2)
        assert of(functools.partial(max, 1)) == of(functools.partial(max, 1))
        assert of(functools.partial(max, 1)) != of(functools.partial(max, 2))
        assert of(functools.partial(max, key=abs)) != of(functools.partial(max, key=len))
        assert of(functools.lru_cache(lambda x: x)) != of(functools.lru_cache(lambda x: -x))

        def loud(function: Any) -> Any:
            @functools.wraps(function)
            def inner(*args: Any) -> Any:
                return function(*args)

            return inner

        assert of(loud(lambda x: x)) != of(loud(lambda x: -x))

    def test_methods_count_what_they_are_bound_to(self) -> None:
        model = defined(BASE, "Model")
        one, other = model(), model()
        assert of(one.run) == of(other.run)
        other.rate = 5
        assert of(one.run) != of(other.run)
        assert of("a".upper) != of("b".upper)

    def test_functions_that_use_each_other_and_themselves(self) -> None:
        source = "def f(n): return g(n - 1) if n else {}\ndef g(n): return f(n - 1) if n else 0\n"
        assert of(defined(source.format(1))) == of(defined(source.format(1)))
        assert of(defined(source.format(1))) != of(defined(source.format(2)))
        assert of(defined(source.format(1), "g")) != of(defined(source.format(2), "g"))

    def test_nested_functions_and_comprehensions(self) -> None:
        source = "A = {}\ndef f(xs):\n    def g(x): return x + A\n    return [g(x) for x in xs]\n"
        assert of(defined(source.format(1))) != of(defined(source.format(2)))

    def test_a_global_that_cannot_be_told(self) -> None:
        function = defined("import threading\nLOCK = threading.Lock()\ndef f():\n    with LOCK: return 1")
        with pytest.raises(NotCacheable, match="the function f uses LOCK: a value of type _thread.lock"):
            of(function)

    def test_a_logger_or_a_sentinel_does_no_harm(self) -> None:
        source = "import logging\nLOG = logging.getLogger('x')\nNONE = object()\ndef f(x=NONE): LOG.info(NONE is x)"
        assert of(defined(source)) == of(defined(source))


class TestModules:
    """Of modules of a user, what is taken from them counts; of installed ones, their version."""

    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

        def write(source: str) -> None:
            (tmp_path / "users_helpers.py").write_text(source)
            sys.modules.pop("users_helpers", None)

        yield write
        sys.modules.pop("users_helpers", None)

    @pytest.mark.parametrize(
        "source",
        [
            "import users_helpers\ndef f(x): return users_helpers.g(x)",
            "from users_helpers import g\ndef f(x): return g(x)",
            "def f(x):\n    import users_helpers\n    return users_helpers.g(x)",
            "def f(x):\n    from users_helpers import g\n    return g(x)",
            "import users_helpers\ndef f(x): return vars(users_helpers)['g'](x)",
        ],
    )
    def test_of_the_user(self, module: Any, source: str) -> None:
        module("def g(x): return x + 1\n")
        before = of(defined(source))
        assert of(defined(source)) == before
        module("def g(x): return x + 2\n")
        assert of(defined(source)) != before

    def test_what_it_imports_counts_too(self, module: Any, tmp_path: Path) -> None:
        package = tmp_path / "users_package"
        package.mkdir()
        (package / "__init__.py").write_text("from .inner import g\n")
        source = "def f(x):\n    from users_helpers import users_package\n    return users_package.g(x)"
        module("import users_package\n")
        (package / "inner.py").write_text("def g(x): return x + 1\n")
        before = of(defined(source))
        assert of(defined(source)) == before
        (package / "inner.py").write_text("def g(x): return x + 2\n")
        assert of(defined(source)) != before

    def test_what_is_not_used_does_not_count(self, module: Any) -> None:
        source = "import users_helpers\ndef f(x): return users_helpers.g(x)"
        module("def g(x): return x + 1\n")
        before = of(defined(source))
        module("def g(x): return x + 1\ndef h(x): return x\n")
        assert of(defined(source)) == before

    def test_installed(self, tmp_path: Path) -> None:
        program = """
            import sys, pathlib
            sys.path.insert(0, sys.argv[1])
            import site; site.getsitepackages = lambda: [sys.argv[1]]
            import anypackage
            from daskfed.data.content import Walk
            print(Walk().of(anypackage.f).hex())
        """
        info = tmp_path / "anypackage-1.0.dist-info"
        info.mkdir()

        def token(version: str, body: str) -> str:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: anypackage\nVersion: {version}\n")
            (tmp_path / "anypackage.py").write_text(f"def f(x): return {body}\n")
            command = [sys.executable, "-B", "-c", textwrap.dedent(program), str(tmp_path)]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

        assert token("1.0", "x") == token("1.0", "x + 1"), "its version speaks for it"
        assert token("1.0", "x") != token("1.1", "x")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Settings:
    depth: int = 1
    names: list[str] = dataclasses.field(default_factory=list)


Pair = namedtuple("Pair", "a b")


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Tokenized:
    def __init__(self, x: Any) -> None:
        self.x, self.lock = x, threading.Lock()

    def __dask_tokenize__(self) -> Any:
        return "Tokenized", self.x


DIFFERENT = [
    0, 10**5000, 10**5000 + 1, 0.0, -0.0, False, None, "0", b"0", 0j, [], (), {}, set(), frozenset(), [0], (0,), {0}, [[0]], [0, 0], {0: 0}, {0: 1},
    {1: 0}, {"a": 1, "b": 2}, "ab", ["a", "b"], range(3), range(4), slice(3), slice(Slotted(1)), ..., int, float, bytearray(b"0"),
    np.zeros(3), np.zeros(3, "f4"), np.zeros(4), np.zeros((1, 3)), np.float64(0), np.dtype("f8"), pd.Series([1, 2]),
    pd.Series([1, 2], name="a"), pd.DataFrame({"a": [1]}), pd.Timestamp("2020-01-01"), Colour.RED, Colour.BLUE, Colour,
    Settings(), Settings(2), Settings(names=["a"]), Settings, Pair(1, 2), Pair(1, 3), Pair, Slotted(1), Slotted([1]),
    Tokenized(1), Tokenized(2), OrderedDict(a=1), defaultdict(list, a=1), Exception("a"), Exception("b"), len, max,
    np.sin, np.sum, np.array([1, "a"], dtype=object), np.array([2, "a"], dtype=object), list[int], Path("a"), object(),
]  # fmt: skip


class TestValues:
    def test_different_ones_differ(self) -> None:
        tokens = [of(value) for value in DIFFERENT]
        same = [(a, b) for n, a in enumerate(DIFFERENT) for m, b in enumerate(DIFFERENT[:n]) if tokens[n] == tokens[m]]
        assert not same

    def test_copies_are_the_same(self) -> None:
        shared = [1]
        assert of([shared, shared]) == of([[1], [1]])
        assert of({"a": 1, "b": 2}) == of({"b": 2, "a": 1})
        assert of(Settings(names=["a"])) == of(Settings(names=["a"]))
        assert of(np.arange(10)[::2]) == of(np.array([0, 2, 4, 6, 8]))
        assert of(Tokenized(1)) == of(Tokenized(1))

    def test_what_holds_itself(self) -> None:
        def ring(n: int) -> list[Any]:
            ring: list[Any] = [n]
            ring.append(ring)
            return ring

        assert of(ring(1)) == of(ring(1)) != of(ring(2))

    def test_what_is_deep(self) -> None:
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(NotCacheable, match="argument 1 of len: it is nested too deeply"):
            Walk().call(len, [deep], {})

    @pytest.mark.parametrize(
        "value, words",
        [(threading.Lock(), "_thread.lock"), ((n for n in ()), "generator"), (memoryview(b""), "memoryview")],
    )
    def test_what_cannot_be_told(self, value: Any, words: str) -> None:
        with pytest.raises(NotCacheable, match=f"x= of max: a value of type .*{words}.*normalize_token.*cache=True"):
            Walk().call(max, [1], {"x": [value]})
        with pytest.raises(NotCacheable, match="argument 2 of max"):
            Walk().call(max, [1, {"a": value}], {})

    def test_lazy_collections(self) -> None:
        with pytest.raises(NotCacheable, match="not computed yet"):
            Walk().call(max, [dask.delayed(1)], {})

    def test_lengths_count(self) -> None:
        assert digest("a", "b") != digest("ab") != digest("", "ab")


def test_two_processes_agree(tmp_path: Path) -> None:
    """All of it, in processes that order sets differently, from a script and from a notebook's kind of source."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import importlib.util
spec = importlib.util.spec_from_file_location("these_tests", {__file__!r})
tests = importlib.util.module_from_spec(spec)
sys.modules["these_tests"] = tests
spec.loader.exec_module(tests)
from daskfed.data.content import Walk
import random
WORDS = {{"a", "b", "c", frozenset(["d", "e"])}}
class Mine:
    def __init__(self): self.words = set("xyz")
    def run(self): return WORDS, tests.Settings
def f(x): return x in {{"p", "q", "r"}}, WORDS, Mine().run()
for value in [*tests.DIFFERENT, tests.defined(tests.BASE), f, Mine(), Mine().run, np_arrays := tests.np.array([f, Mine()], dtype=object)]:
    print(type(value).__name__, Walk().of(value).hex())
"""
    (tmp_path / "program.py").write_text(program)
    outputs = []
    for seed in ("1", "2", "3"):
        command = [sys.executable, str(tmp_path / "program.py")]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=env).stdout)
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0].splitlines()) == len(DIFFERENT) + 5
