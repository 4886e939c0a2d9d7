"""The engine's gRPC service: the requests of a gateway share a call, and each has its own events and end."""

import queue

import grpc
import pytest

from farshore import rpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import inference_pb2 as api
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine_service import EngineService

from ..waiting import until
from .hold.endless import ENDLESS
from .hold.paused import pause_next, unhurried


class Context:
    """A call; ``end`` tells the service that it has ended."""

    def add_callback(self, callback):
        self.end = callback
        return True

    def cancel(self):
        raise AssertionError("the service breaks the call off")


@pytest.fixture
def served(rig):
    """served(cluster) -> (a service over a new engine of the cluster, the engine). Stopped after the test."""
    services = []

    def serve(cluster):
        engine = cluster.start()
        service = EngineService(
            worker="engine",
            engine=engine,
            store=cluster.stores["engine"],
            shards={worker: client.identify() for worker, client in cluster.clients.items()},
            grammars=GrammarCompiler(lambda: None, vocab=100, eos_ids=()),
        )
        services.append(service)
        return service, engine

    yield serve
    for service in services:
        service.stop()


def asked(name, prompt, *, number=1, salt="", **sampling):
    request = pb.SequenceRequest(
        sequence_id=name, epoch=1, prompt=prompt, sampling=api.Sampling(**sampling), cache_salt=salt
    )
    return pb.GatewayMessage(number=number, submit=request.SerializeToString())


def cancelled(number, choice=None):
    return pb.GatewayMessage(number=number, cancel=pb.CancelSequence(choice=choice))


def events_of(service, *messages):
    """The events of a call in which the gateway says this and no more."""
    for message in service.Run(iter(messages), Context()):
        yield from message.events


def by_number(events):
    """The kinds of each request's events, without those of prefill."""
    found = {}
    for event in events:
        if event.WhichOneof("kind") != "prefill":
            found.setdefault(event.number, []).append(event)
    return found


class Saying:
    """What a gateway says: these messages, and what the test adds, until it ends."""

    def __init__(self, *messages):
        self._messages = queue.SimpleQueue()
        for message in messages:
            self.say(message)

    def say(self, message):
        self._messages.put(message)

    def end(self):
        self._messages.put(None)

    def __iter__(self):
        return iter(self._messages.get, None)


PROMPT = [i % 90 for i in range(700)]


def test_log_probabilities_of_the_prompt_are_sent_in_pieces(tiny_model, rig, served):
    service, _ = served(rig(tiny_model, memory_bytes=64 << 20))
    prompt = [i % 90 for i in range(600)]
    scored = [
        event.prompt_logprobs
        for event in events_of(service, asked("a", prompt, max_tokens=1, prompt_logprobs=2))
        if event.HasField("prompt_logprobs")
    ]
    assert [part.first for part in scored] == [0, 256, 512]
    tokens = [token for part in scored for token in part.tokens]
    assert [token.token_id for token in tokens] == prompt
    assert not tokens[0].HasField("logprob") and tokens[0].rank == 0 and not tokens[0].top
    for token in tokens[1:]:
        assert token.logprob < 0 and token.rank >= 1 and len(token.top) == 2


def test_a_request_with_another_salt_finds_no_stored_prefix(tiny_model, rig, served):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    service, _ = served(cluster)
    new = []
    for name, salt in (("a", ""), ("b", "mine"), ("c", ""), ("d", "mine"), ("e", "another's")):
        before = written(cluster)
        events = list(events_of(service, asked(name, PROMPT, max_tokens=2, temperature=0, salt=salt)))
        assert any(event.taken for event in events)
        assert events[-1].HasField("finished")
        cluster.settle()
        new.append(written(cluster) - before)
    assert new == [700, 700, 0, 0, 700]


def written(cluster):
    """Returns the sealed tokens in all stores; full blocks stay cached after their sequences end."""
    return sum(info.sealed_tokens for store in cluster.stores.values() for info in store.announce())


def test_the_status_shows_the_spans_that_a_sequence_reads_whichever_sequence_wrote_them(
    tiny_model, rig, served
):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    service, engine = served(cluster)
    unhurried(engine)  # The first sequence hands nothing off before the second one's first token.
    first_token, streams = pause_next(engine, 1), [begun(service, "a")]
    with first_token:
        first_token = pause_next(engine, 1)
        streams.append(begun(service, "b"))
    with first_token:
        (first, second) = service.Status(pb.EngineStatusRequest(), None).sequences
        assert written(cluster) == 700 + 700 % 256, "b shares no full blocks of a"
        for name in "ab":
            engine.cancel(name)
    assert all(list(stream)[-1].HasField("finished") for stream in streams)
    token_bytes = cluster.attention.layouts[0].token_bytes
    for sequence in (first, second):
        spans = sorted(sequence.spans, key=lambda span: span.first)
        assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]
        assert spans[-1].last == sequence.tail_first >= 512
        assert {span.worker_id for span in spans} <= set(cluster.targets)
        assert sum(span.bytes for span in spans) == sequence.tail_first * token_bytes


