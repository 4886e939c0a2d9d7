"""A request's name is its principal and its id; ids stay out of errors, the log and status."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from farshore.errors import AlreadyExists, NotFound
from farshore.gateway.limits import Limits
from farshore.gateway.requests.log import RequestLog
from farshore.gateway.requests.request import RequestKey
from farshore.gateway.requests.validate import Job
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api

SECRET = "hard-to-guess"


class Waiting:
    """A runner whose requests end when they are cancelled."""

    def __init__(self):
        self.ends = {}

    async def pump(self, request, job):
        await self.ends.setdefault(request.sequence_id, asyncio.Event()).wait()
        request.finish([api.Completion(reason=api.FINISH_REASON_CANCELLED)])

    def cancel(self, sequence_id):
        self.ends.setdefault(sequence_id, asyncio.Event()).set()


def _job(sequence_id):
    return Job(
        prompt_tokens=1,
        prompt_end=(),
        prompt_end_text="",
        shows_special_tokens=False,
        includes_stop=False,
        n=1,
        stop=(),
        stop_token_ids=(),
        seed=1,
        message=b"",
    )


def test_the_same_id_of_two_principals_names_two_requests():
    async def both():
        with ThreadPoolExecutor(1) as threads:
            log = RequestLog(Waiting(), Limits(), preparing=threads, engine_problem=lambda: None)
            ours, theirs = RequestKey("one", "a"), RequestKey("other", "a")
            started = {}
            for key, fingerprint in ((ours, b"1"), (theirs, b"2")):
                assert log.find_same(key, fingerprint, 0) is None
                started[key] = log.start(
                    key, _job, fingerprint=fingerprint, choices=1, values=1, arrived_s=0.0
                )
            assert started[ours].sequence_id != started[theirs].sequence_id
            assert log.find_same(ours, b"1", 0) is started[ours]
            with pytest.raises(AlreadyExists):
                log.find_same(ours, b"2", 0)
            await log.cancel(ours)
            assert started[ours].ended and not started[theirs].ended
            with pytest.raises(NotFound):
                log.find_same(RequestKey("a third", "a"), None, 0)
            await log.close()

    asyncio.run(both())


def test_ids_are_not_in_errors_logs_and_status(farshore, harness, caplog):
    with caplog.at_level(logging.DEBUG):
        call = farshore.generate(request_id=SECRET)
        farshore.engine.next_sequence()
        next(call)
        refused = [
            farshore.generate("Another", request_id=SECRET),
            farshore.generate(request_id=SECRET, resume_from=7),
            farshore.generate(request_id=SECRET, resume=api.Resume(), resume_from=7),
            farshore.generate(None, request_id=f"{SECRET}-unknown"),
            farshore.generate(request_id=SECRET, sampling=dict(top_p=3.0)),
        ]
        texts = []
        for stream in refused:
            failure = harness.failure_of(stream)
            texts += [failure.details(), repr(failure.trailing_metadata())]
        with pytest.raises(grpc.RpcError) as unknown:
            farshore.stub.Cancel(api.CancelRequest(request_id=f"{SECRET}-unknown"), timeout=30)
        texts.append(unknown.value.details())
        status = farshore.operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=30)
        farshore.stub.Cancel(api.CancelRequest(request_id=SECRET), timeout=30)
    assert not any(SECRET in text for text in texts)
    assert SECRET not in str(status) and SECRET not in caplog.text
