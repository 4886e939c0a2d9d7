"""Greedy tokens in float32 equal those of transformers, for every placement of the KV."""

import pytest
import torch

from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished


@pytest.fixture(scope="module")
def fresh_blocks(prompts):
    """Prompt name -> number of its full blocks that no other prompt begins with."""

    def shared(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    return {
        name: len(ids) // 256
        - max(shared(ids, other) // 256 for other in prompts.values() if other is not ids)
        for name, ids in prompts.items()
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("shards", "shard_by", "local", "classes"),
    [
        (1, "range", False, (1,)),
        (2, "range", False, (2,)),
        (3, "range", False, (3,)),
        (3, "head", False, (1, 1, 1)),
        (5, "both", False, (2, 2, 1)),
        (0, "range", True, (1,)),
    ],
    ids=["1 by range", "2 by range", "3 by range", "3 by head", "5 by both", "local"],
)
def test_greedy_tokens_equal_transformers(
    demo_model, rig, submit, prompts, greedy_float32, fresh_blocks, shards, shard_by, local, classes
):
    """``classes``: for each range of head groups, the number of shards that split its tokens."""
    cluster = rig(demo_model(torch.float32), shards=shards, shard_by=shard_by, local=local)
    engine = cluster.start()
    running = {
        name: submit(engine, name, ids, Sampling(max_tokens=len(greedy_float32[name]), temperature=0.0))
        for name, ids in prompts.items()
    }
    for name, collected in running.items():
        result = collected.result()
        assert isinstance(result, Finished), (name, result)
        assert collected.tokens == greedy_float32[name], name
        used = {worker for worker, size in result.attended_bytes.items() if size}
        assert used <= set(cluster.targets)
        assert len(used) >= sum(min(class_shards, max(1, fresh_blocks[name])) for class_shards in classes), (
            name
        )
        if name in ("two blocks", "long"):
            assert fresh_blocks[name] >= 2


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["explain", "block plus one"])
def test_log_probabilities_of_a_prompt_equal_transformers(
    demo_model, rig, submit, prompts, hugging_face, name
):
    engine = rig(demo_model(torch.float32), shards=2).start()
    collected = submit(engine, name, prompts[name], Sampling(max_tokens=1, prompt_logprobs=5))
    assert isinstance(collected.result(), Finished)
    ids = torch.tensor([prompts[name]])
    with torch.inference_mode():
        expected = torch.log_softmax(hugging_face(torch.float32)(ids).logits[0, :-1].double(), dim=-1)
    found = collected.prompt[1:]
    own = expected.gather(1, ids[0, 1:, None])[:, 0]
    assert torch.tensor([token.logprob for token in found]).sub(own).abs().max() < 1e-3
    best = torch.tensor([[value for _, value in token.top] for token in found])
    assert best.sub(expected.topk(5).values).abs().max() < 1e-3
