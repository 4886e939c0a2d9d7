"""The options that configure a cluster.

Used by ``serve``, and by the commands that start a cluster if none runs. Must not know how a cluster works.
"""

import argparse
from collections.abc import Sequence
from typing import get_args

from farshore.client.cli.options.gateway import add_gateway_options
from farshore.client.cli.options.model import add_model_options, model_spec
from farshore.client.cli.options.values import DEFAULT_SERVER, number, size_bytes, whole
from farshore.controller.config import AttentionDevice, ClusterConfig, KvFormat, Placement, ShardBy
from farshore.defaults import DRAIN_TIMEOUT_S, MAX_DECODE_STALL_MS, SHARD_GRACE_S
from farshore.errors import InvalidRequest


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
