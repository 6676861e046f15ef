"""Canonical Relax operators as ONNX nodes: one small function per operator, looked up in `EXPORTERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lpsn_tvm import graph
from lpsn_tvm.errors import UnsupportedOpError
from lpsn_tvm.export_writer import GraphWriter

Exporter = Callable[[GraphWriter, Any, list[str], str], Any]
Attrs = dict[str, Any]


def _simple(op: str) -> Exporter:
    def write(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
        w.node(op, inputs, out)

    return write


# --- elementwise ----------------------------------------------------------------------------------------------------


def _clip(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    low, high = (float(getattr(arg, "value", arg)) for arg in call.args[1:3])
    w.node("Clip", [inputs[0], w.number(low, out), w.number(high, out)], out)


def _relu6(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("Clip", [inputs[0], w.number(0.0, out), w.number(6.0, out)], out)


def _leaky_relu(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("LeakyRelu", inputs, out, alpha=float(graph.call_attrs(call)["alpha"]))


def _prelu(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    slope = graph.constant_value(call.args[1])
    rank, axis = len(graph.shape_of(call.args[0])), int(graph.call_attrs(call)["axis"])
    shape = [1] * rank
    shape[axis % rank] = slope.size
    w.node("PRelu", [inputs[0], w.constant(slope.reshape(shape[1:]), f"{out}.slope")], out)


def _silu(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("Mul", [inputs[0], w.inner("Sigmoid", inputs, out)], out)


def _gelu(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    scaled = w.inner("Mul", [inputs[0], w.number(0.5**0.5, out)], out)
    shifted = w.inner("Add", [w.inner("Erf", [scaled], out), w.number(1.0, out)], out)
    w.node("Mul", [w.inner("Mul", [inputs[0], w.number(0.5, out)], out), shifted], out)


def _gelu_tanh(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    x = inputs[0]
    cube = w.inner("Mul", [w.inner("Mul", [x, x], out), x], out)
    inner = w.inner("Add", [x, w.inner("Mul", [cube, w.number(0.044715, out)], out)], out)
    tanh = w.inner("Tanh", [w.inner("Mul", [inner, w.number((2.0 / np.pi) ** 0.5, out)], out)], out)
    shifted = w.inner("Add", [tanh, w.number(1.0, out)], out)
    w.node("Mul", [w.inner("Mul", [x, w.number(0.5, out)], out), shifted], out)


def _softplus(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    beta = float(graph.call_attrs(call)["beta"])
    if beta == 1.0:
        w.node("Softplus", inputs, out)
        return
    soft = w.inner("Softplus", [w.inner("Mul", [inputs[0], w.number(beta, out)], out)], out)
    w.node("Div", [soft, w.number(beta, out)], out)


def _rsqrt(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("Reciprocal", [w.inner("Sqrt", inputs, out)], out)


def _square(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("Mul", [inputs[0], inputs[0]], out)


# --- poolings and reductions ----------------------------------------------------------------------------------------


def _pool(op: str) -> Exporter:
    def write(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
        attrs = graph.call_attrs(call)
        given: Attrs = {"kernel_shape": attrs["pool_size"], "strides": attrs["strides"], "pads": attrs["padding"]}
        given["ceil_mode"] = int(attrs["ceil_mode"])
        if op == "AveragePool":
            given["count_include_pad"] = int(attrs["count_include_pad"])
        else:
            given["dilations"] = attrs["dilation"]
        w.node(op, inputs, out, **given)

    return write


def _adaptive_avg_pool2d(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    size, target = graph.shape_of(call.args[0])[2:], graph.shape_of(call)[2:]
    if any(a % b for a, b in zip(size, target, strict=True)):
        raise UnsupportedOpError(f"adaptive average pooling of {size} to {target} has no ONNX form", where=out)
    kernel = [a // b for a, b in zip(size, target, strict=True)]
    w.node("AveragePool", inputs, out, kernel_shape=kernel, strides=kernel)


def _axes(call: Any) -> list[int]:
    rank, axes = len(graph.shape_of(call.args[0])), graph.call_attrs(call).get("axis")
    return list(range(rank)) if axes is None else [int(axis) % rank for axis in axes]


def _reduce(op: str) -> Exporter:
    def write(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
        axes, keepdims = _axes(call), bool(graph.call_attrs(call)["keepdims"])
        if op in ("ReduceMean", "ReduceMax") and axes == [2, 3] and keepdims and len(graph.shape_of(call.args[0])) == 4:
            w.node("GlobalAveragePool" if op == "ReduceMean" else "GlobalMaxPool", inputs, out)
            return
        w.axes(op, inputs[0], axes, out, keepdims)

    return write


def _variance(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    axes = _axes(call)
    mean = w.axes("ReduceMean", inputs[0], axes, w.unique(f"{out}.mean"), True)
    centered = w.inner("Sub", [inputs[0], mean], out)
    w.axes("ReduceMean", w.inner("Mul", [centered, centered], out), axes, out, bool(graph.call_attrs(call)["keepdims"]))


# --- shapes ---------------------------------------------------------------------------------------------------------


def _concat(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("Concat", inputs, out, axis=int(graph.call_attrs(call)["axis"]) % len(graph.shape_of(call)))


def _reshape(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    target = w.shape(graph.shape_of(call), graph.shape_of(call.args[0]), out)
    w.node("Reshape", [inputs[0], target], out)


def _transpose(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    axes = graph.call_attrs(call)["axes"]
    w.node("Transpose", inputs, out, perm=list(axes) if axes else None)


def _broadcast_to(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    target, source = list(graph.shape_of(call)), graph.shape_of(call.args[0])
    if w.is_batch_dynamic and len(source) == len(target):
        target[0] = 1
    w.node("Expand", [inputs[0], w.constant(np.array(target, np.int64), f"{out}.shape")], out)


def _integers(expr: Any) -> list[int]:
    return [int(getattr(item, "value", item)) for item in expr.fields]


def _strided_slice(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    axes, begin, end = (_integers(arg) for arg in call.args[1:4])
    strides = _integers(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    rows = {"begin": begin, "end": end, "axes": axes, "strides": strides}
    w.node(
        "Slice", [inputs[0], *(w.constant(np.array(row, np.int64), f"{out}.{key}") for key, row in rows.items())], out
    )


def _pad(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    attrs = graph.call_attrs(call)
    mode = {"replicate": "edge"}.get(attrs["pad_mode"], attrs["pad_mode"])
    width = attrs["pad_width"]
    pads = w.constant(np.array([*width[0::2], *width[1::2]], np.int64), f"{out}.pads")
    operands = [inputs[0], pads, w.number(float(attrs["pad_value"]), out)] if mode == "constant" else [inputs[0], pads]
    w.node("Pad", operands, out, mode=mode)


def _take(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("Gather", inputs, out, axis=int(graph.call_attrs(call)["axis"]))


def _pixel_shuffle(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("DepthToSpace", inputs, out, blocksize=int(graph.call_attrs(call)["upscale_factor"]), mode="CRD")


def _resize(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    attrs = graph.call_attrs(call)
    source, target = graph.shape_of(call.args[0]), graph.shape_of(call)
    transform, rounding = attrs["coordinate_transformation_mode"], attrs["rounding_method"]
    given: Attrs = {"mode": {"nearest_neighbor": "nearest"}.get(attrs["method"], attrs["method"])}
    if transform == "tf_half_pixel_for_nn":
        # floor((x + 0.5) * s) is half_pixel rounded to the nearest, ties up.
        transform, rounding = "half_pixel", "round_prefer_ceil"
    given["coordinate_transformation_mode"] = transform
    if given["mode"] == "nearest":
        given["nearest_mode"] = (
            rounding
            if rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
            else "round_prefer_ceil"
        )
    if given["mode"] == "cubic":
        given |= {"cubic_coeff_a": float(attrs["cubic_alpha"]), "exclude_outside": int(attrs["cubic_exclude"])}
    if all(b % a == 0 or a % b == 0 for a, b in zip(source[2:], target[2:], strict=True)):
        scales = np.array([1.0, 1.0, target[2] / source[2], target[3] / source[3]], np.float32)
        w.node("Resize", [inputs[0], "", w.constant(scales, f"{out}.scales")], out, **given)
        return
    sizes, axes = list(target), None
    if w.opset >= 18:
        sizes, axes = sizes[2:], [2, 3]
    elif w.is_batch_dynamic:
        raise UnsupportedOpError("this resize needs opset 18 when the batch is dynamic", where=out)
    w.node(
        "Resize", [inputs[0], "", "", w.constant(np.array(sizes, np.int64), f"{out}.sizes")], out, axes=axes, **given
    )


# --- normalisations and other float operators -----------------------------------------------------------------------


def _softmax(op: str) -> Exporter:
    def write(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
        w.node(op, inputs, out, axis=int(graph.call_attrs(call)["axis"]))

    return write


def _instance_norm(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    w.node("InstanceNormalization", inputs, out, epsilon=float(graph.call_attrs(call)["epsilon"]))


def _layer_norm(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    attrs, rank = graph.call_attrs(call), len(graph.shape_of(call))
    axes = sorted(int(axis) % rank for axis in attrs["axes"])
    if axes != list(range(axes[0], rank)):
        raise UnsupportedOpError(f"layer norm over axes {axes} has no ONNX form", where=out)
    w.node("LayerNormalization", inputs, out, axis=axes[0], epsilon=float(attrs["epsilon"]))


def _group_norm(w: GraphWriter, call: Any, inputs: list[str], out: str) -> None:
    attrs, shape = graph.call_attrs(call), graph.shape_of(call)
    groups = int(attrs["num_groups"])
    target = w.constant(np.array([0, groups, -1], np.int64), f"{out}.groups")
    ones, zeros = (w.constant(np.full(groups, value, np.float32), f"{out}.unit") for value in (1.0, 0.0))
    flat = w.inner("Reshape", [inputs[0], target], out)
    normed = w.inner("InstanceNormalization", [flat, ones, zeros], out, epsilon=float(attrs["epsilon"]))
    back = w.inner("Reshape", [normed, w.shape(shape, shape, out)], out)
    gamma, beta = (
        w.constant(graph.constant_value(arg).reshape((-1,) + (1,) * (len(shape) - 2)), f"{out}.affine")
        for arg in call.args[1:3]
    )
    w.node("Add", [w.inner("Mul", [back, gamma], out), beta], out)


_SIMPLE = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "maximum": "Max", "minimum": "Min",
    "power": "Pow", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs", "negative": "Neg", "erf": "Erf",
    "floor": "Floor", "ceil": "Ceil", "round": "Round", "sin": "Sin", "cos": "Cos", "tan": "Tan", "atan": "Atan",
    "sign": "Sign", "tanh": "Tanh", "sigmoid": "Sigmoid", "nn.relu": "Relu", "nn.selu": "Selu", "matmul": "MatMul",
}  # fmt: skip

EXPORTERS: dict[str, Exporter] = {
    **{f"relax.{name}": _simple(op) for name, op in _SIMPLE.items()},
    "relax.clip": _clip,
    "relax.nn.relu6": _relu6,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.nn.prelu": _prelu,
    "relax.nn.silu": _silu,
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
    "relax.nn.softplus": _softplus,
    "relax.rsqrt": _rsqrt,
    "relax.square": _square,
    "relax.nn.max_pool2d": _pool("MaxPool"),
    "relax.nn.avg_pool2d": _pool("AveragePool"),
    "relax.nn.adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "relax.mean": _reduce("ReduceMean"),
    "relax.sum": _reduce("ReduceSum"),
    "relax.max": _reduce("ReduceMax"),
    "relax.min": _reduce("ReduceMin"),
    "relax.variance": _variance,
    "relax.concat": _concat,
    "relax.reshape": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.flatten": _reshape,
    "relax.nn.batch_flatten": _reshape,
    "relax.permute_dims": _transpose,
    "relax.broadcast_to": _broadcast_to,
    "relax.strided_slice": _strided_slice,
    "relax.nn.pad": _pad,
    "relax.take": _take,
    "relax.nn.pixel_shuffle": _pixel_shuffle,
    "relax.image.resize2d": _resize,
    "relax.nn.softmax": _softmax("Softmax"),
    "relax.nn.log_softmax": _softmax("LogSoftmax"),
    "relax.nn.instance_norm": _instance_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.group_norm": _group_norm,
}
"""Relax operator -> writer of its ONNX nodes: (writer, call, input tensor names, output tensor name)."""
