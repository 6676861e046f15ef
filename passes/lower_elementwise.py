"""Sums, products and lookup tables in integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpsn_tvm import graph, quant
from lpsn_tvm.passes.integer_ops import IntegerTensor, integer_call, result_attrs, scale_of
from lpsn_tvm.quant import Array, QuantParams
from lpsn_tvm.reference import evaluate


def lower_add(a: IntegerTensor, b: IntegerTensor, out: QuantParams, interval: tuple[float, float]) -> Any:
    """Sum of two tensors of different scales, numpy broadcasting, clamped to `interval`."""
    target = scale_of(out)
    attrs = {
        "a_multiplier": a.scale / target,
        "b_multiplier": b.scale / target,
        "a_zero_point": a.zero_point,
        "b_zero_point": b.zero_point,
    }
    return integer_call("lpsn.add", [a.expr, b.expr], attrs | result_attrs(out, *interval))


def lower_multiply(a: IntegerTensor, b: IntegerTensor, out: QuantParams, interval: tuple[float, float]) -> Any:
    """Product of two tensors, numpy broadcasting, clamped to `interval`."""
    attrs = {
        "multiplier": a.scale * b.scale / scale_of(out),
        "a_zero_point": a.zero_point,
        "b_zero_point": b.zero_point,
    }
    return integer_call("lpsn.multiply", [a.expr, b.expr], attrs | result_attrs(out, *interval))


def lower_lookup(
    source: str, members: Sequence[tuple[str, Any]], x: IntegerTensor, out: QuantParams, per_channel: bool
) -> Any:
    """Any chain of elementwise operators on one tensor: evaluated here on all of its 2**bits values.

    Parameters
    ----------
    source : str
        Variable that the operators are computed from.
    members : sequence of (name, call)
        The float operators in execution order; the last one is the result.
    x : IntegerTensor
        The source in integers.
    out : QuantParams
        Parameters of the result.
    per_channel : bool
        Whether constants per channel occur (then one table per channel).
    """
    table = lookup_table(source, members, x, out, per_channel)
    if np.all(table == table[:1]):
        return integer_call("lpsn.lookup", [x.expr, graph.constant(table[0])], {"qmin": x.params.qmin})
    return integer_call("lpsn.channel_lookup", [x.expr, graph.constant(table)], {"qmin": x.params.qmin})


def lookup_table(
    source: str, members: Sequence[tuple[str, Any]], x: IntegerTensor, out: QuantParams, per_channel: bool
) -> Array:
    """Integer tables [C or 1, 2**bits] of the float operators `members`; see `lower_lookup`."""
    shape = graph.shape_of(x.expr)
    integers = np.arange(x.params.qmin, x.params.qmax + 1)
    real = quant.dequantize(integers, scale=x.scale, zero_point=x.zero_point)
    channels = shape[1] if per_channel else 1
    # The batch axis runs over the table's entries, so that constants per channel broadcast as they do in the network.
    grid = real.reshape((-1,) + (1,) * (len(shape) - 1))
    values: Mapping[str, Array] = {
        source: np.broadcast_to(grid, (len(real), channels, *grid.shape[2:])[: len(shape)]).copy()
    }
    for name, call in members:
        values = {**values, name: evaluate(call, values)}
    # Where a function is not defined (0 / 0) any number will do; infinities saturate.
    result = np.nan_to_num(np.asarray(values[members[-1][0]], np.float32), nan=0.0)
    bounds = result_attrs(out)
    quantized = quant.to_integer(
        result * np.float32(np.float32(1.0) / np.float32(scale_of(out))),
        bounds["out_zero_point"], bounds["qmin"], bounds["qmax"], out.dtype,
    )  # fmt: skip
    return np.ascontiguousarray(quantized.reshape(len(real), channels).T)
