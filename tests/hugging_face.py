"""The demo model in transformers, which tests of exactness compare with.

Loaded by the fixtures ``hugging_face`` and ``hugging_face_greedy`` of ``tests/conftest.py``. Must not import
our own models.
"""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

NO_TOKEN = 10**9
"""No token has this id, so transformers does not stop at an end."""


class Models:
    """transformers' models of one GGUF file, each made once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded = {}

    def load(self, dtype: torch.dtype, attention: str = "sdpa"):
        """The model in ``dtype``, with an implementation of attention."""
        if (dtype, attention) not in self._loaded:
            is_first = (dtype, attention) == (torch.float32, "sdpa")
            model = self._read() if is_first else self._copy(dtype, attention)
            self._loaded[dtype, attention] = model.eval()
        return self._loaded[dtype, attention]

    def _read(self):
        return AutoModelForCausalLM.from_pretrained(
            self._path.parent,
            gguf_file=self._path.name,
            dtype=torch.float32,
            attn_implementation="sdpa",
            quantization_config=GgufConfig(dequantize=True),
        )

    def _copy(self, dtype: torch.dtype, attention: str):
        """What transformers would read, but for the time that takes: parameters in ``dtype``, and buffers,
        which hold the frequencies of RoPE, in float32."""
        model = copy.deepcopy(self.load(torch.float32))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        model.set_attn_implementation(attention)
        return model


@torch.inference_mode()
def greedy(model, ids: list[int], count: int, **options) -> list[int]:
    """The ``count`` greedy tokens of transformers after one prompt. ``options``: of its ``generate``."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=NO_TOKEN,
        pad_token_id=0,
        **options,
    )
    return out[0, len(ids) :].tolist()
