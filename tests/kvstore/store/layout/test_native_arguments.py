"""Checks of native arguments (``kernels/cpu/native/runtime/arguments.h``): errors name the argument."""

import pytest

from farshore.kvstore.store.layout import blocks

pytestmark = pytest.mark.skipif(blocks.native is None, reason="needs the native module")


@pytest.mark.parametrize(
    ("given", "named", "error", "says"),
    [
        ((0, []), {}, TypeError, "xor: bytes: missing"),
        ((0, []), {"size": 0}, TypeError, "xor: bytes: missing"),
        ((0, [], 0, 0), {}, TypeError, "xor: 1 arguments too many"),
        ((0, [], 0), {"size": 0}, TypeError, "xor: unexpected argument size"),
        ((0, 7, 0), {}, TypeError, "xor: sources: expected a tuple or list, got int"),
        ((0, [1.5], 0), {}, TypeError, "xor: sources.source: expected an integer, got float"),
        ((0, [], "1"), {}, TypeError, "xor: bytes: expected an integer, got str"),
        ((0, [], 2**64), {}, RuntimeError, "xor: bytes: the integer does not fit into 64 bits"),
        ((0, [], -1), {}, RuntimeError, "xor: bytes: -1 is not in 0 to"),
    ],
)
def test_a_wrong_argument_is_named(given, named, error, says):
    with pytest.raises(error, match=says):
        blocks.native.xor(*given, **named)


def test_arguments_may_be_given_by_keyword_in_any_order():
    assert blocks.native.xor(bytes=0, to=0, sources=()) is None
    assert blocks.native.xor(0, bytes=0, sources=()) is None
