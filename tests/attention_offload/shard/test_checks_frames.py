"""Open and Step messages with bad values: a live shard refuses each by name, over every transport."""

import math
import socket

import pytest

from farshore.attention_offload import codec
from farshore.attention_offload.shard import checks
from farshore.attention_offload.transport.frames import REMOTE, native
from farshore.errors import InvalidRequest
from farshore.kvstore.store.layout import forms
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

DEADLINE_S = 60.0


def specs(**changes):
    return lambda m: [setattr(m.specs[0], name, value) for name, value in changes.items()]


def layouts(**changes):
    return lambda m: [setattr(m.layouts[0], name, value) for name, value in changes.items()]


def both(**changes):
    return lambda m: (specs(**changes)(m), layouts(**changes)(m))


def classes(*values):
    def change(m):
        del m.layer_class[:]
        m.layer_class.extend(values)

    return change


OPENINGS = {
    "no heads": (specs(q_heads=0, k_heads=0, v_heads=0), "heads of Q, K and V: give 1 to"),
    "heads above the bound": (
        specs(q_heads=2**32 - 1, k_heads=1, v_heads=1),
        "heads of Q, K and V: give 1 to",
    ),
    "heads that don't divide": (specs(q_heads=7), "must be a multiple"),
    "no dims": (both(k_dim=0), "dims"),
    "dims that wrap an int": (both(k_dim=2**32 - 1), "dims"),
    "other dims than stored": (specs(k_dim=9), "is not how 2 layers"),
    "other heads than stored": (specs(q_heads=12, k_heads=6, v_heads=6), "is not how 2 layers"),
    "other groups than stored": (layouts(groups=1), "is not how 2 layers"),
    "more layers than stored": (classes(0, 0, 0), "is not how 3 layers"),
    "a layer of no class": (classes(0, 1), "a layer of class 1 in a model of 1 classes"),
    "no layers": (classes(), "a model of 0 layers"),
    "too many layers": (classes(*[0] * 4097), "a model of 4097 layers"),
    "no classes": (lambda m: (m.ClearField("specs"), m.ClearField("layouts")), "0 specs and 0 layouts"),
    "a layout too few": (lambda m: m.ClearField("layouts"), "1 specs and 0 layouts"),
    "V in K that is not": (both(v_in_k=True, v_dim=9), "inside K of 3 x 8"),
    "empty blocks": (layouts(block_tokens=0), "tokens in a block"),
    "endless blocks": (layouts(block_tokens=2**32 - 1), "tokens in a block"),
    "a scale of nothing": (specs(scale=0.0), "scale of 0.0"),
    "a scale that is no float32": (specs(scale=1e300), "scale of 1e[+]300"),
    "a scale that is no number": (specs(scale=math.nan), "scale of nan"),
    "a cap below 0": (specs(soft_cap=-1.0), "soft cap of -1.0"),
    "a window of nothing": (specs(window_tokens=0), "window of 0 tokens"),
    "a dtype that is none": (lambda m: setattr(m, "dtype", "f" * 10_000), "unknown dtype 'f+[.][.][.]"),
    "a format that is none": (layouts(format="fp3"), "unknown KV format 'fp3'"),
    "queries wider than the KV": (lambda m: setattr(m, "dtype", "float64"), "queries in float64"),
}


@pytest.mark.parametrize("transport", REMOTE)
@pytest.mark.parametrize(("change", "says"), OPENINGS.values(), ids=OPENINGS)
def test_a_bad_open_message_is_refused_by_name(live, transport, change, says):
    opening = live.open()
    change(opening)
    frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(live.work.query()))
    answer = live.attend(transport, opening, codec.step_to_pb(live.step), frame)
    with pytest.raises(InvalidRequest, match=says):
        raise answer


def rows(count, **changes):
    def change(step):
        del step.positions[:], step.micro_batch_rows[:]
        step.positions.extend([100] * count)
        step.micro_batch_rows.append(count)
        for name, value in changes.items():
            setattr(step.reads[0].reads[0], name, value)

    return change


def read(**changes):
    return lambda step: [setattr(step.reads[0].reads[0], name, value) for name, value in changes.items()]


def many_reads(step):
    step.reads[0].reads.extend(list(step.reads[0].reads) * checks.MOST_READS)


