"""Table lookups: any function of one quantized tensor. Tables are widened to 256 entries, so that every byte is a
valid index; a warp's reads of one table stay in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.threads import element_kernel
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.lookup import widened
from lpsn_tvm.schedules.views import View, compute

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def lookup(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.lookup` with a constant table."""
    data, table = inputs[0], constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    wide = widened(table, data.dtype, int(attrs["qmin"]))

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda *i: t[_byte(q(*i))])

    return element_kernel("lookup", (data,), (wide,), out, define)


def channel_lookup(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.channel_lookup`: one table per channel."""
    data, table = inputs[0], constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    channels = data.blocks * data.block if data.block else data.shape[1]
    wide = np.zeros((channels, 256), table.dtype)
    wide[: table.shape[0]] = widened(table, data.dtype, int(attrs["qmin"]))

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda n, c, *rest: t[c, _byte(q(n, c, *rest))])

    return element_kernel("channel_lookup", (data,), (wide,), out, define)


def _byte(q: Any) -> Any:
    return q.astype("int32") & 255
