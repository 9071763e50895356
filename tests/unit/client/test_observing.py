"""What tasks print, and their warnings, come with the name of their site."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest

from daskfed.client.observing import print_tagged, warn_tagged


def printed(**message: Any) -> tuple[float, Any]:
    return (0.0, {"args": ("a", 1), "sep": "-", "end": ";\n", "file": None, "flush": None, **message})


def warned(message: Any, category: Any, **more: Any) -> tuple[float, Any]:
    return (0.0, {"message": pickle.dumps(message), "category": pickle.dumps(category), "worker": "w", **more})


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    print_tagged(printed(site="north"))
    print_tagged(printed(site="north", file=2))
    print_tagged(printed())
    print_tagged((0.0, "by hand"))
    print_tagged((0.0, {"site": "no print", "worker": "w", "args": ()}))
    assert capsys.readouterr() == ("[north] a-1;\na-1;\nby hand\n[no print] \n", "[north] a-1;\n")


@pytest.mark.parametrize("message", ["careful", RuntimeWarning("careful")])
def test_warn(message: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_tagged(warned(message, RuntimeWarning, site="north"))
        warn_tagged(warned(message, RuntimeWarning))
        warn_tagged((0.0, "by hand"))
    assert [str(each.message) for each in caught] == ["careful", "careful", "by hand"]
    assert [each.category for each in caught] == [RuntimeWarning, RuntimeWarning, UserWarning]
    assert caught[0].filename == "[north] w" and "north" not in caught[1].filename
