"""Builder of float operator calls `lpsn.float_*`, the counterpart of `integer_ops.integer_call`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import float_ops
from lpsn_tvm.errors import CompileError


def float_call(op: str, tensors: Sequence[Any], attrs: Mapping[str, Any], shape: Sequence[int]) -> relax.Call:
    """A call of the float operator `op` ("lpsn.float_conv2d") on `tensors`, every attribute filled in.

    Parameters
    ----------
    op : str
        A key of `float_ops.OPERATORS`.
    tensors : sequence of Relax expressions
        In the order of the numpy function.
    attrs : mapping
        Keyword arguments of the numpy function.
    shape : sequence of int
        Shape of the float32 result.

    Raises
    ------
    CompileError
        Unknown operator or attribute, or an attribute is missing.
    """
    if op not in float_ops.OPERATORS:
        raise CompileError(f"unknown float operator; known: {', '.join(sorted(float_ops.OPERATORS))}", where=op)
    parameters = inspect.signature(float_ops.OPERATORS[op]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    unknown = sorted(set(attrs) - set(defaults))
    complete = {**defaults, **attrs}
    missing = sorted(name for name, value in complete.items() if value is inspect.Parameter.empty)
    if unknown or missing:
        raise CompileError(f"attributes unknown: {unknown}, missing: {missing}", where=op)
    return relax.Call(
        tvm.ir.Op.get("relax.call_pure_packed"),
        [relax.ExternFunc(op), *tensors],
        tvm.ir.make_node("ir.DictAttrs", **{name: _plain(value) for name, value in complete.items()}),
        [relax.TensorType(tuple(int(extent) for extent in shape), "float32")],
    )


def _plain(value: Any) -> Any:
    """What DictAttrs keeps exactly: bool, int, float, str, lists of them."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(np.float32(value))
    return value if isinstance(value, str) else [_plain(item) for item in value]
