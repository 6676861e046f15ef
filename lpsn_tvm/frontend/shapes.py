"""Fix the dynamic dimensions of a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lpsn_tvm.errors import ModelError

if TYPE_CHECKING:
    import onnx


def fix_input_shapes(model: onnx.ModelProto, *, batch: int, input_shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a static shape into every graph input, in place; shapes of inner values and outputs are forgotten (inferred
    again later).

    A dynamic first dimension becomes `batch` unless `input_shapes` says otherwise. A dimension that has a symbol takes
    the value the same symbol got in another input.

    Raises
    ------
    ModelError
        Names the input, the dimension, and the option that fixes it.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ModelError(f"batch must be an integer of at least 1, not {batch!r}", where="batch")
    names = [value.name for value in model.graph.input]
    unknown = sorted(set(input_shapes) - set(names))
    if unknown:
        raise ModelError(
            f"the model has no input {unknown[0]!r}; its inputs are {', '.join(names)}", where="input_shapes"
        )
    symbols: dict[str, int] = {}
    for value in model.graph.input:
        if value.name in input_shapes:
            _apply(value, tuple(input_shapes[value.name]), symbols)
    for value in model.graph.input:
        _resolve(value, batch, symbols)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def _apply(value: onnx.ValueInfoProto, wanted: tuple[int, ...], symbols: dict[str, int]) -> None:
    tensor = value.type.tensor_type
    where = f"input_shapes[{value.name!r}]"
    if any(isinstance(extent, bool) or not hasattr(extent, "__index__") or int(extent) < 1 for extent in wanted):
        raise ModelError(f"{wanted} is not a shape: every extent must be an integer of at least 1", where=where)
    if not tensor.HasField("shape"):
        for extent in wanted:
            tensor.shape.dim.add().dim_value = int(extent)
        return
    if len(tensor.shape.dim) != len(wanted):
        raise ModelError(
            f"{wanted} has {len(wanted)} dimensions, the model's input has {len(tensor.shape.dim)}: {describe(value)}",
            where=where,
        )
    for index, (dim, extent) in enumerate(zip(tensor.shape.dim, wanted, strict=True)):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            if dim.dim_value != extent:
                raise ModelError(
                    f"dimension {index} is {dim.dim_value} in the model and cannot become {extent}: {describe(value)}",
                    where=where,
                )
            continue
        if dim.dim_param and symbols.setdefault(dim.dim_param, int(extent)) != extent:
            raise ModelError(
                f"dimension {index} ({dim.dim_param}) is {extent} here and {symbols[dim.dim_param]} in another input",
                where=where,
            )
        dim.dim_value = int(extent)


def _resolve(value: onnx.ValueInfoProto, batch: int, symbols: Mapping[str, int]) -> None:
    tensor, given = value.type.tensor_type, describe(value)
    if not tensor.HasField("shape"):
        raise ModelError(
            f"the rank is not known; give input_shapes={{{value.name!r}: (...)}}", where=f"input {value.name!r}"
        )
    for index, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            if (
                index == 0
                and batch != 1
                and dim.dim_value != batch
                and len(tensor.shape.dim) > 1
                and dim.dim_value == 1
            ):
                raise ModelError(
                    f"the model's batch is fixed to 1 and cannot become {batch}: {given}", where=f"input {value.name!r}"
                )
            continue
        if dim.dim_param in symbols and dim.dim_param:
            dim.dim_value = symbols[dim.dim_param]
        elif index == 0:
            dim.dim_value = batch
        else:
            label = f" ({dim.dim_param})" if dim.dim_param else ""
            raise ModelError(
                f"dimension {index}{label} is dynamic: {given}; fix it with input_shapes={{{value.name!r}: (...)}}",
                where=f"input {value.name!r}",
            )


def describe(value: onnx.ValueInfoProto) -> str:
    """`[N, 3, 224, 224]`."""
    dims: list[Any] = [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
    return "[" + ", ".join(map(str, dims)) + "]"
