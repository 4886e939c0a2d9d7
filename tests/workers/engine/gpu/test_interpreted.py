"""Engine and shards on the GPU's kernels, in triton's interpreter on CPU memory: greedy tokens in float32
equal those of transformers.

The engine takes a device's path, on a runtime that runs work late and in random order, and the model computes
as on a GPU: products in PyTorch, all between them in triton. A launch takes 50 to 400 ms in the interpreter,
so models have few layers and prompts few tokens.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from farshore.kernels.formats import KVFormat
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.select import CPU_KERNELS
from farshore.models.device_llama import DeviceLlama
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished

PLACEMENTS = {
    "local": ("triton", {"local": True}),
    "native shards": ("native", {"shards": 1}),
    "triton shards": (
        "triton",
        {"shards": 3, "shard_by": "head", "stores_on": lambda worker: DeferringRuntime(seed=1)},
    ),
}
"""Name -> the kernels of the shards, or of the engine's own store, and options of the rig."""

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU, triton compiles its kernels"),
    pytest.mark.parametrize("placement", PLACEMENTS),
    # Triton 3.6 makes bounds of loops from arrays of one element.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def ops():
    """The GPU's kernels, interpreted, with large tiles. Triton reads the variable again at the first
    launch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        made = importlib.import_module("farshore.kernels.gpu.ops")
        # A program takes about as long for a large tile as for a small one. The kernels' own tests use small
        # ones, and reach every path with short sequences.
        tuning = importlib.import_module("farshore.kernels.gpu.tuning")
        large = tuning.TileShape(block_m=64, block_n=64, warps=4, stages=1)
        patch.setattr(tuning, "partial_tiles", lambda *shape: large)
        patch.setattr(tuning, "extend_tiles", lambda *shape, **options: large)
        rotate = tuning.rotate_constants
        patch.setattr(tuning, "rotate_constants", lambda rows, dim: rotate(rows, dim) | {"ROWS": 64})
        yield made


@pytest.fixture
def answer(ops, rig, submit, monkeypatch):
    """answer(model, prompts, count, placement, ...) -> the first ``count`` tokens of each prompt's greedy
    answer, from an engine on triton's kernels that decodes all of them together. More options are the
    rig's."""

    def run(model, prompts, count, placement, **more):
        shard_kernels, options = PLACEMENTS[placement]
        # A shard's session chooses its kernels when its client is made, the engine when it is made.
        monkeypatch.setenv(CPU_KERNELS, shard_kernels)
        cluster = rig(model, memory_bytes=64 << 20, **options, **more)
        monkeypatch.setenv(CPU_KERNELS, "triton")
        engine = cluster.start(runtime=DeferringRuntime(seed=2))
        assert engine._kernels is ops
        for client in cluster.clients.values():
            native = client._session.runs_natively(torch.float32)
            assert native == (shard_kernels == "native")
        greedy = Sampling(max_tokens=count, temperature=0.0)
        running = [submit(engine, str(i), prompt, greedy) for i, prompt in enumerate(prompts)]
        for collected in running:
            result = collected.result()
            assert isinstance(result, Finished), result
            assert {worker for worker, size in result.attended_bytes.items() if size} == set(cluster.targets)
        return [collected.tokens for collected in running]

    return run


@pytest.fixture
def on_device(ops, monkeypatch):
    """on_device(model, layers=...) -> the first ``layers`` layers of a model, on the GPU's dense kernels."""

    def cut(model, *, layers):
        weights = model.weights._replace(layers=model.weights.layers[:layers])
        with monkeypatch.context() as patch:
            patch.setenv(CPU_KERNELS, "triton")
            made = DeviceLlama(replace(model.config, layers=layers), weights.dense())
        assert made._dense is importlib.import_module("farshore.kernels.gpu.dense.ops")
        return made

    return cut


def test_tokens_of_a_tiny_model(tiny_model, on_device, greedy, answer, placement):
    prompts = [list(range(3, 8)), list(range(90, 57, -1))]
    model = on_device(tiny_model, layers=tiny_model.config.layers)
    assert answer(model, prompts, 4, placement) == [greedy(prompt, 4) for prompt in prompts]


def test_tokens_with_int4_kv(tiny_model, on_device, rig, submit, answer, placement):
    """Those of an engine on the host: prefill and tails hold the same bytes."""
    prompts = [list(range(3, 8)), list(range(90, 57, -1))]
    engine = rig(tiny_model, memory_bytes=64 << 20, shards=1, format=KVFormat.INT4).start()
    running = [
        submit(engine, str(i), prompt, Sampling(max_tokens=4, temperature=0.0))
        for i, prompt in enumerate(prompts)
    ]
    assert all(isinstance(collected.result(), Finished) for collected in running)
    model = on_device(tiny_model, layers=tiny_model.config.layers)
    assert answer(model, prompts, 4, placement, format=KVFormat.INT4) == [one.tokens for one in running]


CHOSEN = ("one word", "one token", "capital", "python", "sql", "json", "russian", "digits")
"""Names of the prompts: eight, each of at most 64 tokens."""


@pytest.fixture(scope="module")
def expected(hugging_face, prompts):
    """expected(layers, count) -> the first ``count`` greedy tokens after each chosen prompt, by the demo
    model in transformers, cut off after so many layers."""
    answers = {}

    def cut(layers):
        full = hugging_face(torch.float32)
        shape = full.config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}
        model = type(full)(type(full.config).from_dict(shape))
        model.load_state_dict(full.state_dict(), strict=False)
        return model.eval()

    def continued(model, prompt, count):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    @torch.inference_mode()
    def tokens(layers, count):
        if (layers, count) not in answers:
            model = cut(layers)
            answers[layers, count] = [continued(model, prompts[name], count) for name in CHOSEN]
        return answers[layers, count]

    return tokens


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(1, marks=pytest.mark.heavy, id="1 layer"),
        pytest.param(30, marks=pytest.mark.soak, id="all layers"),
    ],
)
def test_tokens_of_the_demo_model(demo_model, on_device, prompts, expected, answer, placement, layers):
    """Eight prompts, decoded in one batch, sixteen tokens each."""
    chosen = [prompts[name] for name in CHOSEN]
    assert max(map(len, chosen)) <= 64
    model = on_device(demo_model(torch.float32), layers=layers)
    assert answer(model, chosen, 16, placement) == expected(layers, 16)
