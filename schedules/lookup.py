"""Table lookups: any function of one quantized tensor. Tables are widened to 256 entries, so that every byte is a
valid index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.views import View, compute


def lookup(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.lookup` with a constant table: `table[q - qmin]`."""
    table = byte_table(inputs[0], constants, attrs)
    return None if table is None else _looked_up(maker, "lookup", inputs[0], table)


def channel_lookup(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.channel_lookup`: one table per channel."""
    data, table = inputs[0], byte_table(inputs[0], constants, attrs)
    if table is None:
        return None
    wide = np.zeros((data.blocks * data.block if data.block else data.shape[1], 256), table.dtype)
    wide[: table.shape[0]] = table
    return _looked_up(maker, "channel_lookup", data, wide)


def _looked_up(maker: Maker, name: str, data: TensorSpec, table: Array) -> Kernel:
    """One table for all channels, or one for each."""
    out = TensorSpec(data.shape, str(table.dtype), data.block)

    def define(q: View, t: Any) -> Any:
        def value(*index: Any) -> Any:
            byte = q(*index).astype("int32") & 255
            return t[byte] if table.ndim == 1 else t[index[1], byte]

        return compute(out, value)

    return maker.kernel(name, (data,), (table,), out, define, kind="lookup")


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
