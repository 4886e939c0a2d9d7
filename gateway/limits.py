"""Every bound and deadline of the gateway.

Created by ``__main__`` (the defaults) and by tests (small values), read by all modules of the gateway. Must
not know how a bound is enforced.
"""

from dataclasses import dataclass

ERROR_MESSAGE_CHARS = 1000
"""Longest error message that a client gets: it travels in an HTTP/2 trailer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The defaults are a gateway's. Suffixes name units; ``message`` is one call's bytes."""

    max_live_requests: int = 256
    """Requests being prepared or generated at once; one more is refused with a retry hint."""
    max_readers: int = 512
    """Generate calls open at once, including those that read a request which another call started."""
    readers_per_request: int = 8
    """Calls that read one request at once."""
    other_calls: int = 64
    """Calls open at once besides Generate: status, cancel, health."""
    connections_per_call: int = 4
    """HTTP connections for each call that may be open: clients keep idle ones for their next calls."""
    retry_after_ms: int = 1000
    """Retry hint of refusals."""
    default_max_tokens: int = 256

    message_bytes: int = 4 << 20
    """Largest message of one call, for a model of up to a million positions."""
    message_bytes_per_position: int = 4
    """For larger models: a token is about four letters, or an id of up to three bytes."""
    most_message_bytes: int = 16 << 20
    """For any model: parsing a message holds the interpreter's lock."""
    ping_interval_ms: int = 5_000
    """A client may send one keepalive ping in this time, with or without open calls. One that sends more is
    disconnected with ENHANCE_YOUR_CALM."""
    open_bytes: int = 256 << 20
    """Messages of all open Generate calls together: gRPC keeps a call's message until the call ends."""
    messages: int = 4096
    """Messages of one chat."""
    message_overhead_chars: int = 16
    """Characters counted for each chat message in addition to its role and content: templates add some."""
    role_chars: int = 64
    """Longest role, name, tool call's id or function's name of a message."""
    tools: int = 512
    """Tools of one chat."""
    chat_json_chars: int = 1 << 20
    """JSON texts of one chat together: tools, arguments of tool calls, template arguments."""
    sampling_bytes: int = 64 << 10
    """Largest serialised ``Sampling``."""
    chars_per_position: int = 256
    """Longer texts are refused before they are tokenized: tokenizing them takes a core for seconds."""
    request_id_chars: int = 128
    cache_salt_chars: int = 256
    tokenizer_threads: int = 2

    choices: int = 32
    """Completions of one request; each takes a row of the engine's batch."""
    logprobs: int = 20
    """Alternatives reported for each token."""
    logit_biases: int = 1024
    stops: int = 16
    stop_chars: int = 256
    stop_token_ids: int = 128
    allowed_token_ids: int = 4096
    bad_words: int = 128
    bad_word_chars: int = 256
    structure_chars: int = 32 << 10
    """Length of a JSON schema, a regex, a grammar, or all choices together."""

    request_values: int = 1 << 20
    """Tokens and alternatives that one request may ask for: choices * max_tokens * (1 + logprobs). For a
    model with more positions than this, the limit is the number of positions."""
    prompt_values: int = 1 << 18
    """Log-probabilities of one prompt: tokens * (1 + prompt_logprobs)."""
    live_values: int = 1 << 24
    """Tokens and alternatives of all live requests together. Each is kept in the request log for readers that
    reconnect, at about 64 bytes."""
    batch_requests: int = 128
    """Requests of one batch."""
    batch_values: int = 1 << 17
    """Tokens and alternatives of one batch. Its answer then has about 4 MB, the most that gRPC's clients
    receive unless they are told to."""
    replay_s: float = 60.0
    """How long a request that has ended can be read again."""
    replay_requests: int = 256
    """Ended requests that can be read again."""
    replay_bytes: int = 64 << 20
    """Events of all ended requests together; the oldest requests are forgotten first."""

    grace_s: float = 15.0
    """How long a request whose id the client chose goes on without a reader."""
    reader_stall_s: float = 60.0
    """A reader that takes nothing for this long is disconnected; it may reconnect."""
    stall_s: float = 1800.0
    """Longest silence of an engine within one request. An engine sends nothing while a request is queued."""
    cancel_s: float = 5.0
    """How long an engine may take to end a sequence before the gateway goes on without it."""
    probe_s: float = 1.0
    """Interval of health probes to each engine, and the deadline of each probe."""
    missed_probes: int = 3
    """Consecutive unanswered probes after which an engine gets nothing new."""
    lost_s: float = 10.0
    """Silence of an engine, on probes and streams, after which its requests fail."""
    engines_tried: int = 3
    """Engines that a request is offered to, if those before do not take it."""
    most_engines: int = 1024
    """Engines that a gateway knows at once."""
    controller_s: float = 5.0
    """Deadline of calls to the controller."""
    drain_s: float = 3.0
    """How long live requests go on after the gateway was told to stop."""
    shutdown_s: float = 1.0
    """Bound of each later stage of stopping, and of the wait to send a call's status."""

    @property
    def open_calls(self) -> int:
        """Calls open at once on one listener."""
        return self.max_readers + self.other_calls

    @property
    def standing_calls(self) -> int:
        """Calls open at once that watch the health or ask for the services: they stay open, so they leave
        half of ``other_calls`` to those that do not."""
        return self.other_calls // 2

    def message_bytes_for(self, max_positions: int) -> int:
        """Largest message of one call for a model of ``max_positions``."""
        wanted = max(self.message_bytes, max_positions * self.message_bytes_per_position)
        return min(wanted, self.most_message_bytes)

    def request_values_for(self, max_positions: int) -> int:
        """``request_values`` for a model of ``max_positions``."""
        return max(self.request_values, max_positions)
