"""A module's call with tensors that lie on a GPU: checked, run on their stream, answered in their library."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lpsn_tvm.errors import LpsnError
from lpsn_tvm.targets.cuda_tensors import DeviceInput, device_input, handed_over, is_torch, make_output, torch_stream

if TYPE_CHECKING:
    from lpsn_tvm.artifact import TensorInfo
    from lpsn_tvm.targets.cuda_artifact import CudaArtifact


def call_on_device(artifact: CudaArtifact, tensors: list[Any], stream: int | None) -> Any:
    """Run the network on tensors of one GPU.

    Parameters
    ----------
    artifact : CudaArtifact
        The network.
    tensors : list
        In the order of its inputs.
    stream : int, optional
        Where to run, instead of the stream that the tensors come from.

    Raises
    ------
    LpsnError
        Shapes, types or GPUs do not fit.
    """
    like = tensors[0]
    if stream is not None and is_torch(like):
        return _on_torch_stream(artifact, tensors, stream)
    inputs = [_checked(info, value, stream or 0) for info, value in zip(artifact.inputs, tensors, strict=True)]
    return _run(artifact, inputs, like, inputs[0].stream if stream is None else stream)


def _run(artifact: CudaArtifact, inputs: list[DeviceInput], like: Any, stream: int) -> Any:
    first = inputs[0]
    count = first.shape[0]
    for other in inputs[1:]:
        if other.shape[0] != count:
            raise LpsnError("all inputs must have the same batch size", where="module call")
        if other.device != first.device:
            raise LpsnError("all inputs must be on the same GPU", where="module call")
    runner = artifact.runner(first.device)
    made = [
        make_output(like, runner, (artifact.rows(i, count), *port.shape[1:]) if port.shape else (), port.dtype, stream)
        for i, port in enumerate(runner.program.outputs)
    ]
    held = [tensor.held for tensor in inputs if tensor.held is not None]
    runner.run_on_device(
        [tensor.address for tensor in inputs],
        [address for _, address in made],
        stream,
        count,
        after=[tensor.stream for tensor in inputs if tensor.stream != stream],
        held=held or None,
    )
    results = [handed_over(result, like) for result, _ in made]
    if len(results) == 1:
        return results[0]
    return {info.name: result for info, result in zip(artifact.outputs, results, strict=True)}


def _on_torch_stream(artifact: CudaArtifact, tensors: list[Any], stream: int) -> Any:
    """Torch's memory is told of the other stream: else what is freed could be given out again while it runs."""
    torch = sys.modules["torch"]
    device = tensors[0].get_device()
    current = torch_stream(torch, device)
    # Torch names its default stream 0 and takes no other object for it.
    other = torch.cuda.ExternalStream(stream, device=tensors[0].device) if stream else torch.cuda.default_stream(device)
    taken = [_as_wanted(info, value) for info, value in zip(artifact.inputs, tensors, strict=True)]
    inputs = [
        _checked(info, value, stream)._replace(stream=current)
        for info, value in zip(artifact.inputs, taken, strict=True)
    ]
    with torch.cuda.stream(other):
        result = _run(artifact, inputs, tensors[0], stream)
    for value in taken:
        value.record_stream(other)
    return result


def _as_wanted(info: TensorInfo, tensor: Any) -> Any:
    """A torch tensor as the network takes it, converted on the GPU where it is something else."""
    torch = sys.modules["torch"]
    if tensor.is_complex():
        raise LpsnError(f"dtype {tensor.dtype} is not a real number type", where=f"input {info.name!r}")
    return tensor.to(getattr(torch, info.dtype)).contiguous()


def _checked(info: TensorInfo, value: Any, stream: int) -> DeviceInput:
    tensor = device_input(value, stream)
    where = f"input {info.name!r}"
    if tensor is None:
        raise LpsnError("is not on a GPU", where=where)
    shape = tensor.shape
    if shape != info.shape and (shape[1:] != info.shape[1:] or len(shape) != len(info.shape) or shape[0] == 0):
        raise LpsnError(f"shape {shape} does not fit {('N', *info.shape[1:])}", where=where)
    if tensor.dtype == info.dtype and tensor.is_contiguous:
        return tensor
    if is_torch(value):
        converted = _as_wanted(info, value)
        found = device_input(converted)
        if found is not None:
            return found._replace(held=converted)
    if tensor.dtype != info.dtype:
        raise LpsnError(f"is {tensor.dtype}; on the GPU {info.dtype} is taken", where=where)
    raise LpsnError("is not contiguous; make it so first (ascontiguousarray)", where=where)
