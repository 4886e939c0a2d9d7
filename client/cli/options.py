"""Option types that several subcommands share, and the options that configure a cluster.

Used by the subcommands' modules. Must not know what the commands do.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any, get_args

from farshore.client.cli.model_options import add_model_options, model_spec
from farshore.controller.config import AttentionDevice, ClusterConfig, KvFormat, Placement, ShardBy
from farshore.defaults import DRAIN_TIMEOUT_S, MAX_DECODE_STALL_MS, SHARD_GRACE_S
from farshore.errors import InvalidRequest, TransportError

DEFAULT_SERVER = "127.0.0.1:50051"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size_bytes(text: str) -> int:
    """Parses a size: 512MiB, 1GiB, 2g (GiB), 1.5GB (powers of 1000), 1073741824."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not (match[2] and match[4])):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: use bytes, or a number with KiB, MiB or GiB, such as 512MiB or 2GiB"
        )
    number, unit, binary, byte = match.groups()
    base = 1000 if unit and byte and not binary else 1024
    return (
        int(float(number) * base ** _POWERS[unit.lower()])
        if "." in number
        else (int(number) * base ** _POWERS[unit.lower()])
    )


def whole(text: str) -> int:
    """Parses a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """Parses a number, also NaN and infinity."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def seconds(text: str) -> float:
    """Parses a time above 0, in seconds, of at most a year."""
    value = number(text)
    if not 0 < value <= 365 * 86_400:
        raise argparse.ArgumentTypeError(f"{text}: use a number of seconds above 0, such as 2.5")
    return value


def positive(text: str) -> int:
    """Parses a whole number from 1 on."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: use a whole number from 1 on")
    return value


def server_address(text: str) -> str:
    """Checks HOST:PORT; an IPv6 host must be in brackets."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_port = port.isascii() and port.isdigit() and 0 < int(port) <= 65535
    if not bare or not is_port or (":" in bare) != (bare != host):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address: use HOST:PORT, such as {DEFAULT_SERVER} or [::1]:50051"
        )
    return text


def server_addresses(text: str) -> list[str]:
    """Checks one HOST:PORT, or several with commas between them."""
    return [server_address(address.strip()) for address in text.split(",")]


class _Servers(argparse.Action):
    """Collects the addresses of an option that may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if earlier is self.default else [*earlier, *values])


def add_gateway_options(
    parser: argparse.ArgumentParser,
    *,
    default: Sequence[str] | None = (DEFAULT_SERVER,),
    help: str = f"the gateway, or several of a cluster: with commas, or repeated (default: {DEFAULT_SERVER})",
    timeout_help: str = "most time that a gateway may take for each call (default: 10), and to answer at all "
    "(default: 30)",
) -> None:
    """Adds ``--server`` and ``--timeout`` for a command that uses a running gateway. ``server`` becomes a
    sequence of addresses, ``timeout`` a number of seconds or None."""
    parser.add_argument(
        "--server",
        type=server_addresses,
        action=_Servers,
        default=default,
        metavar="HOST:PORT",
        help=help,
    )
    parser.add_argument("--timeout", type=seconds, metavar="S", help=timeout_help)


def add_own_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a command that uses a running gateway or starts a cluster: ``running_or_own``."""
    add_gateway_options(
        parser,
        default=None,
        help="the gateway to use, or several of a cluster: with commas, or repeated; one must be running "
        f"(default: {DEFAULT_SERVER} if it is)",
        timeout_help="most time for an answer (default: a day), and for a gateway to answer at all "
        "(default: 30)",
    )
    parser.add_argument(
        "--model", help="the model to start, or that the server is expected to serve (default: smollm2, any)"
    )
    started = parser.add_argument_group("only if a cluster is started")
    add_model_options(started)
    add_cluster_options(started)


def no_gateway(addresses: Sequence[str]) -> TransportError:
    """The error of a command that needs a running gateway."""
    return TransportError(
        f"no gateway answers at {' or '.join(addresses)}: start one with `farshore serve`, or give the right "
        "--server"
    )


