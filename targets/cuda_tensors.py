"""Tensors that lie on a GPU, whoever made them: addresses for reading in place, and tensors to write to."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.targets.cuda_dlpack import CUDA, DEFAULT_STREAM, is_on_gpu, make_capsule, read_capsule

if TYPE_CHECKING:
    from lpsn_tvm.targets.cuda_runner import Runner


class DeviceInput(NamedTuple):
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
    held : object
        What must live until the run is over, where the maker would not give the memory out in the order of its stream.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    is_contiguous: bool
    device: int = 0
    stream: int = 0
    held: Any = None


def stream_number(stream: Any) -> int:
    """The driver's handle of a stream: a number, or a stream of torch, cupy, numba or cuda.core.

    Raises
    ------
    LpsnError
        It is none of these.
    """
    if hasattr(stream, "__cuda_stream__"):
        stream = stream.__cuda_stream__()[1]
    for name in ("cuda_stream", "ptr", "handle"):
        stream = getattr(stream, name, stream)
    try:
        number = int(getattr(stream, "value", stream) or 0)
    except (TypeError, ValueError) as error:
        raise LpsnError(f"{type(stream).__name__} is no CUDA stream", where="stream") from error
    return 0 if number == DEFAULT_STREAM else number


def is_torch(tensor: Any) -> bool:
    """Whether it is a torch tensor; imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def device_input(tensor: Any, stream: int = 0) -> DeviceInput | None:
    """The description of a tensor on a GPU, through torch, `__cuda_array_interface__` (cupy, numba and others have it)
    or DLPack; None for anything else.

    Parameters
    ----------
    tensor : object
        Anything.
    stream : int
        For DLPack, whose makers order their work before that of this stream.
    """
    if is_torch(tensor):
        return _torch_input(sys.modules["torch"], tensor) if tensor.is_cuda else None
    interface = getattr(tensor, "__cuda_array_interface__", None)
    # Without a stream nobody would order the work (jax: its arrays may still be under way).
    if (interface is None or interface.get("stream") is None) and is_on_gpu(tensor):
        return _dlpack_input(tensor, stream)
    if interface is None:
        return None
    shape = tuple(int(extent) for extent in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    made_on = interface.get("stream")
    return DeviceInput(
        address=int(interface["data"][0]),
        shape=shape,
        dtype=str(dtype),
        is_contiguous=strides is None or _is_contiguous(shape, tuple(strides), dtype.itemsize),
        device=_device_of(tensor),
        stream=0 if made_on is None else stream_number(made_on),
    )


def _device_of(tensor: Any) -> int:
    locate = getattr(tensor, "__dlpack_device__", None)
    if locate is not None and int(locate()[0]) == CUDA:
        return int(locate()[1])
    return int(getattr(getattr(tensor, "device", None), "id", 0))


def _torch_input(torch: Any, tensor: Any) -> DeviceInput:
    device = tensor.get_device()
    return DeviceInput(
        tensor.data_ptr(),
        tuple(tensor.shape),
        str(tensor.dtype)[6:],
        tensor.is_contiguous(),
        device,
        torch_stream(torch, device),
    )


def torch_stream(torch: Any, device: int) -> int:
    """The stream that torch works on in this thread."""
    # What torch's own compiler uses: a tenth of the time that making a `Stream` object takes.
    quick: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(torch.cuda.current_stream(device).cuda_stream) if quick is None else quick(device)


def _dlpack_input(tensor: Any, stream: int) -> DeviceInput:
    content = read_capsule(tensor, stream)
    is_contiguous = content.strides is None or _is_contiguous(content.shape, content.strides, 1)
    held = (tensor, content.capsule)
    return DeviceInput(content.address, content.shape, content.dtype, is_contiguous, content.device, stream, held)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != itemsize:
            return False
        itemsize *= extent
    return True


class DeviceTensor:
    """A result in memory of our own, for callers whose library makes no tensors that others may write to.

    Has `__dlpack__` and `__cuda_array_interface__`; `numpy.asarray` copies it to the host.
    """

    def __init__(self, runner: Runner, shape: tuple[int, ...], dtype: str, stream: int) -> None:
        self.shape, self.dtype, self.stream = shape, np.dtype(dtype), stream
        self._runner = runner
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.address = runner.allocate(size)
        weakref.finalize(self, _give_back, runner, self.address)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.dtype}{list(self.shape)} on GPU {self._runner.device.index})"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream or DEFAULT_STREAM,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._runner.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("this tensor is handed over where it is; copy it afterwards")
        if stream != -1:
            taker = stream_number(DEFAULT_STREAM if stream is None else stream)
            if taker != self.stream:
                self._runner.order(self.stream, taker)
        device = self._runner.device.index
        return make_capsule(self, self.address, self.shape, str(self.dtype), device, max_version)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor on a GPU has to be copied")
        result = np.empty(self.shape, self.dtype)
        self._runner.read(result, self.address, self.stream)
        return result if dtype is None else result.astype(dtype, copy=False)


def _give_back(runner: Runner, address: int) -> None:
    with suppress(ArtifactError):  # The driver is shutting down and has freed everything.
        runner.free(address)


def make_output(like: Any, runner: Runner, shape: tuple[int, ...], dtype: str, stream: int) -> tuple[Any, int]:
    """(tensor to write to, its address): by the library of `like` where that makes tensors that others may write to
    (torch, cupy), else of our own.
    """
    if is_torch(like):
        torch = sys.modules["torch"]
        made = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
        return made, int(made.data_ptr())
    if hasattr(like, "__cuda_array_interface__"):
        library = sys.modules.get(type(like).__module__.partition(".")[0])
        make = getattr(library, "empty", None)
        if make is not None:
            # The library takes the GPU whose context is current.
            with runner.driver.using(runner.context):
                made = make(shape, dtype=dtype)
            return made, int(made.__cuda_array_interface__["data"][0])
    made = DeviceTensor(runner, shape, dtype, stream)
    return made, made.address


def handed_over(result: Any, like: Any) -> Any:
    """A `DeviceTensor` as a tensor of the library of `like`, where that takes DLPack; anything else as it is."""
    if not isinstance(result, DeviceTensor) or isinstance(like, DeviceTensor):
        return result
    library = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    library = library or sys.modules.get(type(like).__module__.partition(".")[0])
    take = getattr(library, "from_dlpack", None)
    return result if take is None else take(result)
