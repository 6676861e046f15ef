"""What a constant operand of an elementwise operator is to its tensor: a scalar, one value per channel, or something
else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from lpsn_tvm import graph

Array = npt.NDArray[Any]


def scalar_value(expr: Any) -> float | None:
    """The value of a constant with one element, else None."""
    if not graph.is_constant(expr):
        return None
    value = graph.constant_value(expr)
    return float(value.reshape(())) if value.size == 1 else None


def per_channel(value: Array, shape: tuple[int, ...]) -> Array | None:
    """`value`, an operand that broadcasts against a tensor of `shape`, as one number per channel (axis 1); None if it
    is anything else.

    Scalars are repeated. Example: [1, C, 1, 1], [C, 1, 1] and [] against [N, C, H, W]; [C], [1, C] against [N, C].
    """
    if len(shape) < 2 or value.ndim > len(shape):
        return None
    aligned = (1,) * (len(shape) - value.ndim) + value.shape
    if any(extent != 1 for axis, extent in enumerate(aligned) if axis != 1) or aligned[1] not in (1, shape[1]):
        return None
    return np.broadcast_to(value.reshape(-1), (shape[1],)).astype(np.float32)


def affine_step(call: Any) -> tuple[Any, str, Array] | None:
    """(tensor, "scale" | "shift", float32[C]) of `multiply` or `add` of a variable and a per-channel or scalar constant
    in the second place, else None.
    """
    kind = {"relax.multiply": "scale", "relax.add": "shift"}.get(graph.op_name(call))
    if kind is None or not isinstance(call.args[0], relax.Var) or not graph.is_constant(call.args[1]):
        return None
    shape = graph.shape_of(call.args[0])
    if len(shape) not in (2, 4):
        return None
    value = per_channel(graph.constant_value(call.args[1]), shape)
    return None if value is None else (call.args[0], kind, value)
