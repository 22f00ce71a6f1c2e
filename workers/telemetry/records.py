"""What workers and driver tell each other on the control pipe: typed records as MessagePack, never pickles."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import msgspec

from pipeline.run.sketch import Sketch
from pipeline.wording import escaped

__all__ = [
    "Failure",
    "Finished",
    "Go",
    "Judged",
    "Loss",
    "Observation",
    "Ready",
    "Record",
    "Scored",
    "Switched",
    "encoded",
    "receive",
    "send",
]


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The worker has its stage, which is ``built`` (``pipeline.run.fingerprint``), and both ends of its channels."""

    stage: int
    pid: int
    threads: int
    replica: int = 0
    built: dict[str, Sketch] = {}


class Go(msgspec.Struct, tag=True, frozen=True):
    """Driver to worker: everybody is ready."""


class Loss(msgspec.Struct, tag=True, frozen=True):
    """Training losses of batches ``first_batch`` on, from a replica's last stage, at a time on the common clock."""

    first_batch: int
    losses: list[float]
    time_ns: int
    replica: int = 0


class Scored(msgspec.Struct, tag=True, frozen=True):
    """A pass over the held-out batches after ``updates`` training batches, from the last stage of replica 0."""

    updates: int
    loss: float
    accuracy: float | None
    rows: int
    time_ns: int


class Judged(msgspec.Struct, tag=True, frozen=True):
    """How good a stage's synthetic gradient of a sampled batch was; see ``pipeline.stage.dni_quality.Quality``."""

    stage: int
    batch: int
    cosine: float
    norm_ratio: float
    error: float
    time_ns: int
    replica: int = 0


class Switched(msgspec.Struct, tag=True, frozen=True):
    """A stage locked or unlocked; see ``pipeline.stage.unlock.Switch``."""

    stage: int
    batch: int
    locked: bool
    cosine: float | None
    norm_ratio: float | None
    time_ns: int
    replica: int = 0


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The worker did everything and wrote its files. Times are on the common clock.

    ``window_ns``: in the last stage of a run of several batches, the ends of the last batch of the warm-up and of all.
    ``down_bytes`` and ``up_bytes``: what it sent in the whole run for training, tensors only.
    """

    stage: int
    updated: int
    learned: int
    dropped: int
    peak_memory_bytes: int
    begin_ns: int
    end_ns: int
    window_ns: tuple[int, int] | None = None
    down_bytes: int = 0
    up_bytes: int = 0
    replica: int = 0


class Failure(msgspec.Struct, tag=True, frozen=True):
    """The worker cannot go on. ``shown`` is the part of the traceback for the user's eyes; None: all of it."""

    stage: int
    pid: int
    message: str
    traceback: str
    time_ns: int
    layer: str | None = None
    batch: int | None = None
    replica: int = 0
    shown: str | None = None


Observation = Loss | Scored | Judged | Switched
"""What a worker reports of the training while it trains."""
Record = Ready | Go | Observation | Finished | Failure

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Record)
_encoder = msgspec.msgpack.Encoder()


def encoded(record: msgspec.Struct) -> bytes:
    """Any typed record as MessagePack; what of its text no encoding has travels escaped."""
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        return _encoder.encode(escaped(msgspec.to_builtins(record, builtin_types=(bytes,))))


def send(connection: Connection, record: Record) -> None:
    """Send one record, or raise OSError where the other side is gone; blocks only while the pipe is full."""
    connection.send_bytes(encoded(record))


def receive(connection: Connection) -> Record:
    """Receive one record; blocks until there is one. Raises EOFError, or msgspec.DecodeError for what is no record."""
    record: Record = _decoder.decode(connection.recv_bytes())
    return record
