"""The quality of each KV format: perplexity of a text, and finding a needle in it, each compared with bf16.

Called through ``catalogue``. All tokens pass through the engine's own prefill, stores and decode steps, with
KV in the format measured. All formats read the same tokens, so differences between them are not due to
sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import torch

from farshore.benchmarks.machine import Facts
from farshore.benchmarks.quality.rig import Answer, Reader, Score
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing
from farshore.errors import InvalidRequest
from farshore.kernels.formats import KVFormat
from farshore.models.files.source import DEMO, resolve
from farshore.models.llama import Llama
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.models.weights.load import load_model

FORMATS = {"bf16": KVFormat.BFLOAT16, "int8": KVFormat.INT8, "int4": KVFormat.INT4}
MOST_INT8_CHANGE_PERCENT = 0.5

TEXT = "texts/alice.txt"
NEEDLE = "The secret number of the old lighthouse is {number}. Remember it."
QUESTION = "\n\nThe secret number of the old lighthouse is"
NUMBERS = ("48213", "70596", "31847")

Load = Callable[[int], tuple[Llama, Tokenizer]]
"""Called with a number of threads; returns a model that uses them, and its tokenizer."""

Comparison = tuple[Result, list[Bar]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much text is read. Tests use tiny sizes."""

    windows: int = 2
    """Ranges of the text, each read as one prompt."""
    window_tokens: int = 4608
    haystack_tokens: int = 4096
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Positions of the needle, from the beginning (0) to the end (1)."""


def run(load: Load, facts: Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Measures the cases whose name contains ``only``, and the same case in bf16 to compare with.
    InvalidRequest, before any text is read, if there are none."""
    names = {case: [f for f in FORMATS if only in f"{case}, {f}"] for case in ("perplexity", "needle")}
    if not any(names.values()):
        raise InvalidRequest(f"no case holds {only!r}: choose from perplexity, needle, {', '.join(FORMATS)}")
    model, tokenizer = load(facts.threads)
    text = files("farshore.benchmarks").joinpath(TEXT).read_text(encoding="utf-8")
    results: list[Result] = []
    bars: list[Bar] = []
    cases: tuple[tuple[str, Callable[..., Any], Callable[..., Comparison]], ...] = (
        ("perplexity", _perplexity, _compare_perplexity),
        ("needle", _needles, _compare_needles),
    )
    for case, measure, compare in cases:
        measured = {}
        for format in dict.fromkeys(("bf16", *names[case])) if names[case] else ():
            progress(f"{case}, {format}")
            with Reader(model, FORMATS[format]) as reader:
                measured[format] = measure(reader, tokenizer, text, sizes)
        for format, measurement in measured.items():
            result, new_bars = compare(format, measurement, measured["bf16"])
            results.append(result)
            bars += new_bars
    return Report(asdict(facts) | {"model": DEMO, "text": TEXT}, tuple(results), tuple(bars))


def load_demo(threads: int) -> tuple[Llama, Tokenizer]:
    torch.set_num_threads(threads)
    source = resolve(DEMO)
    return load_model(source, dtype=torch.bfloat16, threads=threads), load_tokenizer(source)


def _perplexity(reader: Reader, tokenizer: Tokenizer, text: str, sizes: Sizes) -> Score:
    tokens = tokenizer.encode(text)
    size = sizes.window_tokens
    if len(tokens) < sizes.windows * size:
        raise InvalidRequest(f"{TEXT} has {len(tokens)} tokens: {sizes.windows} windows of {size} need more")
    return Score.joined(reader.score(tokens[i * size : (i + 1) * size]) for i in range(sizes.windows))


def _compare_perplexity(format: str, score: Score, bf16: Score) -> Comparison:
    name = f"perplexity, {format}"
    change_percent = (score.perplexity / bf16.perplexity - 1) * 100
    figures = {
        "perplexity": score.perplexity,
        "change_percent": change_percent,
        "predicted_tokens": len(score.logprobs),
        "same_best_token_percent": float((score.best == bf16.best).float().mean()) * 100,
        "mean_logprob_distance": float((score.logprobs - bf16.logprobs).abs().mean()),
    }
    bars = []
    if format == "int8":
        bars.append(Bar.at_most(f"{name}, change", abs(change_percent), MOST_INT8_CHANGE_PERCENT, "%"))
    return Result(name, Timing((score.seconds,)), figures), bars


@dataclass(frozen=True, slots=True)
class _Needle:
    depth: float
    expected: list[int]
    answer: Answer

    @property
    def found(self) -> bool:
        return self.answer.tokens == self.expected


def _needles(reader: Reader, tokenizer: Tokenizer, text: str, sizes: Sizes) -> list[_Needle]:
    """For each depth, the number that was hidden and the model's answer."""
    needles = []
    for depth, number in zip(sizes.depths, NUMBERS, strict=False):
        expected = tokenizer.encode(f" {number}")
        hay = _haystack(tokenizer, text, sizes.haystack_tokens, depth, NEEDLE.format(number=number))
        answer = reader.answer(tokenizer.encode(hay + QUESTION), most_tokens=len(expected))
        needles.append(_Needle(depth, expected, answer))
    return needles


def _compare_needles(format: str, needles: Sequence[_Needle], bf16: Sequence[_Needle]) -> Comparison:
    name = f"needle, {format}"
    found, of_bf16 = (sum(needle.found for needle in each) for each in (needles, bf16))
    depths = {True: "found_at_depths", False: "missed_at_depths"}
    figures: dict[str, float | int | str | None] = {"found": found, "of": len(needles)} | {
        key: " ".join(f"{needle.depth:g}" for needle in needles if needle.found is which) or None
        for which, key in depths.items()
    }
    bars = [Bar.at_least(f"{name}, found", found, of_bf16, "needles, as bf16")] if format == "int8" else []
    return Result(name, Timing(tuple(needle.answer.seconds for needle in needles)), figures), bars


def _haystack(tokenizer: Tokenizer, text: str, tokens: int, depth: float, needle: str) -> str:
    """The first paragraphs of the text, at most ``tokens`` tokens, with the needle between two of them."""
    paragraphs: list[str] = []
    before, length = None, 0
    for paragraph in text.split("\n\n"):
        length += len(tokenizer.encode(paragraph + "\n\n"))
        if length > tokens:
            break
        if before is None and length > depth * tokens:
            before = len(paragraphs)
        paragraphs.append(paragraph)
    paragraphs.insert(len(paragraphs) if before is None else before, needle)
    return "\n\n".join(paragraphs)
