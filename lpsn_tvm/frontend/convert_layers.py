"""Converters of weighted layers and normalizations: convolutions, dense, batch and instance norm.

Source: the ONNX operator specifications of Conv, ConvTranspose, Gemm, MatMul, BatchNormalization,
InstanceNormalization.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.frontend.node import Array, Expr, Node

op = relax.op


def same_padding(
    extents: tuple[int, ...], window: list[int], strides: tuple[int, ...], auto_pad: str
) -> tuple[int, ...]:
    """Begin and end padding of `auto_pad` SAME_UPPER / SAME_LOWER; `window` is the dilated kernel. All begins, then all
    ends.
    """
    total = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(extents, window, strides, strict=True)]
    small = [t // 2 for t in total]
    large = [t - t // 2 for t in total]
    return (*large, *small) if auto_pad == "SAME_LOWER" else (*small, *large)


def conv(node: Node) -> Expr:
    """Conv -> nn.conv2d (+ add of the bias)."""
    weight = _weight(node)
    rank = len(node.shape())
    if rank == 3:
        return _conv1d(node, weight)
    if rank != 4:
        raise node.unsupported(f"convolution over {rank - 2} dimensions; supported are 1 and 2")
    strides = _pair(node.attrs.get("strides", (1, 1)))
    dilation = _pair(node.attrs.get("dilations", (1, 1)))
    window = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    padding = _padding(node, node.shape()[2:], window, strides)
    return _conv2d(node, node.inputs[0], weight, strides, padding, dilation)


def _conv2d(
    node: Node, data: Expr, weight: Array, strides: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Expr:
    """Negative padding (a crop) becomes a slice in front."""
    if min(padding) < 0:
        top, left, bottom, right = padding
        height, width = graph.shape_of(data)[2:]
        crop = op.strided_slice(
            data, [2, 3], [max(-top, 0), max(-left, 0)], [height + min(bottom, 0), width + min(right, 0)], [1, 1]
        )
        data, padding = node.emit(crop, ""), tuple(max(p, 0) for p in padding)
    call = op.nn.conv2d(
        data,
        graph.constant(weight),
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=int(node.attrs.get("group", 1)),
        out_dtype="float32",
    )
    return _with_bias(node, call)


def _conv1d(node: Node, weight: Array) -> Expr:
    """[N, C, W] is computed as [N, C, 1, W]."""
    n, c, w = node.shape()
    stride, dilation = int(node.attrs.get("strides", (1,))[0]), int(node.attrs.get("dilations", (1,))[0])
    begin, end = _padding(node, (w,), [(weight.shape[2] - 1) * dilation + 1], (stride,))
    data = node.emit(op.reshape(node.inputs[0], (n, c, 1, w)), "")
    result = _conv2d(node, data, weight[:, :, None, :], (1, stride), (0, begin, 0, end), (1, dilation))
    shape = graph.shape_of(result)
    return node.emit(op.reshape(result, (shape[0], shape[1], shape[3])), "shape")


def _with_bias(node: Node, call: Expr) -> Expr:
    bias = node.constant(2, "the bias")
    if bias is None:
        return node.emit(call)
    acc = node.emit(call, "acc")
    return node.emit(op.add(acc, graph.constant(bias.reshape(1, -1, 1, 1).astype(np.float32))))


def conv_transpose(node: Node) -> Expr:
    """ConvTranspose -> nn.conv2d_transpose; dilated kernels are spread out, `output_shape` and `auto_pad` resolved,
    negative padding becomes output padding.
    """
    weight = _weight(node)
    if len(node.shape()) != 4:
        raise node.unsupported(f"transposed convolution over {len(node.shape()) - 2} dimensions; supported are 2")
    strides = _pair(node.attrs.get("strides", (1, 1)))
    weight = _spread(weight, _pair(node.attrs.get("dilations", (1, 1))))
    extra = list(_pair(node.attrs.get("output_padding", (0, 0))))
    full = [(n - 1) * s + k for n, s, k in zip(node.shape()[2:], strides, weight.shape[2:], strict=True)]
    begin, end = _transposed_padding(node, full, extra, strides)
    crop = None
    for axis in range(2):
        # What output_padding cannot hold (it must stay below the stride) is extra zeros at the end, cut from `end`
        # first.
        taken = min(extra[axis], max(end[axis], 0))
        end[axis], extra[axis] = end[axis] - taken, extra[axis] - taken
        if end[axis] < 0:
            extra[axis], end[axis] = extra[axis] - end[axis], 0
        if begin[axis] < 0:
            raise node.unsupported("negative padding of a transposed convolution")
        if extra[axis] >= strides[axis]:
            crop = extra
    if crop is not None:
        raise node.unsupported(f"output_padding {tuple(extra)} must be smaller than strides {strides}")
    call = op.nn.conv2d_transpose(
        node.inputs[0],
        graph.constant(weight),
        strides=strides,
        padding=(*begin, *end),
        output_padding=tuple(extra),
        dilation=(1, 1),
        groups=int(node.attrs.get("group", 1)),
        out_dtype="float32",
    )
    return _with_bias(node, call)


def _transposed_padding(
    node: Node, full: list[int], extra: list[int], strides: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    wanted = node.attrs.get("output_shape")
    if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(node.shape()[2:], strides, strict=True)]
    if wanted is None:
        pads = node.attrs.get("pads", (0, 0, 0, 0)) if auto_pad == "NOTSET" else (0, 0, 0, 0)
        return list(pads[:2]), list(pads[2:])
    total = [f + e - w for f, e, w in zip(full, extra, list(wanted)[-2:], strict=True)]
    if auto_pad == "SAME_UPPER":
        return [t // 2 for t in total], [t - t // 2 for t in total]
    return [t - t // 2 for t in total], [t // 2 for t in total]


def _spread(weight: Array, dilation: tuple[int, ...]) -> Array:
    """Insert zeros between the taps of a dilated kernel."""
    if dilation == (1, 1):
        return weight
    kh, kw = ((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    wide = np.zeros((*weight.shape[:2], kh, kw), np.float32)
    wide[:, :, :: dilation[0], :: dilation[1]] = weight
    return wide


def gemm(node: Node) -> Expr:
    """Gemm -> matmul(x, Const[K, M]) + Const[M]: alpha, beta and transB are applied to the constants."""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    data, right, addend = node.inputs[0], node.inputs[1], node.input(2)
    if node.attrs.get("transA", 0):
        data = node.emit(op.permute_dims(data, [1, 0]), "")
    if not graph.is_constant(right):
        return _general_gemm(node, data, alpha, beta)
    weight = graph.constant_value(right)
    weight = (weight.T if node.attrs.get("transB", 0) else weight) * np.float32(alpha)
    call = op.matmul(data, graph.constant(weight.astype(np.float32)))
    if addend is None or beta == 0.0:
        return node.emit(call)
    acc = node.emit(call, "acc")
    if graph.is_constant(addend):
        value = graph.constant_value(addend) * np.float32(beta)
        if value.ndim < 2 or value.shape[0] == 1:
            value = np.broadcast_to(value.reshape(-1), (weight.shape[1],))
        return node.emit(op.add(acc, graph.constant(value.astype(np.float32))))
    return node.emit(op.add(acc, addend if beta == 1.0 else op.multiply(addend, relax.const(beta, "float32"))))


def _general_gemm(node: Node, data: Expr, alpha: float, beta: float) -> Expr:
    right, addend = node.inputs[1], node.input(2)
    if node.attrs.get("transB", 0):
        right = op.permute_dims(right, [1, 0])
    product = op.matmul(data, right)
    if alpha != 1.0:
        product = op.multiply(product, relax.const(alpha, "float32"))
    if addend is None or beta == 0.0:
        return node.emit(product)
    return node.emit(op.add(product, addend if beta == 1.0 else op.multiply(addend, relax.const(beta, "float32"))))


def matmul(node: Node) -> Expr:
    """MatMul -> matmul."""
    return node.emit(op.matmul(node.inputs[0], node.inputs[1]))


def batch_norm(node: Node) -> Expr:
    """BatchNormalization (inference) -> multiply and add of per-channel constants, computed in float64."""
    if node.attrs.get("training_mode", 0):
        raise node.unsupported("training mode; export the model in inference mode")
    gamma, beta, mean, variance = (np.asarray(node.constant(i, "a parameter"), np.float64) for i in range(1, 5))
    scale = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    return _affine(node, node.inputs[0], scale, beta - mean * scale)


def _affine(node: Node, data: Expr, scale: Array, shift: Array) -> Expr:
    shape = (1, -1, *(1,) * (len(graph.shape_of(data)) - 2))
    product = node.emit(op.multiply(data, graph.constant(scale.reshape(shape).astype(np.float32))), "scale")
    return node.emit(op.add(product, graph.constant(shift.reshape(shape).astype(np.float32))))


def instance_norm(node: Node) -> Expr:
    """InstanceNormalization -> nn.instance_norm."""
    rank = len(node.shape())
    gamma, beta = (graph.constant(np.asarray(node.constant(i, "a parameter"), np.float32)) for i in (1, 2))
    axes = list(range(2, rank))
    return node.emit(
        op.nn.instance_norm(
            node.inputs[0], gamma, beta, channel_axis=1, axes=axes, epsilon=float(node.attrs.get("epsilon", 1e-5))
        )
    )


def group_norm(node: Node) -> Expr:
    """GroupNormalization -> nn.group_norm; before opset 21 scale and bias are per group."""
    channels, groups, rank = node.shape()[1], int(node.attrs["num_groups"]), len(node.shape())
    parameters = []
    for index in (1, 2):
        value = np.asarray(node.constant(index, "a parameter"), np.float32)
        parameters.append(graph.constant(np.repeat(value, channels // value.size)))
    axes = list(range(2, rank))
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    return node.emit(
        op.nn.group_norm(node.inputs[0], *parameters, num_groups=groups, channel_axis=1, axes=axes, epsilon=epsilon)
    )


def layer_norm(node: Node) -> Expr:
    """LayerNormalization -> nn.layer_norm over the axes from `axis` on."""
    if node.output_count > 1:
        raise node.unsupported("the Mean and InvStdDev outputs")
    shape = node.shape()
    axes = list(range(int(node.attrs.get("axis", -1)) % len(shape), len(shape)))
    extents = shape[axes[0] :]
    gamma = np.broadcast_to(np.asarray(node.constant(1, "the scale"), np.float32), extents)
    bias = node.constant(2, "the bias")
    beta = np.zeros(extents, np.float32) if bias is None else np.broadcast_to(bias.astype(np.float32), extents)
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    return node.emit(
        op.nn.layer_norm(node.inputs[0], graph.constant(gamma), graph.constant(beta), axes=axes, epsilon=epsilon)
    )


def _weight(node: Node) -> Array:
    weight = node.constant(1, "the weight")
    if weight is None:
        raise node.unsupported("no weight")
    return np.asarray(weight, np.float32)


def _pair(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _padding(node: Node, extents: tuple[int, ...], window: list[int], strides: tuple[int, ...]) -> tuple[int, ...]:
    """All begins, then all ends: for two dimensions that is top, left, bottom, right."""
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return same_padding(extents, window, strides, auto_pad)
    if auto_pad == "VALID":
        return (0,) * (2 * len(extents))
    return _pair(node.attrs.get("pads", (0,) * (2 * len(extents))))


CONVERTERS = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
}
