"""Pooling as torch functions: lopsided padding, and windows that hang over the edge (`ceil_mode`), by ONNX's rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from lpsn_tvm.interpreter_node import Node

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Geometry:
    """Window geometry.

    `padding` is (top, left, bottom, right) as given; `needed` has the last two as the traced output needs them.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    needed: tuple[int, int, int, int]
    is_native: bool


def _geometry(node: Node) -> _Geometry:
    if node.attrs.get("layout", "NCHW") != "NCHW":
        raise node.refuse(f"data layout {node.attrs['layout']}; only NCHW is evaluated")
    kernel, strides = tuple(node.attrs["pool_size"]), tuple(node.attrs["strides"])
    dilation = tuple(node.attrs.get("dilation", (1, 1)))
    padding = tuple(node.attrs["padding"])
    padding = padding if len(padding) == 4 else padding * (4 // len(padding))
    ends = []
    is_native = padding[:2] == padding[2:] and 2 * padding[0] <= kernel[0] and 2 * padding[1] <= kernel[1]
    for axis in range(2):
        extent, count = node.in_shapes[0][2 + axis], node.shape[2 + axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        ends.append((count - 1) * strides[axis] + reach - extent - padding[axis])
        is_native &= count == (extent + padding[axis] + padding[axis + 2] - reach) // strides[axis] + 1
    return _Geometry(kernel, strides, dilation, padding, (padding[0], padding[1], ends[0], ends[1]), is_native)


def _padded(x: Tensor, padding: tuple[int, int, int, int], value: float) -> Tensor:
    top, left, bottom, right = padding
    return functional.pad(x, (left, right, top, bottom), value=value)


def max_pool2d(node: Node) -> Callable[..., Tensor]:
    """Maximum over windows; padding is minus infinity."""
    g = _geometry(node)

    def run(x: Tensor) -> Tensor:
        if g.is_native:
            return functional.max_pool2d(x, g.kernel, g.strides, g.padding[:2], g.dilation)
        return functional.max_pool2d(_padded(x, g.needed, float("-inf")), g.kernel, g.strides, 0, g.dilation)

    return run


def avg_pool2d(node: Node) -> Callable[..., Tensor]:
    """Average over windows; padding counts if `count_include_pad`, what hangs over (`ceil_mode`) never does."""
    g = _geometry(node)
    if g.dilation != (1, 1):
        raise node.refuse("dilated average pooling")
    includes = bool(node.attrs.get("count_include_pad", False))
    ones = torch.ones(1, 1, *node.in_shapes[0][2:])
    if includes:
        ones = _padded(ones, g.padding, 1.0)
        ones = _padded(ones, (0, 0, g.needed[2] - g.padding[2], g.needed[3] - g.padding[3]), 0.0)
    else:
        ones = _padded(ones, g.needed, 0.0)
    inverse = 1.0 / torch.clamp(functional.avg_pool2d(ones, g.kernel, g.strides, divisor_override=1), min=1.0)

    def run(x: Tensor) -> Tensor:
        if g.is_native:
            return functional.avg_pool2d(x, g.kernel, g.strides, g.padding[:2], count_include_pad=includes)
        total = functional.avg_pool2d(_padded(x, g.needed, 0.0), g.kernel, g.strides, divisor_override=1)
        return total * inverse.to(x.device)

    return run


def adaptive_avg_pool2d(node: Node) -> Callable[..., Tensor]:
    """Average over the regions that torch and TVM both define: from floor(i * H / OH) to ceil((i + 1) * H / OH)."""
    size = (node.shape[2], node.shape[3])
    return lambda x: functional.adaptive_avg_pool2d(x, size)
