"""Converts the package's types to protobuf messages and back.

Called by the transports, the shard clients and the shard's service. It must not know connections or stores.

A message carries a tensor as its raw little-endian bytes in row-major order. Both ends derive the shape and
the dtype from the layout, the model or the step, so messages do not repeat them. Reading a layout raises
InvalidRequest if its format is unknown.
"""

import math
import sys
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from farshore import rpc
from farshore.attention_offload.base import AttentionModel, Caller, Imported, ShardBeat, ShardIdentity, Wanted
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.errors import FarshoreError, InvalidRequest, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kernels.host import HOST
from farshore.kvstore.base import PrefixFound, SpanInfo, SpanKey, SpanSlice
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.layout.forms import stored_bytes
from farshore.proto import attention_pb2 as pb
from farshore.text import quoted

assert sys.byteorder == "little", "the wire is little-endian, and tensors are sent without swapping bytes"

WIRE_VERSION = 2
"""Of frames and messages between engines and shards. A change that the other end would misread increases
it."""

DTYPES = {format.value: format.dtype for format in KVFormat if not format.quantised}
"""The dtypes that a message can name: those of the formats that are not quantised."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """The dtype called ``name``. Raises InvalidRequest if no dtype has that name."""
    if name not in DTYPES:
        raise InvalidRequest(f"unknown dtype {quoted(name)}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES[dtype]


def to_bytes(tensor: Tensor) -> bytes:
    """The elements of ``tensor`` in row-major order. Makes one copy, in the calling thread only: a copy by
    PyTorch would use its thread pool, whose threads would wait for each other."""
    if not tensor.numel():
        return b""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor with the elements in ``data``. Raises InvalidRequest if the size does not match ``shape``
    and ``dtype``."""
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise InvalidRequest(f"{len(data)} bytes for a {dtype} tensor of shape {shape}")
    if not data:
        return torch.empty(shape, dtype=dtype, device=HOST)
    # A bytearray, because a tensor's memory must be writable.
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def bytes_into(out: Tensor, data: bytes) -> None:
    """Copies ``data`` to the uint8 tensor ``out``, which may have any strides, in row-major order. Raises
    InvalidRequest if the sizes differ."""
    if len(data) != out.numel():
        raise InvalidRequest(f"{len(data)} bytes for a tensor of shape {tuple(out.shape)}")
    out.numpy()[...] = np.frombuffer(data, np.uint8).reshape(out.shape)


def tokens_from_bytes(k: bytes, v: bytes, layout: KVLayout, tokens: int) -> tuple[Tensor, Tensor]:
    """k and v of one layer as stored (:mod:`farshore.kvstore.store.layout.forms`): two tensors
    ``u8[heads, tokens, bytes]``. Raises InvalidRequest if a size does not match ``layout`` and ``tokens``."""
    k_bytes, v_bytes = stored_bytes(layout)
    return (
        from_bytes(k, (layout.k_heads, tokens, k_bytes), torch.uint8),
        from_bytes(v, (layout.v_heads, tokens, v_bytes), torch.uint8),
    )


def format_of(name: str) -> KVFormat:
    """The KV format called ``name``. Raises InvalidRequest if no format has that name."""
    try:
        return KVFormat(name)
    except ValueError:
        known = ", ".join(format.value for format in KVFormat)
        raise InvalidRequest(f"unknown KV format {quoted(name)}: use one of {known}") from None


def layout_to_pb(layout: KVLayout) -> pb.Layout:
    return pb.Layout(**(layout._asdict() | {"format": layout.format.value}))


def layout_from_pb(message: pb.Layout) -> KVLayout:
    return KVLayout(
        layers=message.layers,
        groups=message.groups,
        k_heads_per_group=message.k_heads_per_group,
        v_heads_per_group=message.v_heads_per_group,
        k_dim=message.k_dim,
        v_dim=message.v_dim,
        format=format_of(message.format),
        block_tokens=message.block_tokens,
        v_in_k=message.v_in_k,
    )


def key_to_pb(key: SpanKey) -> pb.SpanKey:
    return pb.SpanKey(
        sequence_id=key.sequence,
        layer_class=key.layer_class,
        first=key.first,
        group0=key.group0,
        group1=key.group1,
    )


