"""Relax calls that are left in an integer graph -> operators of `host_float`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lpsn_tvm import graph
from lpsn_tvm.targets.vta import host_float

Array = npt.NDArray[Any]


class HostCall(NamedTuple):
    """An operator of `host_float.OPERATORS`: tensor operands (expressions), constants after them, attributes."""

    op: str
    operands: list[Any]
    attrs: dict[str, Any]
    constants: tuple[Array, ...] = ()


Rule = Callable[[str, list[Any], dict[str, Any], tuple[int, ...]], "HostCall | None"]


def host_call(call: Any) -> HostCall | None:
    """What a Relax call means on the host; None where it has no form there."""
    from lpsn_tvm.interpreter import operands_of

    name = graph.op_name(call).removeprefix("relax.")
    attrs = graph.call_attrs(call)
    operands = operands_of(call, f"relax.{name}", attrs)
    short = name.removeprefix("nn.")
    if short in _RULES:
        return _RULES[short](short, operands, attrs, graph.shape_of(call))
    if short in host_float.REDUCTIONS:
        rank = len(graph.shape_of(operands[0]))
        axes = _axes(attrs.get("axis"), rank)
        return HostCall(
            "relax.reduce", operands, {"name": short, "axes": axes, "keepdims": bool(attrs.get("keepdims", False))}
        )
    if short in host_float.ELEMENTWISE or short in ("astype", "dropout"):
        return _elementwise(short, operands, attrs, graph.dtype_of(call))
    return None


def _axes(axis: Any, rank: int) -> list[int]:
    if axis is None:
        return list(range(rank))
    return [int(a) % rank for a in ([axis] if isinstance(axis, int) else axis)]


def _elementwise(name: str, operands: list[Any], attrs: dict[str, Any], dtype: str) -> HostCall:
    scalars: list[float] = []
    if name == "clip":
        scalars = [float(attrs["min"]), float(attrs["max"])]
    elif name == "leakyrelu":
        scalars = [float(attrs["alpha"])]
    name = "identity" if name in ("astype", "dropout") else name
    return HostCall("relax.elementwise", operands, {"name": name, "dtype": dtype, "scalars": scalars})


def _pad(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall | None:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "edge": "edge", "circular": "wrap"}.get(
        str(attrs.get("pad_mode", "constant"))
    )
    if mode is None:
        return None
    widths = [int(w) for w in attrs["pad_width"]]
    return HostCall(
        "relax.pad", operands[:1], {"widths": widths, "value": float(attrs.get("pad_value", 0.0)), "mode": mode}
    )


def _norm(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall | None:
    rank = len(shape)
    axes = _axes(attrs["axes"], rank)
    if not (attrs.get("center", True) and attrs.get("scale", True)):
        return None
    channel = attrs.get("channel_axis")
    kept = axes if channel is None else [int(channel) % rank]
    affine = [extent if axis in kept else 1 for axis, extent in enumerate(shape)]
    return HostCall("relax.normalize", operands, {"axes": axes, "affine": affine, "epsilon": float(attrs["epsilon"])})


def _resize(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall | None:
    from lpsn_tvm.interpreter_resize import interpolation_matrix, nearest_indices, source_positions

    mode, method = str(attrs["coordinate_transformation_mode"]), str(attrs["method"])
    if mode == "tf_crop_and_resize" or attrs.get("layout", "NCHW") != "NCHW":
        return None
    matrices = []
    for size, target in zip(graph.shape_of(operands[0])[2:], shape[2:], strict=True):
        position = source_positions(size, target, mode)
        if method == "nearest_neighbor":
            index = nearest_indices(position, size, str(attrs.get("rounding_method", "")), mode)
            matrices.append(np.eye(size, dtype=np.float32)[index])
        else:
            alpha, exclude = float(attrs.get("cubic_alpha", -0.75)), bool(attrs.get("cubic_exclude", 0))
            matrices.append(interpolation_matrix(position, size, method, alpha, exclude))
    return HostCall("relax.resize", operands[:1], {}, tuple(matrices))


def _softmax(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall:
    return HostCall("relax.softmax", operands, {"axis": int(attrs.get("axis", -1)), "log": name == "log_softmax"})


def _take(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall | None:
    axis = attrs.get("axis")
    return None if axis is None else HostCall("relax.take", operands, {"axis": int(axis)})


def _reshape(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall:
    return HostCall("relax.reshape", operands[:1], {"shape": list(shape)})


def _permute(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall:
    axes = attrs.get("axes")
    return HostCall("relax.permute", operands, {"axes": list(axes or reversed(range(len(shape))))})


def _concat(name: str, operands: list[Any], attrs: dict[str, Any], shape: tuple[int, ...]) -> HostCall:
    return HostCall("relax.concat", operands, {"axis": int(attrs.get("axis") or 0)})


_RULES: dict[str, Rule] = {
    "pad": _pad,
    "layer_norm": _norm,
    "instance_norm": _norm,
    "image.resize2d": _resize,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "take": _take,
    "matmul": lambda name, operands, attrs, shape: HostCall("relax.matmul", operands, {}),
    "broadcast_to": lambda name, operands, attrs, shape: HostCall(
        "relax.broadcast_to", operands[:1], {"shape": list(shape)}
    ),
    **dict.fromkeys(("reshape", "flatten", "batch_flatten", "squeeze", "expand_dims"), _reshape),
    "permute_dims": _permute,
    "tile": lambda name, operands, attrs, shape: HostCall(
        "relax.tile", operands, {"repeats": [int(r) for r in attrs["repeats"]]}
    ),
    "repeat": lambda name, operands, attrs, shape: HostCall(
        "relax.repeat", operands, {"repeats": int(attrs["repeats"]), "axis": int(attrs["axis"])}
    ),
    "concat": _concat,
}
"""Operator -> what it means; reductions and elementwise operators are in `host_call`."""
