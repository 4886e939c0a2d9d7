"""The kernel benchmark at tiny sizes: it reports every bar and reads every layer. Speed is not tested."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from farshore.benchmarks.catalogue import BENCHMARKS, Options
from farshore.benchmarks.kernels import benchmark as kernels
from farshore.benchmarks.kernels.implementation import choose, import_module
from farshore.benchmarks.kernels.shapes import LLAMA_8B, SMOLLM2
from farshore.errors import InvalidRequest


@pytest.fixture
def report(reference, machine, tiny):
    return kernels.run(reference, machine, tiny, progress=lambda _: None)


def test_the_bars(report):
    bars = Counter((bar.bound, bar.unit) for bar in report.bars)
    assert bars == {
        (85, "% of read bandwidth"): 1,
        (75, "% of read bandwidth"): 1,
        (70, "% of read bandwidth"): 1,
        (3, "x PyTorch SDPA"): 1,
        (1.6, "x bfloat16 tokens/s"): 2,
        (2, "x bfloat16 tokens/s"): 2,
        (4, "x 3 separate segments"): 2,
        (65, "% of GEMM rate"): 4,
        (10, "µs"): 2,
    }
    assert len({(bar.name, bar.unit) for bar in report.bars}) == len(report.bars)
    assert {bar.name for bar in report.bars} <= {result.name for result in report.results}


def test_the_json_names_machine_results_and_bars(report):
    told = json.loads(json.dumps(report.as_dict()))
    assert set(told) == {"machine", "results", "bars"}
    assert told["machine"]["implementation"] == "reference"
    assert told["machine"]["read_buffer_bytes"] == 8192
    assert all(result["timing"]["runs"] == 3 for result in told["results"])


def test_only_the_selected_cases_run(reference, machine, tiny):
    report = kernels.run(reference, machine, tiny, only="extend on 7", progress=lambda _: None)
    assert [result.name for result in report.results] == [
        f"extend bfloat16, 5 new on 7 past, {shape}" for shape in (SMOLLM2, LLAMA_8B)
    ]


def test_an_unknown_case_is_refused_before_anything_is_measured(reference, machine, tiny):
    with pytest.raises(InvalidRequest, match="no case 'splits': choose a part of decode, 32/8 heads"):
        kernels.run(reference, machine, tiny, only="splits", progress=lambda _: pytest.fail("measured"))


def test_sdpa_gets_as_many_tokens_as_time_allows(reference, machine, tiny):
    for run_s, tokens in ((100.0, 5), (0.0, 1)):
        sizes = replace(tiny, sdpa_run_s=run_s)
        report = kernels.run(reference, machine, sizes, only="extend on 7", progress=lambda _: None)
        assert [result.figures["sdpa_new_tokens"] for result in report.results] == [tokens] * 2


def test_the_requested_amount_of_kv_is_read_in_rotation(report, tiny):
    sizes = [result.figures["kv_bytes"] for result in report.results if "kv_bytes" in result.figures]
    assert len(sizes) == 9 and min(sizes) > tiny.kv_bytes


def test_layers_are_read_in_turn(reference, machine, tiny):
    calls = []
    spy = reference._replace(partial=lambda plan, layer, q, *, out: calls.append((plan, layer)))
    kernels.run(spy, machine, tiny, progress=lambda _: None)
    layers_by_plan = {}
    for plan, layer in calls:
        layers_by_plan.setdefault(id(plan), []).append(layer)
    assert len(layers_by_plan) == 3 + 2 * 2 * 2 + 2 * 2 + 1
    for layers in layers_by_plan.values():
        count = max(layers) + 1
        assert all((after - before) % count == 1 % count for before, after in pairwise(layers))


def test_kernels_are_chosen_by_name():
    assert choose("reference", threads=1).name == "reference"
    with pytest.raises(InvalidRequest, match="choose from cpu, reference"):
        choose("abacus", threads=1)


@pytest.fixture
def without_native_kernels(monkeypatch):
    def importing(name):
        if name.endswith(".cpu.attention"):
            raise ImportError("no compiler")
        return import_module(name)

    monkeypatch.setattr("farshore.benchmarks.kernels.implementation.import_module", importing)


def test_the_reference_is_used_if_no_native_kernels_are_built(without_native_kernels):
    assert choose(None, threads=1).name == "reference"
    with pytest.raises(InvalidRequest, match="cpu kernels are not built here: no compiler"):
        choose("cpu", threads=1)


def test_native_kernels_are_preferred_and_get_their_thread_count(monkeypatch):
    told = {}
    native = SimpleNamespace(
        instruction_sets=["abacus 2", "abacus"],
        plan=lambda **given: told.update(plan=given),
        partial=None,
        extend=lambda **given: told.update(extend=given),
        merge=lambda: told.update(merge={}),
    )
    monkeypatch.setattr(
        "farshore.benchmarks.kernels.implementation.import_module",
        {"farshore.kernels.cpu.attention": native}.__getitem__,
    )
    chosen = choose(None, threads=1)
    assert (chosen.name, chosen.instruction_set) == ("cpu", "abacus 2")
    for operation in ("plan", "extend", "merge"):
        getattr(chosen, operation)()
    assert told == {"plan": {"threads": 1}, "extend": {"threads": 1}, "merge": {}}


def test_wrong_options_are_refused_before_anything_is_measured():
    with pytest.raises(InvalidRequest):
        BENCHMARKS["kernels"].run(Options(implementation="abacus"), lambda _: pytest.fail("measured"))
