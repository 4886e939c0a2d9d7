"""Draws the next tokens of a batch from logits on a device, in one pass.

Draws what ``decode.sampler`` draws from each row alone, which says what the stages mean. The options of all
rows travel to the device in one buffer and the drawn tokens come back in one; between these two copies the
host waits for nothing. A stage runs for the whole batch, if any row asks for it.

Called by ``decode.draws`` where the model is on a GPU. A CPU draws row by row: there one pass takes 2 to 13
times as long for 16 rows of SmolLM2's vocabulary, and 2 to 80 times for one (EPYC Zen 4, one thread; most
with top-p, which sorts whole rows here). It must not know sequences.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farshore.errors import FarshoreError
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.token_mask import Mask, TokenMask
from farshore.workers.engine.decode.sampler import DrawnToken, least_logit, uniform, units
from farshore.workers.engine.logprobs import DAMAGED
from farshore.workers.engine.penalties import LARGEST, Adjustments, TokenCounts, adjustments, finite

_ALIGNED = 8
"""Bytes: every array in an upload starts at a multiple."""


class DrawBatch:
    """Rows of one batch, each with its options. Add all rows, then :meth:`draw` once."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._rows: list[_Row] = []
        self._masks: list[Mask] = []
        self._masked: list[int] = []
        self._changes: list[tuple[int, Adjustments]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        index: int,
        sampling: Sampling,
        *,
        tokens: Sequence[int],
        prompt_tokens: int,
        counts: TokenCounts,
        choice: int = 0,
        mask: TokenMask | None = None,
    ) -> Mask | None:
        """Adds a draw from row ``index`` of the logits. The other arguments are those of ``sampler.sample``,
        and may change after the call. Returns which tokens may be drawn; None: all. Raises FarshoreError, and
        adds nothing, if none may."""
        allowed = None if mask is None else mask.allowed(tokens, prompt_tokens)
        changes = adjustments(
            sampling, vocab=self._vocab, tokens=tokens, prompt_tokens=prompt_tokens, counts=counts
        )
        row = len(self._rows)
        if allowed is not None:
            self._masked.append(row)
            self._masks.append(allowed)
        if changes is not None:
            self._changes.append((row, changes.copy()))
        self._rows.append(_Row(index, sampling, uniform(sampling.seed, choice, len(tokens))))
        return allowed

    def draw(self, logits: Tensor, runtime: DeviceRuntime) -> list[DrawnToken | FarshoreError]:
        """Draws a token for each row, in the order in which they were added.

        ``logits``: f32[rows, vocab], not changed, on the device of ``runtime``, which the calling thread has
        entered. Waits for the work that computes them. A row whose logits are not finite gets an error in its
        place.
        """
        if not self._rows:
            return []
        answer = self.compute(logits, runtime).cpu().tolist()
        alternatives = [_alternatives(row.sampling, self._vocab) for row in self._rows]
        return [_result(*pair) for pair in zip(answer, alternatives, strict=True)]

    def compute(self, logits: Tensor, runtime: DeviceRuntime) -> Tensor:
        """The drawn tokens on the device, with all that :meth:`draw` says of them: f64[rows, numbers]. The
        host waits for nothing."""
        rows, vocab = self._rows, self._vocab
        sent = _Sent(self._arrays(), runtime)
        model = logits.index_select(0, sent["index"]).float()
        adapted = _adapted(model, sent)
        warm = [row.warm for row in rows]
        tokens = adapted.argmax(-1) if not all(warm) else None
        if any(warm):
            drawn = _drawn(adapted, sent, _Stages.of(rows, vocab))
            tokens = drawn if tokens is None else torch.where(sent["temperature"] > 0.0, drawn, tokens)
        assert tokens is not None
        columns = [tokens.double(), torch.isfinite(model).all(-1).double()]
        alternatives = [_alternatives(row.sampling, vocab) for row in rows]
        if any(count is not None for count in alternatives):
            columns += _logprobs(model, tokens, max(count or 0 for count in alternatives))
        return torch.stack(columns, -1)

    def _arrays(self) -> "dict[str, NDArray[Any]]":
        """Everything that the device needs to know. Arrays of one number for each row are columns."""
        options = [row.sampling for row in self._rows]
        vocab = self._vocab
        arrays: dict[str, NDArray[Any]] = {
            "index": np.array([row.index for row in self._rows]),
            "uniform": np.array([row.uniform for row in self._rows])[:, None],
            "top_p": np.array([max(option.top_p, 0.0) for option in options])[:, None],
            "least": np.array([least_logit(option.min_p) for option in options])[:, None],
            "top_k": np.array([_top_k(option, vocab) for option in options])[:, None],
            "temperature": np.array(
                [row.temperature if row.warm else 0.0 for row in self._rows], dtype=np.float32
            ),
        }
        for stage in Adjustments._fields:
            parts = [(row, *getattr(changes, stage)) for row, changes in self._changes]
            parts = [part for part in parts if part[1].size]
            if parts:
                arrays[stage] = np.concatenate([row * vocab + ids for row, ids, _ in parts])
                values = [np.broadcast_to(values, ids.shape) for _, ids, values in parts]
                arrays[f"{stage} by"] = np.concatenate(values)
        if self._masks:
            arrays["masked"] = np.array(self._masked)
            arrays["mask"] = np.stack(self._masks)
        return arrays


