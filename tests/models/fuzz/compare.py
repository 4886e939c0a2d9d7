"""One checkpoint read by us and by transformers: equal, refused, or a Difference.

Ours is read as the gateway and a dense worker read it. An answer that differs from transformers' is a fault,
unless it is a refusal (ModelError).
"""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from farshore.errors import InvalidRequest, ModelError
from farshore.gateway.served import Served
from farshore.model_spec import ModelSpec
from farshore.models.files.source import resolve
from farshore.models.llama import Llama
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.models.weights.load import load_model

from .gguf_recipe import GgufRecipe, write_gguf
from .recipe import Recipe, write, write_json

NEW_TOKENS = 5
MOST_TOKENS = 104
TOLERANCE = 4e-4
"""Allowed difference of logits, as a share of the largest. Seen: 1e-4, and 2.4e-4 with random k-quants."""
Forward = Callable[..., Tensor]


class Difference(AssertionError):
    """Ours and transformers' answers differ."""


@dataclass(frozen=True)
class Outcome:
    """``kind``: 'equal', 'refused', 'refused by both', or 'ours alone' (transformers fails to load).
    ``reason``: the error, without what changes from draw to draw."""

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Loaded:
    model: Llama
    served: Served


def compare(recipe: Recipe, forward: Forward) -> Outcome:
    """Raises Difference."""
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        write(recipe, folder)
        ours = load(folder, recipe)
        write_json(folder / "config.json", recipe.reference_config())
        theirs = reference(folder)
        if isinstance(ours, str):
            return Outcome("refused by both" if isinstance(theirs, str) else "refused", ours)
        if isinstance(theirs, str):
            if theirs.startswith("random"):
                raise Difference(f"a model with a missing tensor was served: {theirs}")
            return Outcome("ours alone", theirs)
        model, tokenizer = theirs
        check_stops(ours.served, model, recipe)
        check_tokenizer(ours.served.tokenizer, tokenizer, recipe.prompts)
        check_answers(ours.model, model, recipe.tensors.seed, forward)
        return Outcome("equal")


def compare_gguf(recipe: GgufRecipe, forward: Forward) -> Outcome:
    """Raises Difference."""
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        path, theirs = write_gguf(recipe, folder)
        try:
            model = load_model(resolve(str(path)), dtype=torch.float32)
        except ModelError as error:
            return Outcome("refused", general(str(error), folder))
        check_answers(model, theirs, recipe.tensors.seed, forward)
        return Outcome("equal")


def load(folder: Path, recipe: Recipe) -> Loaded | str:
    """Ours, or why it is refused."""
    try:
        spec = ModelSpec(model=str(folder), **recipe.options)
        served = Served.load(spec)
        return Loaded(load_model(resolve(spec.model), dtype=torch.float32, config=served.config), served)
    except (ModelError, InvalidRequest) as error:
        return general(str(error), folder)


