"""The codec and the shard's session receive arbitrary messages, from hypothesis."""

from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.attention_offload import codec
from farshore.attention_offload.shard.session import AttendedBytes, ShardSession
from farshore.errors import InvalidRequest, NotFound
from farshore.proto import attention_pb2 as pb

NUMBERS = st.integers(0, 2**32 - 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200))
def test_no_bytes_make_the_codec_raise_anything_of_its_own(data):
    """Bytes decode to a message or raise DecodeError; a message converts or raises InvalidRequest."""
    for message, decode in ((pb.Step, codec.step_from_pb), (pb.Open, codec.model_from_pb)):
        try:
            decode(message.FromString(data))
        except (DecodeError, InvalidRequest):
            continue


STEPS = st.builds(
    pb.Step,
    step=NUMBERS,
    positions=st.lists(st.integers(0, 2**40), max_size=3),
    group0=st.integers(0, 4) | NUMBERS,
    group1=st.integers(0, 4) | NUMBERS,
    micro_batch_rows=st.lists(st.integers(0, 3) | NUMBERS, max_size=3),
    reads=st.lists(
        st.builds(
            pb.StepReads,
            reads=st.lists(
                st.builds(
                    pb.StepRead,
                    span_id=st.sampled_from(["here", "here", "here", "shard/9"]),
                    holder=st.sampled_from(["a", "a", "a", "b"]),
                    origin=st.just(0) | st.integers(0, 30),
                    first=st.integers(0, 30) | st.integers(0, 2**64 - 1),
                    last=st.integers(0, 30) | st.integers(0, 2**64 - 1),
                    group0=st.integers(0, 4) | NUMBERS,
                    group1=st.integers(0, 4) | NUMBERS,
                    first_row=st.integers(0, 3) | NUMBERS,
                    rows=st.integers(0, 3) | NUMBERS,
                ),
                max_size=3,
            ),
        ),
        min_size=1,
        max_size=2,
    ),
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(message=STEPS)
def test_a_shard_looks_at_every_number_of_a_step_before_it_reads_memory(target, message):
    """A well-formed step with bad values is refused before the kernels see it, or reads stored tokens only;
    no read goes beyond a span."""
    session = ShardSession(target.store, target.work.model, AttendedBytes())
    for read in (read for reads in message.reads for read in reads.reads):
        read.span_id = target.read.span if read.span_id == "here" else read.span_id
    try:
        step = codec.step_from_pb(message)
        session.begin(step)
    except (InvalidRequest, NotFound):
        return
    for index, batch in enumerate(step.micro_batches):
        if len(batch):
            q = target.work.query(rows=len(batch), groups=step.group1 - step.group0)
            state = session.attend(step.step, 0, index, q)
            assert not state.o.isnan().any()
