"""The machine that a benchmark runs on: its facts, and the rates that kernels are compared with.

Used by every benchmark; ``farshore bench machine`` prints only this. Must not know any kernel.
"""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from farshore.benchmarks.memory import allocate
from farshore.benchmarks.timing import LEAST_RUN_S, ROUNDS, interleave

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
CACHES_PER_BUFFER = 8
MOST_BUFFER_BYTES = 4 << 30
UNKNOWN_L3_BYTES = 256 << 20

READERS: Mapping[str, Callable[[Tensor], object]] = {
    "torch.sum(int64)": lambda memory: memory.view(torch.int64).sum(),
    "torch.sum(float32)": lambda memory: memory.view(torch.float32).sum(),
    "torch.aminmax(int32)": lambda memory: memory.view(torch.int32).aminmax(),
}
"""Functions that read every byte of a ``u8`` buffer once. Which is fastest depends on the machine."""


@dataclass(frozen=True, slots=True)
class MachineSizes:
    """How much is measured. Tests use tiny sizes."""

    buffer_bytes: int | None = None
    """Bytes read and copied; None: 8 x L3, at most 4 GiB and a third of the memory."""
    gemm: tuple[int, ...] = (512, 2048, 4096)
    """n of the n x n x n products, ascending; the first is always measured."""
    gemm_run_s: float = 0.25
    """A larger product is measured if a run would take less than this at the rate of the previous one."""
    least_run_s: float = LEAST_RUN_S
    """The least length of a timed run; see ``timing.interleave``."""
    rounds: int = ROUNDS


@dataclass(frozen=True, slots=True)
class Facts:
    """What the system reports about the machine and the process."""

    cpu: str
    architecture: str
    physical_cores: int
    """Cores of this machine or VM, not only of this process."""
    l3_bytes: int | None
    """The size that the system reports, which in a VM may be more than its share; None if unknown."""
    memory_bytes: int
    """The machine's, or the container's limit if that is less."""
    isa: tuple[str, ...]
    python: str
    torch: str
    threads: int
    load_average_1m: float
    """Before the measurement. Above 0, other processes were running."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does at best. GB/s and GFLOP/s are powers of ten."""

    read_gbps: float
    """The read bandwidth of the fastest reader."""
    reader: str
    read_gbps_by_reader: Mapping[str, float]
    read_buffer_bytes: int
    read_buffer_of_l3: float | None
    copy_gbps: float
    """Bytes copied per second; each is read once and written once."""
    gemm: str
    """The dtype and n of the fastest product, with which ``extend`` is compared. Without instructions for
    bfloat16, PyTorch's bfloat16 product takes 100 times as long as its float32 one."""
    gemm_gflops: Mapping[str, float]
    """By dtype, at the fastest n."""
    gemm_gflops_by_size: Mapping[str, float]
    """By dtype and n."""


def facts(threads: int) -> Facts:
    cpuinfo = _pairs(Path("/proc/cpuinfo"))
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    return Facts(
        cpu=cpuinfo.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        physical_cores=physical_cores(Path("/sys/devices/system/cpu")),
        l3_bytes=l3_bytes(Path("/sys/devices/system/cpu/cpu0/cache")),
        memory_bytes=min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _cgroup_bytes()),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        python=platform.python_version(),
        torch=torch.__version__,
        threads=threads,
        load_average_1m=os.getloadavg()[0],
    )


def measure(machine: Facts, sizes: MachineSizes, *, progress: Callable[[str], None]) -> Rates:
    """Measures the rates with ``machine.threads`` threads, in well under a minute. Sets PyTorch's threads."""
    torch.set_num_threads(machine.threads)
    size_bytes = sizes.buffer_bytes or cold_bytes(machine)
    progress(f"read and copy bandwidth, over {size_bytes >> 20} MiB")
    by_reader, copy_gbps = _bandwidths(size_bytes, sizes.rounds)
    reader = max(by_reader, key=by_reader.__getitem__)
    by_dtype = {dtype: _gemm_gflops(dtype, sizes, progress) for dtype in (torch.bfloat16, torch.float32)}
    by_size = {
        f"{name_of(dtype)} {n}": rate for dtype, rates in by_dtype.items() for n, rate in rates.items()
    }
    return Rates(
        read_gbps=by_reader[reader],
        reader=reader,
        read_gbps_by_reader=by_reader,
        read_buffer_bytes=size_bytes,
        read_buffer_of_l3=size_bytes / machine.l3_bytes if machine.l3_bytes else None,
        copy_gbps=copy_gbps,
        gemm=max(by_size, key=by_size.__getitem__),
        gemm_gflops={name_of(dtype): max(rates.values()) for dtype, rates in by_dtype.items()},
        gemm_gflops_by_size=by_size,
    )


