from farshore.proto import admin_pb2 as _admin_pb2
from farshore.proto import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayMessage(_message.Message):
    __slots__ = ("number", "submit", "cancel")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    number: int
    submit: bytes
    cancel: CancelSequence
    def __init__(self, number: _Optional[int] = ..., submit: _Optional[bytes] = ..., cancel: _Optional[_Union[CancelSequence, _Mapping]] = ...) -> None: ...

class CancelSequence(_message.Message):
    __slots__ = ("choice",)
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    choice: int
    def __init__(self, choice: _Optional[int] = ...) -> None: ...

class EngineMessage(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[SequenceEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[SequenceEvent, _Mapping]]] = ...) -> None: ...

class SequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "prompt", "sampling", "cache_salt", "grammar", "bad_words", "priority", "fill", "epoch")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.Sampling
    cache_salt: str
    grammar: str
    bad_words: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenIds]
    priority: int
    fill: bool
    epoch: int
    def __init__(self, sequence_id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., cache_salt: _Optional[str] = ..., grammar: _Optional[str] = ..., bad_words: _Optional[_Iterable[_Union[_inference_pb2.TokenIds, _Mapping]]] = ..., priority: _Optional[int] = ..., fill: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("token_id", "choice", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    choice: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., choice: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class SequenceFinished(_message.Message):
    __slots__ = ("reason", "queued_ms", "shards", "choice", "cached_tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: _inference_pb2.FinishReason
    queued_ms: float
    shards: _containers.RepeatedCompositeFieldContainer[_inference_pb2.ShardUse]
    choice: int
    cached_tokens: int
    def __init__(self, reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., queued_ms: _Optional[float] = ..., shards: _Optional[_Iterable[_Union[_inference_pb2.ShardUse, _Mapping]]] = ..., choice: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class SequenceFailed(_message.Message):
    __slots__ = ("code", "message", "trailing")
    class TrailingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRAILING_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    trailing: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., trailing: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SequenceEvent(_message.Message):
    __slots__ = ("number", "taken", "token", "prefill", "prompt_logprobs", "finished", "failed")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    number: int
    taken: bool
    token: SampledToken
    prefill: _inference_pb2.PrefillProgress
    prompt_logprobs: _inference_pb2.PromptLogprobs
    finished: SequenceFinished
    failed: SequenceFailed
    def __init__(self, number: _Optional[int] = ..., taken: bool = ..., token: _Optional[_Union[SampledToken, _Mapping]] = ..., prefill: _Optional[_Union[_inference_pb2.PrefillProgress, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_inference_pb2.PromptLogprobs, _Mapping]] = ..., finished: _Optional[_Union[SequenceFinished, _Mapping]] = ..., failed: _Optional[_Union[SequenceFailed, _Mapping]] = ...) -> None: ...

class EngineStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("worker", "sequences", "shards", "readers", "drains")
    class ShardsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: bool = ...) -> None: ...
    class ReadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class DrainsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    DRAINS_FIELD_NUMBER: _ClassVar[int]
    worker: _admin_pb2.WorkerStatus
    sequences: _containers.RepeatedCompositeFieldContainer[_admin_pb2.SequenceStatus]
    shards: _containers.ScalarMap[str, bool]
    readers: _containers.ScalarMap[str, int]
    drains: _containers.ScalarMap[str, str]
    def __init__(self, worker: _Optional[_Union[_admin_pb2.WorkerStatus, _Mapping]] = ..., sequences: _Optional[_Iterable[_Union[_admin_pb2.SequenceStatus, _Mapping]]] = ..., shards: _Optional[_Mapping[str, bool]] = ..., readers: _Optional[_Mapping[str, int]] = ..., drains: _Optional[_Mapping[str, str]] = ...) -> None: ...

class WorkerRecord(_message.Message):
    __slots__ = ("worker_id", "kind", "slot", "address", "host", "process_id", "state", "progress", "shards", "failure", "content", "load", "zone", "spec", "device", "node")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    kind: str
    slot: str
    address: str
    host: str
    process_id: int
    state: str
    progress: str
    shards: int
    failure: str
    content: str
    load: Load
    zone: str
    spec: str
    device: str
    node: str
    def __init__(self, worker_id: _Optional[str] = ..., kind: _Optional[str] = ..., slot: _Optional[str] = ..., address: _Optional[str] = ..., host: _Optional[str] = ..., process_id: _Optional[int] = ..., state: _Optional[str] = ..., progress: _Optional[str] = ..., shards: _Optional[int] = ..., failure: _Optional[str] = ..., content: _Optional[str] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., zone: _Optional[str] = ..., spec: _Optional[str] = ..., device: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "parked", "free_bytes", "budget_bytes")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    parked: int
    free_bytes: int
    budget_bytes: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., parked: _Optional[int] = ..., free_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ...) -> None: ...

class WithdrawRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("worker_ids", "draining")
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    draining: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_ids: _Optional[_Iterable[str]] = ..., draining: _Optional[_Iterable[str]] = ...) -> None: ...

class DirectoryReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Listing(_message.Message):
    __slots__ = ("workers", "closed", "settled", "draining")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerRecord]
    closed: _containers.RepeatedScalarFieldContainer[str]
    settled: bool
    draining: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerRecord, _Mapping]]] = ..., closed: _Optional[_Iterable[str]] = ..., settled: bool = ..., draining: _Optional[_Iterable[str]] = ...) -> None: ...

class BlockAnnouncement(_message.Message):
    __slots__ = ("worker_id", "since", "until", "added", "removed")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    since: int
    until: int
    added: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, worker_id: _Optional[str] = ..., since: _Optional[int] = ..., until: _Optional[int] = ..., added: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class BlockAnnouncementReply(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: int
    def __init__(self, known: _Optional[int] = ...) -> None: ...

class FindPrefixRequest(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FindPrefixReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockHolders]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockHolders, _Mapping]]] = ...) -> None: ...

class BlockHolders(_message.Message):
    __slots__ = ("worker_ids",)
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_ids: _Optional[_Iterable[str]] = ...) -> None: ...
