"""The configuration of a cluster, validated before anything is started.

Created by the command line and by tests, read by the driver, the controller and its service. Imports nothing
heavy. Must not know how a cluster is started.
"""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from farshore.defaults import DRAIN_TIMEOUT_S, MAX_DECODE_STALL_MS, SHARD_GRACE_S
from farshore.errors import InvalidRequest
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.model_spec import ModelSpec
from farshore.text import quoted

Placement = Literal["offload", "local"]
ShardBy = Literal["range", "head", "both"]
Dtype = Literal["bfloat16", "float32"]
KvFormat = Literal["bf16", "float32", "int8", "int4"]
AttentionDevice = Literal["cpu", "cuda"]

_HALF = ("float16", "half", "fp16")
"""Names of a type that weights may be stored in, and that nothing computes in."""
_FORMAT_OF_DTYPE: dict[Dtype, KvFormat] = {"bfloat16": "bf16", "float32": "float32"}

PLACE_DEADLINE_S = 120.0
"""A worker process imports torch and opens a port in seconds; longer means that no node has room for it."""

LOAD_DEADLINE_S = 1800.0
"""For the dense workers to load their model."""

MOST_WORKERS = 1000
MIN_KV_MEMORY_BYTES = 64 << 20
MOST_STALL_MS = 60_000
MOST_DRAIN_S = 86_400.0
LEAST_GRACE_S, MOST_GRACE_S = 1.0, 3600.0
"""At least a second: a frame may be that late before the engine asks whether the shard is alive."""
MOST_SPECULATED = 16
"""Each guessed token is a row of the step; more than these cost more than they can save."""

