"""Table lookups: any function of one quantized tensor. Tables are widened to 256 entries, so that every byte is a
valid index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Attrs, Constants, Inputs, Maker
from lpsn_tvm.schedules.views import View, compute


def lookup(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.lookup` with a constant table: `table[q - qmin]`."""
    table = byte_table(inputs[0], constants, attrs)
    if table is None:
        return None
    data = inputs[0]
    out = TensorSpec(data.shape, str(table.dtype), data.block)

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda *i: t[_byte(q(*i))])

    return maker.kernel("lookup", (data,), (table,), out, define, kind="lookup")


def channel_lookup(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.channel_lookup`: one table per channel."""
    table = byte_table(inputs[0], constants, attrs)
    if table is None:
        return None
    data = inputs[0]
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    wide = np.zeros((data.blocks * data.block if data.block else data.shape[1], 256), table.dtype)
    wide[: table.shape[0]] = table

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda n, c, *rest: t[c, _byte(q(n, c, *rest))])

    return maker.kernel("channel_lookup", (data,), (wide,), out, define, kind="lookup")


def byte_table(data: TensorSpec, constants: Constants, attrs: Attrs) -> Array | None:
    """[..., 2**bits] -> [..., 256], indexed by the byte of the stored integer (two's complement); None where the table
    is no constant or the index no byte.
    """
    table = constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    every_byte = np.arange(256, dtype=np.uint8).view(data.dtype).astype(np.int32)
    index = np.clip(every_byte - int(attrs["qmin"]), 0, table.shape[-1] - 1)
    return np.ascontiguousarray(table[..., index])


def _byte(q: Any) -> Any:
    return q.astype("int32") & 255
