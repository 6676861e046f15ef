"""Tensors that lie on a GPU, whoever made them: addresses for reading in place, and empty ones to write to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpsn_tvm.errors import LpsnError
from lpsn_tvm.targets.cuda_dlpack import is_on_gpu, read_capsule


@dataclass(frozen=True)
class DeviceInput:
    """What a kernel needs to know of somebody's tensor.

    Parameters
    ----------
    address : int
    shape : tuple of int
    dtype : str
    is_contiguous : bool
    device : int
        Number of the GPU.
    stream : int
        The stream on which its maker works (0: the default stream).
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    is_contiguous: bool
    device: int = 0
    stream: int = 0


def device_input(tensor: Any) -> DeviceInput | None:
    """The description of a tensor on a GPU, through `__cuda_array_interface__` (torch, cupy, numba and others have it)
    or DLPack; None for anything else.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _torch_input(torch, tensor) if tensor.is_cuda else None
    interface = getattr(tensor, "__cuda_array_interface__", None)
    if interface is None:
        return _dlpack_input(tensor) if is_on_gpu(tensor) else None
    shape = tuple(int(extent) for extent in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    device = getattr(getattr(tensor, "device", None), "id", 0)
    stream = interface.get("stream")
    return DeviceInput(
        address=int(interface["data"][0]),
        shape=shape,
        dtype=str(dtype),
        is_contiguous=strides is None or tuple(strides) == _strides(shape, dtype.itemsize),
        device=int(device),
        # 1 is the legacy default stream.
        stream=0 if stream in (None, 1) else int(stream),
    )


def _torch_input(torch: Any, tensor: Any) -> DeviceInput:
    device = int(tensor.device.index or 0)
    return DeviceInput(
        address=int(tensor.data_ptr()),
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        is_contiguous=bool(tensor.is_contiguous()),
        device=device,
        stream=int(torch.cuda.current_stream(device).cuda_stream),
    )


def _dlpack_input(tensor: Any) -> DeviceInput:
    content = read_capsule(tensor)
    is_contiguous = content.strides is None or content.strides == _strides(content.shape, 1)
    return DeviceInput(content.address, content.shape, content.dtype, is_contiguous, content.device)


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    for extent in reversed(shape):
        strides.insert(0, itemsize)
        itemsize *= extent
    return tuple(strides)


def empty_like(tensor: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A tensor of the same library on the same GPU, made by that library's own `empty`.

    Raises
    ------
    LpsnError
        The library has no such function.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=tensor.device)
    library = sys.modules.get(type(tensor).__module__.partition(".")[0])
    make = getattr(library, "empty", None)
    if make is None:
        raise LpsnError(
            f"results for {type(tensor).__name__} cannot be made: its library has no `empty`; pass torch or cupy "
            "tensors, or numpy arrays",
            where="module call",
        )
    return make(shape, dtype=dtype)
