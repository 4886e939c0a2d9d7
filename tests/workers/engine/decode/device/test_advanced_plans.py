"""Hundreds of steps on the plans of a GPU's kernels, which are advanced from step to step: tokens equal those
of transformers.

Triton's interpreter would take minutes. So the tiles are computed in PyTorch, by one operator that the
graphs of the deferring runtime repeat as they repeat a launch: what it reads are the tables in the plan's
room, and the arguments of its first call.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from farshore.kernels import reference
from farshore.kernels.base import State
from farshore.kernels.gpu import plans, work
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kvstore.store.arena.arena import stride_bytes
from farshore.models.device_llama import DeviceLlama
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Finished

PLANS = []
"""The plans by number: an operator takes numbers and tensors only."""


@torch.library.custom_op("farshore_test::attend_to_tiles", mutates_args=("o", "lse"))
def attend_to_tiles(
    number: int, layer: int, q: Tensor, memory: Tensor, tables: list[Tensor], o: Tensor, lse: Tensor
) -> None:
    spec, layout, heads = PLANS[number].spec, PLANS[number].layout, PLANS[number].heads
    base, stride, first, position, _, _, positions, tiles = tables
    items = []
    for row, rows, segment, pair, head0, start, stop, _ in tiles.tolist():
        if rows:
            query = pair * heads.heads + head0
            items.append(
                reference._Item(
                    rows=slice(row, row + rows),
                    heads=slice(query, query + heads.tile_heads),
                    base=int(base[segment]),
                    stride=int(stride[segment]),
                    first=int(first[segment]) + start,
                    count=stop - start,
                    position=int(position[segment]) + start,
                    layout=layout,
                    k_heads=slice(pair, pair + 1),
                    v_heads=slice(pair, pair + 1),
                )
            )
    plan = reference.Plan(tuple(items), memory, spec, positions)
    reference.partial(plan, layer, q, out=State(o, lse))


def partial(plan, layer, q, *, out):
    number = next((n for n, known in enumerate(PLANS) if known is plan), len(PLANS))
    if number == len(PLANS):
        PLANS.append(plan)
    tables = [*plan.segments, plan.positions, plan.tiles]
    attend_to_tiles(number, layer, q, plan.kv.view(torch.uint8), tables, out.o, out.lse)


KERNELS = SimpleNamespace(
    native=False,
    plan=plans.plan,
    partial=partial,
    partial_async=partial,
    wait=reference.wait,
    extend=reference.extend,
    merge=reference.merge,
)


@pytest.fixture
def advanced(monkeypatch):
    """Whether each attempt to advance a list of tiles was possible."""
    found = []
    advance = work.TileList.advance

    def observed(tiles, *args):
        found.append(advance(tiles, *args))
        return found[-1]

    monkeypatch.setattr(work.TileList, "advance", observed)
    return found


@pytest.fixture(scope="module")
def sharp(tiny, tmp_path_factory):
    """(a model of transformers, ours with the same weights). These are so large that few tokens of the
    context change the next one; the tiny model's hardly depends on any."""
    config = type(tiny.config)(**tiny.config.to_dict() | {"initializer_range": 0.3})
    torch.manual_seed(5)
    theirs = type(tiny)(config).eval()
    folder = tmp_path_factory.mktemp("sharp")
    theirs.save_pretrained(folder)
    ours = load_model(resolve(str(folder)), dtype=torch.float32)
    return theirs, DeviceLlama(ours.config, ours.weights.dense())


@pytest.fixture
def check(rig, submit, monkeypatch, sharp):
    """check([(prompt, tokens)], limits, options of the rig) -> the engine, whose answers to all prompts were
    compared with those of transformers."""
    monkeypatch.setattr("farshore.workers.engine.engine.implementation", lambda *devices, dtype: KERNELS)
    theirs, ours = sharp

    def run(asked, *, limits=None, **options):
        cluster = rig(ours, **{"memory_bytes": 64 << 20} | options)
        engine = cluster.start(runtime=DeferringRuntime(seed=7), limits=limits)
        running = [
            submit(engine, str(number), prompt, Sampling(max_tokens=tokens))
            for number, (prompt, tokens) in enumerate(asked)
        ]
        for collected, (prompt, tokens) in zip(running, asked, strict=True):
            end = collected.result()
            assert isinstance(end, Finished), end
            with torch.inference_mode():
                logits = theirs(torch.tensor([[*prompt, *collected.tokens]])).logits[0, len(prompt) - 1 : -1]
            assert len(collected.tokens) == tokens
            assert collected.tokens == logits.argmax(dim=-1).tolist()
        return engine

    yield run
    PLANS.clear()


@pytest.mark.parametrize("placement", [{"local": True}, {"shards": 2}], ids=["local", "shards"])
def test_hundreds_of_steps(check, advanced, placement):
    """Over block boundaries, and hand-offs of the tails' full blocks. Sequences end at different times."""
    prompts = [(5, 320), (200, 150), (90, 240)]
    check([([i * 7 % 97 for i in range(size)], tokens) for size, tokens in prompts], **placement)
    assert sum(advanced) > 200
    assert not all(advanced)


def test_guesses(check, advanced):
    """Several rows of one tail in a step, of which some are dropped: then tails shrink."""
    limits = EngineLimits(speculate_tokens=4)
    asked = [([5, 6, 7, 8] * 40, 200), ([i * 7 % 97 for i in range(60)], 120)]
    check(asked, limits=limits, local=True)
    assert sum(advanced) > 20


def test_parked_sequences(check, advanced, sharp, rig):
    block_bytes = rig(sharp[1]).attention.layouts[0].block_bytes
    sizes = [(250, 40), (245, 60), (255, 50), (240, 70), (3, 80)]
    asked = [([(7 * n + i) % 90 for i in range(size)], tokens) for n, (size, tokens) in enumerate(sizes)]
    engine = check(asked, local=True, memory_bytes=stride_bytes(block_bytes) * 5)
    assert engine.load().parkings > 0
    assert sum(advanced) > 20
