"""Checks every number that an engine sends before the shard takes memory or calls a kernel.

Called by ``shard.service`` and ``shard.session``. It must not know transports: the messages that reach it are
well-formed, but their values may be anything. A value that makes no sense raises InvalidRequest, which names
the value. Products are checked here, where Python's integers do not wrap; native code receives only values
that fit into 32 bits.

The limits exceed the needs of any model or step of today. Together they limit what one connection can make a
shard allocate outside its arena.
"""

import math
from collections.abc import Sequence

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.errors import InvalidRequest
from farshore.ids import SpanId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kvstore.base import SpanKey, SpanShape
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.layout import forms

MOST_CLASSES = 64
MOST_ROWS = 4096
MOST_MICRO_BATCHES = 256
"""A frame's header has 8 bits for a micro-batch's number."""

MOST_READS = 1 << 17
MOST_POSITIONS = 2**31
"""Kernels count positions in 32 bits."""

MOST_STEP_BYTES = 256 << 20
"""The limit for q, o and lse of all rows of a step, in one layer of each class, at 8 bytes per element."""

MOST_SCRATCH_BYTES = 256 << 20
"""The limit for the states that a kernel plan merges: one per head of each distinct (rows, groups) range."""

MOST_WORK_ITEMS = 1 << 21
"""The limit for a kernel plan's work list: the sum of rows times head groups over all reads."""

MOST_ID_CHARS = 256
"""The longest sequence id or incarnation."""

HASH_BYTES = 32
MOST_BLOCKS = 1 << 14
MOST_BLOCK_TOKENS = 4096
MOST_SPANS = 1 << 16
"""The most spans that one call may name. The store's lock is held while they are processed."""

MOST_WANTED = 1 << 20
"""The most sequences and spans in an engine's complete list, for the same reason."""


def check_id(what: str, text: str) -> str:
    """Returns ``text`` unchanged; raises InvalidRequest unless it has 1 to MOST_ID_CHARS characters.

    ``what`` names the id in the error, such as "a sequence id"."""
    if not 1 <= len(text) <= MOST_ID_CHARS:
        raise InvalidRequest(f"{what} of {len(text)} characters: give 1 to {MOST_ID_CHARS}")
    return text


def check_key(key: SpanKey) -> SpanKey:
    """Returns ``key`` unchanged; raises InvalidRequest for a bad sequence id or layer class. The store checks
    the rest."""
    check_id("a sequence id", key.sequence)
    if not 0 <= key.layer_class < MOST_CLASSES:
        raise InvalidRequest(f"layer class {key.layer_class}: give 0 to {MOST_CLASSES - 1}")
    return key


def check_spans(spans: Sequence[SpanId]) -> Sequence[SpanId]:
    """Returns ``spans`` unchanged; raises InvalidRequest if there are more than MOST_SPANS."""
    if len(spans) > MOST_SPANS:
        raise InvalidRequest(f"a call that names {len(spans)} spans: {MOST_SPANS} at most")
    return spans


def check_hashes(hashes: Sequence[bytes]) -> Sequence[bytes]:
    """Returns ``hashes`` unchanged; raises InvalidRequest for too many, or for one of another length."""
    if len(hashes) > MOST_BLOCKS:
        raise InvalidRequest(f"a call that names {len(hashes)} blocks: {MOST_BLOCKS} at most")
    for name in hashes:
        if len(name) != HASH_BYTES:
            raise InvalidRequest(f"a hash of {len(name)} bytes: give {HASH_BYTES}")
    return hashes


