"""``timeout=``: what is accepted, whose it is, and what a limited function is to the rest of Dask."""

from __future__ import annotations

import subprocess
import sys
from math import inf
from typing import Any

import cloudpickle
import dask
import pytest
from dask.base import collections_to_expr, tokenize
from dask.delayed import delayed
from dask.utils import funcname

from daskfed.client.keywords import takes_timeout
from daskfed.client.limits import limited, seconds_of, wants_limits
from daskfed.errors import ConfigurationError


def double(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize(("given", "seconds"), [(2, 2), (0.5, 0.5), ("5m", 300), ("250ms", 0.25), (None, inf)])
def test_times(given: Any, seconds: float) -> None:
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", [0, -1, "soon", [], True, float("nan"), "-3s"])
def test_what_is_no_time(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected seconds"):
        limited(double, given)


def test_keys_and_names_stay() -> None:
    assert tokenize(limited(double, 5)) == tokenize(double)
    assert funcname(limited(double, 5)) == "double"
    assert limited(double, None) is double
    assert limited(double, 5)(4) == 8


def test_a_function_that_has_such_a_parameter_gets_it() -> None:
    assert takes_timeout(lambda url, timeout=3: 0)
    assert takes_timeout(lambda url, **options: 0)
    assert not takes_timeout(double) and not takes_timeout(sum)


def test_it_opens_where_daskfed_is_not_installed() -> None:
    program = (
        "import sys, pickle; sys.modules['daskfed'] = None; f = pickle.loads(sys.stdin.buffer.read())\n"
        "assert f(4) == 8, f(4)\n"
        "try: f(10**6)\n"
        "except TimeoutError as exc: print(exc)"
    )
    function = limited(eval("lambda x: 2 * x if x < 10**6 else __import__('time').sleep(5)"), 0.3)
    done = subprocess.run(
        [sys.executable, "-c", program], input=cloudpickle.dumps(function), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"took longer than its timeout of 0.3 s" in done.stdout


def test_graphs_with_timeouts_are_noticed() -> None:
    with dask.annotate(timeout=3):
        built = delayed(double)(4)
    plain = delayed(double)(4)
    assert wants_limits(collections_to_expr([built]), {})
    assert wants_limits(collections_to_expr([delayed(sum)([built, plain]), plain]), {})
    assert not wants_limits(collections_to_expr([plain]), {})
    assert wants_limits(collections_to_expr([plain]), {"timeout": 3})
