"""How Farshore sets up the Ray nodes that it starts.

Used by ``driver.ray_runtime`` for a private Ray, and by ``farshore node``. Imports nothing, since Ray reads
these variables when it is imported.
"""

OBJECT_STORE_BYTES = 80 << 20
"""The smallest size that Ray allows, instead of 30% of memory: KV and frames do not use the object store."""

MARK = "farshore"
"""A custom resource that every node of ``farshore node`` declares, also one that takes no workers."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray starts its workers at niceness 15: an engine then gets 3% of a core that another process uses. A
    # gateway that tokenized long prompts stopped all answers for two seconds.
    "RAY_worker_niceness": "0",
    # Ray's memory monitor would kill the process that uses the most memory, which is the one with the KV.
    "RAY_memory_monitor_refresh_ms": "0",
    # The GCS remembers the newest 100,000 task events by default, and the driver makes one every half second.
    "RAY_task_events_max_num_task_in_gcs": "1000",
}
"""For all processes of Ray."""

QUICK_VERDICT = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}
"""For the head of several nodes: a node that is lost is declared dead after 1 to 4 s. By default that takes
15 s, and a minute for a node that is frozen or cut off."""
