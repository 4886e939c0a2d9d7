"""The decode kernel over a store's segments, compared with the same kernel over one plain tensor.

Called by ``benchmark``. Each call reads the next layer, and all layers together exceed every cache.
"""

from collections.abc import Callable
from itertools import chain, cycle

import torch
from torch import Tensor

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.kernels.cold import query
from farshore.benchmarks.kernels.shapes import SMOLLM2
from farshore.benchmarks.kvstore.setting import EPOCH, Setting, key, random_bytes, store_for
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import LEAST_RUN_S, interleave
from farshore.ids import SequenceId
from farshore.kernels.base import KVLayout, Segments, WorkList
from farshore.kernels.formats import KVFormat

BAR_OF_PLAIN = 0.98


def against_plain(setting: Setting) -> Measured:
    """Decodes over a sealed span and over the same KV in one tensor, in turn."""
    tokens = setting.sizes.decode_tokens
    one_layer = KVLayout.of(SMOLLM2.spec, layers=1, format=KVFormat.BFLOAT16)
    layout = one_layer._replace(layers=setting.sizes.decode_kv_bytes // (tokens * one_layer.token_bytes) + 1)
    # A block as long as the sequence is one plain tensor, [layer][K|V][head][token][dim].
    plain = layout._replace(block_tokens=tokens)
    memory = random_bytes(plain.block_bytes)
    store = store_for(tokens, spans=1, layout=layout)
    span = store.create(key("s", layout=layout), capacity_tokens=tokens, layout=layout, epoch=EPOCH)
    for layer in range(layout.layers):
        store.write(span, layer, 0, *plain.views(memory, layer), sequence=SequenceId("s"), epoch=EPOCH)
    store.seal(span, tokens, sequence=SequenceId("s"), epoch=EPOCH)
    plain_segments = Segments.of([(0, plain.block_bytes, 0, tokens, 0, 0, plain.groups)])
    stored = store.segments(span, 0, tokens)

    over_plain = _partial(setting, plain_segments, memory, plain)
    over_store = _partial(setting, stored, store.memory, layout, first_layer=layout.layers // 2)
    timed = interleave(
        {"plain": over_plain, "store": over_store},
        rounds=setting.sizes.rounds * 2,
        warm_up=layout.layers,
        least_run_s=LEAST_RUN_S,
        limit_s=setting.sizes.limit_s,
    )
    of_plain = timed["plain"].over(timed["store"])
    layer_bytes = tokens * one_layer.token_bytes
    name = f"decode over the store's segments, {tokens} tokens, {SMOLLM2}"
    figures = {
        "segments": stored.size,
        "gbps": layer_bytes / timed["store"].median_s / 1e9,
        "plain_gbps_in_turn": layer_bytes / timed["plain"].median_s / 1e9,
        "times_the_speed_over_one_tensor": of_plain,
    }
    return [Result(name, timed["store"], figures)], [
        Bar.at_least(name, of_plain, BAR_OF_PLAIN, "x one plain tensor")
    ]


def _partial(
    setting: Setting, segments: Segments, memory: Tensor, layout: KVLayout, *, first_layer: int = 0
) -> Callable[[], None]:
    """A function that computes partial attention in the next layer at each call."""
    work = WorkList.of([(0, 1, segment, 0, layout.groups) for segment in range(segments.size)])
    positions = torch.tensor([setting.sizes.decode_tokens])
    plan = setting.implementation.plan(work, segments, memory, layout, SMOLLM2.spec, positions=positions)
    q, out = query(SMOLLM2, 1)
    layers = cycle(chain(range(first_layer, layout.layers), range(first_layer)))
    return lambda: setting.implementation.partial(plan, next(layers), q, out=out)
