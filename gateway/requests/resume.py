"""Where a reader of a request goes on: behind a number of tokens, or behind the tokens that it has.

Made by ``intake`` from a call, used by ``request`` for each reader. Tokens can be compared with an answer
that is computed again, so a client may go on at a gateway that does not know its request. Must not know about
calls.
"""

from collections.abc import Sequence

from farshore.errors import InvalidRequest, ResumeMismatch
from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api


class Received:
    """The tokens that one reader has, by choice. It is compared with the answer's tokens as these come."""

    def __init__(self, choices: Sequence[Sequence[int]] = ()) -> None:
        self._choices = choices
        self._compared = [0] * len(choices)
        self.left = sum(map(len, choices))
        """Tokens that the reader has and that the answer has not shown yet."""

    def has(self, token: api.Token) -> bool:
        """Whether the reader has the answer's next token of its choice. Raises ResumeMismatch if it has
        another one in its place."""
        if token.choice >= len(self._choices) or token.index >= len(self._choices[token.choice]):
            return False
        got = self._choices[token.choice][token.index]
        if got != token.token_id:
            raise ResumeMismatch(
                f"token {token.index} of choice {token.choice} is {token.token_id} and the received one is "
                f"{got}: the answer cannot go on from there; leave resume out for another answer",
                field="resume.received",
            )
        self._compared[token.choice] = token.index + 1
        self.left -= 1
        return True

    def check_end(self) -> None:
        """The answer has ended. Raises ResumeMismatch if the reader has more tokens."""
        if not self.left:
            return
        choice, compared = next(
            (choice, compared)
            for choice, compared in enumerate(self._compared)
            if compared < len(self._choices[choice])
        )
        raise ResumeMismatch(
            f"choice {choice} ended with {compared} tokens and {len(self._choices[choice])} were received: "
            "these are tokens of another answer",
            field="resume.received",
        )


def check(request: api.GenerateRequest, limits: Limits, *, positions: int) -> None:
    """Raises InvalidRequest if what a call wants to go on from is contradictory or more than an answer can
    have. ``positions``: the model's."""
    if request.resume_from and not request.request_id:
        raise InvalidRequest(
            "resume_from needs the request_id of the request to go on with", field="resume_from"
        )
    if not request.HasField("resume"):
        return
    if request.resume_from:
        raise InvalidRequest("resume and resume_from were given: leave out one of them", field="resume_from")
    choices = request.resume.received
    if len(choices) > limits.choices:
        raise InvalidRequest(
            f"received has {len(choices)} choices: a request has at most {limits.choices}",
            field="resume.received",
        )
    longest = max((len(choice.ids) for choice in choices), default=0)
    if longest > positions:
        raise InvalidRequest(
            f"a received choice has {longest} tokens and the model {positions} positions",
            field="resume.received",
        )


def check_repeatable(request: api.GenerateRequest) -> None:
    """The request starts here. Raises InvalidRequest if tokens of it were received, and there is no seed with
    which they would be drawn again."""
    sampling = request.sampling
    draws = sampling.HasField("temperature") and sampling.temperature > 0
    if draws and not sampling.HasField("seed") and any(choice.ids for choice in request.resume.received):
        raise InvalidRequest(
            "this gateway does not know the request, and would draw other tokens: give resume.seed, which "
            "the event Accepted had",
            field="resume.seed",
        )
