"""Rounding and clamping of `quant.to_integer` in TE: bit for bit the numpy rule.

Clamps, zero points and multipliers are read from a small float32 tensor (integers below 2**24 are exact there), so that
equal shapes share code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array

MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000
"""1.5 * 2**23: adding it to a float32 below 2**22 rounds half to even into the low bits."""

LIMIT = 2.0**20


def to_integer(value: Any, low: Any, high: Any, zero_point: Any, dtype: str) -> Any:
    """`rint(clip(value, low, high)) + zero_point`: float32 `low` / `high` are qmin / qmax minus the zero point.

    The clamp stands between any product in `value` and the magic addition: a compiler must not contract the two into
    one multiply-add.
    """
    from tvm import tirx

    clamped = tirx.max(tirx.min(value, high), low)
    bits = tirx.reinterpret("int32", clamped + tirx.const(MAGIC, "float32"))
    return (bits - tirx.const(MAGIC_BITS, "int32") + zero_point.astype("int32")).astype(dtype)


def bounded(value: Any) -> Any:
    """Within +-2**20: what each of two products passes before they are added, for the same reason."""
    from tvm import tirx

    return tirx.max(tirx.min(value, tirx.const(LIMIT, "float32")), tirx.const(-LIMIT, "float32"))


def apart(value: Any) -> Any:
    """The float32 value as it is, rounded: a compiler must not contract a product with the sum that follows. Infinity
    becomes the largest number.
    """
    from tvm import tirx

    largest = tirx.max_value("float32")
    return tirx.max(tirx.min(value, largest), -largest)


def scaled(value: Any, multiplier: Any, zero_point: Any) -> Any:
    """`float32(value - zero_point) * multiplier`."""
    return (value.astype("int32") - zero_point.astype("int32")).astype("float32") * multiplier


def output_range(attrs: Any) -> list[float]:
    """`[low, high, zero point]` of an operator's output, as `to_integer` wants them."""
    zero_point = int(attrs["out_zero_point"])
    return [int(attrs["qmin"]) - zero_point, int(attrs["qmax"]) - zero_point, zero_point]


def parameters(*values: float) -> Array:
    """The float32 constant that a kernel reads its numbers from."""
    return np.asarray(values, np.float32)
