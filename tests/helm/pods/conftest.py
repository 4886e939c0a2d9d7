"""Fixtures that run what the chart renders, on hosts of their own."""

import concurrent.futures
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from farshore.benchmarks.cluster.hosts import hosts, why_not

from .cluster import Cluster, pods_of
from .image import this_installation
from .kubelet import Kubelet

pytest.register_assert_rewrite(f"{__package__}.pod_tests")

FARSHORE = "registry.example.com/farshore"
"""The repository of the chart's image, with which the tests render."""


@pytest.fixture(scope="module")
def image():
    """The image of the chart's containers."""
    return this_installation()


@pytest.fixture(scope="class")
def cluster(request, render, image, server_binary):
    """A Cluster of the class's VALUES, whose pods are ready."""
    if reason := why_not():
        pytest.skip(reason)
    if shutil.which("nft") is None and not os.environ.get("CI"):
        pytest.skip("needs nft, which enforces the network policies: install nftables")
    if "redis" in request.cls.VALUES:
        server_binary("redis")
    objects = render(request.cls.VALUES)
    pods = pods_of(objects)
    images = {FARSHORE: image, "redis": this_installation()}
    # Not in /tmp, which hosts do not share.
    with tempfile.TemporaryDirectory(prefix="farshore-", dir="/var/tmp") as folder, hosts() as made:
        Path(folder).chmod(0o755)
        cluster = Cluster(Kubelet(made, images, objects, Path(folder)))
        try:
            cluster.start(pods)
            yield cluster
        finally:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(lambda pod: pod.kill(), cluster.pods.values()))
