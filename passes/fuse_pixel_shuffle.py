"""Depth to space behind a convolution's float32 results -> the convolution's own epilogue, for backends that write any
layout as easily as another.

Before -> After:

    a = conv2d(x, ..., out_dtype="float32")
    y = float_depth_to_space(a, block_size=b, mode=m)          ->  y = conv2d(x, ..., block_size=b, mode=m)

where nobody else reads `a`, and it is no output. Convolutions in groups stay as they are.
"""

from __future__ import annotations

from typing import Any

import tvm

from lpsn_tvm import graph
from lpsn_tvm.passes.absorb import absorb


def fuse_pixel_shuffle(mod: tvm.IRModule) -> tvm.IRModule:
    """Let convolutions rearrange their pixels; see the module's docstring.

    Parameters
    ----------
    mod : IRModule
        Integer, or mixed, module after `fuse_float`.

    Returns
    -------
    IRModule
        The same function; a convolution has the name of the operator that it took over.
    """
    return absorb(mod, ("lpsn.conv2d",), _merge)


def _merge(layer: Any, reader: Any) -> dict[str, Any] | None:
    attrs = graph.call_attrs(layer)
    if graph.op_name(reader) != "lpsn.float_depth_to_space" or attrs["out_dtype"] != "float32" or attrs["groups"] != 1:
        return None
    moved = graph.call_attrs(reader)
    return {**attrs, "block_size": moved["block_size"], "mode": moved["mode"]}
