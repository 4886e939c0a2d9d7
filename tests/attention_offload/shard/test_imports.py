"""A shard copies a sealed span of another shard: once, checked, findable, and without a trace if it fails."""

import threading
from functools import partial

import pytest
import torch

from farshore import rpc
from farshore.attention_offload.shard import exports, imports
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.transport import connect as transport_connect
from farshore.errors import (
    Cancelled,
    Corrupt,
    DeadlineExceeded,
    Full,
    InvalidRequest,
    NotFound,
    Overloaded,
    TransportError,
)
from farshore.ids import SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey
from farshore.kvstore.prefix import PrefixBlock
from farshore.proto import attention_pb2 as pb

DEADLINE_S = 60.0
A, B = SequenceId("a"), SequenceId("b")
FIRST, TOKENS = 32, 45
NAMES = [PrefixBlock(bytes([n]) * 32, tuple(range(n, n + 16)), FIRST + 16 * n) for n in range(2)]


@pytest.fixture
def shards(start_shard, reach):
    """(source shard, target shard, client of the source, client of the target)"""
    source, target = start_shard(worker="source"), start_shard(worker="target")
    return source, target, reach(source.address), reach(target.address)


@pytest.fixture(params=["native", "gRPC"])
def over(request, monkeypatch):
    """The exports' way: a native connection, or gRPC."""
    if request.param == "gRPC":
        monkeypatch.setattr(transport_connect, "native", lambda: None)
        monkeypatch.setattr(exports, "MESSAGE_BYTES", 1000)


def sealed(store, work, *, format=KVFormat.FLOAT32, names=NAMES, tokens=TOKENS):
    """A span of ``a`` with random tokens, of groups 1 to 3."""
    layout = KVLayout.of(work.spec, layers=2, format=format)._replace(block_tokens=16).of_groups(2)
    key = SpanKey(sequence=A, layer_class=0, first=FIRST, group0=1, group1=3)
    span = store.create(key, capacity_tokens=tokens + 3, layout=layout, epoch=work.owner)
    random = torch.Generator().manual_seed(7)
    dtype = torch.float32 if format.quantised else format.dtype
    for layer in range(2):
        k = torch.randn(2, tokens, work.spec.k_dim, generator=random).to(dtype)
        v = torch.randn(2, tokens, work.spec.v_dim, generator=random).to(dtype)
        store.write(span, layer, 0, k, v, sequence=A, epoch=work.owner)
    store.seal(span, 32, sequence=A, epoch=work.owner, blocks=names)
    store.seal(span, tokens, sequence=A, epoch=work.owner)
    return span


def do(client, source, span, *, tokens=TOKENS, holder=A, deadline_s=DEADLINE_S):
    return client.import_span(source.address, span, tokens=tokens, holder=holder, deadline_s=deadline_s)


def check_nothing_is_left(shard):
    assert shard.store.announce() == []
    usage = shard.store.usage()
    assert usage.free_bytes == usage.budget_bytes


@pytest.mark.parametrize("format", KVFormat)
def test_a_copy_has_the_bytes_and_the_names_of_its_source(shards, work, over, format):
    source, target, _, client = shards
    span = sealed(source.store, work, format=format)
    imported = do(client, source, span)
    assert imported.tokens == TOKENS
    key, layout = source.store.look_up(span, holder=A)
    assert imported.layout == layout
    assert (imported.key.first, imported.key.group0, imported.key.group1) == (key.first, 1, 3)
    assert target.store.digest(imported.span, TOKENS) == source.store.digest(span, TOKENS)
    client.store.hold([imported.span], sequence=B, epoch=work.owner)
    for layer in range(2):
        copy = client.store.read(imported.span, layer, 3, TOKENS, sequence=B, dtype=torch.uint8)
        original = source.store.read(span, layer, 3, TOKENS, sequence=A, dtype=torch.uint8)
        assert all(torch.equal(*pair) for pair in zip(copy, original, strict=True))
    held = client.store.hold_prefix(NAMES, layer_class=0, sequence=A, epoch=work.owner)
    (found,) = held.slices
    assert (found.span, found.first, found.last) == (imported.span, FIRST, FIRST + 32)
    with pytest.raises(InvalidRequest, match="not granted"):
        client.store.seal(imported.span, TOKENS, sequence=B, epoch=work.owner)


