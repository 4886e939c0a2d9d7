"""Native copies that bypass the caches, and XOR, at sizes and addresses that are not multiples of a
vector."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from farshore.kvstore.store.layout import blocks

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
def test_an_xor_is_of_all_sources(size, sources):
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
    """Truncated to 32 bits, 2^32 layers or threads would be 0, and 2^32 + 1 would be 1."""
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
    """Writes of 1 MiB and more bypass the caches."""
    wide = layout._replace(layers=1, k_dim=64, v_dim=64, block_tokens=64)
    memory = torch.zeros(3200 // 64 * wide.block_bytes, dtype=torch.uint8)
    bases = range(0, memory.numel(), wide.block_bytes)
    k, v = torch.randn(wide.k_heads, 3200, 64).bfloat16(), torch.randn(wide.v_heads, 3200, 64).bfloat16()
    assert k.numel() * 2 + v.numel() * 2 > 1 << 20
    blocks.copy_in(memory, wide, bases, layer=0, first=0, k=k, v=v)
    got = blocks.copy_out(memory, wide, bases, layers=range(1), first=0, last=3200)
    assert torch.equal(got[0][0], k) and torch.equal(got[1][0], v)


NO_THREADS = """
import resource
import torch
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store.layout import blocks

torch.set_num_threads(1)  # PyTorch's pool ends the process if it gets no threads
layout = KVLayout(4, 2, 1, 1, 64, 64, KVFormat.FLOAT32)
memory = torch.randn(8 * layout.block_bytes // 4).view(torch.uint8)
bases = range(0, memory.numel(), layout.block_bytes)
def copy(threads):
    return blocks.copy_out(memory, layout, bases, layers=range(4), first=0, last=2000, threads=threads)
alone = copy(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
size = sum(tensor.numel() * 4 for tensor in alone)
resource.setrlimit(resource.RLIMIT_AS, (used + size + (4 << 20), -1))  # too little for a thread's stack
for expected, got in zip(alone, copy(4), strict=True):
    assert torch.equal(expected, got)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures its own memory by /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="asan takes the memory")
def test_a_copy_succeeds_without_the_threads_it_asks_for(tmp_path):
    """A shard at its limit of threads or memory copies more slowly, and refuses nothing."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", NO_THREADS], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
