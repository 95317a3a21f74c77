from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("run_id", "sender", "version", "recipe_digest", "manifest_digest", "initial_digest", "committed", "contributors", "state_digest", "working", "working_seconds", "round_seconds", "catching_up", "finished", "void_rounds", "train_examples", "processes")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RECIPE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INITIAL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    WORKING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CATCHING_UP_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    VOID_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sender: str
    version: str
    recipe_digest: str
    manifest_digest: str
    initial_digest: str
    committed: int
    contributors: _containers.RepeatedScalarFieldContainer[str]
    state_digest: str
    working: int
    working_seconds: float
    round_seconds: float
    catching_up: bool
    finished: bool
    void_rounds: int
    train_examples: int
    processes: int
    def __init__(self, run_id: _Optional[str] = ..., sender: _Optional[str] = ..., version: _Optional[str] = ..., recipe_digest: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., initial_digest: _Optional[str] = ..., committed: _Optional[int] = ..., contributors: _Optional[_Iterable[str]] = ..., state_digest: _Optional[str] = ..., working: _Optional[int] = ..., working_seconds: _Optional[float] = ..., round_seconds: _Optional[float] = ..., catching_up: _Optional[bool] = ..., finished: _Optional[bool] = ..., void_rounds: _Optional[int] = ..., train_examples: _Optional[int] = ..., processes: _Optional[int] = ...) -> None: ...

class UpdatePart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("run_id", "round", "sender", "manifest_digest", "weight", "degree", "size", "sha256", "wants_to_stop")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DEGREE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    WANTS_TO_STOP_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    sender: str
    manifest_digest: str
    weight: float
    degree: int
    size: int
    sha256: str
    wants_to_stop: bool
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., sender: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., weight: _Optional[float] = ..., degree: _Optional[int] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ..., wants_to_stop: _Optional[bool] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("accepted", "committed")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    committed: int
    def __init__(self, accepted: _Optional[bool] = ..., committed: _Optional[int] = ...) -> None: ...

class StateRequest(_message.Message):
    __slots__ = ("run_id", "sender", "round", "manifest_digest", "state_digest", "offset")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sender: str
    round: int
    manifest_digest: str
    state_digest: str
    offset: int
    def __init__(self, run_id: _Optional[str] = ..., sender: _Optional[str] = ..., round: _Optional[int] = ..., manifest_digest: _Optional[str] = ..., state_digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class GroupPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: GroupHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[GroupHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GroupHeader(_message.Message):
    __slots__ = ("run_id", "sender", "round", "attempt", "members", "phase", "size", "sha256")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sender: str
    round: int
    attempt: int
    members: _containers.RepeatedScalarFieldContainer[str]
    phase: str
    size: int
    sha256: str
    def __init__(self, run_id: _Optional[str] = ..., sender: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., members: _Optional[_Iterable[str]] = ..., phase: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...
