"""A gateway in this process, over real gRPC on loopback, with an engine that the test controls.

Loaded by the fixture ``harness`` of ``tests/conftest.py``. Servers run on one event loop in a thread; tests
are plain functions with blocking clients. All tests of a session share one loop, because grpc.aio logs errors
if several loops of a process use it.
"""

import asyncio
import contextlib
import dataclasses
import queue
import subprocess
import sys
import threading
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.benchmarks.gateway.scripted import CallEnds, ScriptedService
from farshore.gateway.api.server import create
from farshore.gateway.limits import Limits
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Listing, WorkerRecord
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc, cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from farshore.proto import inference_pb2 as api

WAIT_S = 30
ENGINE_SERVICE = "farshore.cluster.v1.Engine"


class LoopThread:
    """An event loop in a thread. ``run`` blocks for a coroutine's result."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def stop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


class Sequence:
    """The engine's side of one sequence: sends the events that the test gives."""

    def __init__(self, request, loop):
        self.request = request
        self._loop = loop
        self.script = asyncio.Queue()  # events, or an exception to raise
        self.ended = threading.Event()  # set when the request has ended, for any reason

    def _put(self, item):
        self._loop.call_soon_threadsafe(self.script.put_nowait, item)

    def tokens(self, *ids, choice=0):
        for token_id in ids:
            self.token(token_id=token_id, choice=choice)

    def token(self, **fields):
        self._put(cluster_pb2.SequenceEvent(token=cluster_pb2.SampledToken(**fields)))

    def prefill(self, done, total):
        progress = api.PrefillProgress(done_tokens=done, total_tokens=total)
        self._put(cluster_pb2.SequenceEvent(prefill=progress))

    def prompt_logprobs(self, first, *tokens):
        scored = api.PromptLogprobs(first=first, tokens=[api.PromptToken(**token) for token in tokens])
        self._put(cluster_pb2.SequenceEvent(prompt_logprobs=scored))

    def finish(self, reason=api.FINISH_REASON_STOP, queued_ms=1.5, choice=0):
        shards = [api.ShardUse(worker_id="attention-0", process_id=7, attended_bytes=4096)]
        done = cluster_pb2.SequenceFinished(
            reason=reason, queued_ms=queued_ms, shards=shards, choice=choice, cached_tokens=2
        )
        self._put(cluster_pb2.SequenceEvent(finished=done))

    def fail(self, code, message, kind="TransportError", **trailing):
        """``kind``: the type of the engine's error; None: the call fails, with all its requests."""
        if kind is None:
            self._put(CallEnds(code, message))
        else:
            self._put(failed(code, message, kind, **trailing))

    def close(self):
        """Ends the call, with all its requests, without Finished."""
        self._put(CallEnds(grpc.StatusCode.OK, ""))


def failed(code, message, kind="TransportError", **trailing):
    """The event of a request that fails with an error of the type ``kind``."""
    trailing = {rpc.ERROR_KIND: kind} | trailing
    return cluster_pb2.SequenceEvent(
        failed=cluster_pb2.SequenceFailed(code=code.value[0], message=message, trailing=trailing)
    )


class FakeEngine(ScriptedService, admin_pb2_grpc.AdminServiceServicer):
    """An engine and a controller. ``auto``: token ids with which each choice is answered at once; None: the
    test answers."""

    def __init__(self, loop):
        self._loop = loop
        self._arrived = queue.Queue()
        self.arrived = 0  # sequences that came
        self.live = {}
        self.auto = None
        self.confirms = asyncio.Event()  # a new sequence waits for it
        self.confirms.set()
        self.refuses = None  # for each new sequence: the arguments of ``failed``, or CallEnds
        self.ignores_cancel = False
        self.calls = 0  # of gateways
        self.cancelled = []  # (sequence id, choice or None)
        self.status = admin.ClusterStatusResponse(model="smollm2", dtype="bfloat16")
        self.operations = []  # the requests of operators, other than for status and events

    def next_sequence(self):
        """Blocks until a sequence arrives; each is returned once."""
        return self._arrived.get(timeout=WAIT_S)

    @property
    def idle(self):
        """Whether no sequence has arrived that next_sequence() has not returned."""
        return self._arrived.empty()

    async def Run(self, messages, context):
        self.calls += 1
        await super().Run(messages, context)

    async def answer(self, request, send):
        if isinstance(self.refuses, CallEnds):
            raise self.refuses
        if self.refuses is not None:
            send(failed(*self.refuses))
            return
        sequence = Sequence(request, self._loop)
        try:
            await self.confirms.wait()
            send(cluster_pb2.SequenceEvent(taken=True))
            self.live[request.sequence_id] = sequence
            self._arrived.put(sequence)
            self.arrived += 1
            if self.auto is not None:
                for choice in range(request.sampling.n):
                    sequence.tokens(*self.auto, choice=choice)
                    sequence.finish(choice=choice)
            live = request.sampling.n
            while live:
                item = await sequence.script.get()
                if isinstance(item, CallEnds):
                    raise item
                send(item)
                live -= request.sampling.n if item.HasField("failed") else item.HasField("finished")
        finally:
            self.live.pop(request.sequence_id, None)
            sequence.ended.set()

    def cancel(self, request, choice):
        self.cancelled.append((request.sequence_id, choice))
        sequence = self.live.get(request.sequence_id)
        if sequence is None:
            return
        if self.ignores_cancel:
            sequence.ended.set()  # As far as the gateway goes.
            return
        for ended in range(request.sampling.n) if choice is None else [choice]:
            sequence.finish(api.FINISH_REASON_CANCELLED, choice=ended)

    async def ClusterStatus(self, request, context):
        if isinstance(self.status, tuple):
            await context.abort(*self.status)
        return self.status

    async def Scale(self, request, context):
        self.operations.append(request)
        return admin.ScaleResponse(dense_workers=request.dense_workers, attention_workers=3)

    async def Drain(self, request, context):
        self.operations.append(request)
        return admin.DrainResponse(worker_id=f"{request.worker_id}-a")

    async def Down(self, request, context):
        self.operations.append(request)
        return admin.DownResponse()

    async def WatchEvents(self, request, context):
        for number in range(request.since + 1, 5):
            await context.write(admin.ClusterEvent(number=number, kind="started", subject=f"dense-{number}"))
        if request.follow:
            await asyncio.Event().wait()


