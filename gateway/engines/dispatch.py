"""Runs requests on engines: chooses one, and another if that one does not take the request.

Called by ``requests.log``. Must not know how an engine is found or watched.
"""

from farshore.errors import TransportError
from farshore.gateway.engines.engine_client import EngineClient, NotTaken
from farshore.gateway.engines.known import KnownEngine
from farshore.gateway.engines.router import Router
from farshore.gateway.limits import Limits
from farshore.gateway.requests.answer import Answer
from farshore.gateway.requests.request import Failure, Request
from farshore.gateway.requests.validate import Job
from farshore.ids import FIRST_EPOCH
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import inference_pb2 as api


class Dispatcher:
    """Implements :class:`~farshore.gateway.requests.log.Runner`. Use it on the event loop only."""

    def __init__(self, router: Router[KnownEngine], *, tokenizer: Tokenizer, limits: Limits) -> None:
        self._router = router
        self._tokenizer = tokenizer
        self._limits = limits
        self._engines: dict[str, EngineClient] = {}  # by sequence

    async def pump(self, request: Request, job: Job) -> None:
        """Runs ``job`` and adds its events to ``request``, which has ended when this returns, unless it
        raises. Raises TransportError if no engine takes requests."""
        answer = Answer(request, job, self._tokenizer)
        message, epoch = job.message, FIRST_EPOCH
        tried: set[str] = set()
        refused: Failure | None = None
        while not request.ended:
            if request.cancelling:
                answer.end(api.FINISH_REASON_CANCELLED)
                return
            try:
                engine = self._router.choose(job, tried)
            except TransportError as error:
                request.fail(refused or Failure.of(error))
                return
            self._engines[request.sequence_id] = engine.client
            try:
                with engine.count():
                    await engine.client.run(request, message, answer)
            except NotTaken as refusal:
                tried.add(engine.worker)
                refused = refusal.failure
                if len(tried) >= self._limits.engines_tried:
                    request.fail(refused)
                elif not refusal.certain:
                    epoch += 1
                    message = _in_epoch(job.message, epoch)
            finally:
                del self._engines[request.sequence_id]

    def cancel(self, sequence_id: str) -> None:
        """Asks the engine that runs a sequence to end it. A request that no engine has yet ends by itself:
        its ``cancelling`` is set."""
        engine = self._engines.get(sequence_id)
        if engine is not None:
            engine.cancel(sequence_id)


def _in_epoch(message: bytes, epoch: int) -> bytes:
    """The serialised SequenceRequest with another epoch: of a scalar field that occurs twice, protobuf takes
    the last."""
    return message + cluster.SequenceRequest(epoch=epoch).SerializeToString()
