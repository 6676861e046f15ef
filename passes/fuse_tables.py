"""Tables behind integer layers -> the layers' own epilogues, for backends that read and write a tensor less that way.

Before -> After:

    q = conv2d(x, ...)          (or conv2d_transpose, dense; with a residual or without)
    y = lookup(q, table)                                                       ->  y = conv2d(x, ..., table=...)

where nobody else reads `q`, it is no output, table and layer both put out bytes, and a residual is of the table's type
(kernels have one type for what they add to and what they write). The layer's `qmin`, `qmax` and zero point go on to say
what `q` was, `out_dtype` says what the table holds; the new table has one entry for each q within [qmin, qmax]. Tables
per channel stay operators of their own, and so does a second lookup behind the first.
"""

from __future__ import annotations

from typing import Any

import tvm

from lpsn_tvm import graph
from lpsn_tvm.passes.absorb import absorb
from lpsn_tvm.passes.integer_ops import tensors_of

LAYERS = ("lpsn.conv2d", "lpsn.conv2d_transpose", "lpsn.dense")
BYTES = ("int8", "uint8")
CONSTANTS = 4
"""Operands of a layer before its residual: input, weight, bias, scale."""


def fuse_tables(mod: tvm.IRModule) -> tvm.IRModule:
    """Move tables into the layers before them; see the module's docstring.

    Parameters
    ----------
    mod : IRModule
        Integer, or mixed, module.

    Returns
    -------
    IRModule
        The same function; a layer with a table has the name of the lookup that it took over.
    """
    return absorb(mod, LAYERS, _with_table)


def _with_table(layer: Any, call: Any) -> dict[str, Any] | None:
    """The layer's attributes with the table of the lookup; None where the two do not become one."""
    if graph.op_name(call) != "lpsn.lookup":
        return None
    attrs, table = graph.call_attrs(layer), call.args[2]
    if not graph.is_constant(table) or graph.dtype_of(table) not in BYTES:
        return None
    if attrs["out_dtype"] not in BYTES or "table" in attrs:
        return None
    residual = tensors_of(layer)[CONSTANTS:]
    if residual and graph.dtype_of(residual[0]) != graph.dtype_of(table):
        return None
    values, first = graph.constant_value(table), int(graph.call_attrs(call)["qmin"])
    begin, end = attrs["qmin"] - first, attrs["qmax"] - first + 1
    if not 0 <= begin < end <= len(values):
        return None
    return {**attrs, "table": values[begin:end].tolist(), "out_dtype": graph.dtype_of(table)}