def dense(name, address, **fields):
    """The record of a dense worker that serves, unless ``fields`` say otherwise."""
    fields = dict(kind="dense", slot=name, host="127.0.0.1", process_id=1, state="serving") | fields
    return WorkerRecord(worker=WorkerId(name), address=address, **fields)


class ListedEngines:
    """A directory with the list that the test gives."""

    def __init__(self, *records):
        self.reads = 0
        self.list(*records)

    def list(self, *records, closed=(), settled=True):
        self._answer = Listing(workers=records, closed=frozenset(closed), settled=settled)

    def fail(self, error):
        self._answer = error

    def listing(self):
        self.reads += 1
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def disconnect(self):
        pass


class EngineProcess:
    """A running engine_process.py."""

    def __init__(self, port):
        script = Path(__file__).with_name("engine_process.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.process.stdout.readline())
        self.address = f"127.0.0.1:{self.port}"

    def tell(self, word):
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self):
        self.process.kill()
        self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()


@dataclasses.dataclass
class Harness:
    """A gateway, its engine and a stub of the client API."""

    loop_thread: LoopThread
    engine: FakeEngine
    gateway: object
    directory: ListedEngines
    engine_address: str
    channel: grpc.Channel
    stub: inference_pb2_grpc.InferenceServiceStub
    operators: admin_pb2_grpc.AdminServiceStub
    stop_engine: object

    @property
    def address(self):
        return self.gateway.address

    def generate(self, text="Hello", **fields):
        sampling = api.Sampling(**fields.pop("sampling", {}))
        prompt = {} if text is None else {"text": text}
        request = api.GenerateRequest(**prompt, sampling=sampling, **fields)
        return self.stub.Generate(request, timeout=WAIT_S)


class Health(health.aio.HealthServicer):
    """A health service. ``answer``: an optional coroutine function that replaces Check."""

    answer = None

    async def Check(self, request, context):
        if self.answer is not None:
            return await self.answer(request, context)
        return await super().Check(request, context)


@contextlib.contextmanager
def engine(loop_thread):
    """Yields a FakeEngine that serves at its ``address`` until its ``stop()``."""

    async def start():
        fake = FakeEngine(loop_thread.loop)
        server = grpc.aio.server(options=rpc.OPTIONS)
        cluster_pb2_grpc.add_EngineServicer_to_server(fake, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(fake, server)
        fake.health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(fake.health, server)
        await fake.health.set(ENGINE_SERVICE, health_pb2.HealthCheckResponse.SERVING)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        fake.stop = lambda: loop_thread.run(server.stop(None))
        await server.start()
        return fake

    fake = loop_thread.run(start())
    try:
        yield fake
    finally:
        fake.stop()


@contextlib.contextmanager
def gateway(
    loop_thread, served, *, limits=None, controller=None, engine_address=None, directory=None, **options
):
    """Yields a Harness. ``engine_address``: use the engine at this address instead of the FakeEngine.
    ``directory``: instead of one that lists that engine. A gateway of the FakeEngine has found it: on a busy
    machine that may take more than its first probe."""

    with engine(loop_thread) as fake:
        address = engine_address or fake.address
        listed = directory or ListedEngines(dense("dense-0-a", address))
        created = loop_thread.run(
            create(
                served,
                listen="127.0.0.1:0",
                directory=listed,
                controller=controller or fake.address,
                limits=limits or Limits(drain_s=0.1),
                **options,
            )
        )
        channel = grpc.insecure_channel(created.address, options=rpc.OPTIONS)
        try:
            if engine_address is None and directory is None:
                loop_thread.run(created.await_serving())
            yield Harness(
                loop_thread=loop_thread,
                engine=fake,
                gateway=created,
                directory=listed,
                engine_address=address,
                channel=channel,
                stub=inference_pb2_grpc.InferenceServiceStub(channel),
                operators=admin_pb2_grpc.AdminServiceStub(channel),
                stop_engine=fake.stop,
            )
        finally:
            channel.close()
            loop_thread.run(created.stop())


def text_of(events, choice=0):
    """The text of one choice, joined from a stream's events as a client does."""
    tokens = [event.token for event in events if event.HasField("token")]
    return "".join(token.text for token in tokens if token.choice == choice) + "".join(
        event.finished.choices[choice].text for event in events if event.HasField("finished")
    )


def indices_of(events):
    return [event.token.index for event in events if event.HasField("token")]


def failure_of(call):
    """The error with which a stream ends. Drops the events before it."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call succeeded")