_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_OF_ONE_DRIVER = {
    "dense_workers",
    "attention_workers",
    "host",
    "port",
    "http_port",
    "controller_port",
    "ray_address",
    "token_file",
    "state_dir",
    "dashboard",
}
"""Fields in which two drivers of one cluster may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Raises InvalidRequest, with the option's name and the fix, for values that can't work. The field names
    are those of the options of ``farshore serve``, and ``spec`` contains those that say what is loaded."""

    spec: ModelSpec = field(default_factory=ModelSpec)
    """The model, and how to read it."""
    name: str = "default"
    """The cluster's name: several clusters may share one Ray."""
    dtype: Dtype = "bfloat16"
    """Element type of weights and arithmetic."""
    kv_format: KvFormat | None = None
    """Format of stored keys and values; None: that of ``dtype``. Use :attr:`stored_format`."""
    dense_workers: int = 1
    """Engines. Each loads the whole model, and all share the attention workers."""
    attention_workers: int = 2
    kv_memory_bytes: int = 1 << 30
    """KV budget of each worker; a dense worker's holds tails and, with local placement, spans."""
    dense_kv_memory_bytes: int | None = None
    """KV budget of each dense worker, all of which a GPU gives up at once; None: ``kv_memory_bytes``."""
    device: str = "auto"
    """Where the dense workers compute: cpu, cuda (a GPU each), cuda:N, or auto: a GPU each if there are as
    many, else the CPU."""
    attention_device: AttentionDevice = "cpu"
    """Where the attention workers keep KV and compute: host memory, or a GPU each."""
    placement: Placement = "offload"
    shard_by: ShardBy = "range"
    max_decode_stall_ms: float = MAX_DECODE_STALL_MS
    """Longest time from one token of an answer to its next while other prompts are prefilled."""
    shard_grace_s: float = SHARD_GRACE_S
    """How long an attention worker may answer nothing before the requests whose KV it stores fail."""
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    """How long the requests of a dense worker that is drained may go on before they fail."""
    speculate: int = 0
    """Tokens guessed ahead per step by prompt lookup; 0: off."""
    host: str = "127.0.0.1"
    port: int = 50051
    """Port of the gateway's gRPC API; 0 for any free one."""
    http_port: int | None = None
    """Port of the gateway's OpenAI-compatible HTTP API; 0 for any free one; None: off."""
    controller_port: int = 0
    """Port of a controller that this driver starts; 0 for any free one."""
    ray_address: str | None = None
    """Join this Ray cluster instead of starting one."""
    token_file: str | None = None
    """The cluster's token: a file with this path on every node. None: a private Ray's cluster makes one."""
    state_dir: str | None = None
    """The folder where a controller that this driver starts on a joined Ray keeps what operators changed,
    unless Redis does; None: ``farshore`` in the user's folder of states. On a private Ray nothing is kept."""
    dashboard: bool = False
    """Start Ray's dashboard."""
    redis_url: str | None = None
    """Keep the directory and the desired state in this Redis or Valkey; None: the controller keeps them. It
    has no password: Ray shows what its actors are started with."""
    redis_password_file: str | None = None
    """Path, on every node, of the file with the password; the next three alike."""
    redis_ca_file: str | None = None
    redis_cert_file: str | None = None
    redis_key_file: str | None = None

    @property
    def stored_format(self) -> KvFormat:
        """The format that KV is stored in."""
        return self.kv_format or _FORMAT_OF_DTYPE[self.dtype]

    @property
    def gpu_index(self) -> int | None:
        """The GPU of ``cuda:N``, among those that this host shows; None if Ray chooses."""
        index = self.device.partition(":")[2]
        return int(index) if index else None

    @property
    def dense_budget_bytes(self) -> int:
        """The KV budget of each dense worker."""
        own = self.dense_kv_memory_bytes
        return self.kv_memory_bytes if own is None else own

    @property
    def namespace(self) -> str:
        """Ray's namespace of the controller and the workers."""
        return namespace(self.name)

    @property
    def redis(self) -> RedisAddress | None:
        """Where the cluster's directory is, if it is in Redis."""
        files = {
            "password_file": self.redis_password_file,
            "ca_file": self.redis_ca_file,
            "cert_file": self.redis_cert_file,
            "key_file": self.redis_key_file,
        }
        given = {name: path for name, path in files.items() if path}
        if not self.redis_url:
            if given:
                raise InvalidRequest(f"--redis-{min(given).replace('_', '-')}: give --redis-url, too")
            return None
        address = RedisAddress.parse(self.redis_url)
        if address.password:
            raise InvalidRequest(
                "--redis-url: Ray shows what its actors are started with: write the password to a file and "
                "name that by --redis-password-file"
            )
        return replace(address, cluster=self.name, **given)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_counts(self.dense_workers, self.attention_workers, placement=self.placement)
        budgets = {"--kv-memory": self.kv_memory_bytes, "--dense-kv-memory": self.dense_kv_memory_bytes}
        for option, budget_bytes in budgets.items():
            if budget_bytes is not None and budget_bytes < MIN_KV_MEMORY_BYTES:
                raise InvalidRequest(
                    f"{option} {budget_bytes}: give each worker at least {MIN_KV_MEMORY_BYTES >> 20}MiB"
                )
        if self.dtype in _HALF:
            raise InvalidRequest(
                f"--dtype {self.dtype} is unsupported: use bfloat16, which takes the same memory, or float32"
            )
        if self.dtype not in get_args(Dtype):
            raise InvalidRequest(f"--dtype {self.dtype}: use bfloat16 (also auto) or float32")
        # Unquantised KV has the type of the arithmetic: kernels take no other float type.
        kv_formats = ("int8", "int4", _FORMAT_OF_DTYPE[self.dtype])
        for name, value, choices in (
            ("--attention-device", self.attention_device, get_args(AttentionDevice)),
            ("--placement", self.placement, get_args(Placement)),
            ("--shard-by", self.shard_by, get_args(ShardBy)),
            ("--kv-format", self.stored_format, kv_formats),
        ):
            if value not in choices:
                raise InvalidRequest(f"{name} {value}: use one of {', '.join(choices)}")
        self._check_device()
        if self.state_dir is not None and self.ray_address is None:
            raise InvalidRequest(
                f"--state-dir {quoted(self.state_dir)[1:-1]}: give --ray-address, too: without it the "
                "cluster ends with its command, and its state with it"
            )
        if not LEAST_GRACE_S <= self.shard_grace_s <= MOST_GRACE_S:
            raise InvalidRequest(
                f"--shard-grace {self.shard_grace_s:g}: use {LEAST_GRACE_S:g} to {MOST_GRACE_S:g} seconds"
            )
        if not 0 <= self.drain_timeout_s <= MOST_DRAIN_S:
            raise InvalidRequest(
                f"--drain-timeout {self.drain_timeout_s:g}: use 0 to {MOST_DRAIN_S:g} seconds"
            )
        if not 1 <= self.max_decode_stall_ms <= MOST_STALL_MS:
            raise InvalidRequest(
                f"--max-decode-stall-ms {self.max_decode_stall_ms:g}: use a number from 1 to {MOST_STALL_MS}"
            )
        if not 0 <= self.speculate <= MOST_SPECULATED:
            raise InvalidRequest(f"--speculate {self.speculate}: use 0 (off) to {MOST_SPECULATED} tokens")
        _ = self.redis  # Raises.
        ports = {
            "--port": self.port,
            "--http-port": self.http_port,
            "--controller-port": self.controller_port,
        }
        for name, port in ports.items():
            if port is not None and not 0 <= port <= 65535:
                raise InvalidRequest(f"{name} {port}: use 0 (any) to 65535")

    def _check_device(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise InvalidRequest(
                f"--device {quoted(self.device)}: use auto, cpu, cuda, or cuda:N for one GPU of this host"
            )
        if self.gpu_index is None:
            return
        if self.ray_address is not None:
            raise InvalidRequest(
                f"--device {self.device}: on the Ray of --ray-address Ray chooses the GPU: use cuda, and "
                "CUDA_VISIBLE_DEVICES where the node is started"
            )
        if self.dense_workers > 1 or self.attention_device == "cuda":
            raise InvalidRequest(
                f"--device {self.device} is one GPU, for one worker: for several use cuda, and "
                "CUDA_VISIBLE_DEVICES to choose GPUs"
            )


def check_name(name: str) -> None:
    """Raises InvalidRequest for a name that no cluster can have."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"--name {quoted(name)}: use 1 to 40 lower-case letters, digits and inner hyphens, such as blue-2"
        )


def namespace(name: str) -> str:
    """Ray's namespace of the cluster ``name``."""
    return f"farshore-{name}"


def check_same(running: ClusterConfig, asked: ClusterConfig) -> None:
    """Raises InvalidRequest unless ``asked`` describes the cluster that runs, apart from the numbers of its
    workers and from what each driver chooses for itself."""
    differing = [
        _option(each.name)
        for each in fields(ClusterConfig)
        if each.name not in _OF_ONE_DRIVER and getattr(running, each.name) != getattr(asked, each.name)
    ]
    if differing:
        raise InvalidRequest(
            f"the cluster {running.name} runs {running.spec.name} with other values of"
            f" {', '.join(differing)}: give the same values, or end it first with `farshore down`, or choose"
            " another --name"
        )


def _option(name: str) -> str:
    """The option of ``farshore serve`` that sets a field."""
    if name == "spec":
        return "the model's options"
    bare = name.removesuffix("_bytes").removesuffix("_s")
    return "--" + bare.replace("_", "-")


def check_counts(dense_workers: int, attention_workers: int, *, placement: str) -> None:
    """Raises InvalidRequest for numbers of workers that can't work."""
    if dense_workers < 1:
        raise InvalidRequest(
            f"--dense-workers {dense_workers}: give at least 1; `farshore down` ends a whole cluster"
        )
    if attention_workers < 0 or (placement == "offload" and attention_workers < 1):
        raise InvalidRequest(
            f"--attention-workers {attention_workers}: give at least 1, or use --placement local"
        )
    for option, count in (("--dense-workers", dense_workers), ("--attention-workers", attention_workers)):
        if count > MOST_WORKERS:
            raise InvalidRequest(f"{option} {count}: give at most {MOST_WORKERS}")
