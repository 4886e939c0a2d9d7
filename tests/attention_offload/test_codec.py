"""Tests of the conversion of models, layouts and failures to messages and back."""

import grpc
import pytest
import torch

from farshore import rpc
from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.errors import Internal, InvalidRequest, TransportError
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat

PLAIN = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=80, v_dim=64, scale=0.1)
LATENT = AttentionSpec(128, 1, 1, 576, 512, 576**-0.5, soft_cap=30.0, window_tokens=512, v_in_k=True)


@pytest.mark.parametrize("format", KVFormat)
def test_a_model_arrives_as_it_was_sent(format):
    model = AttentionModel(
        specs=(PLAIN, LATENT),
        layer_class=(0, 1, 0),
        layouts=tuple(KVLayout.of(spec, layers=2, format=format) for spec in (PLAIN, LATENT)),
    )
    sent = codec.model_to_pb(model, torch.bfloat16).SerializeToString()
    assert codec.model_from_pb(codec.pb.Open.FromString(sent)) == model


@pytest.mark.parametrize("code", [-1 % 2**32, 17, 99, 2**31])
def test_a_failure_with_a_code_that_gRPC_does_not_have_is_internal(code):
    error = codec.error_from_pb(codec.pb.Failure(code=code, message="why"), peer="shard:1")
    assert type(error) is Internal and "shard:1" in str(error) and "why" in str(error)


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_a_failure_has_the_same_meaning_as_a_gRPC_status(code):
    failure = codec.pb.Failure(code=code.value[0], message="why")
    error = codec.error_from_bytes(failure.SerializeToString(), peer="p")
    assert type(error) is type(rpc.error_of_status(code, "why", peer="p"))


def test_a_failure_that_is_no_message_is_a_transport_error():
    error = codec.error_from_bytes(b"\xff\xff", peer="shard:1")
    assert type(error) is TransportError and "shard:1: garbage" in str(error)


def test_an_unknown_format_is_refused_by_name():
    message = codec.layout_to_pb(KVLayout.of(PLAIN, layers=1, format=KVFormat.INT8))
    message.format = "fp3"
    with pytest.raises(InvalidRequest, match=r"'fp3': use one of float32, .*int4"):
        codec.layout_from_pb(message)


@pytest.mark.parametrize("version", [0, codec.WIRE_VERSION + 1])
def test_another_wire_version_is_refused_by_name(version):
    opening = codec.model_to_pb(AttentionModel((), (), ()), torch.float32)
    opening.wire_version = version
    with pytest.raises(InvalidRequest, match=f"wire version is {version}.*same version of Farshore"):
        codec.model_from_pb(opening)