def test_sharers_of_several_engines_get_one_copy(shards, work, reach, monkeypatch):
    source, target, source_client, _ = shards
    span = sealed(source.store, work)
    source_client.store.hold([span], sequence=B, epoch=work.owner)
    made = []
    pieces = exports.pieces
    monkeypatch.setattr(exports, "pieces", lambda *args: made.append(1) or pieces(*args))
    results = {}

    def ask(number):
        client = reach(target.address)
        results[number] = do(client, source, span, holder=(A, B)[number % 2]).span

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(results) == 6 and len(set(results.values())) == 1
    assert len(made) == 1
    assert do(reach(target.address), source, span).span == results[0]
    assert len(made) == 1


def test_more_tokens_of_a_span_that_grew_are_copied_anew(shards, work):
    source, _, _, client = shards
    span = sealed(source.store, work)
    first = do(client, source, span, tokens=16)
    assert first.tokens == TOKENS
    for layer in range(2):
        k, v = torch.ones(2, 3, work.spec.k_dim), torch.ones(2, 3, work.spec.v_dim)
        source.store.write(span, layer, TOKENS, k, v, sequence=A, epoch=work.owner)
    source.store.seal(span, TOKENS + 3, sequence=A, epoch=work.owner)
    assert do(client, source, span).span == first.span
    second = do(client, source, span, tokens=TOKENS + 3)
    assert second.span != first.span and second.tokens == TOKENS + 3


def test_a_copy_that_no_sequence_holds_is_given_up_after_a_while(work, start_shard, reach, clock):
    source = start_shard(worker="source")
    target = start_shard(worker="target", service=partial(AttentionService, clock=clock))
    client = reach(target.address)
    span = sealed(source.store, work, names=[])
    held, unheld = do(client, source, span), do(client, source, sealed(source.store, work, names=[]))
    client.store.hold([held.span], sequence=B, epoch=work.owner)
    clock.now_s += imports.KEEP_S + 1
    target.service.imports.tick()
    assert [info.span for info in target.store.announce()] == [held.span]
    assert do(client, source, span).span == held.span
    client.store.drop([held.span], sequence=B, epoch=work.owner)
    clock.now_s += imports.KEEP_S + 1
    target.service.imports.tick()
    check_nothing_is_left(target)
    assert do(client, source, span).span not in (held.span, unheld.span)


def test_a_wrong_digest_or_a_damaged_piece_is_refused_and_leaves_nothing(shards, work, over, monkeypatch):
    source, target, _, client = shards
    span = sealed(source.store, work)
    source.store.digest(span, TOKENS)
    with source.store.stored_runs(span, 1, 40, 41, sequence=A) as runs:
        address = runs[0]
    damaged = source.store.memory[address - source.store.memory.data_ptr()]
    damaged ^= 1
    with pytest.raises(Corrupt, match="digest"):
        do(client, source, span)
    damaged ^= 1
    check_nothing_is_left(target)
    pieces = exports.pieces

    def flipped(*args):
        for piece, payload in pieces(*args):
            payload = payload.clone()
            payload[5] ^= 1
            yield piece, payload

    with monkeypatch.context() as patch, pytest.raises(Corrupt, match="damaged"):
        patch.setattr(exports, "pieces", flipped)
        do(client, source, span)
    check_nothing_is_left(target)
    assert do(client, source, span).tokens == TOKENS


def test_refusals_of_either_shard_reach_the_caller_and_leave_nothing(shards, start_shard, reach, work):
    source, target, _, client = shards
    span = sealed(source.store, work)
    with pytest.raises(NotFound, match="no span"):
        do(client, source, SpanId("source/x/9"))
    with pytest.raises(NotFound, match="does not hold"):
        do(client, source, span, holder=B)
    with pytest.raises(InvalidRequest, match="are sealed"):
        do(client, source, span, tokens=TOKENS + 1)
    with pytest.raises(InvalidRequest, match="sequence id"):
        do(client, source, span, holder=SequenceId(""))
    small = start_shard(worker="small", memory_bytes=4096)
    with pytest.raises(Full):
        do(reach(small.address), source, span)
    source.stop()
    with pytest.raises(TransportError):
        do(client, source, span)
    for shard in (target, small):
        check_nothing_is_left(shard)


