"""Sizes of a canonical module: multiply-accumulates, parameters, activation elements. For one batch as traced."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import tvm
from tvm import relax

from lpsn_tvm.graph import bindings, find_layers, op_name, shape_of

VIEWS = ("relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims")
"""Operators whose result is the operand's memory seen differently."""
ELEMENTWISE = tuple(
    f"relax.{name}"
    for name in (
        "add", "subtract", "multiply", "divide", "maximum", "minimum", "clip", "sigmoid", "tanh", "exp", "negative",
        "nn.relu", "nn.leakyrelu", "nn.prelu", "nn.silu", "nn.gelu",
    )
)  # fmt: skip
"""Operators that a compiler fuses into what produced their operand."""


def count_macs(mod: tvm.IRModule) -> int:
    """Multiply-accumulates of all layers, for the traced batch."""
    return sum(layer.macs * layer.in_shape[0] for layer in find_layers(mod).values())


def count_parameters(mod: tvm.IRModule) -> int:
    """Weights and biases of all layers."""
    return sum(int(layer.weight.size + layer.bias.size) for layer in find_layers(mod).values())


def activation_elements(mod: tvm.IRModule) -> int:
    """A of the paper's memory metric: elements of the outputs of all layers.

    Source: Zhang et al., Applied Sciences 2022, 12(15), 7829.
    """
    return sum(prod(layer.out_shape) for layer in find_layers(mod).values())


def peak_activation_elements(mod: tvm.IRModule) -> int:
    """Most elements that are alive at once when operators run in order and every value is freed after its last use.

    Inputs count until they are read for the last time, outputs until the end; an operator's operands and result are
    alive together. What a compiler fuses takes no memory of its own: an element-wise result takes the place of an
    operand of the same shape that nobody reads any more (sum and bias, ReLU, residual sum), reshapes are views.
    """
    parameters = [p.name for p in mod["main"].params]
    readers = Counter(name for _, value in bindings(mod) for name in variables_of(value))
    sizes = {p.name: prod(shape_of(p)) for p in mod["main"].params}
    home: dict[str, str] = {name: name for name in parameters}
    # Reads still to come of every piece of memory, by all variables that live in it; the caller reads its inputs for
    # ever.
    pending = Counter({name: readers[name] + 1 for name in parameters})
    used: list[set[str]] = []
    for var, value in bindings(mod):
        operands = variables_of(value)
        pending.subtract(home[operand] for operand in operands)
        place = _place(value, var, operands, home, pending)
        home[var.name] = place
        pending[place] += readers[var.name]
        if place == var.name:
            sizes[place] = prod(shape_of(var))
        used.append({home[operand] for operand in operands} | {place})
    ends = {name: position for position, names in enumerate(used) for name in names}
    alive, peak = set(parameters), sum(sizes[name] for name in parameters)
    for position, names in enumerate(used):
        alive |= names
        peak = max(peak, sum(sizes[name] for name in alive))
        alive = {name for name in alive if ends.get(name, -1) > position}
    return peak


def _place(value: Any, var: Any, operands: list[str], home: dict[str, str], pending: Counter[str]) -> str:
    """The memory that a result takes: its own, or an operand's."""
    if operands and (isinstance(value, (relax.Var, relax.Tuple)) or op_name(value) in VIEWS):
        return home[operands[0]]
    if op_name(value) in ELEMENTWISE:
        for arg in value.args:
            if isinstance(arg, relax.Var) and pending[home[arg.name]] == 0 and shape_of(arg) == shape_of(var):
                return home[arg.name]
    return str(var.name)


def variables_of(expr: Any) -> list[str]:
    """Names of the variables that an expression reads, in order."""
    if isinstance(expr, relax.Var):
        return [expr.name]
    fields = expr.fields if isinstance(expr, relax.Tuple) else expr.args if isinstance(expr, relax.Call) else ()
    return [name for field in fields for name in variables_of(field)]
