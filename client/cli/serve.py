"""``farshore serve``: starts a cluster and runs it until a signal.

Called by ``main``. Must not know how a cluster is started: ``controller.driver.cluster`` does.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from farshore import __version__
from farshore.client.cli.options.cluster import add_cluster_options, cluster_config
from farshore.client.cli.options.layers import Layers, WatchedFile
from farshore.client.cli.options.model import add_model_options
from farshore.client.cli.terminal import Progress, stop_signals
from farshore.controller.config import ClusterConfig
from farshore.errors import FarshoreError, InvalidRequest, ProcessEnded
from farshore.model_spec import DEMO

if TYPE_CHECKING:
    from farshore.controller.driver.cluster import Cluster

_REDIS = ("redis_url", "redis_password_file", "redis_ca_file", "redis_cert_file", "redis_key_file")
HTTP_PORT = 8000
_OPTIONS = (
    "name",
    "dense_workers",
    "host",
    "port",
    "http_port",
    "controller_port",
    "state_dir",
    "ray_address",
    "token_file",
    "dashboard",
    *_REDIS,
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "serve",
        help="start a cluster on this machine (or on a Ray cluster) and serve a model",
        description="Start a cluster and serve a model over gRPC until Ctrl-C or SIGTERM. When a process "
        "ends that it can't serve without, the command names it and ends with exit code 1. On a Ray that it "
        "joins, the cluster outlives the command: run it again to add a gateway, end it by `farshore down`.",
        epilog="example: farshore serve --model smollm2 --attention-workers 4 --kv-memory 512MiB",
    )
    parser.add_argument(
        "--model",
        default=DEMO,
        help="a model directory, a .gguf file, a Hugging Face id (org/name, or org/name:Q4_K_M for one of "
        "its GGUF files), or smollm2, the demo model (default: %(default)s)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names by which requests may call the model; answers and status show the first (default: what "
        "--model says, and the last part of it)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=50051, help="port of the API; 0 for any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--http-port",
        type=int,
        metavar="PORT",
        help=f"port of the OpenAI-compatible HTTP API; 0 for any free one (default: {HTTP_PORT}, or 0 with"
        " --port 0)",
    )
    add_model_options(parser.add_argument_group("model"))
    _add_cluster_options(parser)
    _add_redis_options(parser)
    layers = Layers(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a YAML file with these options by name, such as `attention-workers: 4`; an option here and an "
        "environment variable such as FARSHORE_ATTENTION_WORKERS go before it; while the command runs, "
        "numbers of workers that change in it are applied",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object when the model is served: its addresses"
    )
    parser.set_defaults(run=run, usage_error=parser.error, layers=layers)


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--dense-workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that run the model's layers; each loads the whole model and they share the attention "
        "workers (default: %(default)s)",
    )
    add_cluster_options(cluster)
    cluster.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="join this Ray cluster instead of starting one; it must require a token (RAY_AUTH_MODE=token)",
    )
    cluster.add_argument(
        "--token-file",
        metavar="FILE",
        help="the cluster's token: 64 hex digits in a file of mode 600, the same on every node; it is Ray's "
        "token, too, unless RAY_AUTH_TOKEN_PATH names another (default: RAY_AUTH_TOKEN_PATH with "
        "--ray-address, else a token is made)",
    )
    cluster.add_argument(
        "--name",
        default="default",
        help="the cluster's name, by which --ray-address finds one that runs (default: %(default)s)",
    )
    cluster.add_argument("--dashboard", action="store_true", help="start Ray's dashboard, too")
    cluster.add_argument(
        "--no-gateway",
        action="store_true",
        help="with --ray-address: only keep the controller, for gateways that run elsewhere (`farshore "
        "gateway`); waits until Ray answers",
    )
    cluster.add_argument(
        "--controller-port",
        type=int,
        default=0,
        metavar="PORT",
        help="port of the controller, for what runs elsewhere; 0 for any free one (default: %(default)s)",
    )
    cluster.add_argument(
        "--state-dir",
        metavar="DIR",
        help="with --ray-address: the folder, on the controller's node, for what `farshore scale` and "
        "`farshore drain` change, which a restarted controller reads (default: $XDG_STATE_HOME/farshore, or "
        "~/.local/state/farshore)",
    )


def _add_redis_options(parser: argparse.ArgumentParser) -> None:
    redis = parser.add_argument_group(
        "redis",
        "keep the directory and what `farshore scale` changed in a Redis >= 7 or a Valkey: it outlives the "
        "controller; paths are those of each node",
    )
    redis.add_argument(
        "--redis-url",
        metavar="URL",
        help="redis://[USER@]HOST[:PORT][/DB], or rediss:// for TLS (default: the controller keeps them)",
    )
    redis.add_argument("--redis-password-file", metavar="FILE", help="the file that holds the password")
    redis.add_argument(
        "--redis-ca-file", metavar="FILE", help="certificates that sign its own (default: the system's)"
    )
    redis.add_argument("--redis-cert-file", metavar="FILE", help="a certificate to show to it")
    redis.add_argument("--redis-key-file", metavar="FILE", help="the key of that certificate")


def run(args: argparse.Namespace) -> int:
    given = copy.copy(args)
    # Before the options are read: a change from then on is seen.
    watched = WatchedFile(args.config) if args.config else None
    try:
        config = _config(args)
        if args.no_gateway and config.ray_address is None:
            raise InvalidRequest(
                "--no-gateway: give --ray-address, too: gateways elsewhere can't use a private Ray"
            )
    except InvalidRequest as error:
        args.usage_error(str(error))
    progress = Progress()
    try:
        running: list[Cluster] = []
        with stop_signals(again=lambda: _end_now(running)) as take_signals:
            return _serve(config, args, progress, take_signals, _Changes(given, watched, progress), running)
    except KeyboardInterrupt:
        progress.clear()
    return 0


def _config(args: argparse.Namespace) -> ClusterConfig:
    """The configuration of the command line, the environment and the file. Raises InvalidRequest."""
    args.layers.complete(args, file=args.config, environment=os.environ)
    if args.http_port is None:
        args.http_port = HTTP_PORT if args.port else 0
    return cluster_config(args, _OPTIONS, model=args.model)


class _Changes:
    """Applies what changes in the file of ``--config``. ``args``: as the command line gave them."""

    def __init__(self, args: argparse.Namespace, watched: WatchedFile | None, progress: Progress) -> None:
        self._args = args
        self._watched = watched
        self._progress = progress

    def apply(self, cluster: "Cluster") -> None:
        """Looks into the file. One that can't be applied is said and leaves the cluster as it is."""
        if self._watched is None or not self._watched.changed():
            return
        args = copy.copy(self._args)
        args.usage_error = _refuse
        try:
            cluster.reconfigure(_config(args), args.given)
        except InvalidRequest as error:
            self._progress.note(f"farshore: warning: {args.config} is not applied: {error}")
        except FarshoreError as error:
            self._progress.note(f"farshore: warning: {args.config} is applied later: {error}")
            self._watched.forget()
        else:
            self._progress.note(f"farshore: {args.config} changed, and is applied")


