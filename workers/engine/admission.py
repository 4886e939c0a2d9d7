"""The limits of an engine, and the checks that refuse a request before it is queued.

Called by ``engine`` from its callers' threads. It must not know how sequences run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from farshore.defaults import MAX_DECODE_STALL_MS, SHARD_GRACE_S
from farshore.errors import Full, InvalidRequest
from farshore.models.config.model import ModelConfig
from farshore.sampling import Sampling
from farshore.workers.engine.kv.cache import SequenceCache


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds on what one engine runs at a time."""

    segment_tokens: int = 2048
    """Prompt tokens in one prefill segment: a multiple of 256. A larger segment pulls less past KV from the
    shards and takes more memory."""
    max_decode_stall_ms: float = MAX_DECODE_STALL_MS
    """Longest time, in milliseconds, between two tokens of a running sequence while prompts are prefilled."""
    speculate_tokens: int = 0
    """Tokens guessed by prompt lookup and verified in one step; 0 disables guessing."""
    running: int = 64
    """Most completions that run at a time."""
    waiting: int = 256
    """Most requests that wait for their first placement; the engine refuses further ones."""
    shard_grace_s: float = SHARD_GRACE_S
    """Seconds that a shard may stay silent before the sequences whose KV it holds fail."""


def check_size(prompt_tokens: int, sampling: Sampling, *, config: ModelConfig, cache: SequenceCache) -> None:
    """Raises InvalidRequest if a request of this size can never run on this engine.

    Checks the prompt's length, ``max_tokens`` and ``n`` against the model's positions and the KV pool.
    """
    if not prompt_tokens:
        raise InvalidRequest("the prompt is empty: give at least one token")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens {sampling.max_tokens}: ask for at least 1")
    if sampling.n < 1:
        raise InvalidRequest(f"n {sampling.n}: ask for at least 1 completion")
    total = prompt_tokens + sampling.max_tokens
    if total > config.max_positions:
        raise InvalidRequest(
            f"{prompt_tokens} prompt tokens + max_tokens {sampling.max_tokens} = {total}, but the model has"
            f" {config.max_positions} positions: shorten the prompt or lower max_tokens"
        )
    try:
        cache.fits_ever(total)
    except Full as error:
        raise InvalidRequest(
            f"{prompt_tokens} prompt tokens + max_tokens {sampling.max_tokens} do not fit into the KV"
            f" pool of {error.free_bytes / 2**30:.2f} GiB: shorten the prompt, lower max_tokens, or start the"
            " cluster with more --kv-memory or --attention-workers"
        ) from error


def lowered(prompt_tokens: int, sampling: Sampling, *, cache: SequenceCache) -> Sampling:
    """The sampling with the largest ``max_tokens``, up to the given one, that fits into the empty KV pool; at
    least 1."""
    fitting, too_many = 1, sampling.max_tokens + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        try:
            cache.fits_ever(prompt_tokens + middle)
            fitting = middle
        except Full:
            too_many = middle
    return replace(sampling, max_tokens=fitting)


def check_tokens(prompt: Sequence[int], *, config: ModelConfig) -> None:
    """Raises InvalidRequest if a token id of ``prompt`` (not empty) is outside the vocabulary."""
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < config.vocab:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {config.vocab}")
