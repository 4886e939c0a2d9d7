"""Sends a sealed span to another shard, piece by piece.

Called by ``shard.bulk_loop``, and by ``shard.service`` if the other shard has no native connection. The other
end is ``shard.imports``. It must not know why a span is copied.

The pieces of whole blocks are views of the blocks, not copies. The span is pinned while its pieces are sent,
so that it may be dropped meanwhile.
"""

from collections.abc import Iterator

from torch import Tensor

from farshore.attention_offload import codec
from farshore.errors import InvalidRequest
from farshore.ids import SequenceId, SpanId
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.transfer import to_chunk
from farshore.proto import attention_pb2 as pb

MESSAGE_BYTES = 256 << 10
"""The KV in one gRPC message. Handling a message holds the interpreter's lock, and hot frames wait."""


def pieces(store: LocalStore, request: pb.ExportRequest) -> Iterator[tuple[pb.ExportPiece, Tensor]]:
    """All sealed tokens of the requested span: pieces without payloads, and the payloads, ``u8[bytes]``. A
    payload is valid until the next piece is taken.

    Raises NotFound unless the request's sequence holds the span, and InvalidRequest if fewer tokens than the
    request asks for are sealed."""
    span, holder = SpanId(request.span_id), SequenceId(request.sequence_id)
    key = store.look_up(span, holder=holder).key
    tokens, named = store.sealed(span, holder=holder)
    if not 0 < request.tokens <= tokens:
        raise InvalidRequest(f"an export of {request.tokens} tokens of {span}, of which {tokens} are sealed")
    digest = store.digest(span, tokens)
    for image in store.chunk_images(span, 0, tokens):
        chunk = to_chunk(image)
        piece = pb.ExportPiece(
            header=chunk.header, checksum=chunk.checksum, payload_bytes=image.image.nbytes, digest=digest
        )
        digest = ""
        if image.chunk.layer0 == 0:
            piece.blocks.extend(
                codec.block_to_pb(block)
                for block in named
                if image.chunk.first <= block.first - key.first < image.chunk.last
            )
        yield piece, image.image


def messages(store: LocalStore, request: pb.ExportRequest) -> Iterator[pb.ExportPiece]:
    """The pieces of an export as gRPC carries them. Raises as :func:`pieces`."""
    for piece, payload in pieces(store, request):
        piece.payload = codec.to_bytes(payload[:MESSAGE_BYTES])
        yield piece
        for first in range(MESSAGE_BYTES, payload.nbytes, MESSAGE_BYTES):
            yield pb.ExportPiece(payload=codec.to_bytes(payload[first : first + MESSAGE_BYTES]))
