"""Reference execution of an integer Relax module: the numpy functions of `quant`, one binding after the other.

This is what "bit for bit" means: a compiled module must return exactly what `run_reference` returns for the same
feeds. Operators that stayed float, as Relax (torch interpreter's functions) or fused (`float_ops`), may differ from
compiled code by float rounding, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import float_ops, graph, quant
from lpsn_tvm.errors import ModelError, UnsupportedOpError

_OPERATORS: dict[str, Any] = {**quant.OPERATORS, **float_ops.OPERATORS}


def run_reference(mod: Any, feeds: Mapping[str, quant.Array], fetch: list[str] | None = None) -> dict[str, quant.Array]:
    """Execute `mod["main"]` and return its outputs by name.

    Parameters
    ----------
    mod : IRModule
        Integer, float or mixed module in A-normal form (one dataflow block).
    feeds : dict of ndarray
        One array per function parameter, by parameter name.
    fetch : list of str, optional
        Names of further variables to return.

    Returns
    -------
    dict of ndarray
        Output variable name -> value, in output order, then the fetched variables.
    """
    function = mod["main"]
    values: dict[str, quant.Array] = {}
    for param in function.params:
        if param.name not in feeds:
            raise ModelError(f"input is missing; given: {', '.join(feeds) or 'none'}", where=param.name)
        value = np.asarray(feeds[param.name])
        if value.shape != graph.shape_of(param) or str(value.dtype) != graph.dtype_of(param):
            wanted = f"{graph.dtype_of(param)}{list(graph.shape_of(param))}"
            raise ModelError(f"input is {value.dtype}{list(value.shape)}, not {wanted}", where=param.name)
        values[param.name] = value
    for var, expr in graph.bindings(mod):
        values[var.name] = evaluate(expr, values)
    result = {name: values[name] for name in output_variables(mod)}
    for name in fetch or []:
        result[name] = values[name]
    return result


def output_variables(mod: Any) -> list[str]:
    """Names of the variables that `main` returns, aliases (`gv = x`) resolved, in order."""
    alias: dict[str, Any] = {
        var.name: expr for var, expr in graph.bindings(mod) if isinstance(expr, (relax.Var, relax.Tuple))
    }

    def resolve(expr: Any) -> list[str]:
        if isinstance(expr, relax.Tuple):
            return [name for field in expr.fields for name in resolve(field)]
        return resolve(alias[expr.name]) if expr.name in alias else [expr.name]

    return resolve(mod["main"].body.body)


def evaluate(expr: Any, values: Mapping[str, Any]) -> Any:
    """The value of one bound expression, given the values of the variables it reads (numpy in, numpy out)."""
    if isinstance(expr, relax.Var):
        return values[expr.name]
    if isinstance(expr, relax.Tuple):
        return tuple(evaluate(item, values) for item in expr.fields)
    if graph.is_constant(expr):
        return graph.constant_value(expr)
    name = graph.op_name(expr)
    if name in _OPERATORS:
        return _OPERATORS[name](*[evaluate(arg, values) for arg in expr.args[1:]], **graph.call_attrs(expr))
    return evaluate_float(expr, values)


def evaluate_float(call: Any, values: Mapping[str, Any]) -> quant.Array:
    """One Relax operator in float, by the torch interpreter's operator function."""
    import torch

    from lpsn_tvm.interpreter import operands_of
    from lpsn_tvm.interpreter_ops import FACTORIES, Node

    op = graph.op_name(call)
    if op not in FACTORIES:
        raise UnsupportedOpError(f"operator {op or type(call).__name__} cannot be evaluated")
    attrs = graph.call_attrs(call)
    operands = operands_of(call, op, attrs)
    node = Node(op, op, attrs, tuple(graph.shape_of(operand) for operand in operands), graph.shape_of(call))
    tensors = [torch.from_numpy(np.array(evaluate(operand, values))) for operand in operands]
    result: quant.Array = FACTORIES[op](node)(*tensors).numpy()
    return np.ascontiguousarray(result)
