"""Spell `nn.pixel_shuffle` as reshape, permute_dims, reshape, for a float build: TVM 0.27 has no implementation of the
operator.

Before: `y = pixel_shuffle(x[N, C*b*b, H, W], b)`. After: `y.wide = reshape(x, [N, C, b, b, H, W]); y.perm =
permute_dims(y.wide, [0, 1, 4, 2, 5, 3]); y = reshape(y.perm, [N, C, H*b, W*b])`.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph


def expand_pixel_shuffle(mod: tvm.IRModule) -> tvm.IRModule:
    """Expand every `nn.pixel_shuffle`; the result is no longer the canonical spelling.

    Parameters
    ----------
    mod : IRModule
        Canonical, about to be built.
    """
    if not any(graph.op_name(value) == "relax.nn.pixel_shuffle" for _, value in graph.bindings(mod)):
        return mod

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if graph.op_name(value) != "relax.nn.pixel_shuffle":
            return None
        block = int(graph.call_attrs(value)["upscale_factor"])
        n, c, h, w = graph.shape_of(value.args[0])
        wide = relax.op.reshape(lookup(value.args[0]), (n, c // block**2, block, block, h, w))
        wide = graph.emit_named(builder, wide, f"{var.name}.wide")
        moved = graph.emit_named(builder, relax.op.permute_dims(wide, [0, 1, 4, 2, 5, 3]), f"{var.name}.perm")
        return relax.op.reshape(moved, (n, c // block**2, h * block, w * block))

    return graph.rebuild(mod, rewrite)
