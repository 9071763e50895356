"""What the hub keeps unopened, and for how long."""

from __future__ import annotations

import pytest
from distributed.core import clean_exception

from daskfed.errors import UnknownSiteError
from daskfed.hub.stores import Stores
from daskfed.messages import Attempt, Import, RunBlock
from tests.unit.hub.builders import block

ERROR = {"status": "error", "exception": b"exception", "traceback": b"traceback", "text": "not kept"}
KEPT = {"exception": b"exception", "traceback": b"traceback"}


def order(*imports: Import) -> RunBlock:
    return RunBlock(block("b", "y", "x"), Attempt(0, 1), imports, 0.0)


def test_a_payload_travels_beside_the_order_until_its_block_is_forgotten() -> None:
    stores = Stores()
    stores.keep_payloads([block("a", "x"), block("b", "y")], [b"A", b"B"])
    assert stores.beside(order()) == {"block": b"B", "errors": {}}
    stores.forget_block("b")
    stores.forget_block("b")
    assert stores.payloads == {"a": b"A"}


def test_a_block_keeps_its_first_payload() -> None:
    stores = Stores()
    stores.keep_payloads([block("b", "y")], [b"first"])
    stores.keep_payloads([block("b", "y")], [b"second"])
    assert stores.payloads == {"b": b"first"}


def test_as_many_payloads_as_blocks_are_expected() -> None:
    with pytest.raises(ValueError):
        Stores().keep_payloads([block("a", "x"), block("b", "y")], [b"A"])


def test_errors_of_failed_inputs_travel_too() -> None:
    stores = Stores()
    stores.keep_payloads([block("b", "y")], [b"B"])
    stores.keep_error(["x", "w"], ERROR)
    imports = Import("x", "", 0, failed=True), Import("v", "north", 8)
    assert stores.beside(order(*imports)) == {"block": b"B", "errors": {"x": KEPT}}


def test_errors_and_types_are_kept_until_their_keys_are_forgotten() -> None:
    stores = Stores()
    stores.keep_error(["x", "y"], ERROR)
    stores.forget_keys(["x", "unknown"])
    assert stores.errors == {"y": KEPT}


def test_types_are_kept_once_for_a_block_as_far_as_they_are_alike() -> None:
    stores = Stores()
    stores.keep_types("b", {"x": b"int", "y": b"str"})
    stores.keep_types("b", {"z": b"int"})
    assert [stores.type_of(key, "b") for key in "xyz"] == [b"int", b"str", b"int"]
    assert stores.type_of("x", "other") is None and stores.type_of("x", None) is None
    stores.keep_types("b", {"y": b"int"})  # made again
    assert stores.type_of("y", "b") == b"int"
    stores.keep_types("b", {"y": b"str"})
    stores.forget_keys(["y"])
    assert stores.type_of("y", "b") == b"int"  # as of any key that may still come
    stores.forget_block("b")
    assert stores.type_of("x", "b") is None


def test_an_error_of_the_hub_itself_is_one_that_a_client_can_raise() -> None:
    stores = Stores()
    stores.make_error(["x"], "UnknownSiteError", "b: no site matches 'nroth'; sites are north")
    kind, error, _ = clean_exception(*(each.data for each in stores.errors["x"].values()))
    assert kind is UnknownSiteError
    assert str(error) == "b: no site matches 'nroth'; sites are north"
