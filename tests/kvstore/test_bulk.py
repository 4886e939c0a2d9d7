"""Native copies past the caches, and XOR, at sizes and addresses that fit no vector."""

import pytest
import torch

from farshore.kvstore import blocks

pytestmark = pytest.mark.skipif(blocks.native is None, reason="no native module was built")

SIZES = [0, 1, 15, 63, 64, 65, 127, 200, 4096, 4099]


def random_bytes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1, 17, 63])
def test_a_streamed_copy_writes_these_bytes_and_no_others(size, offset):
    source, to = random_bytes(size + 7, 0), random_bytes(size + 200, 1)
    expected = to.clone()
    expected[offset : offset + size] = source[7:]
    blocks.native.stream(to.data_ptr() + offset, source.data_ptr() + 7, size)
    assert torch.equal(to, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sources", [0, 1, 2, 5])
def test_a_sum_is_of_all_sources(size, sources):
    given = [random_bytes(size + i, i)[i:] for i in range(sources)]
    to = random_bytes(size + 64, 9)
    expected = to.clone()
    expected[:size] = 0
    for source in given:
        expected[:size] ^= source
    blocks.native.xor(to.data_ptr(), [source.data_ptr() for source in given], size)
    assert torch.equal(to, expected)


@pytest.mark.parametrize("number", [2**31, 2**32, 2**32 + 1, -(2**31) - 1])
def test_a_number_that_32_bits_cannot_hold_is_refused(layout, number):
    """And not cut to what they can: 2^32 layers or threads would be none, and 2^32 + 1 one."""
    memory = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    k, v = (
        torch.ones(heads, 1, dim).bfloat16()
        for heads, dim in ((layout.k_heads, layout.k_dim), (layout.v_heads, layout.v_dim))
    )
    for asked in ({"layer": number}, {"layer": 0, "threads": number}):
        with pytest.raises(RuntimeError, match="does not fit into 32 bits"):
            blocks.copy_in(memory, layout, [0], first=0, k=k, v=v, **asked)
    assert not memory.any()


def test_large_writes_are_the_same_bytes(layout):
    """From 1 MiB on they go past the caches."""
    wide = layout._replace(layers=1, k_dim=64, v_dim=64, block_tokens=64)
    memory = torch.zeros(3200 // 64 * wide.block_bytes, dtype=torch.uint8)
    bases = range(0, memory.numel(), wide.block_bytes)
    k, v = torch.randn(wide.k_heads, 3200, 64).bfloat16(), torch.randn(wide.v_heads, 3200, 64).bfloat16()
    assert k.numel() * 2 + v.numel() * 2 > 1 << 20
    blocks.copy_in(memory, wide, bases, layer=0, first=0, k=k, v=v)
    got = blocks.copy_out(memory, wide, bases, layers=range(1), first=0, last=3200)
    assert torch.equal(got[0][0], k) and torch.equal(got[1][0], v)
