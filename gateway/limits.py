"""Every bound and deadline of the gateway in one frozen place.

Made by ``__main__`` (the defaults) and by tests (small ones). Must not know how a bound is enforced.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_live_requests: int = 256
    """Requests being prepared or generated at once; one more is refused with a retry hint."""
    retry_after_ms: int = 1000
    default_max_tokens: int = 256
    chars_per_position: int = 256
    """Longer texts are refused before the tokenizer sees them: tokenizing takes a core for seconds."""
    request_id_chars: int = 128
    cache_salt_chars: int = 256
    tokenizer_threads: int = 2

    choices: int = 32
    """Completions of one request; each takes a place in the engine's batch."""
    logprobs: int = 20
    """Alternatives reported for each token."""
    logit_biases: int = 1024
    stops: int = 16
    stop_chars: int = 256
    stop_token_ids: int = 128

    grace_s: float = 15.0
    """How long a request with a client's own id lives on without any reader."""
    replay_s: float = 60.0
    """How long a request that has ended can be read again."""
    replay_requests: int = 256
    replay_tokens: int = 1 << 20
    """Of all ended requests together, alternatives counted like tokens; the oldest are forgotten first."""

    stall_s: float = 1800.0
    """Longest silence of an engine within one request; waiting in its queue is silent."""
    cancel_s: float = 5.0
    """How long an engine may take to end a sequence before its stream is cut."""
    controller_s: float = 5.0
    shutdown_s: float = 1.0
