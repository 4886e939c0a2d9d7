"""Turns the token ids of one completion into text, and ends it at a stop string.

Created by ``answer`` for each choice. Must not know where tokens come from or where the text goes.
"""

from farshore.gateway.requests.stop_strings import StopStrings
from farshore.gateway.requests.validate import Job
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.proto import inference_pb2 as api


class Completion:
    """Grows by ``push`` until it has a ``reason``. Use it on the event loop only."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._silent_ids = frozenset(job.stop_token_ids)
        self._text = tokenizer.stream(job.prompt_end)
        self._shown = tokenizer.token_text if job.shows_special_tokens else None
        self._is_silent = tokenizer.is_silent
        self._stops = StopStrings(job.stop, included=job.includes_stop)
        self._tokens = 0
        self._rest = ""
        self.reason: api.FinishReason | None = None

    def push(self, token_id: int) -> str:
        """Adds a token. Returns the text that is now final: text that may become a stop string is held back.
        A stop string ends the completion."""
        self._tokens += 1
        # A stop token's text is not part of the answer, even if the token is not a special one.
        text = "" if token_id in self._silent_ids else self._stops.push(self._own_text(token_id))
        if self._stops.found:
            self.reason = api.FINISH_REASON_STOP
        return text

    def _own_text(self, token_id: int) -> str:
        text = self._text.push(token_id)
        if self._shown is not None and self._is_silent(token_id):
            text += self._shown(token_id)
        return text

    def end(self, reason: api.FinishReason) -> None:
        """Ends the completion with the engine's ``reason``, unless a stop string ended it before."""
        if self.reason is not None:
            return
        text = self._stops.push(self._text.finish())
        self._rest = text + self._stops.finish()
        # The last bytes, decoded as replacement characters, may have completed a stop string.
        self.reason = api.FINISH_REASON_STOP if self._stops.found else reason

    def summary(self) -> api.Completion:
        """For the Finished event. ``text``: the text that came after the last token's."""
        return api.Completion(reason=self.reason, tokens=self._tokens, text=self._rest)