def gemm(which: str) -> tuple[Callable[[], Tensor], int]:
    """A function that computes one n x n x n product into allocated memory, and its FLOPs. ``which`` is a
    dtype and n, as in ``Rates.gemm``."""
    name, size = which.split()
    dtype, n = getattr(torch, name), int(size)
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, n, generator=generator).to(dtype)
    b = torch.randn(n, n, generator=generator).to(dtype)
    out = torch.empty(n, n, dtype=dtype)
    return lambda: torch.matmul(a, b, out=out), 2 * n**3


def cold_bytes(machine: Facts) -> int:
    """The size of a buffer so large that none of it is still cached when it is read again."""
    l3 = machine.l3_bytes or UNKNOWN_L3_BYTES
    size_bytes = min(CACHES_PER_BUFFER * l3, MOST_BUFFER_BYTES, machine.memory_bytes // 3)
    return size_bytes // 4096 * 4096


def l3_bytes(caches: Path) -> int | None:
    """The size of the L3 cache, read from ``caches``, such as /sys/devices/system/cpu/cpu0/cache; None if it
    is not there."""
    for index in sorted(caches.glob("index*")):
        if (index / "level").read_text().strip() == "3":
            text = (index / "size").read_text().strip()
            return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    return None


def physical_cores(cpus: Path) -> int:
    """The number of distinct (package, core) pairs under ``cpus``, such as /sys/devices/system/cpu; the
    number of logical CPUs if it has none."""
    cores = {
        ((topology / "physical_package_id").read_text(), (topology / "core_id").read_text())
        for topology in cpus.glob("cpu[0-9]*/topology")
    }
    return len(cores) or os.cpu_count() or 1


def available_bytes(machine: Facts) -> int:
    """Free memory in bytes; half of all memory if the system does not report it."""
    reported = _pairs(Path("/proc/meminfo")).get("MemAvailable")
    return min(
        int(reported.split()[0]) << 10 if reported else machine.memory_bytes // 2, machine.memory_bytes
    )


def name_of(dtype: torch.dtype) -> str:
    """For example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _bandwidths(size_bytes: int, rounds: int) -> tuple[dict[str, float], float]:
    """GB/s of each reader, and of copying one half of the buffer to the other."""
    memory = allocate(size_bytes)
    memory.fill_(1)  # Untouched pages would all map to one page of zeros, which would be cached.
    to, source = memory[: size_bytes // 2], memory[size_bytes // 2 :]
    reads = {name: partial(reader, memory) for name, reader in READERS.items()}
    by_reader = {
        name: size_bytes / timing.median_s / 1e9 for name, timing in interleave(reads, rounds=rounds).items()
    }
    copied = interleave({"copy": lambda: to.copy_(source)}, rounds=rounds)
    return by_reader, to.numel() / copied["copy"].median_s / 1e9


def _gemm_gflops(
    dtype: torch.dtype, sizes: MachineSizes, progress: Callable[[str], None]
) -> dict[int, float]:
    """GFLOP/s by n."""
    by_n: dict[int, float] = {}
    for n in sizes.gemm:
        if by_n and 2 * n**3 / (1e9 * max(by_n.values())) > sizes.gemm_run_s:
            break
        which = f"{name_of(dtype)} {n}"
        progress(f"GEMM {which}")
        product, flops = gemm(which)
        timing = interleave(
            {"gemm": product},
            rounds=sizes.rounds,
            least_run_s=sizes.least_run_s,
            limit_s=4 * sizes.rounds * sizes.gemm_run_s,
        )
        by_n[n] = flops / timing["gemm"].median_s / 1e9
    return by_n


def _cgroup_bytes() -> float:
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return float("inf") if text == "max" else int(text)


def _pairs(file: Path) -> dict[str, str]:
    """The first ``name : value`` of each name in a /proc file; empty if the file does not exist."""
    pairs: dict[str, str] = {}
    if file.is_file():
        for line in file.read_text().splitlines():
            name, separator, value = line.partition(":")
            if separator:
                pairs.setdefault(name.strip(), value.strip())
    return pairs
