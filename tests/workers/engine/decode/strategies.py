"""Random sampling options, and random rows of logits."""

from hypothesis import strategies as st

from farshore.sampling import Sampling
from farshore.workers.engine.penalties import LARGEST

# Any finite float64; float32's limits and usual values are drawn more often.
floats = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e-38, 1e-45, 1e-46, 5e-324, LARGEST, -LARGEST, 1e300, -1e300, 100.0]),
    st.floats(0.0, 2.0),
)
integers = st.one_of(st.integers(-2, 60), st.integers(-(1 << 70), 1 << 70))
anything = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=floats,
    top_k=integers,
    top_p=floats,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    logit_bias=st.dictionaries(integers, floats, max_size=4),
    logprobs=st.none() | integers,
    seed=integers,
)
up_to_2 = st.floats(-2.0, 2.0, width=32)
# Values that the gateway accepts (gateway/requests/sampling_limits.py), in float32 as on the wire.
accepted = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=st.floats(0.0, 2.0, width=32),
    top_k=st.integers(0, (1 << 32) - 1),
    top_p=st.floats(0.0, 1.0, width=32, exclude_min=True),
    min_p=st.floats(0.0, 1.0, width=32),
    repetition_penalty=st.floats(0.0, 10.0, width=32, exclude_min=True),
    presence_penalty=up_to_2,
    frequency_penalty=up_to_2,
    logit_bias=st.dictionaries(st.integers(0, 40), st.floats(-100.0, 100.0, width=32), max_size=4),
    logprobs=st.none() | st.integers(0, 20),
    seed=st.integers(0, (1 << 64) - 1),
)
logit = st.one_of(
    st.floats(-30.0, 30.0, width=32),
    st.sampled_from([0.0, 3e38, -3e38, LARGEST, -LARGEST, 1e-45]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
rows_of_logits = st.one_of(
    st.lists(logit, min_size=1, max_size=40),
    # Rows of more than one block of the partial sums.
    st.builds(
        lambda values, vocab: [values[i % len(values)] for i in range(vocab)],
        st.lists(logit, min_size=1, max_size=5),
        st.integers(1, 600),
    ),
)
