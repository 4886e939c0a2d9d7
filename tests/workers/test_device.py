"""Which device a worker gets, from facts: no test here needs a GPU, or must not have one."""

import subprocess
import sys

import pytest
import torch

from farshore.errors import InvalidRequest
from farshore.workers.device import CPU, Facts, choose, look, resolve

H200 = "NVIDIA H200, 139 GiB"
NO_CUDA = Facts(built_for=None, has_driver=True)
NO_DRIVER = Facts(built_for="13.0")
HIDDEN = Facts(built_for="13.0", has_driver=True, visible="")
BROKEN = Facts(built_for="13.0", has_driver=True, complaint="the driver is too old (found version 11040)")
ONE = Facts(built_for="13.0", has_driver=True, gpus=(H200,))
TWO = Facts(built_for="13.0", has_driver=True, gpus=(H200, "NVIDIA L4, 22 GiB"), visible="3,1")


@pytest.mark.parametrize(
    ("asked", "facts", "granted", "expected"),
    [
        ("cpu", TWO, None, "cpu"),
        ("cpu", NO_CUDA, None, "cpu"),
        ("auto", NO_CUDA, 1, "cpu: torch was built without CUDA"),
        ("auto", NO_DRIVER, 0, "cpu: no NVIDIA driver is here"),
        ("auto", HIDDEN, None, "cpu: CUDA_VISIBLE_DEVICES= shows no GPU"),
        ("auto", BROKEN, 1, "cpu: torch finds no GPU (the driver is too old (found version 11040))"),
        ("auto", ONE, 0, "cpu: Ray gave this worker no GPU"),
        ("auto", ONE, 1, f"cuda: {H200}"),
        ("auto", TWO, None, f"cuda: {H200}"),
        ("cuda", TWO, 1, f"cuda: {H200}"),
        ("cuda:1", TWO, None, "cuda: NVIDIA L4, 22 GiB"),
    ],
)
def test_the_device_and_why(asked, facts, granted, expected):
    assert str(choose(asked, facts, granted=granted)) == expected


def test_the_device_is_one_of_pytorch():
    assert choose("auto", NO_CUDA).torch == CPU.torch == torch.device("cpu")
    assert choose("auto", ONE).torch == choose("cuda", TWO).torch == torch.device("cuda:0")
    assert choose("cuda:1", TWO).torch == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("asked", "facts", "problem", "fix"),
    [
        ("cuda", NO_CUDA, "torch was built without CUDA", "docs/accelerators.md"),
        ("cuda", NO_DRIVER, "no NVIDIA driver", "nvidia-smi"),
        ("cuda:0", HIDDEN, "CUDA_VISIBLE_DEVICES= shows no GPU", "unset CUDA_VISIBLE_DEVICES"),
        ("cuda", BROKEN, "driver is too old", "nvidia-smi"),
        ("cuda:1", ONE, "1 GPU is visible here", "use cuda:0, or"),
        ("cuda:2", TWO, "2 GPUs are visible here", "use cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line_with_the_fix(asked, facts, problem, fix):
    with pytest.raises(InvalidRequest) as refused:
        choose(asked, facts, option="--attention-device")
    said = str(refused.value)
    assert said.startswith(f"--attention-device {asked}: ") and "\n" not in said
    assert problem in said and fix in said


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1", ""])
def test_a_word_that_names_no_device_is_refused(asked):
    with pytest.raises(InvalidRequest, match="use auto, cpu, cuda or cuda:N"):
        choose(asked, TWO)


def test_what_this_host_shows():
    facts = look()
    assert facts.built_for == torch.version.cuda
    assert len(facts.gpus) == torch.cuda.device_count() and all("GiB" in name for name in facts.gpus)
    assert look(described=False).gpus == ("",) * len(facts.gpus)
    assert resolve("auto") == choose("auto", facts)


def test_a_worker_on_the_cpu_opens_no_gpu():
    """CUDA would take memory of each GPU that the process sees."""
    code = "import torch\nfrom farshore.workers.device import resolve\n"
    code += "print(resolve('cpu'), resolve('auto', granted=0).torch, torch.cuda.is_initialized())"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "cpu cpu False\n"


def test_an_attention_worker_without_ray_refuses_a_gpu_that_is_not_there():
    command = [sys.executable, "-P", "-m", "farshore.workers.attention", "--device", "cuda:99"]
    command += ["--worker", "attention-0-aa", "--kv-memory-bytes", str(64 << 20)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and "error: --device cuda:99: " in done.stderr, done.stderr
