"""Draws the hostile requests of ``bench faults`` from a seed; the same seed gives the same requests.

Pure. Called by ``faults.hostile``, which sends them. Must not know what a server answers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from farshore.proto import inference_pb2 as api

VOCAB = 49_152
"""The size of SmolLM2's vocabulary."""
MOST_UINT32 = 2**32 - 1
TINY, HUGE = 1e-38, 3e38
"""About the smallest normal and the largest float32."""
NAN, INF = math.nan, math.inf
WORDS = (
    "sea",
    "lamp",
    "wind",
    "ship",
    "keeper",
    "storm",
    "{",
    "\n\n",
    "1815",
    "und",
    "água",
    "🎉",
    "<|im_end|>",
)


class HostileKind(StrEnum):
    """The kinds of hostile requests; each value is the kind's name in reports."""

    IDS = "hostile ids"
    SIZES = "sizes"
    CHOICES = "choices"
    LOGPROBS = "logprobs"
    PENALTIES = "penalties"
    TEMPERATURE = "temperature"
    STOPS = "stops"
    BIAS = "bias"
    CANCEL_AT_ONCE = "cancel at once"
    CANCEL_MIDWAY = "cancel in mid-stream"
    CANCEL_BEFORE = "cancel before"
    RESUME = "resume"
    DISCONNECT = "disconnect in mid-stream"
    SLOW_READER = "slow reader"
    STALLED_READER = "stalled reader"
    GARBAGE = "garbage bytes"
    OVERSIZE = "oversize message"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """A hostile request and the behaviour of its client.

    ``message`` is the serialised GenerateRequest, which contains ``request_id``. After ``after_tokens``
    tokens the client cancels, leaves or stalls. It waits ``hold_s`` seconds then, or before each read.
    ``resumed`` is the serialised request with which it resumes. ``garbage`` is sent to the port instead of a
    request."""

    number: int
    kind: HostileKind
    request_id: str = ""
    message: bytes = b""
    after_tokens: int = 0
    hold_s: float = 0.0
    resumed: bytes = b""
    garbage: bytes = b""


def deal(seed: int, requests: int) -> Iterator[Hostile]:
    """Yields ``requests`` requests, one at a time: all of them take gigabytes.

    The numbers of requests of any two kinds differ by one at most. Request i does not depend on
    ``requests``."""
    dealer, kinds = Random(f"{seed} kinds"), list(HostileKind)
    for number in range(requests):
        if number % len(kinds) == 0:
            dealer.shuffle(kinds)
        kind = kinds[number % len(kinds)]
        yield _MAKERS[kind](Random(f"{seed} {number}"), number, kind)


def _prompt(draw: Random, *, words: int | None = None) -> str:
    return " ".join(draw.choices(WORDS, k=words or draw.randint(1, 60)))


def _sampling(draw: Random, **fields: object) -> api.Sampling:
    """Sampling of some tokens and a few choices, unless ``fields`` says otherwise. One in eight needs several
    blocks."""
    length = draw.randint(200, 400) if draw.random() < 1 / 8 else draw.randint(4, 40)
    given: dict[str, object] = {"max_tokens": length, "temperature": draw.choice((0.0, 0.7, 1.0))}
    if draw.random() < 1 / 4:
        given |= {"n": draw.randint(2, 4), "temperature": 1.0}
    given |= fields
    bias = given.pop("logit_bias", {})
    return api.Sampling(seed=draw.getrandbits(32), logit_bias=bias, **given)


def _id(draw: Random, number: int) -> str:
    return f"hostile-{number}-{draw.getrandbits(32):08x}"


def _hostile(number: int, kind: HostileKind, request: api.GenerateRequest, **more: object) -> Hostile:
    wire = request.SerializeToString(deterministic=True)
    return Hostile(number=number, kind=kind, request_id=request.request_id, message=wire, **more)


def _ids(draw: Random, number: int, kind: HostileKind) -> Hostile:
    """Request ids that resemble other requests' ids, their choices, or paths; some ids repeat often."""
    bystander, other = draw.randrange(8), draw.randrange(max(1, number))
    name = draw.choice(
        (
            "a",
            "a/1",
            "a/0",
            f"bystander-{bystander}",
            f"bystander-{bystander}/{draw.randrange(4)}",
            f"hostile-{other}",
            f"{bystander}",
            "../../etc/passwd",
            "\0",
            "\r\nx: y",
            "a" * draw.choice((127, 128, 129, 5000)),
            "".join(chr(draw.choice((0x202E, 0x1F389, 0x0, 0xFFFF, 0x41))) for _ in range(12)),
            "%s%n{0}${x}",
            "/",
            " ",
        )
    )
    sampling = _sampling(draw, n=draw.randint(1, 3), temperature=1.0)
    return _hostile(number, kind, api.GenerateRequest(text=_prompt(draw), request_id=name, sampling=sampling))