def many_batches(step):
    step.micro_batch_rows.extend([0] * 256)


STEPS = {
    "no rows": (rows(0), "a step of 0 rows"),
    "too many rows": (rows(checks.MOST_ROWS + 1), "a step of 4097 rows"),
    "micro-batches of other rows": (
        lambda m: m.micro_batch_rows.append(2**32 - 1),
        "micro-batches of 4294967296",
    ),
    "too many micro-batches": (many_batches, "in 257 micro-batches"),
    "too many reads": (many_reads, f"a step of {checks.MOST_READS + 1} reads"),
    "no reads of its class": (lambda m: m.ClearField("reads"), "reads of 0 layer classes"),
    "a position beyond 31 bits": (lambda m: m.positions.__setitem__(0, 2**31), "a row at position 2147"),
    "groups the model hasn't": (lambda m: setattr(m, "group1", 4), "head groups 0 to 4 of a model of 3"),
    "groups backwards": (lambda m: setattr(m, "group0", 3), "head groups 3 to 3"),
    "a read of rows it hasn't": (read(rows=2), "a read of rows range.0, 2. in a step of 1"),
    "a read of no rows": (read(rows=0), "a read of rows"),
    "a read of rows that wrap": (read(first_row=1, rows=2**32 - 1), "a read of rows"),
    "a read of groups it hasn't": (read(group1=2**32 - 1), "a read of head groups"),
    "a read of no tokens": (read(last=0), "a read of positions 0 to 0"),
    "a read that is backwards": (read(first=9, last=3), "a read of positions 9 to 3"),
    "a read beyond 31 bits": (read(last=2**63), "a read of positions"),
    "a read below its origin": (read(origin=5, first=2), "begins at 5"),
    "another origin": (read(origin=3, first=3), "begins at position 0, the read says 3"),
    "beyond the seal": (read(last=21), "sealed are 0 to 20"),
}  # fmt: skip


@pytest.mark.parametrize("transport", REMOTE)
@pytest.mark.parametrize(("change", "says"), STEPS.values(), ids=STEPS)
def test_a_bad_step_is_refused_by_name(live, transport, change, says):
    begin = codec.step_to_pb(live.step)
    change(begin)
    frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(live.work.query()))
    answer = live.attend(transport, live.open(), begin, frame)
    with pytest.raises(InvalidRequest, match=says):
        raise answer


@pytest.mark.parametrize("transport", REMOTE)
def test_sizes_whose_product_wraps_to_nothing_are_refused(live, transport):
    """16 rows of 4,096 heads of 16,384 float32: 2^32 bytes of q, which are 0 in 32 bits."""
    opening, begin = live.open(), codec.step_to_pb(live.step)
    heads, dim = forms.MOST_HEADS, forms.MOST_DIM
    specs(q_heads=heads, k_heads=1, v_heads=1, k_dim=dim, v_dim=dim)(opening)
    layouts(groups=1, k_heads_per_group=1, v_heads_per_group=1, k_dim=dim, v_dim=dim)(opening)
    rows(16, rows=16, group1=1)(begin)
    begin.group1 = 1
    answer = live.attend(transport, opening, begin, pb.LayerFrame(step=1, layer=0, q=b""))
    with pytest.raises(InvalidRequest, match=r"bytes a layer: .* at most"):
        raise answer


@pytest.mark.parametrize(
    "work_item",
    [
        (None, 2**32, 4, 4, 8),
        (None, 4, 2**32, 4, 8),
        (None, 4, 4, 2**32, 8),
        (None, 4, 2**30, 2**30, 8),
        (None, -1, 4, 4, 8),
    ],
)
def test_the_native_loop_takes_no_size_that_its_integers_cannot_hold(live, work_item):
    """The native code checks sizes itself: no upper bits are dropped on the way from Python."""
    near, far = socket.socketpair()
    with far:
        wire = native().stream(near.detach(), DEADLINE_S, True, 0)
        step = (1, 0, ((0, 0),), ((work_item,),), 0, 0, 0, True)
        with pytest.raises((RuntimeError, OverflowError), match=r"bytes in a layer's frame|too big"):
            native().serve(wire, step, False)
