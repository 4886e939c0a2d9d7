"""Writes the tables of ``docs/accelerators.md``: ``python -P docs/generate/accelerators.py``.

Each stands between two comments that name it; the text around them is written by hand. The figures are
computed by ``roofline``, beside this file. A test compares the committed file with what this writes.
"""

import importlib.util
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "accelerators.md"
CONTEXTS = (8192, 32_768, 131_072, 524_288, 1_048_576)
COUNTS = (1, 2, 4, 8, 16)
WIRE_CONTEXT = 32_768
ALLOWANCE = 0.2
NONE = "-"
LINE = 118
"""Characters of a line of text."""


def load_roofline() -> ModuleType:
    """The module beside this file, by its path: documents are no package."""
    spec = importlib.util.spec_from_file_location("docs_roofline", Path(__file__).with_name("roofline.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


roofline = load_roofline()
PAIRS = (
    (roofline.LLAMA_8B, roofline.H100),
    (roofline.LLAMA_8B, roofline.L4),
    (roofline.LLAMA_70B_4BIT, roofline.H100),
)
GPUS = (roofline.H100, roofline.L4)
ON_SHARDS = tuple(f"{count} shard{'s' if count > 1 else ''}" for count in COUNTS)


def text() -> str:
    """The whole of ``docs/accelerators.md``."""
    whole = TARGET.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        before, begin, rest = whole.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, f"{TARGET.name} has no place for the table {name}"
        whole = before + begin + "\n".join(table()) + f"\n{end}{after}"
    return whole


def _assumptions() -> Iterator[str]:
    shard = roofline.Shards(count=1)
    rows = [
        (name, f"{memory_bytes / 1e9:.0f} GB", f"{bandwidth_bytes_s / 1e9:,.0f} GB/s", flops)
        for name, memory_bytes, bandwidth_bytes_s, flops in (
            *((each.name, each.memory_bytes, each.bandwidth_bytes_s, _flops(each)) for each in GPUS),
            ("a shard", shard.memory_bytes, shard.bandwidth_bytes_s, ""),
        )
    ]
    yield from _table(("", "memory", "read", "bfloat16"), rows)
    yield ""
    parts = [
        f"{roofline.EFFICIENCY:.0%} of a memory's bandwidth is reached",
        f"{roofline.GEMM_EFFICIENCY:.0%} of the FLOPs",
        f"{roofline.USABLE:.0%} of a memory is usable",
        f"a hop takes {roofline.HOP_S * 1e6:.0f} µs beside its bytes",
        f"the engine's network has {roofline.LINK_BYTES_S / 1e9:g} GB/s",
    ]
    yield from textwrap.wrap(f"Assumed: {'; '.join(parts)}.", LINE)


def _room() -> Iterator[str]:
    rows = []
    for model in (roofline.LLAMA_8B, roofline.LLAMA_70B, roofline.LLAMA_70B_4BIT):
        cells = [model.name, f"{model.weight_bytes / 1e9:.1f} GB", f"{model.kv_token_bytes / 1024:.0f} KiB"]
        for gpu in GPUS:
            tokens = gpu.kv_room_bytes(model) / model.kv_token_bytes
            cells.append(f"{tokens / 1000:,.0f} thousand" if tokens > 0 else "the weights do not fit")
        rows.append(cells)
    yield from _table(("model", "weights", "KV a token", "tokens beside them: H100", "L4"), rows)


def _one_sequence() -> Iterator[str]:
    rows = []
    for model, gpu in PAIRS:
        for context in CONTEXTS:
            steps = [roofline.local_s(model, gpu, 1, context)]
            steps += [roofline.offloaded_s(model, gpu, each, 1, context) for each in _shards()]
            cells = [NONE if step is None else f"{step * 1e3:.1f}" for step in steps]
            rows.append((f"{model.name}, {gpu.name}", _tokens(context), *cells))
    yield from _table(("", "context", "local", *ON_SHARDS), rows)


def _crossings() -> Iterator[str]:
    rows = []
    for model, gpu in PAIRS:
        found = [roofline.quicker_from_tokens(model, gpu, each) for each in _shards()]
        cells = ["never" if tokens is None else f"{tokens / 1000:,.0f} thousand" for tokens in found]
        rows.append((f"{model.name}, {gpu.name}", *cells))
    yield from _table(("", *ON_SHARDS), rows)


def _many_sequences() -> Iterator[str]:
    rows = []
    for model, gpu in PAIRS:
        for context in CONTEXTS:
            best = [roofline.best_local(model, gpu, context)]
            best += [roofline.best_offloaded(model, gpu, each, context) for each in _shards()]
            cells = [NONE if each is None else f"{each[1]:,.0f} ({each[0]})" for each in best]
            fewest = roofline.fewest_shards(model, gpu, context)
            rows.append((f"{model.name}, {gpu.name}", _tokens(context), *cells, str(fewest or "over 64")))
    yield from _table(("", "context", "local", *ON_SHARDS, "enough shards"), rows)


def _wire() -> Iterator[str]:
    rows = []
    for model, gpu in PAIRS:
        for shards in (roofline.Shards(count=2), roofline.Shards(count=8)):
            for batch in (1, 16, 64):
                step_s = gpu.dense_s(model, batch) + shards.attention_s(model, batch * WIRE_CONTEXT)
                asked = {"rows": batch, "step_s": step_s, "allowance": ALLOWANCE}
                needed = [roofline.wire_bytes_s(model, copies=n, **asked) for n in (shards.count, 1)]
                rows.append(
                    (
                        f"{model.name}, {gpu.name}",
                        str(shards.count),
                        str(batch),
                        f"{step_s * 1e3:.1f} ms",
                        *(f"{each / 1e9:.2f} GB/s" for each in needed),
                        f"{ALLOWANCE * step_s / model.layers * 1e6:,.0f} µs",
                    )
                )
    head = ("", "shards", "sequences", "D + A", "bandwidth, by range", "by head", "hop of at most")
    yield from _table(head, rows)


TABLES = {
    "assumptions": _assumptions,
    "room": _room,
    "one sequence": _one_sequence,
    "crossings": _crossings,
    "many sequences": _many_sequences,
    "wire": _wire,
}


def _flops(gpu: Any) -> str:
    return f"{gpu.flops_s / 1e12:.0f} TFLOP/s"


def _shards() -> list[Any]:
    return [roofline.Shards(count=count) for count in COUNTS]


def _tokens(count: int) -> str:
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}K"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = tuple(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
