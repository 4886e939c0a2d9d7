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

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import Covered, SpanKey
from farshore.kvstore.blocks import native_for
from farshore.kvstore.images import Part, cut, fields, part_layout
from farshore.kvstore.store import LocalStore
from farshore.kvstore.transfer import Digested, Header, Piece, matching


def encode(
    store: LocalStore, members: Mapping[SpanId, Iterable[Piece]], *, sequence: SequenceId, epoch: Epoch
) -> SpanId:
    """The parity of the tokens that ``members``' pieces are of, each from its span's token 0 on: a new span
    in ``store``, held by ``sequence``.

    Raises Full, and InvalidRequest for fewer than two members or different layouts. Whatever is raised, also
    by the pieces, nothing is kept.
    """
    if len(members) < 2:
        raise InvalidRequest(f"the parity of {len(members)} spans: give 2 or more")
    streams = [Digested(pieces) for pieces in members.values()]
    opened = [_opened(stream) for stream in streams]
    headers = [header for header, _ in opened]
    layout = headers[0].layout
    for span, header in zip(members, headers, strict=True):
        if header.layout != layout:
            raise InvalidRequest(f"{span} is stored as {header.layout}, others as {layout}: give equal ones")
    key = SpanKey(
        sequence=sequence, layer_class=headers[0].key.layer_class, first=0, group0=0, group1=layout.groups
    )
    tokens = max(header.tokens for header in headers)

    def covers() -> tuple[Covered, ...]:
        return tuple(
            Covered(span=span, key=header.key, tokens=header.tokens, digest=stream.digest)
            for span, header, stream in zip(members, headers, streams, strict=True)
        )

    header = Header(key=key, layout=layout, tokens=tokens, parity=True, part=Part(0, 0, 0, 0))
    pieces = _xor([pieces for _, pieces in opened], header)
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
        # In this thread, as the XOR itself: PyTorch would wake its others for it, and wait for them.
        total.numpy().fill(0)
        for stream in streams:
            piece = next(stream, None)
            if piece is not None:
                _fold(total, shape, piece)
        yield Piece(replace(header, part=part), total)


def _fold(total: Tensor, shape: KVLayout, piece: Piece) -> None:
    """XORs the tokens that both have into ``total``."""
    theirs, image = part_layout(piece.header.layout, piece.header.part), piece.image.cpu()
    if theirs != shape:
        tokens = min(theirs.block_tokens, shape.block_tokens)
        for mine, other in zip(fields(total, shape), fields(image, theirs), strict=True):
            mine[:, :, :tokens] ^= other[:, :, :tokens]
        return
    native = native_for(total)
    if native is None:
        total ^= image
    else:
        native.xor(total.data_ptr(), image.data_ptr(), shape.block_bytes)
