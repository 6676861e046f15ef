"""Every operator of a compiled network on that network's own operands: one that rounds differently cannot hide behind,
or be blamed for, what comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.reference import evaluate

MOVES = {f"lpsn.float_{op}" for op in "resize_nearest strided_slice depth_to_space reshape transpose concat".split()}
EXACT = {*MOVES, "lpsn.float_instance_norm"}
"""Float operators that return the reference's numbers."""


def is_float(name: str) -> bool:
    """Whether an operator computes in float, and so may round otherwise than the reference."""
    return name.startswith(("relax.", "lpsn.float_")) and name not in EXACT


def is_exact(mod: Any) -> bool:
    """Whether no operator of a lowered network may round otherwise than the reference."""
    return not any(is_float(graph.op_name(value)) for _, value in graph.bindings(mod))


def with_all_outputs(mod: Any) -> tuple[Any, list[str]]:
    """The function with every intermediate value as an output, and their names."""
    function = mod["main"]
    builder, new = relax.BlockBuilder(), {param: param for param in function.params}

    def lookup(expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([lookup(field) for field in expr.fields])
        return new[expr] if isinstance(expr, relax.Var) else expr

    with builder.function("main", list(function.params)):
        with builder.dataflow():
            for var, value in graph.bindings(mod):
                if isinstance(value, relax.Call):
                    call = relax.Call(value.op, [lookup(arg) for arg in value.args], value.attrs, list(value.ty_args))
                    new[var] = graph.emit_named(builder, call, var.name)
            kept = [var for var in new if var not in set(function.params)]
            output = builder.emit_output(relax.Tuple([new[var] for var in kept]))
        builder.emit_func_output(output)
    return builder.get(), [var.name for var in kept]


def check_each_operator(mod: Any, values: Mapping[str, np.ndarray]) -> None:
    """Assert that every value follows from its operands: exactly, and after float operators within float rounding.

    Parameters
    ----------
    mod : IRModule
        The lowered network.
    values : mapping of str to ndarray
        What the compiled module made of every variable, inputs included.
    """
    for var, value in graph.bindings(mod):
        if not isinstance(value, relax.Call):
            continue
        want = evaluate(value, values)
        if is_float(graph.op_name(value)):
            scale = max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(values[var.name], want, rtol=0, atol=2e-5 * scale, err_msg=var.name)
        else:
            np.testing.assert_array_equal(values[var.name], want, err_msg=var.name)
