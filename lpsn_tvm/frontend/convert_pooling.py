"""Converters of poolings and reductions.

`ceil_mode` is resolved here: the windows that hang over the end are expressed as padding, so that nothing behind has to
know it. Source: the ONNX operator specifications of MaxPool, AveragePool, GlobalAveragePool, ReduceMean.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.frontend.convert_layers import same_padding
from lpsn_tvm.frontend.node import Expr, Node

op = relax.op


def _windows(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[int], list[int]]:
    """Kernel, strides, dilation, padding (begins then ends) and overhang of the last window per axis."""
    rank = len(node.shape())
    if rank != 4:
        raise node.unsupported(f"pooling over {rank - 2} dimensions; supported are 2")
    extents = node.shape()[2:]
    kernel = tuple(int(k) for k in node.attrs["kernel_shape"])
    strides = tuple(int(s) for s in node.attrs.get("strides", (1, 1)))
    dilation = tuple(int(d) for d in node.attrs.get("dilations", (1, 1)))
    window = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = list(same_padding(extents, window, strides, auto_pad))
    else:
        pads = [int(p) for p in node.attrs.get("pads", (0, 0, 0, 0))] if auto_pad == "NOTSET" else [0, 0, 0, 0]
    overhang = [0, 0]
    if node.attrs.get("ceil_mode", 0) and auto_pad == "NOTSET":
        for axis in range(2):
            padded = extents[axis] + pads[axis] + pads[axis + 2]
            count = -(-(padded - window[axis]) // strides[axis]) + 1
            if (count - 1) * strides[axis] >= extents[axis] + pads[axis]:
                count -= 1  # a window must start inside the input or its begin padding
            overhang[axis] = max((count - 1) * strides[axis] + window[axis] - padded, 0)
    return kernel, strides, dilation, pads, overhang


def max_pool(node: Node) -> Expr:
    """MaxPool -> nn.max_pool2d; padding never wins, so the overhang is padding too."""
    if node.output_count > 1:
        raise node.unsupported("the Indices output")
    if len(node.shape()) == 3:
        return _pool1d(node, max_pool)
    kernel, strides, dilation, pads, overhang = _windows(node)
    padding = (pads[0], pads[1], pads[2] + overhang[0], pads[3] + overhang[1])
    return node.emit(op.nn.max_pool2d(node.inputs[0], kernel, strides, padding, dilation))


def average_pool(node: Node) -> Expr:
    """AveragePool -> nn.avg_pool2d; where padding counts and the overhang does not, the padding becomes an explicit
    zero pad.
    """
    if len(node.shape()) == 3:
        return _pool1d(node, average_pool)
    kernel, strides, dilation, pads, overhang = _windows(node)
    data, include = node.inputs[0], bool(node.attrs.get("count_include_pad", 0)) and any(pads)
    if include and any(overhang):
        data = node.emit(op.nn.pad(data, (0, 0, 0, 0, pads[0], pads[2], pads[1], pads[3]), "constant", 0.0), "")
        pads, include = [0, 0, 0, 0], False
    padding = (pads[0], pads[1], pads[2] + overhang[0], pads[3] + overhang[1])
    return node.emit(op.nn.avg_pool2d(data, kernel, strides, padding, dilation, count_include_pad=include))


def _pool1d(node: Node, pool: Callable[[Node], Expr]) -> Expr:
    """[N, C, W] is pooled as [N, C, 1, W]."""
    n, c, w = node.shape()
    data = node.emit(op.reshape(node.inputs[0], (n, c, 1, w)), "")
    attrs = dict(node.attrs)
    for name, filler in (("kernel_shape", 1), ("strides", 1), ("dilations", 1)):
        if name in attrs:
            attrs[name] = (filler, *attrs[name])
    if "pads" in attrs:
        attrs["pads"] = (0, attrs["pads"][0], 0, attrs["pads"][1])
    inner = Node(node.emitter.fresh(node.name), node.op_type, [data], attrs, 1, node.opset, node.emitter)
    result = pool(inner)
    shape = graph.shape_of(result)
    return node.emit(op.reshape(result, (shape[0], shape[1], shape[3])))


def global_pool(reduce: Callable[..., Expr]) -> Callable[[Node], Expr]:
    """GlobalAveragePool, GlobalMaxPool -> mean, max over the spatial axes, kept as 1."""

    def convert(node: Node) -> Expr:
        return node.emit(reduce(node.inputs[0], list(range(2, len(node.shape()))), True))

    return convert


def reduction(reduce: Callable[..., Expr]) -> Callable[[Node], Expr]:
    """ReduceMean, ReduceSum, ReduceMax, ReduceMin with axes as attribute or input."""

    def convert(node: Node) -> Expr:
        rank = len(node.shape())
        axes = node.integers("axes", 1)
        if not axes:
            if node.attrs.get("noop_with_empty_axes", 0):
                return node.inputs[0]
            axes = tuple(range(rank))
        ordered = sorted(axis % rank for axis in axes)
        return node.emit(reduce(node.inputs[0], ordered, bool(node.attrs.get("keepdims", 1))))

    return convert


def lrn(node: Node) -> Expr:
    """LRN -> x / (bias + alpha / size * sum of squares of the neighbouring channels) ** beta."""
    data, size = node.inputs[0], int(node.attrs["size"])
    shape = node.shape()
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    width = (0, 0, before, after, *(0, 0) * (len(shape) - 2))
    padded = node.emit(op.nn.pad(op.square(data), width, "constant", 0.0), "")
    total: Expr = None
    for offset in range(size):
        part = op.strided_slice(padded, [1], [offset], [offset + shape[1]], [1])
        total = part if total is None else op.add(total, part)
    factor = relax.const(float(node.attrs.get("alpha", 1e-4)) / size, "float32")
    base = op.add(op.multiply(total, factor), relax.const(float(node.attrs.get("bias", 1.0)), "float32"))
    return node.emit(op.divide(data, op.power(base, relax.const(float(node.attrs.get("beta", 0.75)), "float32"))))


CONVERTERS = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_pool(op.mean),
    "GlobalMaxPool": global_pool(op.max),
    "ReduceMean": reduction(op.mean),
    "ReduceSum": reduction(op.sum),
    "ReduceMax": reduction(op.max),
    "ReduceMin": reduction(op.min),
    "LRN": lrn,
}