def reference(folder: Path) -> tuple[Any, Any] | str:
    """(model, tokenizer) of transformers, or why these files are no reference."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Each of its libraries raises its own.
        return f"{type(error).__name__}: {general(str(error), folder)}"
    if info["missing_keys"]:
        return f"random tensors: {sorted(info['missing_keys'])[:3]}"
    return model.eval(), tokenizer


def check_stops(ours: Served, model: Any, recipe: Recipe) -> None:
    """The ids that end transformers' generate, and two places that it does not read: the tokenizer's end
    token, and config.json if generation_config.json names no end."""
    # An id outside of the vocabulary ends nothing.
    theirs = _ids(model.generation_config.eos_token_id) & set(range(recipe.sizes.vocab))
    more = set(ours.tokenizer.eos_ids)
    if not _ids((recipe.generation or {}).get("eos_token_id")):
        more |= _ids(recipe.config.get("eos_token_id"))
    stop_ids = set(ours.stop_ids)
    if not theirs <= stop_ids <= theirs | more:
        raise Difference(f"stop ids {sorted(stop_ids)}, transformers {sorted(theirs)}")


def _ids(eos: int | list[int] | None) -> set[int]:
    return {eos} if isinstance(eos, int) else set(eos or ())


def check_tokenizer(ours: Tokenizer, theirs: Any, prompts: tuple[str, ...]) -> None:
    for prompt in prompts:
        for special in (True, False):
            mine = ours.encode(prompt, add_special_tokens=special)
            expected = theirs(prompt, add_special_tokens=special).input_ids
            if mine != expected:
                raise Difference(f"ids of {prompt!r} (special {special}): {mine}, transformers {expected}")
        text, expected_text = ours.decode(mine), theirs.decode(mine, skip_special_tokens=True)
        if text != expected_text:
            raise Difference(f"text of {mine}: {text!r}, transformers {expected_text!r}")
    prompt, completion = (ours.encode(text, add_special_tokens=False) for text in prompts[:2])
    before = theirs.decode(prompt, skip_special_tokens=True)
    whole = theirs.decode(prompt + completion, skip_special_tokens=True)
    stream = ours.stream(ours.prompt_end(prompt))
    streamed = "".join(map(stream.push, completion)) + stream.finish()
    if before + streamed != whole:
        raise Difference(f"stream of {completion} after {prompt}: {streamed!r}, transformers {whole!r}")


def check_answers(ours: Llama, theirs: Any, seed: int, forward: Forward) -> None:
    """Logits of every position and the greedy tokens that follow, for a short prompt and for one to the end
    of the positions, past any original length."""
    config = ours.config
    generator = torch.Generator().manual_seed(seed)
    if config.length_warning is not None:
        # Rotated like a sequence of this length, and in transformers by the length of each.
        ids = torch.randint(0, config.vocab, (config.max_positions,), generator=generator).tolist()
        check_logits(ours, theirs, ids, forward)
        return
    most = min(config.max_positions, MOST_TOKENS) - NEW_TOKENS
    for count in (min(5, most), most):
        ids = torch.randint(0, config.vocab, (count,), generator=generator).tolist()
        check_logits(ours, theirs, ids, forward)
        check_greedy(ours, theirs, ids, forward)


def check_logits(ours: Llama, theirs: Any, ids: list[int], forward: Forward) -> None:
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].float()
    require_close(forward(ours, ids), expected, f"{len(ids)} tokens")


def check_greedy(ours: Llama, theirs: Any, ids: list[int], forward: Forward) -> None:
    """transformers' cache against our pass over all tokens."""
    tokens = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for place, step in enumerate(tokens.logits):
        so_far = tokens.sequences[0, : len(ids) + place].tolist()
        require_close(forward(ours, so_far)[-1:], step, f"step {place} after {len(ids)} tokens")


def require_close(mine: Tensor, expected: Tensor, what: str) -> None:
    """Equal logits, and the same greedy token unless two are as good as equal."""
    allowed = TOLERANCE * expected.abs().max().item()
    if mine.shape != expected.shape:
        raise Difference(f"logits {list(mine.shape)} at {what}, transformers {list(expected.shape)}")
    off = (mine - expected).abs().max().item()
    if not off <= allowed:
        raise Difference(f"logits differ by {off:.2e} at {what}, allowed are {allowed:.2e}")
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * allowed
    if not torch.equal(mine.argmax(-1)[clear], expected.argmax(-1)[clear]):
        raise Difference(f"greedy tokens differ at {what}")


def general(message: str, folder: Path) -> str:
    """An error message's first line without paths and numbers, to count reasons."""
    line = message.replace(str(folder), "").strip().splitlines()[0] if message.strip() else ""
    return re.sub(r"-?\d+(\.\d+)?", "N", line)[:110]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what transformers says about these files on stderr; the comparison says it. One thread:
    more would wait for each other at tensors this small."""
    level, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)
        if progress:
            logging.enable_progress_bar()
