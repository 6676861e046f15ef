"""Builders of integer operators: checked `call_pure_packed("lpsn.<op>", ...)` calls with inferred shape and dtype.

What an operator means is `lpsn_tvm.quant`; its keyword arguments are the call's attributes. A built call always
carries every attribute (defaults filled in), so a target reads them without guessing: integers, floats, strings,
booleans and lists of integers or floats. An absent residual is an absent last tensor, an absent table of a layer an
absent attribute.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph, quant
from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.passes.integer_shapes import SHAPES, Attrs
from lpsn_tvm.quant import QuantParams

PREFIX = "lpsn."


@dataclass(frozen=True)
class IntegerTensor:
    """An expression that holds integers, and what they mean."""

    expr: Any
    params: QuantParams

    @property
    def scale(self) -> float:
        """The per-tensor scale, a float32 value."""
        return scale_of(self.params)

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0.0."""
        return int(self.params.zero_point)


def scale_of(params: QuantParams) -> float:
    """The per-tensor scale of `params`, a float32 value."""
    return float(np.float32(np.asarray(params.scale).reshape(-1)[0]))


def result_attrs(params: QuantParams, low: float = -np.inf, high: float = np.inf) -> Attrs:
    """Attributes of a requantized result: zero point, container, range clamped to the real interval [low, high].

    ReLU, ReLU6 and clip cost nothing this way: `qmin = max(qmin, rint(low / scale) + zero_point)`, `qmax` likewise.
    """
    scale, zero_point = scale_of(params), int(params.zero_point)

    def integer(bound: float, fallback: int) -> int:
        if not np.isfinite(bound):
            return fallback
        return int(np.clip(np.rint(np.float64(bound) / scale) + zero_point, params.qmin, params.qmax))

    return {
        "out_zero_point": zero_point,
        "qmin": integer(low, params.qmin),
        "qmax": integer(high, params.qmax),
        "out_dtype": params.dtype,
    }


def is_integer_op(call: Any) -> bool:
    """Whether `call` is one of this package's integer operators."""
    return graph.op_name(call) in quant.OPERATORS


def tensors_of(call: Any) -> list[Any]:
    """The tensor operands of an integer operator (without the packed function's name)."""
    return list(call.args[1:])


@cache
def attribute_defaults(op: str) -> dict[str, Any]:
    """Attribute name -> default of operator `op` ("lpsn.conv2d"); `inspect.Parameter.empty` where it must be given."""
    if op not in quant.OPERATORS:
        raise QuantizeError(f"unknown integer operator; known: {', '.join(sorted(quant.OPERATORS))}", where=op)
    parameters = inspect.signature(quant.OPERATORS[op]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def integer_call(
    op: str,
    tensors: Sequence[Any],
    attrs: Mapping[str, Any],
    out_shape: Sequence[int] | None = None,
    out_dtype: str | None = None,
) -> relax.Call:
    """A call of the integer operator `op` on `tensors`, attributes checked and completed.

    Parameters
    ----------
    op : str
        "lpsn.conv2d" and so on: a key of `quant.OPERATORS`.
    tensors : sequence of Relax expressions
        Data first, then constants in the order of the numpy function.
    attrs : mapping
        Keyword arguments of the numpy function.
    out_shape, out_dtype : optional
        Result type; inferred, and compared with the inferred one if given.

    Raises
    ------
    QuantizeError
        Unknown operator or attribute, missing attribute, or a type that contradicts the operands.
    """
    complete = _complete(op, attrs)
    shapes = [graph.shape_of(t) for t in tensors]
    dtypes = [graph.dtype_of(t) for t in tensors]
    shape = tuple(int(extent) for extent in SHAPES[op](shapes, complete))
    dtype = _out_dtype(op, dtypes, complete)
    if any(extent <= 0 for extent in shape):
        raise QuantizeError(f"result shape {shape} is empty for operands {shapes}", where=op)
    if out_shape is not None and tuple(int(extent) for extent in out_shape) != shape:
        raise QuantizeError(f"result shape is {shape} for operands {shapes}, not {tuple(out_shape)}", where=op)
    if out_dtype is not None and out_dtype != dtype:
        raise QuantizeError(f"result dtype is {dtype}, not {out_dtype}", where=op)
    return relax.Call(
        tvm.ir.Op.get("relax.call_pure_packed"),
        [relax.ExternFunc(op), *tensors],
        tvm.ir.make_node("ir.DictAttrs", **complete),
        [relax.TensorType(shape, dtype)],
    )


def _complete(op: str, attrs: Mapping[str, Any]) -> Attrs:
    defaults = attribute_defaults(op)
    unknown = sorted(set(attrs) - set(defaults))
    if unknown:
        raise QuantizeError(f"unknown attribute {', '.join(unknown)}; known: {', '.join(defaults)}", where=op)
    complete: Attrs = {}
    for name, default in defaults.items():
        value = attrs.get(name, default)
        if value is inspect.Parameter.empty:
            raise QuantizeError(f"attribute {name} is missing", where=op)
        if value is not None:
            complete[name] = _plain(value)
    return complete


def _plain(value: Any) -> Any:
    """Values that DictAttrs keeps exactly: bool, int, float, str, lists of them."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(np.float32(value))
    if isinstance(value, str):
        return value
    return [_plain(item) for item in value]


def _out_dtype(op: str, dtypes: list[str], attrs: Attrs) -> str:
    if "out_dtype" in attrs:
        return str(attrs["out_dtype"])
    if op == "lpsn.dequantize":
        return "float32"
    if op in ("lpsn.lookup", "lpsn.channel_lookup"):
        return dtypes[1]
    return dtypes[0]