def test_a_source_that_stands_still_or_breaks_off_fails_the_copy(shards, work, monkeypatch, over):
    source, target, _, client = shards
    span = sealed(source.store, work)
    go_on, pieces = threading.Event(), exports.pieces

    def slow(*args):
        yield next(pieces(*args))
        go_on.wait(DEADLINE_S)
        raise TransportError("the source gave up")

    monkeypatch.setattr(exports, "pieces", slow)
    with pytest.raises((DeadlineExceeded, TransportError)):
        do(client, source, span, deadline_s=0.3)
    go_on.set()
    with pytest.raises((TransportError, Cancelled), match=r"gave up|given up"):
        do(client, source, span)
    check_nothing_is_left(target)
    monkeypatch.undo()
    assert do(client, source, span).tokens == TOKENS


def test_a_copy_ends_when_its_shard_stops(shards, work, monkeypatch):
    source, target, *_ = shards
    span = sealed(source.store, work)
    begun, go_on, pieces = threading.Event(), threading.Event(), exports.pieces

    def slow(*args):
        for piece in pieces(*args):
            yield piece
            begun.set()
            go_on.wait(DEADLINE_S)

    monkeypatch.setattr(exports, "pieces", slow)
    thread, failed = ask(target.service.imports, request_for(source, span))
    assert begun.wait(DEADLINE_S)
    target.service.imports.end_copies()
    go_on.set()
    thread.join(DEADLINE_S)
    assert failed
    check_nothing_is_left(target)


def test_calls_that_wait_for_imports_leave_room_for_beats(shards, work, monkeypatch):
    source, target, _, client = shards
    span = sealed(source.store, work)
    waits, goes_on = threading.Event(), threading.Event()
    import_span = target.service.imports.import_span

    def held(request, *, deadline_s):
        waits.set()
        assert goes_on.wait(DEADLINE_S)
        return import_span(request, deadline_s=deadline_s)

    monkeypatch.setattr(target.service.imports, "import_span", held)
    monkeypatch.setattr(target.service, "_importing", rpc.CallLimit(1, "calls wait for imports"))
    found = []
    first = threading.Thread(target=lambda: found.append(do(client, source, span)))
    first.start()
    assert waits.wait(DEADLINE_S)
    with pytest.raises(Overloaded, match="wait for imports"):
        do(client, source, span)
    assert client.beat(None).worker == "target"
    goes_on.set()
    first.join()
    assert found[0].tokens == TOKENS == do(client, source, span).tokens


def test_the_copying_thread_rests_after_each_piece(shards, work, monkeypatch):
    source, target, *_ = shards
    span = sealed(source.store, work)
    monkeypatch.setattr(imports, "SHARE_OF_CORES", 1e-12)
    rested_s = []
    copies = imports.SpanImports(target.store, wait=rested_s.append)
    copies.import_span(request_for(source, span), deadline_s=DEADLINE_S)
    sizes = [payload.nbytes for _, payload in exports.pieces(source.store, request_for(source, span).span)]
    assert len(sizes) > 1
    assert rested_s == pytest.approx([imports.MOST_REST_S * size / sum(sizes) for size in sizes])


def test_the_end_of_the_copies_ends_a_rest(shards, work, monkeypatch):
    source, target, *_ = shards
    span = sealed(source.store, work)
    monkeypatch.setattr(imports, "SHARE_OF_CORES", 1e-12)
    monkeypatch.setattr(imports, "MOST_REST_S", 1e6)
    copies = imports.SpanImports(target.store)
    begun, pieces = threading.Event(), exports.pieces

    def noted(*args):
        for piece in pieces(*args):
            begun.set()
            yield piece

    monkeypatch.setattr(exports, "pieces", noted)
    thread, failed = ask(copies, request_for(source, span))
    assert begun.wait(DEADLINE_S)
    copies.end_copies()
    thread.join(DEADLINE_S)
    assert failed
    check_nothing_is_left(target)


def request_for(source, span):
    return pb.ImportRequest(
        address=source.address, span=pb.ExportRequest(span_id=span, tokens=TOKENS, sequence_id=A)
    )


def ask(copies, request):
    """Imports in a thread. Returns the thread, and a list of the Cancelled that it may fail with."""
    failed = []

    def run():
        try:
            copies.import_span(request, deadline_s=DEADLINE_S)
        except Cancelled as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, failed
