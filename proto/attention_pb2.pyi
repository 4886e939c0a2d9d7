from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class IdentifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardIdentity(_message.Message):
    __slots__ = ("worker_id", "process_id", "host", "budget_bytes", "free_bytes", "attended_bytes", "incarnation", "cached_bytes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    process_id: int
    host: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    incarnation: str
    cached_bytes: int
    def __init__(self, worker_id: _Optional[str] = ..., process_id: _Optional[int] = ..., host: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., attended_bytes: _Optional[int] = ..., incarnation: _Optional[str] = ..., cached_bytes: _Optional[int] = ...) -> None: ...

class Caller(_message.Message):
    __slots__ = ("engine", "sent_ns")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    engine: str
    sent_ns: int
    def __init__(self, engine: _Optional[str] = ..., sent_ns: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("layers", "groups", "k_heads_per_group", "v_heads_per_group", "k_dim", "v_dim", "format", "block_tokens", "v_in_k")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    K_HEADS_PER_GROUP_FIELD_NUMBER: _ClassVar[int]
    V_HEADS_PER_GROUP_FIELD_NUMBER: _ClassVar[int]
    K_DIM_FIELD_NUMBER: _ClassVar[int]
    V_DIM_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    V_IN_K_FIELD_NUMBER: _ClassVar[int]
    layers: int
    groups: int
    k_heads_per_group: int
    v_heads_per_group: int
    k_dim: int
    v_dim: int
    format: str
    block_tokens: int
    v_in_k: bool
    def __init__(self, layers: _Optional[int] = ..., groups: _Optional[int] = ..., k_heads_per_group: _Optional[int] = ..., v_heads_per_group: _Optional[int] = ..., k_dim: _Optional[int] = ..., v_dim: _Optional[int] = ..., format: _Optional[str] = ..., block_tokens: _Optional[int] = ..., v_in_k: bool = ...) -> None: ...

class SpanKey(_message.Message):
    __slots__ = ("sequence_id", "layer_class", "first", "group0", "group1")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_CLASS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    GROUP0_FIELD_NUMBER: _ClassVar[int]
    GROUP1_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    layer_class: int
    first: int
    group0: int
    group1: int
    def __init__(self, sequence_id: _Optional[str] = ..., layer_class: _Optional[int] = ..., first: _Optional[int] = ..., group0: _Optional[int] = ..., group1: _Optional[int] = ...) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("key", "capacity_tokens", "layout", "epoch", "caller")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    key: SpanKey
    capacity_tokens: int
    layout: Layout
    epoch: int
    caller: Caller
    def __init__(self, key: _Optional[_Union[SpanKey, _Mapping]] = ..., capacity_tokens: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., epoch: _Optional[int] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class CreateReply(_message.Message):
    __slots__ = ("span_id",)
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    def __init__(self, span_id: _Optional[str] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("span_id", "layer", "first_token", "tokens", "k", "v", "epoch", "sequence_id", "caller")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    layer: int
    first_token: int
    tokens: int
    k: bytes
    v: bytes
    epoch: int
    sequence_id: str
    caller: Caller
    def __init__(self, span_id: _Optional[str] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., tokens: _Optional[int] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ..., epoch: _Optional[int] = ..., sequence_id: _Optional[str] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BulkWrite(_message.Message):
    __slots__ = ("write", "piece_tokens", "token_major")
    WRITE_FIELD_NUMBER: _ClassVar[int]
    PIECE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MAJOR_FIELD_NUMBER: _ClassVar[int]
    write: WriteRequest
    piece_tokens: int
    token_major: bool
    def __init__(self, write: _Optional[_Union[WriteRequest, _Mapping]] = ..., piece_tokens: _Optional[int] = ..., token_major: bool = ...) -> None: ...

class PrefixBlock(_message.Message):
    __slots__ = ("hash", "first", "tokens")
    HASH_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    hash: bytes
    first: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hash: _Optional[bytes] = ..., first: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class SealRequest(_message.Message):
    __slots__ = ("span_id", "tokens", "epoch", "blocks", "sequence_id", "caller")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    tokens: int
    epoch: int
    blocks: _containers.RepeatedCompositeFieldContainer[PrefixBlock]
    sequence_id: str
    caller: Caller
    def __init__(self, span_id: _Optional[str] = ..., tokens: _Optional[int] = ..., epoch: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[PrefixBlock, _Mapping]]] = ..., sequence_id: _Optional[str] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class SealReply(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class FindPrefixRequest(_message.Message):
    __slots__ = ("hashes", "layer_class", "caller")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYER_CLASS_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    layer_class: int
    caller: Caller
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., layer_class: _Optional[int] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class HoldPrefixRequest(_message.Message):
    __slots__ = ("blocks", "layer_class", "sequence_id", "epoch", "caller")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYER_CLASS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[PrefixBlock]
    layer_class: int
    sequence_id: str
    epoch: int
    caller: Caller
    def __init__(self, blocks: _Optional[_Iterable[_Union[PrefixBlock, _Mapping]]] = ..., layer_class: _Optional[int] = ..., sequence_id: _Optional[str] = ..., epoch: _Optional[int] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class SpanSlice(_message.Message):
    __slots__ = ("span_id", "key", "layout", "first", "last")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    key: SpanKey
    layout: Layout
    first: int
    last: int
    def __init__(self, span_id: _Optional[str] = ..., key: _Optional[_Union[SpanKey, _Mapping]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class PrefixFound(_message.Message):
    __slots__ = ("slices", "available_bytes")
    SLICES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    slices: _containers.RepeatedCompositeFieldContainer[SpanSlice]
    available_bytes: int
    def __init__(self, slices: _Optional[_Iterable[_Union[SpanSlice, _Mapping]]] = ..., available_bytes: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("span_id", "layer", "first_token", "end_token", "sequence_id", "caller")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    layer: int
    first_token: int
    end_token: int
    sequence_id: str
    caller: Caller
    def __init__(self, span_id: _Optional[str] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., sequence_id: _Optional[str] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class KVTokens(_message.Message):
    __slots__ = ("tokens", "k", "v")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    k: bytes
    v: bytes
    def __init__(self, tokens: _Optional[int] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("span_ids", "sequence_id", "epoch", "caller")
    SPAN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    span_ids: _containers.RepeatedScalarFieldContainer[str]
    sequence_id: str
    epoch: int
    caller: Caller
    def __init__(self, span_ids: _Optional[_Iterable[str]] = ..., sequence_id: _Optional[str] = ..., epoch: _Optional[int] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class HoldReply(_message.Message):
    __slots__ = ("layouts",)
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    layouts: _containers.RepeatedCompositeFieldContainer[Layout]
    def __init__(self, layouts: _Optional[_Iterable[_Union[Layout, _Mapping]]] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "epoch", "caller")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    epoch: int
    caller: Caller
    def __init__(self, sequence_id: _Optional[str] = ..., epoch: _Optional[int] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class SequenceReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ImportRequest(_message.Message):
    __slots__ = ("address", "span")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    address: str
    span: ExportRequest
    def __init__(self, address: _Optional[str] = ..., span: _Optional[_Union[ExportRequest, _Mapping]] = ...) -> None: ...

class ImportReply(_message.Message):
    __slots__ = ("span_id", "key", "layout", "tokens")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    key: SpanKey
    layout: Layout
    tokens: int
    def __init__(self, span_id: _Optional[str] = ..., key: _Optional[_Union[SpanKey, _Mapping]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., tokens: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("span_id", "tokens", "sequence_id")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    tokens: int
    sequence_id: str
    def __init__(self, span_id: _Optional[str] = ..., tokens: _Optional[int] = ..., sequence_id: _Optional[str] = ...) -> None: ...

class ExportPiece(_message.Message):
    __slots__ = ("header", "checksum", "payload_bytes", "payload", "digest", "blocks")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    checksum: int
    payload_bytes: int
    payload: bytes
    digest: str
    blocks: _containers.RepeatedCompositeFieldContainer[PrefixBlock]
    def __init__(self, header: _Optional[bytes] = ..., checksum: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., payload: _Optional[bytes] = ..., digest: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[PrefixBlock, _Mapping]]] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SpanInfo(_message.Message):
    __slots__ = ("span_id", "key", "sealed_tokens", "capacity_tokens", "bytes", "epoch", "holders")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEALED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    key: SpanKey
    sealed_tokens: int
    capacity_tokens: int
    bytes: int
    epoch: int
    holders: int
    def __init__(self, span_id: _Optional[str] = ..., key: _Optional[_Union[SpanKey, _Mapping]] = ..., sealed_tokens: _Optional[int] = ..., capacity_tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., epoch: _Optional[int] = ..., holders: _Optional[int] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("spans",)
    SPANS_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[SpanInfo]
    def __init__(self, spans: _Optional[_Iterable[_Union[SpanInfo, _Mapping]]] = ...) -> None: ...

class WantedSpans(_message.Message):
    __slots__ = ("sequence_id", "epoch", "span_ids")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPAN_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    epoch: int
    span_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sequence_id: _Optional[str] = ..., epoch: _Optional[int] = ..., span_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class BeatRequest(_message.Message):
    __slots__ = ("caller", "wanted", "complete")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    caller: Caller
    wanted: _containers.RepeatedCompositeFieldContainer[WantedSpans]
    complete: bool
    def __init__(self, caller: _Optional[_Union[Caller, _Mapping]] = ..., wanted: _Optional[_Iterable[_Union[WantedSpans, _Mapping]]] = ..., complete: bool = ...) -> None: ...

class BeatReply(_message.Message):
    __slots__ = ("worker_id", "incarnation", "budget_bytes", "free_bytes", "attended_bytes", "must_reconcile")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MUST_RECONCILE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    must_reconcile: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., attended_bytes: _Optional[int] = ..., must_reconcile: bool = ...) -> None: ...

class AttentionSpec(_message.Message):
    __slots__ = ("q_heads", "k_heads", "v_heads", "k_dim", "v_dim", "scale", "soft_cap", "window_tokens", "v_in_k")
    Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    K_HEADS_FIELD_NUMBER: _ClassVar[int]
    V_HEADS_FIELD_NUMBER: _ClassVar[int]
    K_DIM_FIELD_NUMBER: _ClassVar[int]
    V_DIM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    V_IN_K_FIELD_NUMBER: _ClassVar[int]
    q_heads: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    scale: float
    soft_cap: float
    window_tokens: int
    v_in_k: bool
    def __init__(self, q_heads: _Optional[int] = ..., k_heads: _Optional[int] = ..., v_heads: _Optional[int] = ..., k_dim: _Optional[int] = ..., v_dim: _Optional[int] = ..., scale: _Optional[float] = ..., soft_cap: _Optional[float] = ..., window_tokens: _Optional[int] = ..., v_in_k: bool = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("specs", "layouts", "layer_class", "dtype", "wire_version")
    SPECS_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    LAYER_CLASS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    specs: _containers.RepeatedCompositeFieldContainer[AttentionSpec]
    layouts: _containers.RepeatedCompositeFieldContainer[Layout]
    layer_class: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    wire_version: int
    def __init__(self, specs: _Optional[_Iterable[_Union[AttentionSpec, _Mapping]]] = ..., layouts: _Optional[_Iterable[_Union[Layout, _Mapping]]] = ..., layer_class: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., wire_version: _Optional[int] = ...) -> None: ...

class StepRead(_message.Message):
    __slots__ = ("span_id", "origin", "first", "last", "group0", "group1", "first_row", "rows", "holder")
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    GROUP0_FIELD_NUMBER: _ClassVar[int]
    GROUP1_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    span_id: str
    origin: int
    first: int
    last: int
    group0: int
    group1: int
    first_row: int
    rows: int
    holder: str
    def __init__(self, span_id: _Optional[str] = ..., origin: _Optional[int] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., group0: _Optional[int] = ..., group1: _Optional[int] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., holder: _Optional[str] = ...) -> None: ...

class StepReads(_message.Message):
    __slots__ = ("reads",)
    READS_FIELD_NUMBER: _ClassVar[int]
    reads: _containers.RepeatedCompositeFieldContainer[StepRead]
    def __init__(self, reads: _Optional[_Iterable[_Union[StepRead, _Mapping]]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "positions", "group0", "group1", "reads", "micro_batch_rows")
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    GROUP0_FIELD_NUMBER: _ClassVar[int]
    GROUP1_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    step: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    group0: int
    group1: int
    reads: _containers.RepeatedCompositeFieldContainer[StepReads]
    micro_batch_rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., group0: _Optional[int] = ..., group1: _Optional[int] = ..., reads: _Optional[_Iterable[_Union[StepReads, _Mapping]]] = ..., micro_batch_rows: _Optional[_Iterable[int]] = ...) -> None: ...

class RepeatStep(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class LayerFrame(_message.Message):
    __slots__ = ("step", "layer", "micro_batch", "q")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    step: int
    layer: int
    micro_batch: int
    q: bytes
    def __init__(self, step: _Optional[int] = ..., layer: _Optional[int] = ..., micro_batch: _Optional[int] = ..., q: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("open", "begin", "layer", "repeat_step")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    REPEAT_STEP_FIELD_NUMBER: _ClassVar[int]
    open: Open
    begin: Step
    layer: LayerFrame
    repeat_step: RepeatStep
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., begin: _Optional[_Union[Step, _Mapping]] = ..., layer: _Optional[_Union[LayerFrame, _Mapping]] = ..., repeat_step: _Optional[_Union[RepeatStep, _Mapping]] = ...) -> None: ...

class State(_message.Message):
    __slots__ = ("step", "layer", "micro_batch", "o", "lse")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    O_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    step: int
    layer: int
    micro_batch: int
    o: bytes
    lse: bytes
    def __init__(self, step: _Optional[int] = ..., layer: _Optional[int] = ..., micro_batch: _Optional[int] = ..., o: _Optional[bytes] = ..., lse: _Optional[bytes] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("open", "cores", "threads")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    open: Open
    cores: _containers.RepeatedScalarFieldContainer[int]
    threads: int
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., cores: _Optional[_Iterable[int]] = ..., threads: _Optional[int] = ...) -> None: ...

class ConnectReply(_message.Message):
    __slots__ = ("token", "unix_name", "tcp_port", "shares_cores")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNIX_NAME_FIELD_NUMBER: _ClassVar[int]
    TCP_PORT_FIELD_NUMBER: _ClassVar[int]
    SHARES_CORES_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    unix_name: str
    tcp_port: int
    shares_cores: bool
    def __init__(self, token: _Optional[bytes] = ..., unix_name: _Optional[str] = ..., tcp_port: _Optional[int] = ..., shares_cores: bool = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...
