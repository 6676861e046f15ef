"""DLPack capsules of device tensors without a library that knows them: read in place, and made for memory of our own.

Source: dlpack.h 1.0 and the Python specification of `__dlpack__` in the array API standard.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

CUDA = 2
"""kDLCUDA."""
DEFAULT_STREAM = 1
"""What the protocol calls the legacy default stream."""
VERSION = (1, 0)
KINDS = {0: "int", 1: "uint", 2: "float", 6: "bool"}
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_NAME, _VERSIONED_NAME = b"dltensor", b"dltensor_versioned"


class _Tensor(ctypes.Structure):
    """`DLTensor`."""

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


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """`DLManagedTensor`."""

    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _DELETER))


class _ManagedVersioned(ctypes.Structure):
    """`DLManagedTensorVersioned`."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
# Prototypes of their own: others in the process may set those of `ctypes.pythonapi` otherwise.
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)(("PyCapsule_New", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
# A capsule that is being destroyed must not be touched as a Python object.
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_dying_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))


@dataclass(frozen=True)
class CapsuleContent:
    """What a capsule says; strides are in elements, None for contiguous. Its maker keeps the memory as long as
    `capsule` lives.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device: int
    capsule: Any


def is_on_gpu(tensor: Any) -> bool:
    """Whether a tensor offers DLPack and lies on an NVIDIA GPU."""
    locate = getattr(tensor, "__dlpack_device__", None)
    return locate is not None and hasattr(tensor, "__dlpack__") and int(locate()[0]) == CUDA


def read_capsule(tensor: Any, stream: int = 0) -> CapsuleContent:
    """The content of a tensor's capsule.

    Parameters
    ----------
    tensor : object with `__dlpack__`
        Of any version of the protocol.
    stream : int
        What its maker has put on its own stream is done before whatever comes next on this one.
    """
    wanted = stream or DEFAULT_STREAM
    try:
        capsule = tensor.__dlpack__(stream=wanted, max_version=VERSION)
    except TypeError:  # Before version 1.0 there was no such argument.
        capsule = tensor.__dlpack__(stream=wanted)
    if _is_valid(capsule, _VERSIONED_NAME):
        content = _ManagedVersioned.from_address(_pointer(capsule, _VERSIONED_NAME)).tensor
    else:
        content = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    rank = content.ndim
    kind = KINDS.get(content.code, "unknown") + ("" if content.code == 6 else str(content.bits))
    return CapsuleContent(
        address=int(content.data or 0) + int(content.byte_offset),
        shape=tuple(content.shape[:rank]),
        strides=tuple(content.strides[:rank]) if content.strides else None,
        dtype=kind if content.lanes == 1 else f"{kind}x{content.lanes}",
        device=int(content.device_id),
        capsule=capsule,
    )


_lent: dict[int, tuple[Any, ...]] = {}
"""Address of the managed tensor -> what must live until its deleter is called."""


def _let_go(managed: int) -> None:
    _lent.pop(managed, None)


def _capsule_dies(capsule: int) -> None:
    """A capsule that nobody took (its name says so) gives back what it lent."""
    for name in (_NAME, _VERSIONED_NAME):
        if _dying_is_valid(capsule, name):
            _lent.pop(_dying_pointer(capsule, name), None)


_delete, _destroy = _DELETER(_let_go), _DESTRUCTOR(_capsule_dies)


def make_capsule(
    owner: Any, address: int, shape: tuple[int, ...], dtype: str, device: int, max_version: tuple[int, int] | None
) -> Any:
    """A capsule of contiguous device memory that `owner` keeps.

    Parameters
    ----------
    owner : object
        Lives until whoever takes the capsule is done.
    address, device : int
        On GPU number `device`.
    shape, dtype : tuple of int, str
        Of the tensor.
    max_version : (int, int), optional
        Newest protocol that the taker knows; the one before 1.0 without.
    """
    is_versioned = max_version is not None and max_version[0] >= 1
    kind = np.dtype(dtype)
    extents = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    strides = (ctypes.c_int64 * max(len(shape), 1))(*(int(np.prod(shape[i + 1 :])) for i in range(len(shape))))
    tensor = _Tensor(address, CUDA, device, len(shape), _CODES[kind.kind], 8 * kind.itemsize, 1, extents, strides, 0)
    managed = _ManagedVersioned(*VERSION, None, _delete, 0, tensor) if is_versioned else _Managed(tensor, None, _delete)
    key = ctypes.addressof(managed)
    _lent[key] = (managed, owner, extents, strides)
    return _new(key, _VERSIONED_NAME if is_versioned else _NAME, _destroy)
