"""Whether Ray's nodes have the memory that the attention workers ask for, and what to say where they don't.

Used by the controller. Pure: what the nodes have is given.
"""

from collections.abc import Mapping


def too_little_memory(nodes: Mapping[str, int], *, workers: int, each_bytes: int) -> str | None:
    """What is missing, by name and number, and the fix; None where ``nodes`` (address -> bytes) take all."""
    if sum(memory // each_bytes for memory in nodes.values()) >= workers:
        return None
    have = (
        ", ".join(f"{_mib(memory)} on {node}" for node, memory in sorted(nodes.items())) or "no node at all"
    )
    each = " each" if workers > 1 else ""
    return (
        f"{workers} attention worker{'s' if workers > 1 else ''} with {_mib(each_bytes)} of memory{each} "
        f"({_mib(workers * each_bytes)} in all) do not fit: Ray has {have}; lower --kv-memory or "
        "--attention-workers, or add nodes"
    )


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):,.0f} MiB"
