"""XOR parity: any one of k sealed spans can be rebuilt, bit for bit, from the others and their parity span.

The k spans lie on k workers and their parity on another one, where it costs 1/k of their memory. Sealed KV
never changes, so parity is never updated. The parity is itself a span, which is granted, accounted, exported
and dropped like any other, but cannot be read as tokens. It records the spans that it covers. All spans of a
group have one layout, of any format; a shorter span counts as zeros beyond its end.

No more than one chunk image of each span is in memory at a time. Images come from a store of this process or
from verified chunks of another one. Called by the code that decides which spans form a group. It must not
know where spans lie.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kernels.host import HOST, address
from farshore.kvstore.base import CoveredSpan, Digest, SpanKey
from farshore.kvstore.store.layout.blocks import native_for
from farshore.kvstore.store.layout.images import chunk_ranges, image_fields, image_layout
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.transfer import ChunkImage, ExportHeader, with_digest_check


class Member(NamedTuple):
    """The sealed tokens ``[0, n)`` of a span that a new parity is to cover."""

    images: Iterable[ChunkImage]
    digest: Digest
    """Digest of these tokens as their own store reports it. Without it, parity of damaged bytes would rebuild
    the damage unnoticed."""


def encode(
    store: LocalStore, members: Mapping[SpanId, Member], *, sequence: SequenceId, epoch: Epoch
) -> SpanId:
    """Creates the parity of the members: a new span in ``store``, held by ``sequence``.

    Raises Full, and InvalidRequest for fewer than two members or different layouts. After any exception, also
    one of the members' iterators, nothing is kept.
    """
    if len(members) < 2:
        raise InvalidRequest(f"the parity of {len(members)} spans: give 2 or more")
    opened = {span: _opened(member.images) for span, member in members.items()}
    first_header = next(iter(opened.values()))[0]
    layout = first_header.layout
    for span, (header, _) in opened.items():
        if header.layout != layout:
            raise InvalidRequest(f"{span} is stored as {header.layout}, not as {layout}: give equal ones")
    covers = tuple(
        CoveredSpan(span=span, key=header.key, tokens=header.tokens, digest=members[span].digest)
        for span, (header, _) in opened.items()
    )
    key = SpanKey(
        sequence=sequence, layer_class=first_header.key.layer_class, first=0, group0=0, group1=layout.groups
    )
    tokens = max(header.tokens for header, _ in opened.values())
    parity_header = ExportHeader(key=key, layout=layout, tokens=tokens, parity=True)
    parity_images = _xor([images for _, images in opened.values()], parity_header)
    return store.import_images(parity_images, sequence=sequence, epoch=epoch, covers=covers)


def rebuild(
    store: LocalStore,
    lost: SpanId,
    covers: Sequence[CoveredSpan],
    *,
    parity: Iterable[ChunkImage],
    survivors: Mapping[SpanId, Iterable[ChunkImage]],
    sequence: SequenceId,
    epoch: Epoch,
) -> SpanId:
    """Rebuilds ``lost`` as a new span in ``store``, held by ``sequence``, with the key and the tokens that
    its entry in ``covers`` gives.

    ``covers``: as the parity's ``SpanInfo`` gives it. ``parity``: images of the whole parity span.
    ``survivors``: images of every other covered span, of exactly its covered tokens ``[0, n)``; otherwise
    InvalidRequest. Raises Full, and Corrupt if the result does not have the digest of the lost tokens. After
    any exception, also one of the iterators, nothing is kept.
    """
    covered = {entry.span: entry for entry in covers}
    if lost not in covered or survivors.keys() != covered.keys() - {lost}:
        raise InvalidRequest(
            f"to rebuild {lost} out of {sorted(survivors)}: covered are {sorted(covered)}; give all others"
        )
    opened = {span: _opened(images) for span, images in survivors.items()}
    for span, (header, _) in opened.items():
        if header.tokens != covered[span].tokens:
            raise InvalidRequest(
                f"{header.tokens} tokens of {span}: the parity is of its first {covered[span].tokens}"
            )
    parity_header, parity_images = _opened(parity)
    sources = [parity_images, *(images for _, images in opened.values())]
    target = covered[lost]
    rebuilt = with_digest_check(
        _xor(sources, replace(parity_header, key=target.key, tokens=target.tokens, parity=False)),
        target.digest,
        f"{lost}, rebuilt out of parity and {', '.join(sorted(survivors))},",
    )
    return store.import_images(rebuilt, sequence=sequence, epoch=epoch)


def _opened(images: Iterable[ChunkImage]) -> tuple[ExportHeader, Iterator[ChunkImage]]:
    """(header of the export, an iterator over all of its images)."""
    images = iter(images)
    first = next(images)
    return first.header, chain((first,), images)


def _xor(sources: Sequence[Iterator[ChunkImage]], header: ExportHeader) -> Iterator[ChunkImage]:
    """XORs all sources over the range of ``header``. A source that has ended counts as zeros."""
    buffer = torch.empty(0, dtype=torch.uint8, device=HOST)
    for chunk in chunk_ranges(header.layout, header.tokens):
        shape = image_layout(header.layout, chunk)
        if buffer.numel() < shape.block_bytes:
            buffer = torch.empty(shape.block_bytes, dtype=torch.uint8, device=HOST)
        total = buffer[: shape.block_bytes]
        images = [image for image in (next(source, None) for source in sources) if image is not None]
        _xor_equal([image.image.cpu() for image in images if image.chunk == chunk], total)
        for image in images:
            if image.chunk != chunk:
                _xor_overlap(total, shape, image)
        yield ChunkImage(header, chunk, total)


def _xor_equal(images: list[Tensor], total: Tensor) -> None:
    """Sets ``total`` to the XOR of images of its own shape. Stays in this thread: PyTorch would wake its
    other threads and wait for them."""
    native = native_for(total)
    if native is not None:
        native.xor(address(total), [address(image) for image in images], total.numel())
        return
    total.zero_()
    for image in images:
        total ^= image


def _xor_overlap(total: Tensor, shape: KVLayout, other: ChunkImage) -> None:
    """XORs the tokens that ``total`` and an image with more or fewer tokens have in common into ``total``."""
    other_shape = image_layout(other.header.layout, other.chunk)
    tokens = min(other_shape.block_tokens, shape.block_tokens)
    other_fields = image_fields(other.image.cpu(), other_shape)
    for field, other_field in zip(image_fields(total, shape), other_fields, strict=True):
        field[:, :, :tokens] ^= other_field[:, :, :tokens]