def add_cluster_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of ``serve`` that also apply to a cluster which ``generate`` starts."""
    group.add_argument(
        "--kv-format",
        choices=get_args(KvFormat),
        help="how KV is stored; int8 takes half of bf16's memory, int4 a quarter; their cost in accuracy "
        "is what `farshore bench quality` measures (default: as --dtype)",
    )
    group.add_argument(
        "--attention-workers",
        type=whole,
        default=2,
        metavar="N",
        help="processes that hold KV cache and compute attention on it (default: %(default)s)",
    )
    group.add_argument(
        "--kv-memory",
        type=size_bytes,
        default="1GiB",
        metavar="SIZE",
        help="KV memory of each worker, such as 512MiB or 2GiB (default: %(default)s)",
    )
    group.add_argument(
        "--dense-kv-memory",
        type=size_bytes,
        metavar="SIZE",
        help="KV memory of each dense worker: the newest tokens and, with --placement local, all of its KV; "
        "on a GPU it is taken at the start (default: as --kv-memory)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="where dense workers compute: cpu, cuda (a GPU for each), cuda:N (that one, of "
        "the GPUs that this host shows), or auto: a GPU for each if there is one for each, else the CPU "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--attention-device",
        choices=get_args(AttentionDevice),
        default="cpu",
        help="where attention workers hold KV and compute: cpu (host memory), or cuda, a GPU for each "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--placement",
        choices=get_args(Placement),
        default="offload",
        help="where KV lives: on the attention workers, which all dense workers share, or local to the dense "
        "worker that made it (default: %(default)s)",
    )
    group.add_argument(
        "--shard-by",
        choices=get_args(ShardBy),
        default="range",
        help="split a sequence by token ranges, by KV heads, or by both (default: %(default)s)",
    )
    group.add_argument(
        "--max-decode-stall-ms",
        type=number,
        default=MAX_DECODE_STALL_MS,
        metavar="MS",
        help="most time from one token of an answer to its next while other prompts are read "
        "(default: %(default)g)",
    )
    group.add_argument(
        "--shard-grace",
        type=number,
        default=SHARD_GRACE_S,
        metavar="S",
        dest="shard_grace_s",
        help="how long an attention worker may answer nothing before the requests whose KV lies there fail; "
        "until then they wait for it, and others go on (default: %(default)g)",
    )
    group.add_argument(
        "--drain-timeout",
        type=number,
        default=DRAIN_TIMEOUT_S,
        metavar="S",
        dest="drain_timeout_s",
        help="how long the requests of a dense worker that is drained may go on before they fail and must be "
        "sent again (default: %(default)g)",
    )
    group.add_argument(
        "--speculate",
        type=whole,
        default=0,
        metavar="N",
        help="guess up to N tokens ahead from text that repeats itself, and check them in one step: the same "
        "answer, but for rounding, faster where it quotes its prompt (default: 0, off)",
    )


def cluster_config(
    args: argparse.Namespace, names: Sequence[str], *, model: str, **fixed: object
) -> ClusterConfig:
    """The configuration from the options of :func:`add_cluster_options` and of ``add_model_options``, the
    options ``names`` and the values ``fixed``. A value that can't work is a usage error: exit code 2."""
    try:
        return ClusterConfig(
            spec=model_spec(args, model),
            dtype=args.dtype,
            attention_workers=args.attention_workers,
            kv_memory_bytes=args.kv_memory,
            dense_kv_memory_bytes=args.dense_kv_memory,
            device=args.device,
            attention_device=args.attention_device,
            placement=args.placement,
            shard_by=args.shard_by,
            kv_format=args.kv_format,
            max_decode_stall_ms=args.max_decode_stall_ms,
            shard_grace_s=args.shard_grace_s,
            drain_timeout_s=args.drain_timeout_s,
            speculate=args.speculate,
            **{name: getattr(args, name) for name in names},
            **fixed,
        )
    except InvalidRequest as error:
        args.usage_error(str(error))
        raise  # Not reached: usage_error exits.
