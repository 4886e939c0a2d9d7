"""The workers' gauges in Ray's metrics, which every node shows at its ``/metrics`` with the prefix ``ray_``.

Used by ``actors``, in the workers' own processes. A thread samples every PERIOD_S. Must not know how a worker
counts.
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ray.util.metrics import Gauge

from farshore.periodic import PeriodicThread

_LOG = logging.getLogger(__name__)

PERIOD_S = 2.0

DESCRIPTIONS = {
    "farshore_kv_budget_bytes": "Bytes that a worker may use for KV.",
    "farshore_kv_free_bytes": "Bytes of the budget that can be granted now.",
    "farshore_attended_bytes": "KV bytes that a shard has attended to since it started.",
    "farshore_requests_running": "Requests that an engine runs.",
    "farshore_requests_waiting": "Requests that wait for their first placement.",
    "farshore_choices_parked": "Completions that gave their memory back and wait for it.",
    "farshore_tokens": "Tokens that an engine has generated since it started.",
    "farshore_tokens_per_second": "Tokens that an engine generates per second, over the last period.",
    "farshore_shard_latency_p50_ms": "Median time from sending a layer's queries to the answer.",
    "farshore_shard_latency_p99_ms": "99th percentile of that time.",
    "farshore_shard_failures": "Steps that ran again because a shard did not answer in time.",
}


class Sample(NamedTuple):
    """One value. ``name``: a key of DESCRIPTIONS. ``shard``: the attention worker it is about, if any."""

    name: str
    value: float
    shard: str = ""


class Gauges:
    """Samples from construction on, until the process ends. ``worker``: the value of the label of this
    name."""

    def __init__(self, worker: str, sample: Callable[[], Iterable[Sample]]) -> None:
        self._worker = worker
        self._sample = sample
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("worker", "shard"))
            for name, text in DESCRIPTIONS.items()
        }
        PeriodicThread(self._set, name="gauges", period_s=PERIOD_S, tell=_tell).start()

    def _set(self) -> None:
        for name, value, shard in self._sample():
            self._gauges[name].set(value, tags={"worker": self._worker, "shard": shard})


def _tell(error: Exception) -> None:
    _LOG.error("the worker's gauges can't be sampled", exc_info=error)
