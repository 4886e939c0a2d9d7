"""One of a request's completions on its way from token ids to text.

Made by ``engine`` for every choice. Must not know where tokens come from or who reads the text.
"""

from farshore.gateway.requests.stop_strings import StopStrings
from farshore.gateway.requests.validate import Job
from farshore.models.tokenizer import Tokenizer
from farshore.proto import inference_pb2 as api


class Completion:
    """Grows by ``push`` until it has a ``reason``; on the event loop only."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._silent_ids = frozenset(job.stop_token_ids)
        self._text = tokenizer.stream()
        self._stops = StopStrings(job.stop)
        self._tokens = 0
        self._rest = ""
        self.reason: api.FinishReason | None = None

    def push(self, token_id: int) -> str:
        """The text that this token makes certain. A stop string in it ends the completion."""
        self._tokens += 1
        # A stop token ends the answer and is no part of its text, even where it isn't a special one.
        text = "" if token_id in self._silent_ids else self._stops.push(self._text.push(token_id))
        if self._stops.found:
            self.reason = api.FINISH_REASON_STOP
        return text

    def end(self, reason: api.FinishReason) -> None:
        """Its engine says that it is complete; a stop string's word goes before that."""
        if self.reason is not None:
            return
        text = self._stops.push(self._text.finish())
        self._rest = text + self._stops.finish()
        # The last bytes, as replacement characters, may have completed a stop string.
        self.reason = api.FINISH_REASON_STOP if self._stops.found else reason

    def summary(self) -> api.Completion:
        return api.Completion(reason=self.reason, tokens=self._tokens, text=self._rest)
