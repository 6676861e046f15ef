"""Poolings: maxima on the accumulators, averages as sums times a small integer and a shift."""

from __future__ import annotations

from lpsn_tvm.schedules.vta.ops import Pool
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.lower_context import Unmapped


def pool_step(node: Node) -> Pool:
    """The maximum over windows of a max_pool2d.

    Raises
    ------
    Unmapped
        Dilated windows, or windows that lie wholly in the padding.
    """
    attrs = node.attrs
    if tuple(attrs["dilation"]) != (1, 1):
        raise Unmapped("its windows are dilated")
    kernel, strides = _pair(attrs["kernel"]), _pair(attrs["strides"])
    padding = _pair(attrs["padding"][:2])
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        raise Unmapped("some of its windows lie in the padding")
    return Pool(kernel, strides, padding, *node.shape[2:])


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return int(values[0]), int(values[1])