def check_blocks(blocks: Sequence[PrefixBlock]) -> Sequence[PrefixBlock]:
    """Returns ``blocks`` unchanged; raises InvalidRequest for too many, or for one whose tokens, positions or
    hash are out of range."""
    if len(blocks) > MOST_BLOCKS:
        raise InvalidRequest(f"a call that names {len(blocks)} blocks: {MOST_BLOCKS} at most")
    for block in blocks:
        fits = 1 <= len(block.tokens) <= MOST_BLOCK_TOKENS and block.last <= MOST_POSITIONS
        if len(block.hash) != HASH_BYTES or not fits:
            raise InvalidRequest(
                f"a named block of {len(block.tokens)} tokens at {block.first}, hash of {len(block.hash)}"
                f" bytes: give 1 to {MOST_BLOCK_TOKENS} below {MOST_POSITIONS}, and a hash of {HASH_BYTES}"
            )
    return blocks


def check_model(model: AttentionModel, dtype: torch.dtype) -> None:
    """Checks the contents of an Open message: the shapes and the KV layout of each layer class, the class of
    each layer, and ``dtype``, the type of q and o. Raises InvalidRequest."""
    classes = len(model.specs)
    if not 1 <= classes <= MOST_CLASSES or len(model.layouts) != classes:
        raise InvalidRequest(
            f"{classes} specs and {len(model.layouts)} layouts: give one of each for 1 to"
            f" {MOST_CLASSES} classes"
        )
    if not 1 <= len(model.layer_class) <= forms.MOST_LAYERS:
        raise InvalidRequest(f"a model of {len(model.layer_class)} layers: give 1 to {forms.MOST_LAYERS}")
    if wrong := [index for index in model.layer_class if not 0 <= index < classes]:
        raise InvalidRequest(f"a layer of class {wrong[0]} in a model of {classes} classes")
    for layer_class, (spec, layout) in enumerate(zip(model.specs, model.layouts, strict=True)):
        _check_spec(spec)
        forms.check_layout(layout)
        _check_agreement(spec, layout, layers=model.layer_class.count(layer_class))
        if dtype == torch.float64 and layout.format.dtype != torch.float64:
            raise InvalidRequest(f"queries in float64 on KV in {layout.format.value}: give KV in float64")


def _check_spec(spec: AttentionSpec) -> None:
    heads = (spec.q_heads, spec.k_heads, spec.v_heads)
    if not all(1 <= count <= forms.MOST_HEADS for count in heads):
        raise InvalidRequest(f"{heads} heads of Q, K and V: give 1 to {forms.MOST_HEADS} of each")
    if not all(1 <= dim <= forms.MOST_DIM for dim in (spec.k_dim, spec.v_dim)):
        raise InvalidRequest(f"K of {spec.k_dim} dims, V of {spec.v_dim}: give 1 to {forms.MOST_DIM}")
    if spec.q_heads % spec.k_heads or spec.q_heads % spec.v_heads:
        raise InvalidRequest(f"{heads} heads of Q, K and V: Q's must be a multiple of K's and of V's")
    for name, value in (("scale", spec.scale), ("soft cap", spec.soft_cap)):
        if value is not None and not _is_positive_float32(value):
            raise InvalidRequest(f"a {name} of {value}: give a float32 above 0")
    if spec.window_tokens is not None and not 1 <= spec.window_tokens < MOST_POSITIONS:
        raise InvalidRequest(
            f"a window of {spec.window_tokens} tokens: give 1 to {MOST_POSITIONS - 1}, or none"
        )


def _is_positive_float32(value: float) -> bool:
    limits = torch.finfo(torch.float32)
    return math.isfinite(value) and limits.tiny <= value <= limits.max


def _check_agreement(spec: AttentionSpec, layout: KVLayout, *, layers: int) -> None:
    try:
        expected = KVLayout.of(spec, layers=layers, format=layout.format)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    if layout != expected._replace(block_tokens=layout.block_tokens):
        raise InvalidRequest(f"{layout} is not how {layers} layers of {spec} are stored")


