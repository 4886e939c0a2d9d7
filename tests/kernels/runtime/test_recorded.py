"""RecordedWork: repeats PyTorch's calls and triton's launches on the same memory."""

import importlib
import threading

import pytest
import torch

from farshore.kernels.runtime.recorded import RecordedWork


def test_calls_are_repeated_without_the_work():
    source, target, runs = torch.arange(4.0), torch.zeros(4), []

    def work():
        runs.append(1)
        target.copy_(source * len(runs))

    graph = RecordedWork(work)
    source += 1
    graph.repeat()
    assert target.tolist() == [1, 2, 3, 4] and runs == [1]


@pytest.fixture
def dense(monkeypatch):
    """The GPU's dense kernels, interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return importlib.import_module("farshore.kernels.gpu.dense.ops")


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU, triton compiles its kernels")
def test_launches_are_repeated_once_each(dense):
    """Between PyTorch's calls, with what they were given; a launch by another thread is not recorded."""
    h, x = torch.zeros(1, 8), torch.ones(1, 8)
    elsewhere = torch.zeros(1, 8)
    out = torch.empty_like(h)

    def work():
        x.add_(1)
        dense.add_norm(h, x, x[0], 0.0, out=out)
        other = threading.Thread(target=dense.add_norm, args=(elsewhere, x, x[0], 0.0), kwargs={"out": x * 0})
        other.start()
        other.join()
        h.mul_(2)

    graph = RecordedWork(work)
    assert (h == 4).all() and (elsewhere == 2).all()
    graph.repeat()
    assert (x == 3).all() and (h == 14).all() and (out == 3).all() and (elsewhere == 2).all()
    dense.add_norm(h, x, x[0], 0.0, out=out)  # no longer recorded
    h.zero_()
    graph.repeat()
    assert (h == 8).all()
