"""Default values that several processes share, each written once.

Read by the engine (``workers``), the cluster's configuration (``controller.config``) and, through that, the
command line. Imports nothing, so that the command line can read them without loading PyTorch.
"""

MAX_DECODE_STALL_MS = 200.0
"""Longest time from one token of a running sequence to its next while other prompts are prefilled."""

SHARD_GRACE_S = 10.0
"""How long a shard may answer nothing before the sequences whose KV it stores fail."""

DRAIN_TIMEOUT_S = 60.0
"""How long the requests of a dense worker that is drained may go on before they fail."""
