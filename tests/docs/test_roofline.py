"""The model behind the tables of ``docs/accelerators.md``, and what the text around them says of them."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
CONTEXTS = [1 << power for power in range(12, 21)]


@pytest.fixture(scope="module")
def roofline():
    spec = importlib.util.spec_from_file_location("docs_accelerators", DOCS / "generate" / "accelerators.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.roofline


@pytest.fixture(scope="module")
def prose():
    """The document without its tables, in one line."""
    text = re.sub(
        r"<!-- [\w ]+ -->\n.*?<!-- end -->", "", (DOCS / "accelerators.md").read_text(), flags=re.DOTALL
    )
    return " ".join(text.split())


def test_the_models_are_as_large_as_they_are_called(roofline):
    assert roofline.LLAMA_8B.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert roofline.LLAMA_70B.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert (roofline.LLAMA_8B.kv_token_bytes, roofline.LLAMA_70B.kv_token_bytes) == (128 << 10, 320 << 10)


def test_a_local_step_reads_weights_and_kv_and_stops_at_the_gpus_memory(roofline):
    model, gpu = roofline.LLAMA_8B, roofline.H100
    read = model.step_parameters * 2 + 10_000 * model.kv_token_bytes
    assert roofline.local_s(model, gpu, 1, 10_000) == pytest.approx(read / (0.8 * 3.35e12))
    most = int(gpu.kv_room_bytes(model) / model.kv_token_bytes)
    assert roofline.local_s(model, gpu, 1, most) and roofline.local_s(model, gpu, 1, most + 1) is None
    # A large batch is bounded by the products.
    assert gpu.dense_s(model, 4096) == pytest.approx(2 * 4096 * model.step_parameters / (0.6 * 989e12))


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_where_shards_become_quicker_both_steps_take_the_same_time(roofline, count):
    shards, crossed = roofline.Shards(count=count), 0
    for model, gpu in ((roofline.LLAMA_8B, roofline.H100), (roofline.LLAMA_8B, roofline.L4)):
        tokens = roofline.quicker_from_tokens(model, gpu, shards)
        assert (tokens is None) == (count * 460e9 <= gpu.bandwidth_bytes_s)
        if tokens is not None and tokens * model.kv_token_bytes <= gpu.kv_room_bytes(model):
            local, offloaded = (
                roofline.local_s(model, gpu, 1, tokens),
                roofline.offloaded_s(model, gpu, shards, 1, tokens),
            )
            assert local == pytest.approx(offloaded)
            crossed += 1
    assert crossed >= 1


def test_two_micro_batches_are_taken_only_where_they_are_quicker(roofline):
    model, gpu, shards = roofline.LLAMA_8B, roofline.H100, roofline.Shards(count=8)
    for rows in (1, 2, 16, 256):
        parts = [gpu.dense_s(model, rows), shards.attention_s(model, rows * 8192), shards.wire_s(model, rows)]
        step_s = roofline.offloaded_s(model, gpu, shards, rows, 8192)
        assert max(parts[:2]) <= step_s <= sum(parts)
    assert step_s < sum(parts)


def test_what_does_not_fit_into_the_shards_is_no_step(roofline):
    most = int(0.9 * 2 * 768e9 / roofline.LLAMA_8B.kv_token_bytes)
    asked = (roofline.LLAMA_8B, roofline.H100, roofline.Shards(count=2), 1)
    assert roofline.offloaded_s(*asked, most) and roofline.offloaded_s(*asked, most + 1) is None
    assert roofline.offloaded_s(roofline.LLAMA_70B, *asked[1:], 1000) is None


def test_laminas_own_figure(roofline):
    """70B on an H100, attention on an H20, a batch of 300: at most 30 GB/s at 20%."""
    model = roofline.LLAMA_70B
    step_s = model.weight_bytes / 3.35e12 + 300 * 8192 * model.kv_token_bytes / 4e12
    needed = roofline.wire_bytes_s(model, rows=300, copies=1, step_s=step_s, allowance=0.2)
    assert 10e9 < needed < 30e9


def test_the_text_says_what_the_tables_show(roofline, prose):
    model, h100, l4 = roofline.LLAMA_8B, roofline.H100, roofline.L4
    assert "An H100 reads as fast as seven shards" in prose and round(h100.bandwidth_bytes_s / 460e9) == 7
    assert "more tokens a second from six shards on" in prose
    assert max(roofline.fewest_shards(model, h100, context) for context in CONTEXTS[1:]) == 6
    assert "An L4 reads slower than one shard" in prose and l4.bandwidth_bytes_s < 460e9
    assert "one shard pays at 8K already" in prose and roofline.fewest_shards(model, l4, 8192) == 1
    rooms = [gpu.kv_room_bytes(model) / model.kv_token_bytes for gpu in (h100, l4)]
    assert "427 thousand tokens of KV (H100) or 42 thousand (L4)" in prose
    assert [round(room / 1000) for room in rooms] == [427, 42]
    eight, sixteen = (
        roofline.best_offloaded(model, h100, roofline.Shards(count=n), 8192)[1] for n in (8, 16)
    )
    assert "Sixteen shards do less at 8K than eight" in prose and sixteen < eight
    assert "Nothing on this page was measured on a GPU" in prose