def key_from_pb(message: pb.SpanKey) -> SpanKey:
    return SpanKey(
        sequence=SequenceId(message.sequence_id),
        layer_class=message.layer_class,
        first=message.first,
        group0=message.group0,
        group1=message.group1,
    )


def info_to_pb(info: SpanInfo) -> pb.SpanInfo:
    return pb.SpanInfo(
        span_id=info.span,
        key=key_to_pb(info.key),
        sealed_tokens=info.sealed_tokens,
        capacity_tokens=info.capacity_tokens,
        bytes=info.bytes,
        epoch=info.epoch,
        holders=info.holders,
    )


def info_from_pb(message: pb.SpanInfo) -> SpanInfo:
    return SpanInfo(
        span=SpanId(message.span_id),
        key=key_from_pb(message.key),
        sealed_tokens=message.sealed_tokens,
        capacity_tokens=message.capacity_tokens,
        bytes=message.bytes,
        epoch=Epoch(message.epoch),
        holders=message.holders,
    )


def block_to_pb(block: PrefixBlock) -> pb.PrefixBlock:
    return pb.PrefixBlock(hash=block.hash, first=block.first, tokens=block.tokens)


def block_from_pb(message: pb.PrefixBlock) -> PrefixBlock:
    return PrefixBlock(message.hash, tuple(message.tokens), message.first)


def found_to_pb(found: PrefixFound) -> pb.PrefixFound:
    slices = [
        pb.SpanSlice(
            span_id=span_slice.span,
            key=key_to_pb(span_slice.key),
            layout=layout_to_pb(span_slice.layout),
            first=span_slice.first,
            last=span_slice.last,
        )
        for span_slice in found.slices
    ]
    return pb.PrefixFound(slices=slices, available_bytes=found.available_bytes)


def found_from_pb(message: pb.PrefixFound) -> PrefixFound:
    slices = [
        SpanSlice(
            span=SpanId(span_slice.span_id),
            key=key_from_pb(span_slice.key),
            layout=layout_from_pb(span_slice.layout),
            first=span_slice.first,
            last=span_slice.last,
        )
        for span_slice in message.slices
    ]
    return PrefixFound(slices, message.available_bytes)


def imported_to_pb(imported: Imported) -> pb.ImportReply:
    return pb.ImportReply(
        span_id=imported.span,
        key=key_to_pb(imported.key),
        layout=layout_to_pb(imported.layout),
        tokens=imported.tokens,
    )


def imported_from_pb(message: pb.ImportReply) -> Imported:
    return Imported(
        SpanId(message.span_id), key_from_pb(message.key), layout_from_pb(message.layout), message.tokens
    )


def identity_to_pb(identity: ShardIdentity) -> pb.ShardIdentity:
    return pb.ShardIdentity(**_fields_to_pb(identity))


def identity_from_pb(message: pb.ShardIdentity) -> ShardIdentity:
    return ShardIdentity(**_fields_from_pb(message, ShardIdentity._fields))


def caller_from_pb(message: pb.Caller) -> Caller:
    return Caller(message.engine, message.sent_ns)


def wanted_to_pb(wanted: Wanted) -> list[pb.WantedSpans]:
    return [
        pb.WantedSpans(sequence_id=sequence, epoch=epoch, span_ids=spans)
        for (sequence, epoch), spans in wanted.items()
    ]


def wanted_from_pb(messages: Iterable[pb.WantedSpans]) -> dict[tuple[SequenceId, Epoch], set[SpanId]]:
    """The spans by sequence and epoch. Messages that name the same sequence and epoch are united."""
    wanted: dict[tuple[SequenceId, Epoch], set[SpanId]] = {}
    for message in messages:
        holder = (SequenceId(message.sequence_id), Epoch(message.epoch))
        wanted.setdefault(holder, set()).update(map(SpanId, message.span_ids))
    return wanted


def beat_to_pb(beat: ShardBeat) -> pb.BeatReply:
    return pb.BeatReply(**_fields_to_pb(beat))


def beat_from_pb(message: pb.BeatReply) -> ShardBeat:
    return ShardBeat(**_fields_from_pb(message, ShardBeat._fields))


def _fields_to_pb(said: ShardIdentity | ShardBeat) -> dict[str, Any]:
    """What a shard says of itself, by the fields of its message: all but the worker's have its own names."""
    return {"worker_id" if name == "worker" else name: value for name, value in said._asdict().items()}


