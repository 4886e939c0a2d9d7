"""What an engine takes on: its limits, what it refuses at once, and why.

Called by ``engine`` from its callers' threads. It must not know how sequences run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from farshore.defaults import MAX_DECODE_STALL_MS, SHARD_GRACE_S
from farshore.errors import Full, InvalidRequest
from farshore.models.config import ModelConfig
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.sequence import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    segment_tokens: int = 2048
    """Prompt tokens that go through the layers together: a multiple of 256. More pull less of the past, and
    take more memory."""
    max_decode_stall_ms: float = MAX_DECODE_STALL_MS
    """From one token to the next of a running sequence, while prompts are prefilled beside it."""
    speculate_tokens: int = 0
    """Tokens guessed ahead by prompt lookup and verified in one step; 0: none."""
    running: int = 64
    """Completions under way at a time."""
    waiting: int = 256
    shard_grace_s: float = SHARD_GRACE_S
    """How long a shard may answer nothing before the sequences whose KV lies there fail."""


def check_size(prompt_tokens: int, sampling: Sampling, *, config: ModelConfig, cache: SequenceCache) -> None:
    """InvalidRequest for what can never run here, whatever the prompt's tokens are."""
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


def check_tokens(prompt: Sequence[int], *, config: ModelConfig) -> None:
    """InvalidRequest for token ids outside of the vocabulary."""
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < config.vocab:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {config.vocab}")
