"""Nearest and bilinear resize, and padding: output pixels name their input pixels by index tables read from
constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.rounding import parameters
from lpsn_tvm.schedules.views import View, compute


def resize_nearest(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.resize_nearest` for any data type."""
    return _pick(maker, "resize_nearest", inputs[0], np.asarray(attrs["rows"]), np.asarray(attrs["columns"]))


def _pick(maker: Maker, name: str, data: TensorSpec, rows: Array, columns: Array) -> Kernel:
    out = TensorSpec((*data.shape[:2], len(rows), len(columns)), data.dtype, data.block)

    def define(x: View, row: Any, column: Any) -> Any:
        return compute(out, lambda n, c, y, z: x(n, c, row[y], column[z]))

    return maker.kernel(name, (data,), (rows.astype(np.int32), columns.astype(np.int32)), out, define, kind="move")


def resize_linear(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.resize_linear` (integers) and `lpsn.float_resize_linear`."""
    data = inputs[0]
    is_float = data.dtype == "float32"
    kind = np.float32 if is_float else np.int32
    tables = [np.asarray(attrs[name], np.int32) for name in ("rows", "columns")]
    tables += [np.asarray(attrs[name], kind) for name in ("row_weights", "column_weights")]
    shape = (*data.shape[:2], len(tables[0]) // 2, len(tables[1]) // 2)
    out = TensorSpec(shape, data.dtype, data.block)
    numbers = parameters(0, 0) if is_float else parameters(attrs["qmin"], attrs["qmax"])

    def define(x: View, rows: Any, columns: Any, row_weights: Any, column_weights: Any, p: Any) -> Any:
        def value(n: Any, c: Any, y: Any, z: Any) -> Any:
            def tall(column: Any) -> Any:
                pixels = [x(n, c, rows[2 * y + i], columns[column]).astype(np.dtype(kind).name) for i in (0, 1)]
                return pixels[0] * row_weights[2 * y] + pixels[1] * row_weights[2 * y + 1]

            total = tall(2 * z) * column_weights[2 * z] + tall(2 * z + 1) * column_weights[2 * z + 1]
            return total if is_float else _rounded(total, p, data.dtype)

        return compute(out, value)

    return maker.kernel("resize_linear", (data,), (*tables, numbers), out, define, kind="gather")


def _rounded(total: Any, p: Any, dtype: str) -> Any:
    """Fixed point with 14 fractional bits -> integer within `p`."""
    from tvm import tirx

    rounded = (total + tirx.const(1 << 13, "int32")) >> tirx.const(14, "int32")
    return tirx.max(tirx.min(rounded, p[1].astype("int32")), p[0].astype("int32")).astype(dtype)


def pad(maker: Maker, inputs: Inputs, constants: Constants, attrs: Attrs) -> Kernel | None:
    """Kernel of `lpsn.pad` and `lpsn.float_pad`; reflected and replicated borders are picked like a nearest resize."""
    from tvm import tirx

    data = inputs[0]
    top, left, bottom, right = (int(p) for p in attrs["pad_width"])
    height, width = data.shape[2:]
    if attrs["mode"] != "constant":
        rows = np.pad(np.arange(height), (top, bottom), mode=attrs["mode"])
        columns = np.pad(np.arange(width), (left, right), mode=attrs["mode"])
        return _pick(maker, "pad_by_index", data, rows, columns)
    out = TensorSpec((*data.shape[:2], height + top + bottom, width + left + right), data.dtype, data.block)
    number, fill = maker.filler(float(attrs["value"]), out)

    def define(x: View, p: Any) -> Any:
        def value(n: Any, c: Any, y: Any, z: Any) -> Any:
            inside = tirx.all(y >= top, y < height + top, z >= left, z < width + left)
            return tirx.if_then_else(inside, x(n, c, y - top, z - left), fill(p, c))

        return compute(out, value)

    return maker.kernel("pad", (data,), (number,), out, define, (top, left), kind="move")
