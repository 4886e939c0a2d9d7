"""Every bound and deadline of the gateway in one frozen place.

Made by ``__main__`` (the defaults) and by tests (small ones). Must not know how a bound is enforced.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_live_requests: int = 256
    """Requests being prepared or generated at once; one more is refused with a retry hint."""
    max_readers: int = 512
    """Generate calls open at once, those included that only read what another has started."""
    readers_per_request: int = 8
    other_calls: int = 64
    """Calls open at once besides Generate: status, cancel, health."""
    retry_after_ms: int = 1000
    default_max_tokens: int = 256

    message_bytes: int = 4 << 20
    """Of one call, for a model of up to a million positions."""
    message_bytes_per_position: int = 4
    """For larger models: a token is some four letters, or an id of up to three bytes."""
    most_message_bytes: int = 16 << 20
    """Whatever the model: parsing holds the interpreter's lock."""
    open_bytes: int = 256 << 20
    """Of all open Generate calls together: gRPC keeps a call's message until the call ends."""
    messages: int = 4096
    """Of one chat."""
    message_overhead_chars: int = 16
    """A chat message counts for so many characters besides its own: a template writes some around it."""
    role_chars: int = 64
    sampling_bytes: int = 64 << 10
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

    request_values: int = 1 << 20
    """Tokens and alternatives that one request may ask for: choices * max_tokens * (1 + logprobs). A
    model with more positions than this may fill them."""
    live_values: int = 1 << 24
    """Of all live requests together, since each is logged for readers that come back; some 64 bytes each."""
    replay_s: float = 60.0
    """How long a request that has ended can be read again."""
    replay_requests: int = 256
    replay_bytes: int = 64 << 20
    """Of all ended requests together; the oldest are forgotten first."""

    grace_s: float = 15.0
    """How long a request with a client's own id lives on without any reader."""
    reader_stall_s: float = 60.0
    """A reader that takes nothing for so long is cut off: it can come back."""
    stall_s: float = 1800.0
    """Longest silence of an engine within one request; waiting in its queue is silent."""
    cancel_s: float = 5.0
    """How long an engine may take to end a sequence before its stream is cut."""
    cancel_again_s: float = 0.1
    """An engine that has not ended a sequence by then is told once more: it may not have known it yet."""
    probe_s: float = 1.0
    """Between two questions after the engine's health, and the deadline of each."""
    missed_probes: int = 3
    """So many without an answer, one after another, and the engine counts as gone."""
    controller_s: float = 5.0
    drain_s: float = 3.0
    """How long a gateway that is told to stop lets live requests run on."""
    shutdown_s: float = 1.0

    def message_bytes_for(self, max_positions: int) -> int:
        """The largest message that a gateway for a model of so many positions takes."""
        wanted = max(self.message_bytes, max_positions * self.message_bytes_per_position)
        return min(wanted, self.most_message_bytes)

    def request_values_for(self, max_positions: int) -> int:
        return max(self.request_values, max_positions)
