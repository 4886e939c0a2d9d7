"""Cold calls with bad values: a live shard refuses each before it takes memory or a lock for long."""

import pytest
import torch

from farshore.attention_offload.shard import checks
from farshore.attention_offload.transport.frames import native
from farshore.errors import InvalidRequest, NotFound
from farshore.ids import SpanId
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

CREATIONS = {
    "no heads": ({"groups": 0}, {}),
    "dims beyond": ({"k_dim": 2**32 - 1}, {}),
    "layers beyond": ({"layers": 2**32 - 1}, {}),
    "heads beyond": ({"k_heads_per_group": 2**31}, {}),
    "empty blocks": ({"block_tokens": 0}, {}),
    "endless blocks": ({"block_tokens": 2**32 - 1}, {}),
    "a format that is none": ({"format": "?"}, {}),
    "no tokens": ({}, {"capacity_tokens": 0}),
    "tokens beyond": ({}, {"capacity_tokens": 2**64 - 1}),
}


@pytest.mark.parametrize(("layout", "request_"), CREATIONS.values(), ids=CREATIONS)
def test_a_bad_span_is_refused_before_memory_is_taken(live, layout, request_):
    request = live.valid_requests()["Create"]
    for message, changes in ((request.layout, layout), (request, request_)):
        for name, value in changes.items():
            setattr(message, name, value)
    before = live.shard.store.usage()
    assert type(live.call("Create", request)) is InvalidRequest
    assert live.shard.store.usage() == before


LISTS = {
    "Hold": (lambda m: m.span_ids.extend(["x"] * checks.MOST_SPANS), "names 65537 spans"),
    "Drop": (lambda m: m.span_ids.extend(["x"] * checks.MOST_SPANS), "names 65537 spans"),
    "FindPrefix": (lambda m: m.hashes.extend([bytes(32)] * checks.MOST_BLOCKS), "names 16385 blocks"),
    "HoldPrefix": (lambda m: m.blocks.extend(list(m.blocks) * checks.MOST_BLOCKS), "names 16385 blocks"),
    "Seal": (lambda m: m.blocks.extend(list(m.blocks) * checks.MOST_BLOCKS), "names 16385 blocks"),
    "Beat": (lambda m: m.wanted[0].span_ids.extend(["x"] * checks.MOST_WANTED), "a list of 1048578"),
}


@pytest.mark.parametrize("method", LISTS)
def test_a_call_that_names_too_much_is_refused(live, method):
    """Lists are limited because a lock is held while a list is processed."""
    request = live.valid_requests()[method]
    lengthen, says = LISTS[method]
    lengthen(request)
    with pytest.raises(InvalidRequest, match=says):
        raise live.call(method, request)


def test_ids_are_short_and_not_empty(live):
    for method, field in (("Create", "key.sequence_id"), ("Hold", "sequence_id"), ("Beat", "caller.engine")):
        for name in ("", "x" * (checks.MOST_ID_CHARS + 1)):
            request = live.valid_requests()[method]
            *path, last = field.split(".")
            message = request
            for field_name in path:
                message = getattr(message, field_name)
            setattr(message, last, name)
            assert type(live.call(method, request)) is InvalidRequest


def test_an_unknown_span_id_is_not_echoed_at_length(live):
    answer = live.call("Seal", pb.SealRequest(span_id="x" * 1_000_000, sequence_id="a"))
    assert type(answer) is NotFound and len(str(answer)) < 3_000
    assert SpanId(live.read.span) in {info.span for info in live.shard.store.announce()}
    assert torch.isfinite(live.shard.store.read(live.read.span, 0, 0, 20, sequence=live.read.holder)[0]).all()