def _sizes(draw: Random, number: int, kind: HostileKind) -> Hostile:
    sampling = _sampling(draw)
    request = api.GenerateRequest(sampling=sampling)
    match draw.randrange(10):
        case 0:
            request.text = ""
        case 1:
            request.text = "a" * draw.choice((100_000, 2_000_000, 3_000_000))
        case 2:
            request.tokens.ids.extend([draw.choice((VOCAB, MOST_UINT32, 2**31))])
        case 3:
            request.tokens.ids.extend(draw.choices(range(VOCAB), k=draw.choice((8_191, 8_192, 200_000))))
        case 4:
            request.text = _prompt(draw)
            request.sampling.max_tokens = draw.choice((0, 8_192, 2**31, MOST_UINT32))
        case 5:
            request.chat.messages.extend([api.Message()] * draw.choice((0, 1, 5_000)))
        case 6:
            role = draw.choice(("", "r" * 100_000, "{{ 7*7 }}"))
            request.chat.messages.append(api.Message(role=role, content="x"))
        case 7:
            request.cache_salt = "s" * draw.choice((256, 257, 100_000))
            request.text = _prompt(draw)
        case _:
            # Prompts around one block, and of several blocks, which the pool must find memory for.
            request.tokens.ids.extend(draw.choices(range(VOCAB), k=draw.choice((255, 256, 257, 600))))
    return _hostile(number, kind, request)


def _choices(draw: Random, number: int, kind: HostileKind) -> Hostile:
    n = draw.choice((0, 1, 2, 4, 8, 12, 12, 12, 12, 33, MOST_UINT32))
    sampling = _sampling(draw, n=n, temperature=draw.choice((1.0, 1.0, 1.0, 0.0)), max_tokens=32)
    return _hostile(number, kind, api.GenerateRequest(text=_prompt(draw), sampling=sampling))


def _of_sampling(draw: Random, number: int, kind: HostileKind, **fields: object) -> Hostile:
    return _hostile(number, kind, api.GenerateRequest(text=_prompt(draw), sampling=_sampling(draw, **fields)))


def _logprobs(draw: Random, number: int, kind: HostileKind) -> Hostile:
    asked = draw.choice((0, 1, 5, 20, 20, 21, VOCAB, VOCAB + 1, MOST_UINT32))
    return _of_sampling(draw, number, kind, logprobs=asked)


def _penalties(draw: Random, number: int, kind: HostileKind) -> Hostile:
    names = draw.sample(("repetition_penalty", "presence_penalty", "frequency_penalty"), draw.randint(1, 3))
    extremes: Mapping[str, tuple[float, ...]] = {
        "repetition_penalty": (TINY, 1e-45, 1e-3, 1.0, 1.3, 10.0, 10.1, 0.0, -1.0, NAN, INF),
        "presence_penalty": (-2.0, 2.0, 0.0, 2.0, -2.0, TINY, 2.1, NAN, -INF),
        "frequency_penalty": (-2.0, 2.0, 0.0, 2.0, -2.0, TINY, -HUGE, NAN, INF),
    }
    return _of_sampling(draw, number, kind, **{name: draw.choice(extremes[name]) for name in names})


def _temperature(draw: Random, number: int, kind: HostileKind) -> Hostile:
    fields: dict[str, object] = {
        "temperature": draw.choice((TINY, 1e-45, 0.01, 2.0, 2.0, 2.1, -1.0, NAN, INF))
    }
    if draw.random() < 0.5:
        fields["top_p"] = draw.choice((TINY, 0.5, 1.0, 0.0, NAN))
    if draw.random() < 0.5:
        fields["top_k"] = draw.choice((1, 2, VOCAB, VOCAB + 1, MOST_UINT32))
    if draw.random() < 0.3:
        fields["min_p"] = draw.choice((TINY, 1.0, 1.1, NAN))
    return _of_sampling(draw, number, kind, n=1, **fields)


def _stops(draw: Random, number: int, kind: HostileKind) -> Hostile:
    stops = draw.choice(
        (
            [" "],
            ["a", "e", "i"],
            ["s" * 256],
            ["s" * 257],
            [""],
            ["\0", "\ufffd"],
            ["the"] * 16,
            ["the"] * 17,
            [f"{letter}{letter}" for letter in "abcdefgh"],
        )
    )
    ids = draw.choice(([], [], [0], [VOCAB - 1], [VOCAB], [MOST_UINT32], list(range(128)), list(range(129))))
    return _of_sampling(draw, number, kind, stop=stops, stop_token_ids=ids, ignore_eos=draw.random() < 0.5)


