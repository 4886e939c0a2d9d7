"""An answer as it comes in, and the request that goes on with it after a loss: the only user of the
protocol's resumption.

Used by ``course``. A gateway keeps the answers of its requests: the same gateway continues one from the
number of tokens that its log has sent (``resume_from``). Every other gateway, and one that was started
again, gets the whole request: the answer is generated anew from the same seed, and what was received is
dropped from it. Must not know gateways or connections."""

import itertools
from typing import Any

from farshore.client import events
from farshore.client.sdk import replies
from farshore.client.sdk.gateways import Gateway
from farshore.errors import TransportError
from farshore.proto import inference_pb2 as api


class Answering:
    """A Feed of ``course``: the events of one request, each once, whichever gateways send them."""

    def __init__(self, request: api.GenerateRequest, *, owned: bool) -> None:
        """``owned``: nothing but this stream knows the request's id."""
        self.request_id = request.request_id
        self.owned = owned
        self.accepted: events.Accepted | None = None
        self.finished: events.Finished | None = None
        self._request = request
        self._choices: list[list[events.Token]] = [[] for _ in range(request.sampling.n or 1)]
        self._position = request.resume_from
        """Tokens that the log of the request has sent, and those that the caller had before."""
        self._anew = False
        self._scored = 0
        """Tokens of the prompt whose log-probabilities were received."""

    @property
    def repeatable(self) -> bool:
        """Whether any gateway can generate the answer from its first token."""
        return self._request.WhichOneof("prompt") is not None and not self._request.resume_from

    @property
    def tokens(self) -> int:
        """Tokens received, of all choices."""
        return sum(map(len, self._choices))

    def answer(self) -> events.Answer:
        """The whole answer. Raises TransportError unless the stream is finished."""
        if self.accepted is None or self.finished is None:
            raise TransportError("the answer was closed, or broke off, before it was finished")
        choices = tuple(
            events.Choice(
                text="".join(token.text for token in tokens) + end.text,
                tokens=tuple(tokens),
                reason=end.reason,
            )
            for tokens, end in itertools.zip_longest(self._choices, self.finished.choices, fillvalue=[])
        )
        return events.Answer(request_id=self.accepted.request_id, choices=choices, finished=self.finished)

    def call(self, gateway: Gateway, *, anew: bool, timeout_s: float | None) -> Any:
        """Starts the call that goes on with the answer. ``anew``: at a gateway whose log can't."""
        self._anew = anew
        request = api.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume_from = 0 if anew else self._position
        return gateway.inference.Generate(request, timeout=timeout_s)

    def take(self, message: api.GenerateEvent) -> events.Event | None:
        """The event; None if it was received before. Raises TransportError if the answer is not the one that
        was begun."""
        if self._anew:
            self._position, self._anew = 0, False
        event = replies.event(message)
        if isinstance(event, events.Token):
            self._position += 1
            return event if self._is_next(event) else None
        if isinstance(event, events.Prefill):
            return None if self.tokens else event
        if isinstance(event, events.PromptLogprobs):
            if event.first < self._scored:
                return None
            self._scored = event.first + len(event.tokens)
            return event
        if isinstance(event, events.Accepted):
            if self.accepted is not None:
                return None
            self.accepted = event
        else:
            if not self._request.resume_from and event.completion_tokens != self.tokens:
                raise self._differs()
            self.finished = event
        return event

    def _is_next(self, token: events.Token) -> bool:
        """Whether the token is new; keeps it then. A reader that resumed has not all the tokens of a
        choice."""
        while token.choice >= len(self._choices):  # the number of choices of a resumed request is not known
            self._choices.append([])
        received = self._choices[token.choice]
        first = 0 if self.repeatable else received[0].index if received else token.index
        at = token.index - first
        if at == len(received):
            received.append(token)
            return True
        if not 0 <= at < len(received) or received[at].token_id != token.token_id:
            raise self._differs()
        return False

    def _differs(self) -> TransportError:
        return TransportError(
            f"the answer can't go on after {self.tokens} tokens: its gateway or engine was lost, and another "
            "one generated other tokens, as rounding may cause; send the request again"
        )
