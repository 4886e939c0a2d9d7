"""The sampler can draw with all parameters that pass validation, for any numbers that a client can send."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests import sampling as sampling_limits
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling
from farshore.workers.engine.decode.sampler import sample
from farshore.workers.engine.penalties import TokenCounts

VOCAB = 12
# Values at the edges of the ranges, on both sides, and far outside.
_edges = st.sampled_from([0.0, 1.0, 2.0, -2.0, 0.01, 100.0, 1e-6, 1e-7, 1e-38, 1e-45, 3e38, 10.0])


def _floats(low, high):
    return _mostly(st.none() | st.floats(low, high, width=32), _edges | st.floats(width=32))


def _mostly(allowed, anything):
    return st.integers(0, 19).flatmap(lambda roll: allowed if roll else anything)


_ints = st.integers(0, 40) | st.integers(0, 2**32 - 1)
SAMPLINGS = st.builds(
    api.Sampling,
    temperature=_floats(0, 2),
    top_p=_floats(2**-20, 1),
    top_k=st.none() | _ints,
    min_p=_floats(0, 1),
    repetition_penalty=_floats(0.015625, 100),
    presence_penalty=_floats(-2, 2),
    frequency_penalty=_floats(-2, 2),
    logit_bias=_mostly(
        st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=VOCAB),
        st.dictionaries(st.integers(0, VOCAB), st.floats(width=32), max_size=2),
    ),
    logprobs=_mostly(st.none() | st.integers(0, VOCAB), _ints),
    n=_mostly(st.none() | st.integers(1, 32), _ints),
    seed=st.none() | st.integers(0, 2**64 - 1),
    max_tokens=_mostly(st.none() | st.integers(1, 99), _ints),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
)


def _resolved(asked):
    return Sampling.from_message(asked)


@given(SAMPLINGS, st.lists(st.floats(-1e4, 1e4, width=32), min_size=VOCAB, max_size=VOCAB))
@settings(max_examples=600, deadline=None)
def test_parameters_that_pass_can_be_sampled_with(asked, logits):
    try:
        sampling_limits.check(asked, vocab=VOCAB, limits=Limits())
    except InvalidRequest as error:
        assert len(str(error)) <= 200
        return
    # Overflow to infinity is expected where a weight is nearly 0; invalid operations raise.
    with np.errstate(over="ignore", under="ignore", invalid="raise", divide="raise"):
        choice = sample(
            torch.tensor(logits),
            _resolved(asked),
            tokens=[1, 2, 2, 3, 3, 3],
            prompt_tokens=2,
            counts=TokenCounts(),
        )
    assert 0 <= choice.token < VOCAB
    assert len(choice.top) == (asked.logprobs if asked.HasField("logprobs") else 0)