class _Row(NamedTuple):
    index: int
    sampling: Sampling
    uniform: float

    @property
    def temperature(self) -> np.float32:
        return np.float32(finite(self.sampling.temperature))

    @property
    def warm(self) -> bool:
        """Whether the token is drawn; else it is the likeliest."""
        return bool(self.temperature > 0.0)


class _Stages(NamedTuple):
    """Which stages the batch needs. ``most``: the largest top-k below the vocabulary's size; 0: none."""

    most: int
    nucleus: bool
    min_p: bool

    @classmethod
    def of(cls, rows: "Sequence[_Row]", vocab: int) -> "_Stages":
        warm = [row.sampling for row in rows if row.warm]
        limits = [_top_k(sampling, vocab) for sampling in warm]
        return cls(
            max((limit for limit in limits if limit < vocab), default=0),
            any(sampling.top_p < 1.0 for sampling in warm),
            any(sampling.min_p > 0.0 for sampling in warm),
        )


class _Sent:
    """Arrays on the device, by name: sent as one buffer."""

    def __init__(self, arrays: "dict[str, NDArray[Any]]", runtime: DeviceRuntime) -> None:
        sizes = [-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays.values()]
        starts = [0, *accumulate(sizes)]
        packed = np.empty(starts[-1], dtype=np.uint8)
        for start, array in zip(starts, arrays.values(), strict=False):
            packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = runtime.main.send(torch.from_numpy(packed))
        runtime.settle()
        self._tensors = {
            name: there[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
            for start, (name, array) in zip(starts, arrays.items(), strict=False)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors


_DTYPES = {"int64": torch.int64, "float32": torch.float32, "float64": torch.float64, "bool": torch.bool}


def _adapted(model: Tensor, sent: _Sent) -> Tensor:
    """``model`` with bias, penalties and masks, or ``model`` itself if no row has one."""
    if not any(stage in sent for stage in (*Adjustments._fields, "mask")):
        return model
    row = model.clone()
    flat = row.view(-1)
    if "bias" in sent:
        _put(flat, sent["bias"], flat[sent["bias"]] + sent["bias by"])
    if "repeated" in sent:
        logits, factor = flat[sent["repeated"]], sent["repeated by"]
        _put(flat, sent["repeated"], torch.where(logits > 0, logits / factor, logits * factor))
    if "counted" in sent:
        _put(flat, sent["counted"], flat[sent["counted"]] - sent["counted by"])
    if "mask" in sent:
        row[sent["masked"]] = row[sent["masked"]].masked_fill_(~sent["mask"], -torch.inf)
    return row


def _put(flat: Tensor, index: Tensor, values: Tensor) -> None:
    flat[index] = values.clamp_(-LARGEST, LARGEST)


def _drawn(adapted: Tensor, sent: _Sent, stages: _Stages) -> Tensor:
    """The drawn token of each row, i64[rows]. Rows without a temperature draw any."""
    vocab = adapted.shape[-1]
    # Not `where` by a number, which copies the number to the device and waits.
    warm = sent["temperature"].masked_fill(sent["temperature"] <= 0.0, 1.0)
    # By a tensor: PyTorch multiplies by the reciprocal of a number.
    logits = (adapted - adapted.amax(-1, keepdim=True)) / warm[:, None]
    weights = logits.double().exp_()
    order = descending = None
    if stages.nucleus:
        descending, order = logits.sort(dim=-1, descending=True, stable=True)
    elif stages.most:
        descending = logits.topk(stages.most, dim=-1).values
    if stages.most:
        assert descending is not None
        kth = descending.gather(-1, sent["top_k"].clamp(max=descending.shape[-1]) - 1)
        weights = weights.masked_fill_((logits < kth) & (sent["top_k"] < vocab), 0.0)
    parts = (weights * units(vocab)).round_()
    if order is not None:
        sums = parts.gather(-1, order).cumsum_(-1)
        before = torch.searchsorted(sums, sent["top_p"] * sums[:, -1:])
        ranks = torch.arange(vocab, device=logits.device)
        outside = (ranks > before) & (sent["top_p"] < 1.0)
        parts.masked_fill_(torch.empty_like(outside).scatter_(-1, order, outside), 0.0)
    if stages.min_p:
        parts.masked_fill_(logits < sent["least"], 0.0)
    sums = parts.cumsum_(-1)
    tokens = torch.searchsorted(sums, sent["uniform"] * sums[:, -1:], right=True)[:, 0]
    return tokens.clamp_(max=vocab - 1)  # Logits that are not numbers have no sums.


def _logprobs(model: Tensor, tokens: Tensor, most: int) -> list[Tensor]:
    """Columns: the log-probability of each token, ``most`` likeliest ids, and their log-probabilities."""
    vocab = model.shape[-1]
    largest = model.amax(-1, keepdim=True)
    log_sum = largest.double() + (model - largest).double().exp_().sum(-1, keepdim=True).log_()
    columns = [model.gather(-1, tokens[:, None]).double() - log_sum]
    if most:
        # Whole numbers in the order of the logits, below them the smallest id first: no two are equal.
        bits = (model + 0.0).view(torch.int32)  # -0.0 becomes 0.0.
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        keys = (ordered << 32) + torch.arange(vocab - 1, -1, -1, device=model.device)
        ids = vocab - 1 - (keys.topk(most, dim=-1).values & 0xFFFFFFFF)
        columns += [ids.double(), model.gather(-1, ids).double() - log_sum]
    return list(torch.cat(columns, -1).unbind(-1))


def _result(answer: list[float], alternatives: int | None) -> DrawnToken | FarshoreError:
    """One row of the device's answer."""
    token, is_finite, *logprobs = answer
    if not is_finite:
        return FarshoreError(DAMAGED)
    if alternatives is None:
        return DrawnToken(int(token))
    most = len(logprobs) // 2
    ids, values = logprobs[1 : 1 + most], logprobs[1 + most :]
    top = tuple((int(id), value) for id, value in zip(ids, values, strict=True))
    return DrawnToken(int(token), logprobs[0], top[:alternatives])


def _top_k(sampling: Sampling, vocab: int) -> int:
    """``vocab``: all tokens."""
    return sampling.top_k if 0 < sampling.top_k < vocab else vocab


def _alternatives(sampling: Sampling, vocab: int) -> int | None:
    return None if sampling.logprobs is None else min(max(sampling.logprobs, 0), vocab)
