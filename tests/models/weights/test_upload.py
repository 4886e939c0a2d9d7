"""Uploads: what reaches the device equals what was read, by any number of pieces and threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farshore.kernels.runtime.deferring import DeferredEvent, DeferringRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.models.weights.upload import Uploads

SHAPES = [(0,), (1,), (7,), (16, 3), (5, 64), (33, 31)]


def values(shape, dtype):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_uploads_of_several_threads(dtype, seed):
    uploads = Uploads(DeferringRuntime(seed=seed), piece_bytes=64)
    tensors = [values(shape, dtype) for shape in SHAPES * 3]
    with ThreadPoolExecutor(3) as pool:
        for sent, received in zip(tensors, pool.map(uploads.upload, tensors), strict=True):
            assert received.dtype == dtype and torch.equal(received, sent)
            assert not len(sent) or received.data_ptr() != sent.data_ptr()


def test_a_pinned_buffer_is_not_reused_before_its_copy(monkeypatch):
    monkeypatch.setattr(DeferredEvent, "wait", lambda event: None)
    uploads = Uploads(DeferringRuntime(seed=0), piece_bytes=64)
    with pytest.raises(AssertionError, match="the host overwrites a pinned buffer before the upload"):
        uploads.upload(values((1024,), torch.float32))


def test_an_upload_at_once():
    sent = values((40,), torch.float32)
    assert torch.equal(Uploads(ImmediateRuntime(), piece_bytes=64).upload(sent), sent)
