"""A further driver of a cluster: what it may choose for itself, and what must be as the cluster runs."""

from dataclasses import replace

import pytest

from farshore.controller.config import ClusterConfig, check_same
from farshore.errors import InvalidRequest

RUNNING = ClusterConfig(ray_address="127.0.0.1:6379", token_file="token", http_port=8000)


@pytest.mark.parametrize(
    "own",
    [
        {"port": 50052},
        {"http_port": 8001},
        {"http_port": None},
        {"host": "127.0.0.2"},
        {"state_dir": "/var/lib/farshore"},
        {"attention_workers": 5},
    ],
)
def test_a_driver_has_ports_and_numbers_of_its_own(own):
    check_same(RUNNING, replace(RUNNING, **own))


def test_what_the_cluster_computes_must_be_the_same():
    with pytest.raises(InvalidRequest, match="--kv-memory"):
        check_same(RUNNING, replace(RUNNING, kv_memory_bytes=128 << 20))