def _bias(draw: Random, number: int, kind: HostileKind) -> Hostile:
    count = draw.choice((1, 5, 100, 1024, 1025))
    low, high = draw.choice(((-100.0, 100.0), (100.0, 100.0), (-100.0, -100.0), (-101.0, 0.0)))
    bias = {token: draw.uniform(low, high) for token in draw.sample(range(VOCAB), count)}
    if draw.random() < 0.2:
        bias[draw.choice((VOCAB, MOST_UINT32, 5))] = draw.choice((NAN, INF, -INF, 1.0))
    return _of_sampling(draw, number, kind, logit_bias=bias)


def _misbehaving(draw: Random, number: int, kind: HostileKind) -> Hostile:
    """A valid request with a unique id; its client misbehaves while it is answered."""
    streams = kind in (HostileKind.SLOW_READER, HostileKind.STALLED_READER)
    # Large enough that an unread answer fills the connection's window.
    fields: dict[str, object] = (
        {"logprobs": 20, "n": draw.randint(1, 12), "temperature": 1.0} if streams else {}
    )
    request = api.GenerateRequest(
        text=_prompt(draw),
        request_id=_id(draw, number) if draw.random() < 0.8 or kind in _CANCELS else "",
        sampling=_sampling(draw, ignore_eos=True, **fields),
    )
    hold_s = {
        HostileKind.SLOW_READER: draw.uniform(0.01, 0.1),
        HostileKind.STALLED_READER: draw.uniform(2, 10),
    }
    return _hostile(
        number, kind, request, after_tokens=draw.randint(1, 8), hold_s=hold_s.get(kind, draw.uniform(0, 0.2))
    )


def _resume(draw: Random, number: int, kind: HostileKind) -> Hostile:
    after = draw.randint(1, 8)
    request = api.GenerateRequest(
        text=_prompt(draw), request_id=_id(draw, number), sampling=_sampling(draw, ignore_eos=True)
    )
    resumed = api.GenerateRequest()
    resumed.CopyFrom(request)
    resumed.resume_from = draw.choice((after, after, after, 0, 1, 39, 10_000, MOST_UINT32))
    if draw.random() < 0.3:
        resumed.ClearField("prompt")
    elif draw.random() < 0.2:
        resumed.text = _prompt(draw)
    return _hostile(
        number,
        kind,
        request,
        after_tokens=after,
        hold_s=draw.uniform(0, 1),
        resumed=resumed.SerializeToString(deterministic=True),
    )


def _garbage(draw: Random, number: int, kind: HostileKind) -> Hostile:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    noise = draw.randbytes(draw.randint(1, 20_000))
    return Hostile(
        number=number,
        kind=kind,
        hold_s=draw.uniform(0, 1),
        garbage=draw.choice(
            (
                noise,
                preface + noise,
                # SETTINGS, then a frame whose length does not match its payload.
                preface + b"\0\0\0\x04\0\0\0\0\0" + b"\xff\xff\xff\x00\x01\0\0\0\x01" + noise,
                preface + b"\0\0\0\x04\0\0\0\0\0" * 200,
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise,
                b"",
            )
        ),
    )


def _oversize(draw: Random, number: int, kind: HostileKind) -> Hostile:
    size_bytes = draw.choice((5, 9, 9, 9, 17, 33, 65)) << 20
    request = api.GenerateRequest(sampling=_sampling(draw))
    match draw.randrange(4):
        case 0:
            request.text = "a" * size_bytes
        case 1:
            request.chat.messages.append(api.Message(role="r" * size_bytes, content="x"))
        case 2:
            request.text, request.cache_salt = "x", "s" * size_bytes
        case _:
            request.text = "x"
            request.request_id = "i" * size_bytes
    return _hostile(number, kind, request)


_CANCELS = (HostileKind.CANCEL_AT_ONCE, HostileKind.CANCEL_MIDWAY, HostileKind.CANCEL_BEFORE)
_MAKERS: Mapping[HostileKind, Callable[[Random, int, HostileKind], Hostile]] = {
    HostileKind.IDS: _ids,
    HostileKind.SIZES: _sizes,
    HostileKind.CHOICES: _choices,
    HostileKind.LOGPROBS: _logprobs,
    HostileKind.PENALTIES: _penalties,
    HostileKind.TEMPERATURE: _temperature,
    HostileKind.STOPS: _stops,
    HostileKind.BIAS: _bias,
    HostileKind.RESUME: _resume,
    HostileKind.GARBAGE: _garbage,
    HostileKind.OVERSIZE: _oversize,
    **dict.fromkeys(
        (*_CANCELS, HostileKind.DISCONNECT, HostileKind.SLOW_READER, HostileKind.STALLED_READER), _misbehaving
    ),
}