def begun(service, name):
    """The events of an endless request that the engine has taken."""
    events = events_of(service, asked(name, PROMPT, max_tokens=ENDLESS.max_tokens, temperature=0))
    assert next(event for event in events if event.taken)
    return events


def test_requests_of_one_call_have_their_own_events_and_fail_alone(tiny_model, rig, served):
    service, _ = served(rig(tiny_model, memory_bytes=64 << 20))
    found = by_number(
        events_of(
            service,
            asked("a", [1, 2, 3], number=1, max_tokens=5, temperature=0),
            asked("b", [1, 2, 3], number=7, max_tokens=0),
            asked("c", [1, 2, 3], number=3, max_tokens=4, temperature=0, n=2),
            pb.GatewayMessage(number=4, submit=b"\xff"),
        )
    )
    for number, most, choices in ((1, 5, 1), (3, 4, 2)):
        kinds = [event.WhichOneof("kind") for event in found[number]]
        assert kinds.count("token") == most * choices and kinds.count("finished") == choices
        assert kinds[-1] == "finished" and kinds.count("taken") == 1
    (failed,) = (event.failed for event in found[7])
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] and "max_tokens 0" in failed.message
    assert dict(failed.trailing) == {rpc.ERROR_KIND: "InvalidRequest"}
    (failed,) = (event.failed for event in found[4])
    assert failed.code == grpc.StatusCode.INTERNAL.value[0]


def test_a_cancel_right_behind_its_request_ends_it(tiny_model, rig, served):
    service, _ = served(rig(tiny_model, memory_bytes=64 << 20))
    reason = api.FINISH_REASON_CANCELLED
    found = by_number(
        events_of(
            service,
            asked("a", PROMPT, number=1, max_tokens=ENDLESS.max_tokens),
            cancelled(1),
            asked("b", PROMPT, number=2, max_tokens=ENDLESS.max_tokens, temperature=1, n=2),
            cancelled(2),
            cancelled(9),
        )
    )
    for number, choices in ((1, 1), (2, 2)):
        ends = [event.finished for event in found[number] if event.HasField("finished")]
        assert [end.reason for end in ends] == [reason] * choices
    assert found.keys() == {1, 2}


def test_one_choice_is_cancelled_and_the_others_go_on(tiny_model, rig, served):
    service, _ = served(rig(tiny_model, memory_bytes=64 << 20))
    said = Saying(asked("a", [1, 2, 3], max_tokens=ENDLESS.max_tokens, temperature=1, n=2))
    call = service.Run(said, Context())
    events = (event for message in call for event in message.events)
    assert next(event for event in events if event.HasField("token"))
    for choice in (1, 0):
        said.say(cancelled(1, choice=choice))
        end = next(event.finished for event in events if event.HasField("finished"))
        assert (end.choice, end.reason) == (choice, api.FINISH_REASON_CANCELLED)
        if choice == 1:
            assert next(event for event in events if event.HasField("token")).token.choice == 0
    said.end()
    assert not [event for event in events if not event.HasField("token")]


@pytest.mark.parametrize("how", ["disconnected", "stopped"])
def test_what_a_gateway_runs_ends_with_its_call(tiny_model, rig, served, how):
    """Another gateway's requests go on, unless the engine stops."""
    service, engine = served(rig(tiny_model, memory_bytes=64 << 20))
    contexts = [Context(), Context()]
    calls = [
        service.Run(Saying(asked(name, [1, 2, 3], max_tokens=ENDLESS.max_tokens, temperature=0)), context)
        for name, context in zip("ab", contexts, strict=True)
    ]
    streams = [(event for message in call for event in message.events) for call in calls]
    for stream in streams:
        assert next(event for event in stream if event.HasField("token"))
    if how == "disconnected":
        contexts[0].end()
        list(streams[0])
        assert next(event for event in streams[1] if event.HasField("token"))
        until(lambda: engine.load().running == 1, "the sequence goes on")
        contexts[1].end()
    else:
        engine.stop(reason="it is night")
        service.stop()
        for stream in streams:
            last = list(stream)[-1].failed
            assert last.code == grpc.StatusCode.UNAVAILABLE.value[0] and "it is night" in last.message
        assert not list(events_of(service, asked("c", [1, 2, 3], max_tokens=1)))
    until(lambda: not engine.load().running, "a sequence goes on")
