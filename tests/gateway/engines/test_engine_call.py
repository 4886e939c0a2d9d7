"""The call that all requests to one engine share: what breaks with it, and what it keeps."""

import asyncio
import contextlib

import grpc
import pytest

from farshore import rpc
from farshore.benchmarks.gateway.scripted import CallEnds
from farshore.gateway.engines.engine_call import EVENTS_AT_ONCE, EngineCall
from farshore.gateway.limits import Limits
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import inference_pb2 as api

from ...waiting import until


def test_requests_share_a_call_and_each_has_its_own_tokens(farshore, harness):
    calls = [farshore.generate(request_id=str(number)) for number in range(20)]
    sequences = [farshore.engine.next_sequence() for _ in calls]
    by_id = {sequence.request.sequence_id: number for number, sequence in enumerate(sequences)}
    for step in range(3):
        for number, sequence in enumerate(sequences):
            sequence.tokens(100 * step + number)
    for sequence in sequences:
        sequence.finish()
    found = [[event.token.token_id for event in call if event.HasField("token")] for call in calls]
    assert sorted(found) == [[number, 100 + number, 200 + number] for number in range(len(by_id))]
    assert farshore.engine.calls == 1


@pytest.mark.parametrize(
    "ends",
    [
        CallEnds(grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        CallEnds(grpc.StatusCode.INTERNAL, rpc.FROM_CORE),
    ],
)
def test_a_call_that_breaks_fails_its_requests_and_the_next_one_opens_another(start, harness, ends):
    farshore = start(limits=Limits(probe_s=0.05, missed_probes=1000, drain_s=0.1))
    calls = [farshore.generate(request_id=str(number)) for number in range(3)]
    sequences = [farshore.engine.next_sequence() for _ in calls]
    sequences[0]._put(ends)
    for call in calls:
        failure = harness.failure_of(call)
        assert failure.code() == grpc.StatusCode.UNAVAILABLE
        assert f"was lost ({ends.details}): send the request again" in failure.details()
    assert all(sequence.ended.wait(30) for sequence in sequences)
    until(lambda: farshore.gateway.engines.problem is None, "the engine is not found again")
    farshore.engine.auto = (10,)
    assert len(list(farshore.generate())) == 3
    assert farshore.engine.calls == 2


def test_an_engine_with_as_many_calls_as_it_serves_runs_nothing(start, harness, loop_thread):
    """So the next engine gets the first epoch."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(harness.engine(loop_thread)) for _ in range(2)]
        engines[0].refuses = CallEnds(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
        engines[1].auto = ()
        records = [harness.dense(f"dense-{number}-a", it.address) for number, it in enumerate(engines)]
        farshore = start(directory=harness.ListedEngines(*records))
        until(lambda: len(farshore.gateway.engines.available()) == 2)
        for _ in range(4):
            assert len(list(farshore.generate())) == 2
            assert engines[1].next_sequence().request.epoch == 1
        assert engines[0].calls


class Call:
    """gRPC's end of a call. It writes when ``reads`` is set, and gives the messages of ``incoming``."""

    def __init__(self):
        self.reads = asyncio.Event()
        self.written = []
        self.incoming = asyncio.Queue()

    async def write(self, message):
        await self.reads.wait()
        self.written.append((message.number, message.WhichOneof("kind")))

    async def read(self):
        return await self.incoming.get()

    async def code(self):
        return grpc.StatusCode.OK

    async def details(self):
        return ""

    def cancel(self):
        pass


def test_what_an_engine_has_not_read_is_kept_for_live_requests_only():
    async def run():
        made = Call()
        call = EngineCall(made, take=lambda events: None, over=lambda *_: None)
        for number in range(1, 5):
            call.submit(number, b"x" * 100)
        await asyncio.sleep(0)  # The first one is being written.
        call.cancel(3)
        for number in (1, 2, 3):
            call.drop(number)
        made.reads.set()
        while len(made.written) < 3:
            await asyncio.sleep(0)
        call.hang_up()
        return made.written

    assert asyncio.run(run()) == [(1, "submit"), (4, "submit"), (1, "cancel")]


def test_a_message_that_cannot_be_sent_ends_the_call(caplog):
    class Broken(Call):
        async def write(self, message):
            raise KeyError("dreaming")

        def cancel(self):
            self.incoming.put_nowait(grpc.aio.EOF)

    async def run():
        over = asyncio.Event()
        call = EngineCall(Broken(), take=lambda events: None, over=lambda call, code, details: over.set())
        call.submit(1, b"x")
        await asyncio.wait_for(over.wait(), 60)

    asyncio.run(run())
    assert [entry.message for entry in caplog.records] == ["a message to an engine can't be sent"]


def test_readers_run_between_the_events_of_a_large_message():
    async def run():
        made, seen, over = Call(), [], asyncio.Event()
        call = EngineCall(
            made, take=lambda events: seen.append(len(events)), over=lambda call, code, details: over.set()
        )

        async def reader():
            while not seen:
                await asyncio.sleep(0)
            seen.append("a reader")

        reading = asyncio.create_task(reader())
        token = cluster.SequenceEvent(number=1, token=cluster.SampledToken(token_id=5))
        await made.incoming.put(cluster.EngineMessage(events=[token] * (2 * EVENTS_AT_ONCE + 1)))
        await made.incoming.put(grpc.aio.EOF)
        await over.wait()
        await reading
        call.hang_up()
        return seen

    seen = asyncio.run(run())
    assert [it for it in seen if it != "a reader"] == [EVENTS_AT_ONCE, EVENTS_AT_ONCE, 1]
    assert seen.index("a reader") < len(seen) - 1


def test_events_of_a_request_that_is_over_are_ignored(start):
    """The engine may have sent them before it read the cancellation."""
    farshore = start(limits=Limits(cancel_s=0.1, drain_s=0.1))
    farshore.engine.ignores_cancel = True
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    next(call)
    farshore.stub.Cancel(api.CancelRequest(request_id="a"), timeout=30)
    sequence.tokens(10, 11)
    sequence.finish()
    assert [event.WhichOneof("kind") for event in call] == ["finished"]
    assert sequence.ended.wait(30)
    farshore.engine.auto = (12,)
    assert [event.token.token_id for event in farshore.generate() if event.HasField("token")] == [12]
    assert farshore.engine.calls == 1
