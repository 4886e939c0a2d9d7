"""Triton compiles another kernel for a pointer that is no multiple of 16 bytes, and the token loop waits.
Launches of ``extend`` that differ in nothing but where their rows begin share one kernel."""

import subprocess
import sys

SCRIPT = """
import torch
from farshore.benchmarks.gpu.dry.target import pretend
from farshore.kernels.base import AttentionSpec, State
from farshore.kernels.gpu import ops

_, compiled = pretend("cuda:90")
spec = AttentionSpec(9, 3, 3, 64, 64, 0.1)
rows, n = 8, 3
q = torch.zeros(rows, 9, 64, dtype=torch.bfloat16)
k, v = (torch.zeros(3, 40, 64, dtype=torch.bfloat16) for _ in range(2))
positions = torch.arange(rows)
state = State.identity(rows, 9, 64, dtype=torch.float32, device="cpu")
for first in range(rows - n):
    cut = slice(first, first + n)
    out = State(state.o[cut], state.lse[cut])
    ops.extend(q[cut], k, v, spec, q_positions=positions[cut], k_position=first, out=out)
print(len(compiled), len({binary.hash for _, binary in compiled}))
"""


def test_where_rows_begin_compiles_nothing_new(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "1"]
