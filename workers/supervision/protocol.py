"""What driver and agents of a run tell each other across processes that have no common parent, and on what.

    rank 0   driver  <---- one connection per rank ---->  agent  <--pipe-->  worker       every rank
                     Task, Start, Go, Enough, Stop  -->
                     <--  Hello, Prepared, Status, File, and what the worker says, word for word

Records travel as MessagePack with a length in front: nothing is unpickled. Both sides prove that they know the run's
key before anything else is read. Nothing is encrypted: whoever can read the network can read the training.

``multiprocessing.connection.Listener`` is not used: its accept and its handshake know no deadline.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any, Self

import msgspec

from workers.telemetry import records

__all__ = [
    "AgentStopped",
    "Control",
    "ControlSocket",
    "Dump",
    "Enough",
    "File",
    "Gone",
    "Hello",
    "Interrupted",
    "Note",
    "Prepared",
    "ReadClock",
    "Reception",
    "Start",
    "Stop",
    "Task",
    "Time",
    "WorkerDied",
    "WorkerStatus",
    "connect_to",
]

_SEND_WITHIN_S = 20.0
_GREET_WITHIN_S = 5.0
_LARGEST_BYTES = 64 << 20
_NONCE_BYTES = 32


class Hello(msgspec.Struct, tag=True, frozen=True):
    """An agent introduces itself.

    Attributes:
        rank: its rank, which is the number of its worker.
        pid: its process.
        host: name of its host.
        memory: names the shared memory that it sees; agents that give the same one can share.
        prefix: a start for names in that memory that belong to this process.
        problems: why it cannot take part, one sentence each.
        gpus: how many its host has, where the driver shares them out.
        device: where its worker computes, where whoever started the agent has said so; empty: the driver says.
        nccl: whether its torch has NCCL.
    """

    rank: int
    pid: int
    host: str
    memory: str
    prefix: str
    problems: list[str] = []
    gpus: int = 0
    device: str = ""
    nccl: bool = False


class ReadClock(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: what does your clock say? Also the sign that the driver lives."""


class Time(msgspec.Struct, tag=True, frozen=True):
    """The answer: nanoseconds of the host's own common clock."""

    time_ns: int