def _fields_from_pb(message: pb.ShardIdentity | pb.BeatReply, names: Iterable[str]) -> dict[str, Any]:
    """The reverse of :func:`_fields_to_pb`."""
    return {name: getattr(message, "worker_id" if name == "worker" else name) for name in names}


def failure_to_pb(error: Exception) -> pb.Failure:
    """The message that tells the engine, on a native connection, why the shard ends it."""
    code, message, _ = rpc.status_of(error)
    return pb.Failure(code=code.value[0], message=message)


def error_from_pb(message: pb.Failure, *, peer: str) -> FarshoreError:
    """The error in a Failure message, with which the shard ended a native connection. ``peer`` names the
    shard in the error's text. A code that is not a gRPC status code becomes Internal."""
    return rpc.error_of_status(rpc.code_of(message.code), message.message, peer=peer)


def error_from_bytes(data: bytes, *, peer: str) -> FarshoreError:
    """Like :func:`error_from_pb`, for a serialised message. Data that is no Failure message becomes
    TransportError."""
    try:
        return error_from_pb(pb.Failure.FromString(data), peer=peer)
    except DecodeError as error:
        return TransportError(f"{peer}: garbage: a failure that is no message: {error}")


def model_to_pb(model: AttentionModel, dtype: torch.dtype) -> pb.Open:
    return pb.Open(
        specs=[pb.AttentionSpec(**spec._asdict()) for spec in model.specs],
        layouts=[layout_to_pb(layout) for layout in model.layouts],
        layer_class=model.layer_class,
        dtype=dtype_name(dtype),
        wire_version=WIRE_VERSION,
    )


def model_from_pb(message: pb.Open) -> AttentionModel:
    """Raises InvalidRequest for an engine of another wire version."""
    if message.wire_version != WIRE_VERSION:
        raise InvalidRequest(
            f"the engine's wire version is {message.wire_version}, this attention worker's is "
            f"{WIRE_VERSION}: run the same version of Farshore on all nodes"
        )
    return AttentionModel(
        specs=tuple(
            AttentionSpec(
                q_heads=spec.q_heads,
                k_heads=spec.k_heads,
                v_heads=spec.v_heads,
                k_dim=spec.k_dim,
                v_dim=spec.v_dim,
                scale=spec.scale,
                soft_cap=spec.soft_cap if spec.HasField("soft_cap") else None,
                window_tokens=spec.window_tokens if spec.HasField("window_tokens") else None,
                v_in_k=spec.v_in_k,
            )
            for spec in message.specs
        ),
        layer_class=tuple(message.layer_class),
        layouts=tuple(layout_from_pb(layout) for layout in message.layouts),
    )


def step_to_pb(step: ShardStep) -> pb.Step:
    return pb.Step(
        step=step.step,
        positions=step.positions,
        group0=step.group0,
        group1=step.group1,
        micro_batch_rows=[len(batch) for batch in step.micro_batches],
        reads=[
            pb.StepReads(
                reads=[
                    pb.StepRead(
                        span_id=read.span,
                        origin=read.origin,
                        first=read.first,
                        last=read.last,
                        group0=read.group0,
                        group1=read.group1,
                        first_row=read.rows.start,
                        rows=len(read.rows),
                        holder=read.holder,
                    )
                    for read in class_reads
                ]
            )
            for class_reads in step.reads
        ],
    )


def step_from_pb(message: pb.Step) -> ShardStep:
    """The shard's step. Its rows are numbered from 0: the message does not say which rows of the whole step
    they are. Raises InvalidRequest if the micro-batches do not contain every row."""
    ends = list(accumulate(message.micro_batch_rows, initial=0))
    if ends[-1] != len(message.positions):
        raise InvalidRequest(f"micro-batches of {ends[-1]} rows in a step of {len(message.positions)}")
    return ShardStep(
        step=message.step,
        rows=tuple(range(len(message.positions))),
        positions=tuple(message.positions),
        group0=message.group0,
        group1=message.group1,
        reads=tuple(
            tuple(
                Read(
                    SpanId(read.span_id),
                    read.origin,
                    read.first,
                    read.last,
                    read.group0,
                    read.group1,
                    range(read.first_row, read.first_row + read.rows),
                    SequenceId(read.holder),
                )
                for read in class_reads.reads
            )
            for class_reads in message.reads
        ),
        micro_batches=tuple(range(first, last) for first, last in pairwise(ends)),
    )
