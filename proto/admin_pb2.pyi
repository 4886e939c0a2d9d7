from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_KIND_UNSPECIFIED: _ClassVar[WorkerKind]
    WORKER_KIND_DENSE: _ClassVar[WorkerKind]
    WORKER_KIND_ATTENTION: _ClassVar[WorkerKind]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_FAILED: _ClassVar[WorkerState]
    WORKER_STATE_UNREACHABLE: _ClassVar[WorkerState]
WORKER_KIND_UNSPECIFIED: WorkerKind
WORKER_KIND_DENSE: WorkerKind
WORKER_KIND_ATTENTION: WorkerKind
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_FAILED: WorkerState
WORKER_STATE_UNREACHABLE: WorkerState

class ScaleRequest(_message.Message):
    __slots__ = ("dense_workers", "attention_workers")
    DENSE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_WORKERS_FIELD_NUMBER: _ClassVar[int]
    dense_workers: int
    attention_workers: int
    def __init__(self, dense_workers: _Optional[int] = ..., attention_workers: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("dense_workers", "attention_workers")
    DENSE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_WORKERS_FIELD_NUMBER: _ClassVar[int]
    dense_workers: int
    attention_workers: int
    def __init__(self, dense_workers: _Optional[int] = ..., attention_workers: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id", "timeout_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    timeout_s: float
    def __init__(self, worker_id: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("since", "follow")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    since: int
    follow: bool
    def __init__(self, since: _Optional[int] = ..., follow: bool = ...) -> None: ...

class ClusterEvent(_message.Message):
    __slots__ = ("number", "unix_s", "kind", "subject", "detail")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    number: int
    unix_s: float
    kind: str
    subject: str
    detail: str
    def __init__(self, number: _Optional[int] = ..., unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ClusterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "kind", "address", "host", "process_id", "state", "budget_bytes", "free_bytes", "attended_bytes", "running", "waiting", "links", "parked", "parkings", "tokens", "cached_bytes", "device", "node", "zone", "failure")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    PARKINGS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    kind: WorkerKind
    address: str
    host: str
    process_id: int
    state: WorkerState
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    running: int
    waiting: int
    links: _containers.RepeatedCompositeFieldContainer[ShardLink]
    parked: int
    parkings: int
    tokens: int
    cached_bytes: int
    device: str
    node: str
    zone: str
    failure: str
    def __init__(self, worker_id: _Optional[str] = ..., kind: _Optional[_Union[WorkerKind, str]] = ..., address: _Optional[str] = ..., host: _Optional[str] = ..., process_id: _Optional[int] = ..., state: _Optional[_Union[WorkerState, str]] = ..., budget_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., attended_bytes: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., links: _Optional[_Iterable[_Union[ShardLink, _Mapping]]] = ..., parked: _Optional[int] = ..., parkings: _Optional[int] = ..., tokens: _Optional[int] = ..., cached_bytes: _Optional[int] = ..., device: _Optional[str] = ..., node: _Optional[str] = ..., zone: _Optional[str] = ..., failure: _Optional[str] = ...) -> None: ...

class ShardLink(_message.Message):
    __slots__ = ("worker_id", "transport", "frames", "failures", "p50_ms", "p99_ms", "slow", "deadline_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    SLOW_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: str
    frames: int
    failures: int
    p50_ms: float
    p99_ms: float
    slow: bool
    deadline_ms: float
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., frames: _Optional[int] = ..., failures: _Optional[int] = ..., p50_ms: _Optional[float] = ..., p99_ms: _Optional[float] = ..., slow: bool = ..., deadline_ms: _Optional[float] = ...) -> None: ...

class SpanStatus(_message.Message):
    __slots__ = ("worker_id", "first", "last", "group0", "group1", "bytes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    GROUP0_FIELD_NUMBER: _ClassVar[int]
    GROUP1_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    first: int
    last: int
    group0: int
    group1: int
    bytes: int
    def __init__(self, worker_id: _Optional[str] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., group0: _Optional[int] = ..., group1: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class SequenceStatus(_message.Message):
    __slots__ = ("sequence_id", "owner", "epoch", "tokens", "tail_first", "spans")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIRST_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    owner: str
    epoch: int
    tokens: int
    tail_first: int
    spans: _containers.RepeatedCompositeFieldContainer[SpanStatus]
    def __init__(self, sequence_id: _Optional[str] = ..., owner: _Optional[str] = ..., epoch: _Optional[int] = ..., tokens: _Optional[int] = ..., tail_first: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[SpanStatus, _Mapping]]] = ...) -> None: ...

class ClusterStatusResponse(_message.Message):
    __slots__ = ("model", "dtype", "max_positions", "placement", "shard_by", "workers", "sequences", "pool_budget_bytes", "pool_free_bytes", "version", "kv_format", "max_decode_stall_ms", "speculate_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    SHARD_BY_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POOL_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODE_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    dtype: str
    max_positions: int
    placement: str
    shard_by: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceStatus]
    pool_budget_bytes: int
    pool_free_bytes: int
    version: str
    kv_format: str
    max_decode_stall_ms: float
    speculate_tokens: int
    def __init__(self, model: _Optional[str] = ..., dtype: _Optional[str] = ..., max_positions: _Optional[int] = ..., placement: _Optional[str] = ..., shard_by: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., sequences: _Optional[_Iterable[_Union[SequenceStatus, _Mapping]]] = ..., pool_budget_bytes: _Optional[int] = ..., pool_free_bytes: _Optional[int] = ..., version: _Optional[str] = ..., kv_format: _Optional[str] = ..., max_decode_stall_ms: _Optional[float] = ..., speculate_tokens: _Optional[int] = ...) -> None: ...