class Task(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: what is to be run.

    Attributes:
        sizes: layers per stage, as resolved by the driver.
        hosts: name of the host of every worker.
        prefix: of the names in the shared memory of the agent's host.
        makes_memory: whether this agent makes and removes what lies there.
        meeting: (host, port) where workers without common memory meet; None: there are none.
        profile: what recipe and plan look like to the driver, one text per property.
        devices: where every worker computes; empty: as the agent finds, whose plan it is.
    """

    sizes: list[int]
    hosts: list[str]
    prefix: str
    makes_memory: bool
    meeting: tuple[str, int] | None
    profile: dict[str, str]
    devices: list[str] = []


class Prepared(msgspec.Struct, tag=True, frozen=True):
    """The agent has looked at its task, and made the memory if that is its part."""

    problems: list[str] = []


class Start(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: everybody is prepared, start the worker.

    ``run_dir`` is where it writes; None: into unnamed files on its own host, and the driver gets them by wire.
    """

    run_dir: str | None


class WorkerStatus(msgspec.Struct, tag=True, frozen=True):
    """What the worker does now (``status_table.Status``). ``state`` is the process's letter in /proc, or empty."""

    span: int
    batch: int
    start_ns: int
    progress: int
    state: str


class WorkerDied(msgspec.Struct, tag=True, frozen=True):
    """The worker ended without a word."""

    pid: int
    exit_code: int


class File(msgspec.Struct, tag=True, frozen=True):
    """A piece of a file that the worker wrote, by its name in ``assignment.FILES``; ``last`` is its last piece."""

    what: str
    data: bytes
    last: bool


class Note(msgspec.Struct, tag=True, frozen=True):
    """Either way: a record of those who use a wire for more than one run, as MessagePack."""

    content: bytes


class Enough(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: take no further training batch, finish what is in the pipeline."""


class Dump(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: send the stacks of the worker's threads."""


class Interrupted(msgspec.Struct, tag=True, frozen=True):
    """Somebody sent the agent SIGINT or SIGTERM."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Driver to agent: end the worker; then exit with ``status``, once the driver has hung up."""

    status: int


class AgentStopped(msgspec.Struct, tag=True, frozen=True):
    """The agent's worker has ended, and its memory is removed."""


Control = (
    Hello
    | ReadClock
    | Time
    | Task
    | Prepared
    | Start
    | WorkerStatus
    | WorkerDied
    | File
    | Note
    | Enough
    | Dump
    | Interrupted
    | Stop
    | AgentStopped
    | records.Record
)

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Control)


class Gone(ConnectionError):
    """The other side of a wire hung up, died, or took nothing for too long."""


class ControlSocket:
    """One connection between the driver and an agent; each end belongs to one thread.

    Args:
        connection: the bytes; use `Reception.accept` and `connect_to`, or one end of a pipe inside a process.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, record: Control) -> None:
        """Send one record.

        Raises:
            Gone: the other side is gone, or took nothing for 20 s.

        Blocks:
            while the buffers between both are full, at most 20 s.
        """
        try:
            self._connection.send_bytes(records.encoded(record))
        except OSError as error:
            raise Gone(str(error)) from error

    def poll(self) -> bool:
        """Whether something can be received, if only the end. Never blocks."""
        return self._connection.poll()

    def receive(self) -> Control:
        """Receive one record; poll first.

        Raises:
            Gone: the other side hung up, or the connection broke.
            msgspec.DecodeError: what came is no record.

        Blocks:
            until the rest of a record that has begun is there, at most 20 s per piece.
        """
        try:
            content = self._connection.recv_bytes(_LARGEST_BYTES)
        except (EOFError, OSError) as error:
            raise Gone(str(error) or "it hung up") from error
        record: Control = _decoder.decode(content)
        return record

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``."""
        return self._connection.fileno()

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        self._connection.close()


class Reception:
    """Where agents come to the driver: a listening socket, on a free port, and the key of the run.

    Args:
        host: address to listen at.
    """

    def __init__(self, host: str) -> None:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, 0), family=family, backlog=1024)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self.key = secrets.token_bytes(_NONCE_BYTES)

    def accept(self, within_s: float) -> ControlSocket | None:
        """The next agent that knows the key; None when nobody came, or somebody who does not.

        Blocks:
            at most ``within_s``, and 5 s per message of the greeting.
        """
        self._socket.settimeout(within_s)
        try:
            accepted, _ = self._socket.accept()
        except (TimeoutError, ConnectionAbortedError):
            return None
        connection = _connection(accepted, _GREET_WITHIN_S)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        try:
            connection.send_bytes(nonce)
            answer = connection.recv_bytes(2 * _NONCE_BYTES)
            theirs = answer[:_NONCE_BYTES]
            if not hmac.compare_digest(answer[_NONCE_BYTES:], _proof(self.key, b"agent", nonce, theirs)):
                connection.close()
                return None
            connection.send_bytes(_proof(self.key, b"driver", theirs, nonce))
        except (OSError, EOFError):
            connection.close()
            return None
        _bound(connection, _SEND_WITHIN_S)
        return ControlSocket(connection)

    def close(self) -> None:
        """Take nobody any more."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect_to(host: str, port: int, key: bytes, within_s: float) -> ControlSocket:
    """Connect to the driver's `Reception`.

    Raises:
        OSError: nobody answered there, or somebody who does not know the key.

    Blocks:
        at most ``within_s`` to connect, and 20 s per message of the greeting.
    """
    connection = _connection(socket.create_connection((host, port), within_s), _SEND_WITHIN_S)
    try:
        theirs, nonce = connection.recv_bytes(_NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
        connection.send_bytes(nonce + _proof(key, b"agent", theirs, nonce))
        answer = connection.recv_bytes(_NONCE_BYTES)
    except (EOFError, OSError) as error:
        connection.close()
        raise ConnectionError(
            f"{host}:{port} broke off the greeting ({str(error) or 'it hung up'}): another run's driver?"
        ) from error
    if not hmac.compare_digest(answer, _proof(key, b"driver", nonce, theirs)):
        connection.close()
        raise ConnectionError(f"{host}:{port} does not know this run's key: another run's driver?")
    return ControlSocket(connection)


def _proof(key: bytes, who: bytes, challenge: bytes, own: bytes) -> bytes:
    return hmac.new(key, who + challenge + own, hashlib.sha256).digest()


def _connection(connected: socket.socket, within_s: float) -> Connection:
    """A connection whose every read and write has a deadline, and that notices a host that is gone."""
    connected.settimeout(None)  # the deadlines are the kernel's: multiprocessing reads and writes the descriptor
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SEND_WITHIN_S * 1000))
    connection = Connection(connected.detach())
    _bound(connection, within_s)
    return connection


def _bound(connection: Connection, within_s: float) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as view:
        seconds = struct.pack("ll", int(within_s), int(within_s % 1 * 1e6))
        view.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        view.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
