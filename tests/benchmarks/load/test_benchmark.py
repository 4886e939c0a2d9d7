"""The benchmark of loading, on a tiny checkpoint that is read as transformers reads it."""

import pytest
import torch
from transformers import LlamaForCausalLM

from farshore.benchmarks import machine
from farshore.benchmarks.load import benchmark as load
from farshore.benchmarks.load.checkpoint import Shape, write
from farshore.errors import InvalidRequest
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model

SHAPE = Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=100, files=3)


def test_checkpoint(tmp_path):
    assert len(write(tmp_path, SHAPE)) == 3
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    ours = load_model(resolve(str(tmp_path)), dtype=torch.bfloat16).weights
    assert torch.equal(ours.head, theirs["lm_head.weight"])
    assert torch.equal(ours.layers[1].down, theirs["model.layers.1.mlp.down_proj.weight"])


def test_report():
    report = load.run(
        machine.facts(1), load.Sizes(SHAPE, rounds=1), only="known", progress=lambda _: None
    ).as_dict()
    assert [result["name"] for result in report["results"]] == ["plain read", "bfloat16, known content"]
    assert report["results"][1]["contents"] == 1
    (bar,) = report["bars"]
    assert bar["name"] == "bfloat16, known content, peak memory" and bar["value"] > 0


def test_unknown_case():
    with pytest.raises(InvalidRequest, match="choose from bfloat16"):
        load.run(machine.facts(1), load.Sizes(), only="nothing", progress=lambda _: pytest.fail("measured"))
