"""Fixtures that run what the chart renders, on hosts of their own."""

import concurrent.futures
import contextlib
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
def install(render):
    """install(values=None, *, image=None) -> a context with a Cluster whose pods are ready. ``image``: the
    chart's, instead of this installation."""
    if reason := why_not():
        pytest.skip(reason)
    if shutil.which("nft") is None and not os.environ.get("CI"):
        pytest.skip("needs nft, which enforces the network policies: install nftables")
    here = this_installation()

    @contextlib.contextmanager
    def installed(values=None, *, image=None):
        objects = render(values)
        pods = pods_of(objects)
        images = {FARSHORE: image or here, "redis": here}
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

    return installed
