"""The store in an accelerator's memory, where PyTorch copies. Skipped without an accelerator."""

import pytest
import torch

from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.store import parity
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_store_on_a_device_holds_moves_and_rebuilds(any_layout, sealed, content):
    device, host = (
        LocalStore(worker=WorkerId(name), arena=Arena(64 * 4096, device=name)) for name in ("cuda", "cpu")
    )
    spans = [sealed(device, tokens, any_layout) for tokens in (13, 7)]
    assert device.memory.is_cuda and device.usage().committed_bytes == 64 * 4096
    there = host.import_span(device.export(spans[0], 0, 13), sequence=SequenceId("t"), epoch=1)
    assert all(
        torch.equal(a.cpu(), b)
        for a, b in zip(
            content(device, spans[0], 0, 13), content(host, there, 0, 13, sequence="t"), strict=True
        )
    )
    members = {
        span: parity.Member(device.chunk_images(span, 0, n), device.digest(span, n))
        for span, n in zip(spans, (13, 7), strict=True)
    }
    group = parity.encode(host, members, sequence=SequenceId("g"), epoch=1)
    (info,) = [info for info in host.announce() if info.span == group]
    parity.rebuild(
        device,
        spans[0],
        info.covers,
        parity=host.chunk_images(group, 0, 13),
        survivors={spans[1]: device.chunk_images(spans[1], 0, 7)},
        sequence=SequenceId("r"),
        epoch=1,
    )
    device.check_integrity()
