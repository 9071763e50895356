"""Every message survives the wire, and what is malformed is refused with a ValueError."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskfed import messages
from daskfed.messages import (
    MESSAGES,
    Attempt,
    BlockKind,
    BlockSpec,
    Constraint,
    HeldBlock,
    Import,
    KeysMade,
    MadeKey,
    Message,
    RecallBlock,
    RunBlock,
    decode,
    decode_block,
    encode,
)


def tuples(*each: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Return tuples of any length: of values, or (where several are given) of rows."""
    row = each[0] if len(each) == 1 else st.tuples(*each)
    return st.lists(row, max_size=3).map(tuple)


NAMES = st.text(max_size=5)
INTEGERS = st.integers(-(2**63), 2**63)
FLOATS = st.floats(allow_nan=False)
KEYS = st.recursive(NAMES | st.binary(max_size=5) | INTEGERS | FLOATS, tuples, max_leaves=4)


def built(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Return instances of a dataclass; a field of a type that is not in TYPES is an error."""
    return st.builds(cls, **{field.name: TYPES[str(field.type)] for field in fields(cls)})


TYPES: dict[str, st.SearchStrategy[Any]] = {
    "str": NAMES,
    "str | None": st.none() | NAMES,
    "int | None": st.none() | INTEGERS,
    "int": INTEGERS,
    "float": FLOATS,
    "bool": st.booleans(),
    "Key": KEYS,
    "tuple[Key, ...]": tuples(KEYS),
    "tuple[str, ...]": tuples(NAMES),
    "tuple[tuple[int, ...], ...]": tuples(tuples(INTEGERS)),
    "tuple[tuple[str, str], ...]": tuples(NAMES, NAMES),
    "tuple[tuple[str, int], ...]": tuples(NAMES, INTEGERS),
    "tuple[tuple[str, float], ...]": tuples(NAMES, FLOATS),
    "tuple[tuple[str, int, float], ...]": tuples(NAMES, INTEGERS, FLOATS),
    "tuple[tuple[str, int, int], ...]": tuples(NAMES, INTEGERS, INTEGERS),
    "Attempt": st.builds(Attempt, INTEGERS, INTEGERS),
    "BlockKind": st.sampled_from(BlockKind),
    "Key | None": st.none() | KEYS,
    "Constraint": st.deferred(lambda: built(Constraint)),
    "BlockSpec": st.deferred(lambda: built(BlockSpec)),
    "tuple[Import, ...]": st.deferred(lambda: tuples(built(Import))),
    "tuple[MadeKey, ...]": st.deferred(lambda: tuples(built(MadeKey))),
    "tuple[HeldBlock, ...]": st.deferred(lambda: tuples(built(HeldBlock))),
}
JUNK: st.SearchStrategy[Any] = (
    st.none() | st.integers() | NAMES | tuples(NAMES) | st.dictionaries(NAMES | st.integers(), st.none(), max_size=2)
)
ANY_MESSAGE = st.sampled_from(sorted(MESSAGES)).flatmap(lambda op: built(MESSAGES[op]))
EVERY = pytest.mark.parametrize("op", sorted(MESSAGES))


def over_the_wire(plain: dict[str, Any]) -> dict[str, Any]:
    return msgpack.unpackb(msgpack.packb(plain), use_list=False, strict_map_key=False)  # type: ignore[no-any-return]


def example(op: str) -> dict[str, Any]:
    """Return one encoded message of this op."""
    spec = BlockSpec("b", "c", "ann", BlockKind.GRAPH, ("x",), ("y",), 1, (("f", 1),))
    values: dict[str, Any] = {
        "str": "a", "int": 1, "float": 0.5, "bool": True, "Key": ("x", 0), "Attempt": Attempt(1, 2), "BlockSpec": spec,
        "tuple[Import, ...]": (Import("x", "north", 8),), "tuple[MadeKey, ...]": (MadeKey("x", 8),),
    }  # fmt: skip
    cls = MESSAGES[op]
    return encode(cls(**{field.name: values.get(str(field.type), ()) for field in fields(cls)}))  # type: ignore[arg-type]


class TestRoundTrip:
    @given(ANY_MESSAGE)
    def test_every_message_survives_the_wire(self, message: Message) -> None:
        back = decode(over_the_wire(encode(message)))
        assert back == message
        assert repr(back) == repr(message)  # 1, 1.0 and True are equal, and are different keys

    @given(built(BlockSpec))
    def test_a_block_survives_the_wire_by_itself(self, block: BlockSpec) -> None:
        assert repr(decode_block(over_the_wire(encode(block)))) == repr(block)

    @EVERY
    def test_each_kind_of_message_survives_too(self, op: str) -> None:
        plain = example(op)
        assert encode(decode(over_the_wire(plain))) == plain

    def test_nested_things_come_back_as_what_they_were(self) -> None:
        spec = BlockSpec("b", "c", "ann", BlockKind.CALLS, (("x", 0),), (b"y",), 1, (), Constraint(sites=("north",)))
        message = RunBlock(spec, Attempt(1, 2), (Import(("x", 0), "south", 8),), 0.5)
        back = decode(over_the_wire(encode(message)))
        assert isinstance(back, RunBlock)
        kinds = [type(back.block), type(back.block.constraint), type(back.block.kind), type(back.attempt)]
        assert kinds == [BlockSpec, Constraint, BlockKind, Attempt]
        assert [type(each) for each in back.imports] == [Import]

    def test_every_message_has_an_op_of_its_own(self) -> None:
        named = {getattr(messages, cls.__name__) for cls in MESSAGES.values()}
        assert named == set(MESSAGES.values())
        assert all(cls.op == op for op, cls in MESSAGES.items())

    def test_a_message_is_frozen(self) -> None:
        with pytest.raises(AttributeError):
            RecallBlock("b", Attempt(0, 1)).block = "other"  # type: ignore[misc]


class TestMalformed:
    @EVERY
    def test_a_field_that_is_missing(self, op: str) -> None:
        required = [f.name for f in fields(MESSAGES[op]) if f.default is MISSING]  # type: ignore[arg-type]
        for name in required:
            plain = example(op)
            del plain[name]
            with pytest.raises(ValueError, match=f"malformed message '{op}'.*'{name}'.*another protocol version"):
                decode(plain)

    @EVERY
    def test_a_field_too_many(self, op: str) -> None:
        with pytest.raises(ValueError, match=f"malformed message '{op}'.*colour"):
            decode({**example(op), "colour": "red"})

    @pytest.mark.parametrize("op", ["make-coffee", None, 7, (), ["run-block"], {}])
    def test_an_unknown_op(self, op: Any) -> None:
        with pytest.raises(ValueError, match="unknown message .*: the peer speaks another version"):
            decode({"op": op})

    def test_no_op(self) -> None:
        with pytest.raises(ValueError, match="unknown message None"):
            decode({"block": "b", "attempt": (0, 1)})

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda plain: plain.update(block="b"),
            lambda plain: plain.update(block=None),
            lambda plain: plain.update(attempt=(1,)),
            lambda plain: plain.update(attempt=7),
            lambda plain: plain.update(imports=7),
            lambda plain: plain.update(imports=("x",)),
            lambda plain: plain.update(imports=({"key": "x"},)),
            lambda plain: plain["block"].update(kind="riddle"),
            lambda plain: plain["block"].update(constraint=7),
            lambda plain: plain["block"].update(constraint={"planet": "mars"}),
            lambda plain: plain["block"].pop("outputs"),
        ],
    )
    def test_what_is_inside_an_order_to_run_a_block(self, spoil: Callable[[dict[str, Any]], Any]) -> None:
        plain = example("run-block")
        spoil(plain)
        with pytest.raises(ValueError):
            decode(plain)

    def test_a_key_that_lacks_its_size(self) -> None:
        with pytest.raises(ValueError, match="nbytes"):
            decode({**example(KeysMade.op), "keys": ({"key": "x"},)})

    def test_a_block(self) -> None:
        with pytest.raises(ValueError, match="malformed block"):
            decode_block({"id": "b"})

    @given(st.data())
    def test_junk_in_any_field_is_decoded_or_refused_and_never_worse(self, data: st.DataObject) -> None:
        plain = example(data.draw(st.sampled_from(sorted(MESSAGES))))
        name = data.draw(st.sampled_from(sorted(plain)))
        plain[name] = data.draw(JUNK)
        with suppress(ValueError):
            assert isinstance(decode(plain), Message)
