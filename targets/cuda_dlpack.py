"""Reading DLPack capsules of device tensors without a library that knows them: address, shape and type, in place."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

CUDA = 2
"""kDLCUDA."""
DEFAULT_STREAM = 1
"""What the protocol calls the legacy default stream."""
KINDS = {0: "int", 1: "uint", 2: "float", 6: "bool"}


class _Tensor(ctypes.Structure):
    """`DLTensor`, the first member of `DLManagedTensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class CapsuleContent:
    """What a capsule says; strides are in elements, None for contiguous."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device: int


def is_on_gpu(tensor: Any) -> bool:
    """Whether a tensor offers DLPack and lies on an NVIDIA GPU."""
    locate = getattr(tensor, "__dlpack_device__", None)
    return locate is not None and hasattr(tensor, "__dlpack__") and int(locate()[0]) == CUDA


def read_capsule(tensor: Any) -> CapsuleContent:
    """The content of a tensor's capsule, which is dropped at once: the tensor itself keeps its memory.

    What its maker has put on its stream is done before whatever comes on the default stream.
    """
    capsule = tensor.__dlpack__(stream=DEFAULT_STREAM)
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    content = _Tensor.from_address(get_pointer(capsule, b"dltensor"))
    rank = content.ndim
    kind = KINDS.get(content.code, "unknown") + ("" if content.code == 6 else str(content.bits))
    return CapsuleContent(
        address=int(content.data or 0) + int(content.byte_offset),
        shape=tuple(content.shape[:rank]),
        strides=tuple(content.strides[:rank]) if content.strides else None,
        dtype=kind if content.lanes == 1 else f"{kind}x{content.lanes}",
        device=int(content.device_id),
    )
