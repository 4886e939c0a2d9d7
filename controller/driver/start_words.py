"""Tells an operator what the start of a cluster waits for, in a few words.

Called by ``worker_start`` ten times a second. Must not know how the answers were found.
"""

from collections.abc import Callable, Sequence

from farshore.controller.config import ClusterConfig
from farshore.kvstore.directory.base import WorkerRecord


def tell(
    progress: Callable[[str], None],
    told: str,
    config: ClusterConfig,
    dense: Sequence[WorkerRecord],
    lacking: str | None,
    *,
    placed: bool,
) -> str:
    """Shows what is waited for, if it differs from ``told``. Returns it.

    ``config``: with the numbers of workers that are waited for. ``dense``: the dense workers that are listed.
    ``lacking``: the resource that workers wait for, and the fix; a node that has it may still join.
    ``placed``: whether all attention workers are listed.
    """
    loading = [record for record in dense if record.state != "serving"]
    serving = len(dense) - len(loading)
    if loading:
        text = f"loading {config.spec.name}"
        if config.dense_workers > 1:
            text += f", {serving} of {config.dense_workers} dense workers ready"
        text += f": {loading[0].progress}" if loading[0].progress else ""
    elif lacking and not (placed and serving == config.dense_workers):
        text = f"waiting for room: {lacking}"
    elif not placed or serving < config.dense_workers:
        text = f"starting {config.attention_workers} attention workers"
        text += f" and {config.dense_workers} dense workers" if config.dense_workers > 1 else ""
    else:
        text = f"connecting {config.attention_workers} attention workers"
    if text != told:
        progress(text)
    return text
