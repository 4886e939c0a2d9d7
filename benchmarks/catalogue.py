"""The benchmarks that ``farshore bench`` can run, by name.

Called by ``client.cli.bench``. A benchmark is a function from options to a report. Each imports its own room
when it is run: a machine with a GPU has neither Ray nor Redis.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.benchmarks import machine
from farshore.benchmarks.report import Report

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options for a benchmark."""

    implementation: str | None = None
    """The kernels to measure; None: the fastest ones that are installed."""
    threads: int | None = None
    """None: one per core that this process may use."""
    only: str = ""
    """Only cases whose name contains this are measured."""
    peer: str | None = None
    """Another server to measure in place of ours."""
    requests: int = 2000
    """Number of hostile requests that ``faults`` sends."""
    seed: int | None = None
    """Seed of the hostile requests; None: a random one."""
    dry: bool = False
    """``gpu``: only what a CPU can check."""
    model: str | None = None
    """``gpu``: the folder of the demo model cut off; None: a small random model."""
    so_far: Callable[[Report], None] = field(default=lambda report: None, compare=False)
    """``gpu``: gets the report of what was measured so far, after each section."""

    def facts(self) -> machine.Facts:
        return machine.facts(self.threads or len(usable_cores()))


class Benchmark(NamedTuple):
    summary: str
    run: Callable[[Options, Progress], Report]


def _machine(options: Options, progress: Progress) -> Report:
    facts = options.facts()
    rates = machine.measure(facts, machine.MachineSizes(), progress=progress)
    return Report({**asdict(facts), **asdict(rates)})


def _kernels(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.kernels import benchmark as kernels
    from farshore.benchmarks.kernels.implementation import choose
    from farshore.benchmarks.kernels.shapes import Sizes

    facts = options.facts()
    implementation = choose(options.implementation, threads=facts.threads)
    return kernels.run(implementation, facts, Sizes(), only=options.only, progress=progress)


def _offload(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.demo import load_demo
    from farshore.benchmarks.offload import benchmark as offload
    from farshore.benchmarks.offload import setting as offload_setting

    facts = options.facts()
    sizes = offload_setting.Sizes()
    return offload.run(load_demo, facts, sizes, only=options.only, progress=progress)


def _quality(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.quality import benchmark as quality

    facts = options.facts()
    return quality.run(quality.load_demo, facts, quality.Sizes(), only=options.only, progress=progress)


def _kvstore(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.kernels.implementation import choose
    from farshore.benchmarks.kvstore import benchmark as kvstore
    from farshore.benchmarks.kvstore.setting import StoreSizes

    facts = options.facts()
    implementation = choose(options.implementation, threads=facts.threads)
    return kvstore.run(implementation, facts, StoreSizes(), only=options.only, progress=progress)


def _load(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.load import benchmark as load

    facts = options.facts()
    return load.run(facts, load.Sizes(), only=options.only, progress=progress)


def _dense(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.serve import dense
    from farshore.benchmarks.serve import setting as serve_setting

    facts = options.facts()
    setting = serve_setting.Setting(facts, serve_setting.Sizes(), progress)
    return dense.run(setting, dense.Sizes(), only=options.only)


def _serve(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.serve import benchmark as serve
    from farshore.benchmarks.serve import setting as serve_setting

    facts = options.facts()
    sizes = serve_setting.Sizes()
    return serve.run(facts, sizes, only=options.only, peer=options.peer, progress=progress)


def _faults(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.faults import benchmark as faults
    from farshore.benchmarks.faults import setting as faults_setting

    facts = options.facts()
    sizes = faults_setting.Sizes(requests=options.requests)
    return faults.run(facts, sizes, seed=options.seed, only=options.only, progress=progress)


def _cluster(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.cluster import benchmark as cluster

    return cluster.run(options.facts(), cluster.Sizes(), only=options.only, progress=progress)


def _gateway(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.gateway import benchmark as gateway

    return gateway.run(options.facts(), gateway.Sizes(), only=options.only, progress=progress)


def _engines(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.engines import benchmark as engines
    from farshore.benchmarks.engines import setting as engines_setting

    sizes = engines_setting.Sizes()
    return engines.run(options.facts(), sizes, only=options.only, progress=progress)


def _gpu(options: Options, progress: Progress) -> Report:
    from farshore.benchmarks.gpu import benchmark as gpu
    from farshore.benchmarks.gpu.dry import run as dry

    if options.dry:
        return dry.run(options.facts(), only=options.only, progress=progress)
    return gpu.run(
        options.facts(), only=options.only, model=options.model, progress=progress, so_far=options.so_far
    )


BENCHMARKS: Mapping[str, Benchmark] = {
    "machine": Benchmark("what this machine is and how fast it reads, copies and multiplies", _machine),
    "offload": Benchmark("hops, bulk KV and decode steps over attention workers on this machine", _offload),
    "quality": Benchmark("what KV formats cost: perplexity of a text, and needles in it", _quality),
    "dense": Benchmark("the model's products against read bandwidth, GEMM rate and PyTorch", _dense),
    "serve": Benchmark("decode, prefill and start-up of the real engine and server; peers", _serve),
    "faults": Benchmark("bad requests and frozen workers against a real server: what others see", _faults),
    "cluster": Benchmark(
        "workers and a controller that are killed, and scaling: how long it takes", _cluster
    ),
    "engines": Benchmark(
        "several engines: what a second one brings, prefixes, Redis, drains under load", _engines
    ),
    "gateway": Benchmark("what a token costs in the gateway, and a mask of a structure", _gateway),
    "gpu": Benchmark("kernels and engine on a GPU, against its rates, transformers and vLLM", _gpu),
    "kernels": Benchmark("attention kernels against the machine's rates and PyTorch's SDPA", _kernels),
    "load": Benchmark("loading a checkpoint of 2 GB: memory, and speed against a plain read", _load),
    "kvstore": Benchmark("the KV store: copies against memcpy, parity, appends, forks", _kvstore),
}