def check_step(step: ShardStep, model: AttentionModel) -> None:
    """Checks the rows, head groups, positions and sizes of a step, and that its reads refer to them.

    Raises InvalidRequest. :func:`check_read` checks each read against its span."""
    if not 1 <= len(step.rows) <= MOST_ROWS or len(step.micro_batches) > MOST_MICRO_BATCHES:
        raise InvalidRequest(
            f"a step of {len(step.rows)} rows in {len(step.micro_batches)} micro-batches: give 1 to"
            f" {MOST_ROWS} rows, in {MOST_MICRO_BATCHES} at most"
        )
    if wrong := [position for position in step.positions if not 0 <= position < MOST_POSITIONS]:
        raise InvalidRequest(f"a row at position {wrong[0]}: give 0 to {MOST_POSITIONS - 1}")
    if len(step.reads) != len(model.specs):
        raise InvalidRequest(f"reads of {len(step.reads)} layer classes for a model of {len(model.specs)}")
    if (count := sum(map(len, step.reads))) > MOST_READS:
        raise InvalidRequest(f"a step of {count} reads: give {MOST_READS} at most")
    for spec, reads in zip(model.specs, step.reads, strict=True):
        if not 0 <= step.group0 < step.group1 <= spec.groups:
            raise InvalidRequest(f"head groups {step.group0} to {step.group1} of a model of {spec.groups}")
        for read in reads:
            _check_ranges(step, read)
    _check_sizes(step, model)


def _check_ranges(step: ShardStep, read: Read) -> None:
    rows = read.rows
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= len(step.rows):
        raise InvalidRequest(f"a read of rows {rows} in a step of {len(step.rows)}")
    if not step.group0 <= read.group0 < read.group1 <= step.group1:
        raise InvalidRequest(
            f"a read of head groups {read.group0} to {read.group1}, in a step of {step.group0} to"
            f" {step.group1}"
        )
    if not 0 <= read.origin <= read.first < read.last <= MOST_POSITIONS:
        raise InvalidRequest(
            f"a read of positions {read.first} to {read.last} in a span that begins at {read.origin}"
        )


def _check_sizes(step: ShardStep, model: AttentionModel) -> None:
    groups = step.group1 - step.group0
    step_bytes = scratch_bytes = work_items = 0
    for spec, reads in zip(model.specs, step.reads, strict=True):
        per_group = spec.q_heads_per_group
        step_bytes += 8 * len(step.rows) * groups * per_group * (spec.k_dim + spec.v_dim + 1)
        state_bytes = 4 * per_group * (spec.v_dim + 1)
        ranges = {(read.rows.start, read.rows.stop, read.group0, read.group1) for read in reads}
        scratch_bytes += sum((r1 - r0) * (g1 - g0) for r0, r1, g0, g1 in ranges) * state_bytes
        work_items += sum(len(read.rows) * (read.group1 - read.group0) for read in reads)
    for what, size, most in (
        ("q and states of {} bytes a layer", step_bytes, MOST_STEP_BYTES),
        ("{} bytes of states to merge", scratch_bytes, MOST_SCRATCH_BYTES),
        ("{} rows to attend, each group and read by itself", work_items, MOST_WORK_ITEMS),
    ):
        if size > most:
            raise InvalidRequest(f"a step of {what.format(size)}: {most} at most; give fewer rows")


def check_read(read: Read, stored: SpanShape, layer_class: int, layout: KVLayout) -> None:
    """Raises InvalidRequest unless ``read`` agrees with its span's layer class, layout, origin and groups.

    ``stored`` is the store's description of the span; ``layout`` is the session's layout of the layer class,
    with all groups."""
    key = stored.key
    if key.layer_class != layer_class:
        raise InvalidRequest(f"{read.span} is of layer class {key.layer_class}, the read of {layer_class}")
    if stored.layout != layout.of_groups(key.group1 - key.group0):
        raise InvalidRequest(f"{read.span} is stored as {stored.layout}, the read takes it for {layout}")
    if key.first != read.origin:
        raise InvalidRequest(f"{read.span} begins at position {key.first}, the read says {read.origin}")
    if not key.group0 <= read.group0 < read.group1 <= key.group1:
        raise InvalidRequest(
            f"{read.span} holds head groups {key.group0} to {key.group1}, the read is of {read.group0} to"
            f" {read.group1}"
        )
