"""Runs the requests of a batch at the same time, and collects their whole answers.

Called by ``service``. A request that fails gives its status and leaves the others alone. Must not know how a
request is run.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from farshore.gateway.api import errors
from farshore.gateway.requests import received
from farshore.gateway.requests.intake import Intake
from farshore.gateway.requests.request import Request
from farshore.proto import inference_pb2 as api


async def answered(raw: bytes, intake: Intake, *, arrived_s: float) -> api.BatchGenerateResponse:
    """The results of a serialised BatchGenerateRequest, one for each request, in order. The requests end if
    this is cancelled. Raises InvalidRequest for what is no batch, and Overloaded if this gateway takes no
    call now."""
    raws = received.split_batch(raw, intake.limits)
    results = [api.BatchResult() for _ in raws]
    with contextlib.ExitStack() as held:
        held.enter_context(intake.log.call(len(raw)))
        async with asyncio.TaskGroup() as running:
            left = intake.limits.batch_values
            for one, result in zip(raws, results, strict=True):
                with _failing_into(result, intake):
                    request = intake.take(one, arrived_s=arrived_s, most_values=left).request
                    # Held from here: a task that is cancelled before its first step never runs.
                    held.enter_context(intake.log.reading(request))
                    left -= request.values
                    running.create_task(_complete(request, intake, result))
    return api.BatchGenerateResponse(results=results)


async def _complete(request: Request, intake: Intake, result: api.BatchResult) -> None:
    """Sets ``result`` once the request has ended."""
    texts: list[list[str]] = [[] for _ in range(request.choices)]
    answer = api.Answer(choices=[api.AnsweredChoice() for _ in texts])
    with _failing_into(result, intake):
        async with contextlib.aclosing(request.follow()) as events:
            async for raw in events:
                event = api.GenerateEvent.FromString(raw)
                if event.HasField("token"):
                    token = event.token
                    texts[token.choice].append(token.text)
                    choice = answer.choices[token.choice]
                    choice.token_ids.append(token.token_id)
                    if token.HasField("logprob"):
                        choice.tokens.append(token)
                elif event.HasField("finished"):
                    _finish(answer, event.finished, texts)
        result.answer.CopyFrom(answer)


def _finish(answer: api.Answer, finished: api.Finished, texts: list[list[str]]) -> None:
    answer.usage.CopyFrom(finished.usage)
    answer.timings.CopyFrom(finished.timings)
    answer.shards.extend(finished.shards)
    for choice, pieces, end in zip(answer.choices, texts, finished.choices, strict=True):
        choice.text = "".join(pieces) + end.text
        choice.reason = end.reason


@contextlib.contextmanager
def _failing_into(result: api.BatchResult, intake: Intake) -> Iterator[None]:
    """Notes an exception as the result's error."""
    try:
        yield
    except Exception as error:
        status = errors.status_of(errors.failure_of(error), retry_after_ms=intake.limits.retry_after_ms)
        result.error.MergeFromString(status.SerializeToString())
