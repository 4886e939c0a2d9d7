"""Mixed devices are found without a GPU: the engine has none, and faults that a test seeds are seen.

``bench gpu --dry`` runs every family of models; see test_dry.py.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from farshore.benchmarks.gpu.dry import fakes
from farshore.benchmarks.gpu.dry.fake_cuda import fake_cuda
from farshore.kernels.base import State
from farshore.models.llama import Llama

made, embed, identity = Llama.__init__, Llama.embed, State.identity.__func__


def table_on_the_cpu():
    def __init__(self, config, weights):
        made(self, config, weights)
        self._cos = self._cos.cpu()

    Llama.__init__ = __init__


def hidden_states_on_the_cpu():
    Llama.embed = lambda self, ids: embed(self, ids).cpu()


def states_on_the_cpu():
    def on_the_cpu(cls, *shape, device, **rest):
        return identity(cls, *shape, device="cpu", **rest)

    State.identity = classmethod(on_the_cpu)


def numbers_of_the_host_in_a_graph():
    Llama.embed = lambda self, ids: torch.where(ids[:, None] >= 0, embed(self, ids), 0.0)


SEEDS = table_on_the_cpu, hidden_states_on_the_cpu, states_on_the_cpu, numbers_of_the_host_in_a_graph
fakes.pretend_h100()
with torch.inference_mode(), fake_cuda():
    for seed in (lambda: None, *SEEDS):
        Llama.__init__, Llama.embed, State.identity = made, embed, classmethod(identity)
        seed()
        try:
            next(fakes.cases()).check()
            print(seed.__name__, "passed", sep=":")
        except Exception as error:
            print(seed.__name__, type(error).__name__, str(error).splitlines()[0], sep=":")
"""
"""Runs the first case as it is, then with each fault."""


@pytest.mark.heavy
def test_seeded_faults_are_found():
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sound, *broken = done.stdout.splitlines()
    assert sound == "<lambda>:passed"
    assert [line.split(":")[0] for line in broken] == [
        "table_on_the_cpu",
        "hidden_states_on_the_cpu",
        "states_on_the_cpu",
        "numbers_of_the_host_in_a_graph",
    ]
    for line in broken[:3]:
        assert ("device" in line.lower() or "cuda" in line) and "cpu" in line, line
    assert "NotCaptured" in broken[3] and "aten.where." in broken[3]
