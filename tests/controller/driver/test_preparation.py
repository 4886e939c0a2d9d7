"""What a driver refuses before it starts anything."""

import pytest

from farshore.controller.config import ClusterConfig
from farshore.controller.driver import preparation
from farshore.controller.driver.cluster import Cluster
from farshore.controller.driver.ray_runtime import visible_gpu
from farshore.errors import InvalidRequest
from farshore.workers import device


@pytest.fixture
def host(monkeypatch):
    """host(gpus): what this host shows from now on."""

    def show(gpus):
        facts = device.Facts(built_for="13.0", has_driver=gpus > 0, gpus=("",) * gpus)
        monkeypatch.setattr(device, "look", lambda *, described: facts)

    return show


def started(said):
    raise AssertionError(f"it went on: {said}")


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"device": "cuda"}, "--device cuda: "),
        ({"device": "cuda:0"}, "--device cuda:0: "),
        ({"device": "cpu", "attention_device": "cuda"}, "--attention-device cuda: "),
    ],
)
def test_a_host_without_a_gpu_starts_nothing(host, options, option):
    host(gpus=0)
    with pytest.raises(InvalidRequest, match="no NVIDIA driver is here") as refused:
        Cluster.start(ClusterConfig(port=0, **options), progress=started)
    assert str(refused.value).startswith(option) and "\n" not in str(refused.value)


def test_a_gpu_beyond_the_visible_ones_is_refused(host):
    host(gpus=2)
    with pytest.raises(
        InvalidRequest, match="--device cuda:2: 2 GPUs are visible here: use cuda:0 to cuda:1"
    ):
        preparation.prepared(ClusterConfig(device="cuda:2"), started)


@pytest.mark.parametrize(
    ("options", "gpus"),
    [({"device": "cuda:1"}, 2), ({"device": "cuda", "attention_device": "cuda"}, 1), ({"device": "auto"}, 0)],
)
def test_what_may_work_goes_on(host, options, gpus):
    """Whether there are enough GPUs is Ray's to say."""
    host(gpus=gpus)
    config = ClusterConfig(**options)
    assert preparation.prepared(config, lambda said: None).device == config.device


def test_on_another_ray_each_worker_looks_for_itself(host, tmp_path):
    host(gpus=0)
    config = ClusterConfig(device="cuda", ray_address="10.0.0.1:6379", token_file=str(tmp_path / "none"))
    with pytest.raises(InvalidRequest, match="none"):
        preparation.prepared(config, started)


@pytest.mark.parametrize(
    ("index", "visible", "expected"),
    [(0, None, "0"), (3, None, "3"), (1, "4,2,7", "2"), (0, "GPU-8932f937", "GPU-8932f937")],
)
def test_a_private_ray_shows_one_gpu(index, visible, expected):
    assert visible_gpu(index, visible) == expected
