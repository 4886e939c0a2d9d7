"""The engine against transformers, with the same weights on the same device.

Called by ``benchmark``. In float32, greedy tokens must be equal. In bfloat16 transformers' own attention
implementations differ from each other, so the engine's logits may differ from one of them as much as another
one does. It must not know how fast anything is.
"""

from typing import Any

import torch

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu.engines import Placement, running
from farshore.benchmarks.gpu.setting import Setting, prompts
from farshore.benchmarks.report import Bar
from farshore.models.llama import Llama
from farshore.sampling import Sampling

MOST_DISTANCES = 2.0
"""Bar in bfloat16. A token is drawn where our logit is the greatest, so among the other's logits it is lower
than the greatest by at most twice the distance between ours and theirs."""


def float32(setting: Setting) -> Measured:
    """The small model: the number of answers that differ in any token."""
    theirs, ours = setting.small
    asked = _asked(setting, ours)
    answers = _answers(setting, ours, asked)
    wrong = 0
    with torch.inference_mode():
        for prompt, tokens in zip(asked, answers, strict=True):
            ids = torch.tensor([[*prompt, *tokens]], device=setting.device)
            logits = theirs(ids).logits[0, len(prompt) - 1 : -1]
            wrong += logits.argmax(-1).tolist() != tokens
    name = "the small random model" if setting.folder is None else "the demo model cut off"
    return [], [
        Bar.at_most(f"answers of {name}, float32", wrong, 0, f"of {len(asked)} differ from transformers")
    ]


def bfloat16(setting: Setting) -> Measured:
    """The random model of the 8B shape: how far the drawn tokens lie below transformers' best ones."""
    theirs, ours = setting.large
    asked = _asked(setting, ours)
    answers = _answers(setting, ours, asked)
    gap = distance = 0.0
    for prompt, tokens in zip(asked, answers, strict=True):
        ids = torch.tensor([[*prompt, *tokens]], device=setting.device)
        sdpa, eager = (_logits(theirs, ids, len(tokens), name) for name in ("sdpa", "eager"))
        drawn = sdpa.gather(1, torch.tensor(tokens, device=setting.device)[:, None])[:, 0]
        gap = max(gap, float((sdpa.amax(-1) - drawn).max()))
        distance = max(distance, float((sdpa - eager).abs().max()))
    value = gap / distance if distance else float(gap > 0)
    note = f"greatest gap {gap:.3g}, distance of sdpa and eager {distance:.3g}"
    unit = "x the distance of transformers' sdpa and eager"
    return [], [Bar.at_most("tokens of the random model, bfloat16", value, MOST_DISTANCES, unit, note)]


def _asked(setting: Setting, model: Llama) -> list[list[int]]:
    sizes = setting.sizes
    return prompts(sizes.answers, sizes.prompt_tokens, vocab=model.config.vocab)


def _answers(setting: Setting, model: Llama, asked: list[list[int]]) -> list[list[int]]:
    with running(model, Placement(kv_bytes=1 << 30)) as engine:
        answers = engine.answer(asked, Sampling(max_tokens=setting.sizes.answer_tokens))
    return [answer.tokens for answer in answers]


@torch.inference_mode()
def _logits(theirs: Any, ids: torch.Tensor, count: int, attention: str) -> torch.Tensor:
    """f32[count, vocab]: the logits from which the last ``count`` tokens of ``ids`` were drawn."""
    theirs.set_attn_implementation(attention)
    logits = theirs(ids, logits_to_keep=count + 1).logits[0, :-1].float()
    theirs.set_attn_implementation("sdpa")
    return logits
