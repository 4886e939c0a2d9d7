"""Log-probabilities in the shapes of the HTTP API: OpenAI's of a chat, OpenAI's of a completion, vLLM's of a
prompt.

Called by ``answers``. Must not know how answers are sent.
"""

from collections.abc import Callable, Iterable
from typing import Any

from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.proto import inference_pb2 as api

NameOf = Callable[[int], str]
"""The name of a token in an answer."""


def name_of(tokenizer: Tokenizer, *, as_ids: bool) -> NameOf:
    """Names tokens by their texts, or with ``as_ids`` as vLLM's ``return_tokens_as_token_ids`` does, since
    several tokens may have one text."""
    return (lambda token_id: f"token_id:{token_id}") if as_ids else tokenizer.token_text


def chat_entry(token: api.Token, tokenizer: Tokenizer, name: NameOf) -> dict[str, Any]:
    """One entry of ``logprobs.content``."""

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": name(token_id), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token_id))}

    return {
        **named(token.token_id, token.logprob),
        "top_logprobs": [named(other.token_id, other.logprob) for other in token.top],
    }


def no_values() -> dict[str, list[Any]]:
    """The ``logprobs`` of a completion without tokens; :func:`extend` adds some."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def extend(values: dict[str, list[Any]], more: dict[str, list[Any]]) -> None:
    for name, added in more.items():
        values[name] += added


def completion_values(
    token: api.Token | api.PromptToken, name: NameOf, *, offset: int, most: int
) -> dict[str, list[Any]]:
    """The ``logprobs`` of one token. ``offset``: characters before it. ``most``: alternatives to show. The
    first token of a prompt has none."""
    known = token.HasField("logprob")
    top = {name(other.token_id): other.logprob for other in token.top[:most]}
    return {
        "tokens": [name(token.token_id)],
        "token_logprobs": [token.logprob if known else None],
        "top_logprobs": [top if known else None],
        "text_offset": [offset],
    }


def prompt_entries(tokens: Iterable[api.PromptToken]) -> list[dict[str, Any] | None]:
    """Entries of vLLM's ``prompt_logprobs``: by token id the alternatives and the prompt's own token, the
    latter last unless it is one of them; None for the first token."""
    entries: list[dict[str, Any] | None] = []
    for token in tokens:
        if not token.HasField("logprob"):
            entries.append(None)
            continue
        entry = {
            str(other.token_id): {"logprob": other.logprob, "rank": rank, "decoded_token": other.text}
            for rank, other in enumerate(token.top, 1)
        }
        own = {"logprob": token.logprob, "rank": token.rank, "decoded_token": token.text}
        entries.append({**entry, str(token.token_id): own})
    return entries
