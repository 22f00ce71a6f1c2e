"""Connections between the driver of a run and the ranks' agents: authenticated, nothing unpickled, with deadlines.

Records travel as MessagePack with a length in front. Both sides prove that they know the run's key before anything else
is read (``multiprocessing.connection.Listener`` does so without deadlines). Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import struct
import time
from multiprocessing import connection as mp_connection
from multiprocessing.connection import Connection
from typing import Any, Self, cast

import msgspec

from workers.supervision import control_records as control
from workers.telemetry import records

__all__ = ["LOOK_EVERY_S", "ControlSocket", "Gone", "Reception", "connect_to", "wait_for"]

LOOK_EVERY_S = 0.2  # a look for records waits for one
_SEND_WITHIN_S = 20.0
_GREET_WITHIN_S = 5.0
_UNATTENDED_S = 5.0
_LARGEST_BYTES = 64 << 20
_NONCE_BYTES = 32

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(control.Control)


class Gone(ConnectionError):
    """The other side of a wire hung up, died, or took nothing for too long."""


class ControlSocket:
    """One connection between the driver and an agent; each end belongs to one thread.

    From `Reception.accept` and `connect_to`; inside a process also of one end of a pipe.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._broken: Gone | msgspec.DecodeError | None = None
        self._looked_at = self._heard_at = time.monotonic()

    def send(self, record: control.Control) -> None:
        """Send one record; blocks while the buffers between both are full.

        Raises Gone where the other side is gone, or took nothing for 20 s.
        """
        try:
            self._connection.send_bytes(records.encoded(record))
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self) -> control.Control:
        """Wait for one record; for the rest of one that has begun 20 s at most per piece.

        Raises Gone where the other side hung up or the connection broke, msgspec.DecodeError for what is no record.
        """
        try:
            content = self._connection.recv_bytes(_LARGEST_BYTES)
        except (EOFError, OSError) as error:
            raise Gone(str(error) or "it hung up") from error
        record: control.Control = _decoder.decode(content)
        return record

    def drain(self) -> list[control.Control]:
        """All that has come since the last look, without waiting; raises as `receive`, after what came before."""
        if self._broken is not None:
            raise self._broken
        if time.monotonic() - self._looked_at > _UNATTENDED_S:  # nobody listened, so nobody was silent
            self._heard_at = time.monotonic()
        heard: list[control.Control] = []
        try:
            while self._connection.poll():
                heard.append(self.receive())
        except (Gone, msgspec.DecodeError) as error:
            if not heard:
                raise
            self._broken = error
        self._looked_at = time.monotonic()
        if heard:
            self._heard_at = self._looked_at
        return heard

    def silent_s(self) -> float:
        """For how long nothing has come, in seconds; only counts while `drain` is called often."""
        return time.monotonic() - self._heard_at

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``."""
        return self._connection.fileno()

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        self._connection.close()


def wait_for(*speakers: object) -> None:
    """Wait until a connection can be read, or a process has ended (its sentinel); at most 0.2 s."""
    mp_connection.wait(cast(Any, speakers), LOOK_EVERY_S)


class Reception:
    """Where agents come to the driver: a listening socket at address ``host``, on a free port, and the run's key."""

    def __init__(self, host: str) -> None:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, 0), family=family, backlog=1024)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self.key = secrets.token_bytes(_NONCE_BYTES)

    def accept(self, within_s: float) -> ControlSocket | None:
        """The next agent that knows the key; None when nobody came, or somebody who does not.

        Blocks ``within_s`` at most, and 5 s per message of the greeting.
        """
        self._socket.settimeout(within_s)
        try:
            accepted, _ = self._socket.accept()
        except (TimeoutError, ConnectionAbortedError):
            return None
        connection = _connection(accepted, _GREET_WITHIN_S)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with contextlib.suppress(OSError, EOFError):
            connection.send_bytes(nonce)
            answer = connection.recv_bytes(2 * _NONCE_BYTES)
            theirs = answer[:_NONCE_BYTES]
            if hmac.compare_digest(answer[_NONCE_BYTES:], _proof(self.key, b"agent", nonce, theirs)):
                connection.send_bytes(_proof(self.key, b"driver", theirs, nonce))
                _bound(connection, _SEND_WITHIN_S)
                return ControlSocket(connection)
        connection.close()
        return None

    def close(self) -> None:
        """Take nobody any more."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect_to(host: str, port: int, key: bytes, within_s: float) -> ControlSocket:
    """Connect to the driver's `Reception`. Blocks ``within_s`` at most, and 20 s per message of the greeting.

    Raises OSError where nobody answered, or somebody who does not know the key.
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
