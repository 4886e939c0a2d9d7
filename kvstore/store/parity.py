"""XOR parity: any one of k sealed spans can be rebuilt, bit for bit, from the others and one more span.

The k spans lie on k workers, their parity on yet another; it costs 1/k of their memory. What is sealed never
changes, so parity is never updated. It is itself a span of the store, granted, accounted, exported and
dropped like any other, which nobody can read as tokens; it says what it covers, so that whoever finds it
knows what it is for. Spans of one layout only, of any format; a shorter one counts as zeros beyond its end.

Whole spans never come together: pieces of them do, one of each at a time, out of a store here or out of
verified chunks from elsewhere. Whoever decides what is covered by what calls this. It must not know where
spans lie.
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
from farshore.kvstore.base import Covered, Digest, SpanKey
from farshore.kvstore.store.blocks import native_for
from farshore.kvstore.store.images import cut, fields, part_layout
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.transfer import Header, Piece, matching


class Member(NamedTuple):
    """A span's sealed tokens ``[0, n)``, to be covered."""

    pieces: Iterable[Piece]
    digest: Digest
    """Of these tokens, as their own store knows it: parity of damaged bytes would rebuild the damage."""


def encode(
    store: LocalStore, members: Mapping[SpanId, Member], *, sequence: SequenceId, epoch: Epoch
) -> SpanId:
    """The parity of the members: a new span in ``store``, held by ``sequence``.

    Raises Full, and InvalidRequest for fewer than two members or different layouts. Whatever is raised, also
    by the pieces, nothing is kept.
    """
    if len(members) < 2:
        raise InvalidRequest(f"the parity of {len(members)} spans: give 2 or more")
    opened = {span: _opened(member.pieces) for span, member in members.items()}
    one = next(iter(opened.values()))[0]
    for span, (header, _) in opened.items():
        if header.layout != one.layout:
            raise InvalidRequest(f"{span} is stored as {header.layout}, not as {one.layout}: give equal ones")
    covers = tuple(
        Covered(span=span, key=header.key, tokens=header.tokens, digest=members[span].digest)
        for span, (header, _) in opened.items()
    )
    key = SpanKey(
        sequence=sequence, layer_class=one.key.layer_class, first=0, group0=0, group1=one.layout.groups
    )
    tokens = max(header.tokens for header, _ in opened.values())
    parity = Header(key=key, layout=one.layout, tokens=tokens, parity=True)
    pieces = _xor([pieces for _, pieces in opened.values()], parity)
    return store.import_pieces(pieces, sequence=sequence, epoch=epoch, covers=covers)


def rebuild(
    store: LocalStore,
    lost: SpanId,
    covers: Sequence[Covered],
    *,
    parity: Iterable[Piece],
    survivors: Mapping[SpanId, Iterable[Piece]],
    sequence: SequenceId,
    epoch: Epoch,
) -> SpanId:
    """A new span in ``store``, held by ``sequence``, with what ``covers`` says of ``lost``.

    ``parity``: all of it; ``survivors``: of every other covered span exactly the tokens that are covered,
    from 0 on; else InvalidRequest. Raises Full, and Corrupt where the result does not have the digest of what
    was lost. Whatever is raised, also by the pieces, nothing is kept.
    """
    wanted = {it.span: it for it in covers}
    if lost not in wanted or survivors.keys() != wanted.keys() - {lost}:
        raise InvalidRequest(
            f"to rebuild {lost} out of {sorted(survivors)}: covered are {sorted(wanted)}; give all others"
        )
    opened = {span: _opened(pieces) for span, pieces in survivors.items()}
    for span, (header, _) in opened.items():
        if header.tokens != wanted[span].tokens:
            raise InvalidRequest(
                f"{header.tokens} tokens of {span}: the parity is of its first {wanted[span].tokens}"
            )
    header, pieces = _opened(parity)
    streams = [pieces, *(pieces for _, pieces in opened.values())]
    of = wanted[lost]
    rebuilt = matching(
        _xor(streams, replace(header, key=of.key, tokens=of.tokens, parity=False)),
        of.digest,
        f"{lost}, rebuilt out of parity and {', '.join(sorted(survivors))},",
    )
    return store.import_pieces(rebuilt, sequence=sequence, epoch=epoch)


def _opened(pieces: Iterable[Piece]) -> tuple[Header, Iterator[Piece]]:
    """What the pieces are of, and all of them."""
    pieces = iter(pieces)
    first = next(pieces)
    return first.header, chain((first,), pieces)


def _xor(streams: Sequence[Iterator[Piece]], header: Header) -> Iterator[Piece]:
    """The XOR of all streams, as far as ``header`` says; a stream that has ended counts as zeros."""
    room = torch.empty(0, dtype=torch.uint8)
    for part in cut(header.layout, header.tokens):
        shape = part_layout(header.layout, part)
        if room.numel() < shape.block_bytes:
            room = torch.empty(shape.block_bytes, dtype=torch.uint8)
        total = room[: shape.block_bytes]
        pieces = [piece for piece in (next(stream, None) for stream in streams) if piece is not None]
        _sum([piece.image.cpu() for piece in pieces if piece.part == part], total)
        for piece in pieces:
            if piece.part != part:
                _add(total, shape, piece)
        yield Piece(header, part, total)


def _sum(images: list[Tensor], total: Tensor) -> None:
    """In this thread: PyTorch would wake its others for it, and wait for them."""
    native = native_for(total)
    if native is not None:
        native.xor(total.data_ptr(), [image.data_ptr() for image in images], total.numel())
        return
    total.zero_()
    for image in images:
        total ^= image


def _add(total: Tensor, shape: KVLayout, piece: Piece) -> None:
    """Adds the tokens that both have, where not both have as many."""
    theirs = part_layout(piece.header.layout, piece.part)
    tokens = min(theirs.block_tokens, shape.block_tokens)
    for mine, other in zip(fields(total, shape), fields(piece.image.cpu(), theirs), strict=True):
        mine[:, :, :tokens] ^= other[:, :, :tokens]
