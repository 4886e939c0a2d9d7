"""The driver of a cluster: what it does without Ray. Clusters on a real Ray: the other files here."""

import pytest

from farshore.controller.config import ClusterConfig
from farshore.controller.driver.cluster import PRIVATE_DRAIN_S, drain_s

JOINED = dict(ray_address="127.0.0.1:6379", token_file="/etc/farshore/token")


@pytest.mark.parametrize(
    ("options", "expected_s"),
    [
        ({"drain_timeout_s": 45.0, **JOINED}, 45.0),
        ({"drain_timeout_s": 45.0}, PRIVATE_DRAIN_S),
        ({"drain_timeout_s": 1.0}, 1.0),
    ],
)
def test_requests_of_a_gateway_go_on_as_long_as_asked_where_the_cluster_does(options, expected_s):
    assert drain_s(ClusterConfig(**options)) == expected_s
