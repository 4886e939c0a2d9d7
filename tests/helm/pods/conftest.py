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


@pytest.fixture(scope="module")
def install(render):
    """install(values=None, *, image=None) -> a Cluster whose pods are ready. It ends with the module."""
    if reason := why_not():
        pytest.skip(reason)
    if shutil.which("nft") is None and not os.environ.get("CI"):
        pytest.skip("needs nft, which enforces the network policies: install nftables")
    # Not in /tmp, which hosts do not share.
    with tempfile.TemporaryDirectory(prefix="farshore-", dir="/var/tmp") as folder, hosts() as made:
        Path(folder).chmod(0o755)

        clusters = []

        def installed(values=None, *, image=None):
            objects = render(values)
            pods = pods_of(objects)
            kubelet = Kubelet(made, image or this_installation(), objects, Path(folder))
            clusters.append(Cluster(kubelet))
            clusters[-1].start(pods)
            return clusters[-1]

        try:
            yield installed
        finally:
            pods = [pod for cluster in clusters for pod in cluster.pods.values()]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(lambda pod: pod.kill(), pods))