def _refuse(text: str) -> NoReturn:
    raise InvalidRequest(text)


def _serve(
    config: ClusterConfig,
    args: argparse.Namespace,
    progress: Progress,
    take_signals: Callable[[], None],
    changes: _Changes,
    running: "list[Cluster]",
) -> int:
    """Returns the exit code when everything has ended. Raises KeyboardInterrupt after a signal. ``running``:
    gets the cluster."""
    # Imported here: Ray takes most of a second to import, which other commands must not pay.
    from farshore.controller.driver.cluster import Cluster

    with Cluster.start(
        config, given=args.given, has_gateway=not args.no_gateway, progress=progress.step
    ) as cluster:
        running.append(cluster)
        take_signals()
        progress.clear()
        facts = {"model": config.spec.name, "address": cluster.address, "endpoints": dict(cluster.endpoints)}
        print(json.dumps(facts) if args.json else _told(facts, name=config.name), flush=True)
        for notice in cluster.notices:
            progress.note(f"farshore: warning: {notice}")
        try:
            cluster.wait(
                warn=lambda text: progress.note(f"farshore: warning: {text}"),
                meanwhile=lambda: changes.apply(cluster),
            )
        except KeyboardInterrupt:
            if cluster.goes_on:
                progress.note(cluster.goes_on)
            requests = "" if args.no_gateway else ": running requests may end, a second signal ends them"
            progress.step(f"stopping{requests}")
            raise
        except ProcessEnded as error:
            # Printed before the other processes are ended, which takes seconds.
            progress.note(f"farshore: error: {error}{f'; {cluster.goes_on}' if cluster.goes_on else ''}")
            return 1
    return 0


def _end_now(running: "list[Cluster]") -> None:
    for cluster in running:
        cluster.end_now()


def _told(facts: dict[str, Any], *, name: str) -> str:
    """What ``serve`` prints when the model is served. ``name``: the cluster's."""
    width = max((len(endpoint) for endpoint in facts["endpoints"]), default=0)
    endpoints = [f"  {endpoint:{width}}  {address}" for endpoint, address in facts["endpoints"].items()]
    if not facts["address"]:
        return "\n".join(
            [f"Farshore {__version__} keeps the cluster {name}, which serves {facts['model']}", *endpoints]
        )
    lines = [
        f"Farshore {__version__} serves {facts['model']} at {facts['address']}",
        *endpoints,
        f'Try: farshore generate --server {facts["address"]} "Hello"    Ctrl-C stops.',
    ]
    return "\n".join(lines)
