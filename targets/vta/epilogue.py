"""What follows the sums: bias, right shifts rounded half up, clamp; only what the values can need is emitted."""

from __future__ import annotations

import numpy as np

from lpsn_tvm.schedules.vta.ops import Scalar, Step
from lpsn_tvm.targets.vta.forms import Array, Form
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped

LARGEST_SHIFT = 15
"""What one SHR may do; larger amounts are split (floor after floor is the floor of both)."""
IMMEDIATE = 1 << 15


def add_steps(context: Context, name: str, form: Form, per_channel: Array) -> list[Step]:
    """Add a number per channel, modulo 2**32: nothing, an immediate, or a vector."""
    values = np.asarray(per_channel, np.int64)
    if values.size and values.min() == values.max() and -IMMEDIATE <= values[0] < IMMEDIATE:
        return [] if values[0] == 0 else [Scalar("add", int(values[0]))]
    lanes = form.per_lane(values).astype(np.int32)
    return [context.pool.add_vector("add", f"{name}.bias", lanes)]


def shift_steps(context: Context, name: str, form: Form, amounts: Array) -> list[Step]:
    """Shift right by an amount per channel.

    Raises
    ------
    Unmapped
        An amount beyond what an int32 can be shifted by.
    """
    rest = np.asarray(amounts, np.int64)
    if rest.size and rest.max() > 31:
        raise Unmapped(f"its accumulators are shifted by {int(rest.max())} bits, more than 31")
    steps: list[Step] = []
    while np.any(rest):
        now = np.minimum(rest, LARGEST_SHIFT)
        if now.min() == now.max():
            steps.append(Scalar("shr", int(now[0])))
        else:
            steps.append(context.pool.add_vector("shr", f"{name}.shift", form.per_lane(now)))
        rest = rest - now
    return steps


def clamp_steps(qmin: int, qmax: int, reach: tuple[int, int]) -> list[Step]:
    """Clamp to [qmin, qmax]; sides that `reach`, the values' own range, keeps anyway are left out."""
    steps: list[Step] = []
    if reach[0] < qmin:
        steps.append(Scalar("max", qmin))
    if reach[1] > qmax:
        steps.append(Scalar("min", qmax))
    return steps


def rounding_of(shift: Array) -> Array:
    """`2**(s-1)`, 0 for s = 0."""
    result: Array = (np.int64(1) << np.asarray(shift, np.int64)) >> 1
    return result


def sum_range(rows: Array, low: int, high: int) -> tuple[Array, Array]:
    """Smallest and largest sum of weights int[O, ...] times inputs in [low, high]; terms at a border may be missing."""
    flat = rows.reshape(rows.shape[0], -1)
    positive = np.maximum(flat, 0).sum(axis=1, dtype=np.int64)
    negative = np.minimum(flat, 0).sum(axis=1, dtype=np.int64)
    below, above = min(low, 0), max(high, 0)
    return positive * below + negative * above, positive * above + negative * below
