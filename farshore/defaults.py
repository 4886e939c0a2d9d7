"""Default values that several processes share, each written once.

Read by the engine (``workers``), the cluster's configuration (``controller.config``), the driver and the
command line. Imports nothing, so that the command line can read them without loading PyTorch.
"""

MAX_DECODE_STALL_MS = 200.0
"""Longest time from one token of a running sequence to its next while other prompts are prefilled."""

SHARD_GRACE_S = 10.0
"""How long a shard may answer nothing before the sequences whose KV it stores fail."""

DRAIN_TIMEOUT_S = 60.0
"""How long the requests of a dense worker that is drained may go on before they fail."""

GATEWAY_ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144"}
"""Environment for a gateway's process with glibc, unless the environment says otherwise. A long prompt takes
megabytes for a moment, in any thread of several. By default each thread keeps such memory in an arena of its
own, and the process only grows."""
