"""What staging and peer memory need of CUDA: a copying stream, pinned host memory, handles that other processes open.

The memory that is shared is asked of CUDA itself (cudaMalloc, cudaIpcGetMemHandle): a block of torch's allocator would
be shared whole, and its way of counting references leaves files behind when a process is killed. CUDA is not touched
before a worker with a GPU makes a ``CudaEngine``.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from workers.channels.gpu.nccl import NcclLink
from workers.channels.net.gloo import Meeting

__all__ = ["CudaEngine"]

_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: the only flag that cudaIpcOpenMemHandle knows
_GRANULE_BYTES = 2 << 20  # of device memory: smaller pieces may share a block, and a handle shares the whole block
_SHARED = struct.Struct("<i64s")  # ordinal of the device, CUDA's handle

_own: dict[bytes, Any] = {}
"""What this process shares, by handle: CUDA opens a handle in other processes only. Never freed before the process
ends, since others may still copy into it."""


class CudaEngine:
    """The ``workers.channels.engine.Engine`` of a GPU, e.g. ``cuda:0``; the stream that is current there computes."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    def empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Where the system does not let memory be pinned, copies are right, but wait for the host."""
        runtime, address = _runtime(), torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(self._device):
            if runtime.cudaHostRegister(address, len(memory), 0) != 0:
                runtime.cudaGetLastError()  # else the next kernel reports it
                return lambda: None
        return partial(runtime.cudaHostUnregister, address)

    @torch.no_grad()
    def snapshot(self, into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        for mine, tensor in zip(into, tensors, strict=True):
            mine.copy_(tensor.detach(), non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.cuda.stream(self._stream):
            fetched = tuple(torch.empty_like(t, device=self._device).copy_(t, non_blocking=True) for t in tensors)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in fetched:
            tensor.record_stream(computing)
        return fetched

    def mark(self) -> torch.cuda.Event:
        """Whoever waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def shareable(self, num_bytes: int) -> tuple[Tensor, bytes]:
        runtime, pointer, handle = _runtime(), ctypes.c_void_p(), _Handle()
        whole_bytes = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        with torch.cuda.device(self._device):
            _check(runtime.cudaMalloc(ctypes.byref(pointer), whole_bytes), f"{whole_bytes:,} bytes of {self._device}")
            _check(runtime.cudaIpcGetMemHandle(ctypes.byref(handle), pointer), f"a handle of memory of {self._device}")
        memory = _over(pointer, num_bytes, self._device)
        shared = _SHARED.pack(self._device.index, bytes(handle))
        _own[shared] = memory
        return memory, shared

    def opened(self, handle: bytes, num_bytes: int) -> Tensor:
        if (mine := _own.get(handle)) is not None:
            return cast(Tensor, mine)
        ordinal, name = _SHARED.unpack(handle)
        there = torch.device("cuda", ordinal)
        if there != self._device and not torch.cuda.can_device_access_peer(self._device, there):
            raise RuntimeError(
                f"{self._device} cannot reach the memory of {there} (nvidia-smi topo -p2p r shows who can): choose "
                "channels shm, which goes through the host."
            )
        pointer = ctypes.c_void_p()
        with torch.cuda.device(self._device):
            theirs = _Handle.from_buffer_copy(name)
            opened = _runtime().cudaIpcOpenMemHandle(ctypes.byref(pointer), theirs, _LAZY_PEER_ACCESS)
            _check(opened, f"memory of {there} that another process shares (or choose channels shm)")
        return _over(pointer, num_bytes, self._device)

    def signal(self) -> tuple[torch.cuda.Event, bytes]:
        with torch.cuda.device(self._device):  # an event belongs to the device that is current at its first use
            event = torch.cuda.Event(interprocess=True)
            handle = bytes(event.ipc_handle())
        _own[handle] = event
        return event, handle

    def opened_signal(self, handle: bytes) -> torch.cuda.Event:
        return cast(torch.cuda.Event, _own.get(handle) or torch.cuda.Event.from_ipc_handle(self._device, handle))

    def wire(self, meeting: Meeting, name: str, side: int, within_s: float) -> NcclLink:
        return NcclLink.join(self._device, meeting, name, side, within_s)

    def record(self, signal: Any) -> None:
        signal.record(self._stream)

    def wait(self, signal: Any) -> None:
        self._stream.wait_event(signal)


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _OnDevice:
    """A pointer as torch takes it without a copy: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, pointer: ctypes.c_void_p, num_bytes: int) -> None:
        shape, data = (num_bytes,), (pointer.value, False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": data, "strides": None, "version": 2}


def _over(pointer: ctypes.c_void_p, num_bytes: int, device: torch.device) -> Tensor:
    with torch.cuda.device(device):
        return torch.as_tensor(_OnDevice(pointer, num_bytes))


@cache
def _runtime() -> Any:
    """The CUDA runtime that torch has loaded: another copy would know nothing of torch's contexts."""
    torch.cuda.init()
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = sorted({line.split(maxsplit=5)[-1] for line in lines if "libcudart" in line})
    if not paths:
        raise RuntimeError("torch has not loaded libcudart, which CUDA peer memory needs: choose channels gloo")
    library = ctypes.CDLL(paths[0])
    pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    for name, arguments in (
        ("cudaMalloc", [ctypes.POINTER(pointer), size]),
        ("cudaIpcGetMemHandle", [ctypes.POINTER(_Handle), pointer]),
        ("cudaIpcOpenMemHandle", [ctypes.POINTER(pointer), _Handle, flags]),
        ("cudaHostRegister", [pointer, size, flags]),
        ("cudaHostUnregister", [pointer]),
        ("cudaGetLastError", []),
        ("cudaGetErrorString", [ctypes.c_int]),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _check(status: int, what: str) -> None:
    if status != 0:
        runtime = _runtime()
        runtime.cudaGetLastError()
        said = runtime.cudaGetErrorString(status).decode()
        raise RuntimeError(f"CUDA gives no {what}: {said} (error {status})")
