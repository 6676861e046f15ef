"""Weighted layers as torch functions."""

from __future__ import annotations

import torch
from torch.nn import functional

from lpsn_tvm.interpreter_node import Function, Node

Tensor = torch.Tensor


def symmetric_padding(x: Tensor, padding: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """Pads `x` with zeros where (top, left, bottom, right) is lopsided; returns the padding left for the operator."""
    top, left, bottom, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return functional.pad(x, (left, right, top, bottom)), (0, 0)


def _four(padding: tuple[int, ...]) -> tuple[int, ...]:
    values = tuple(padding)
    return values if len(values) == 4 else values * 2 if len(values) == 2 else values * 4


def _check_layouts(node: Node, data: str = "NCHW", kernel: str | None = None) -> None:
    found = node.attrs.get("data_layout", node.attrs.get("layout", data))
    if found != data:
        raise node.refuse(f"data layout {found}; only {data} is evaluated")
    if kernel is not None and node.attrs.get("kernel_layout", kernel) != kernel:
        raise node.refuse(f"kernel layout {node.attrs['kernel_layout']}; only {kernel} is evaluated")


def conv2d(node: Node) -> Function:
    """Convolution (x, weight OIHW, bias [O] or None); lopsided padding, dilation, groups."""
    _check_layouts(node, kernel="OIHW")
    padding = _four(node.attrs["padding"])
    strides, dilation, groups = node.attrs["strides"], node.attrs["dilation"], int(node.attrs["groups"])
    in_channels = node.in_shapes[0][1]
    is_depthwise = groups > 1 and groups == in_channels

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, rest = symmetric_padding(x, padding)
        # A depthwise layer that lost channels has as many groups as it has channels left.
        return functional.conv2d(x, weight, bias, strides, rest, dilation, x.shape[1] if is_depthwise else groups)

    return run


def conv2d_transpose(node: Node) -> Function:
    """Transposed convolution (x, weight IOHW, bias [O] or None); lopsided padding, any output padding."""
    _check_layouts(node, kernel="IOHW")
    top, left, bottom, right = _four(node.attrs["padding"])
    strides, dilation, groups = node.attrs["strides"], node.attrs["dilation"], int(node.attrs["groups"])
    extra = tuple(node.attrs["output_padding"])
    is_depthwise = groups > 1 and groups == node.in_shapes[0][1]
    # torch's output_padding must be smaller than stride or dilation, and its padding is symmetric: compute the full
    # output and cut it, if need be.
    is_plain = (top, left) == (bottom, right) and all(
        e == 0 or e < max(s, d) for e, s, d in zip(extra, strides, dilation, strict=True)
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        count = x.shape[1] if is_depthwise else groups
        if is_plain:
            return functional.conv_transpose2d(x, weight, bias, strides, (top, left), extra, count, dilation)
        full = functional.conv_transpose2d(x, weight, None, strides, (0, 0), (0, 0), count, dilation)
        full = functional.pad(full, (-left, extra[1] - right, -top, extra[0] - bottom))
        return full if bias is None else full + bias.reshape(1, -1, 1, 1)

    return run


def matmul(_: Node) -> Function:
    """Matrix product (x, weight, bias [M] or None)."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.matmul(x, weight)
        return out if bias is None else out + bias

    return run
