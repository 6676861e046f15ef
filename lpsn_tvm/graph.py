"""Reading and rebuilding canonical Relax functions: the few helpers that every pass shares.

Canonical form is described in CONTRIBUTING.md (Contract 1). Variables are named uniquely, so all results here are
keyed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax

ACC_SUFFIX = ".acc"
LAYER_OPS = {
    "relax.nn.conv2d": "conv2d",
    "relax.nn.conv2d_transpose": "conv2d_transpose",
    "relax.matmul": "dense",
}


def is_constant(expr: Any) -> bool:
    """Whether `expr` is a tensor constant."""
    return isinstance(expr, tvm.ir.GenericConst)


def constant_value(expr: Any) -> np.ndarray:
    """The numpy value of a tensor constant."""
    return np.asarray(expr.value.numpy())


def constant(value: np.ndarray) -> Any:
    """A Relax tensor constant of `value`, dtype kept."""
    # Not ascontiguousarray: it turns rank 0 into rank 1.
    return relax.const(np.asarray(value, order="C"), str(value.dtype))


def op_name(call: Any) -> str:
    """`relax.nn.conv2d`; for `call_pure_packed` the packed function's name (`lpsn.conv2d`); else an empty string."""
    if not isinstance(call, relax.Call):
        return ""
    op = call.op
    if isinstance(op, tvm.ir.Op):
        if op.name == "relax.call_pure_packed":
            return str(call.args[0].global_symbol)
        return str(op.name)
    return ""


FLOAT_MOVES = ("resize_nearest", "strided_slice", "depth_to_space", "reshape", "transpose", "concat")
"""Float operators that move numbers and compute none."""


def is_inexact(call: Any) -> bool:
    """Whether a float operator computes, so that targets may round otherwise."""
    name = op_name(call)
    return name.startswith(("relax.", "lpsn.float_")) and name.removeprefix("lpsn.float_") not in FLOAT_MOVES


def shape_of(expr: Any) -> tuple[int, ...]:
    """The static shape of a tensor expression."""
    return tuple(int(extent) for extent in expr.ty.shape.values)


def dtype_of(expr: Any) -> str:
    """The data type of a tensor expression as a string."""
    return str(expr.ty.dtype)


def bindings(mod: tvm.IRModule) -> Iterator[tuple[Any, Any]]:
    """Yield (variable, value) of every binding of `main`, in order."""
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def call_attrs(call: Any) -> dict[str, Any]:
    """The attributes of a call as plain Python values (ints, floats, strings, tuples)."""
    if call.attrs is None:
        return {}
    if isinstance(call.attrs, tvm.ir.DictAttrs):
        return {str(key): _plain(value) for key, value in call.attrs.items()}
    fields = type(call.attrs).__tvm_ffi_type_info__.fields
    return {field.name: _plain(getattr(call.attrs, field.name)) for field in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, bytes)) or value is None:
        return value
    if isinstance(value, (tvm.tirx.IntImm, tvm.tirx.FloatImm)):
        return value.value
    if hasattr(value, "__iter__"):
        return tuple(_plain(item) for item in value)
    return str(value)


@dataclass(frozen=True)
class Layer:
    """A weighted layer of a canonical function: `acc = op(x, weight)`, `out = acc + bias`.

    Parameters
    ----------
    name : str
        Name of the output variable (after bias): the ONNX node's name.
    kind : str
        "conv2d", "conv2d_transpose" or "dense".
    data : str
        Name of the input variable.
    acc : str
        Name of the variable before the bias.
    weight : float32[O, I/groups, kh, kw] | float32[I, O/groups, kh, kw] (transposed) | float32[K, M] (dense)
    bias : float32[C]
        One value per output channel.
    groups : int
        1 for dense.
    attrs : dict
        The call's attributes (strides, padding, dilation, groups, ...).
    in_shape, out_shape : tuple of int
        Shapes of input and output.
    """

    name: str
    kind: str
    data: str
    acc: str
    weight: np.ndarray
    bias: np.ndarray
    groups: int
    attrs: dict[str, Any]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @property
    def in_channels(self) -> int:
        """Channels (features for dense) that the layer reads."""
        return self.in_shape[1]

    @property
    def out_channels(self) -> int:
        """Channels (features for dense) that the layer writes."""
        return self.out_shape[1]

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel reads one input channel and there are as many groups as input channels."""
        return self.kind == "conv2d" and self.groups > 1 and self.groups == self.in_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one sample."""
        return layer_macs(self.kind, self.weight.size, self.in_shape, self.out_shape)


def layer_macs(kind: str, weights: int, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> int:
    """Multiply-accumulate operations of a layer ("conv2d", "conv2d_transpose" or "dense") for one sample."""
    spatial = in_shape if kind == "conv2d_transpose" else out_shape
    return int(weights) * prod(spatial[2:])


def find_layers(mod: tvm.IRModule) -> dict[str, Layer]:
    """All weighted layers of a canonical module, in execution order, keyed by layer name."""
    pending: dict[str, tuple[Any, Any]] = {}
    layers: dict[str, Layer] = {}
    for var, value in bindings(mod):
        name = op_name(value)
        if name in LAYER_OPS and is_constant(value.args[1]):
            pending[var.name] = (var, value)
        elif name == "relax.add" and isinstance(value.args[0], relax.Var) and value.args[0].name in pending:
            acc, call = pending.pop(value.args[0].name)
            attrs = call_attrs(call)
            layers[var.name] = Layer(
                name=var.name,
                kind=LAYER_OPS[op_name(call)],
                data=call.args[0].name,
                acc=acc.name,
                weight=constant_value(call.args[1]),
                bias=constant_value(value.args[1]).reshape(-1),
                groups=int(attrs.get("groups", 1)),
                attrs=attrs,
                in_shape=shape_of(call.args[0]),
                out_shape=shape_of(var),
            )
    return layers


def consumers_of(mod: tvm.IRModule) -> dict[str, list[str]]:
    """Variable name -> names of the variables whose binding reads it; function outputs read under the name "" ."""
    users: dict[str, list[str]] = {}

    def visit(expr: Any, user: str) -> None:
        if isinstance(expr, relax.Var):
            users.setdefault(expr.name, []).append(user)
        elif isinstance(expr, relax.Tuple):
            for field in expr.fields:
                visit(field, user)

    for var, value in bindings(mod):
        if isinstance(value, relax.Call):
            for arg in value.args:
                visit(arg, var.name)
        else:  # the alias or tuple that the function returns
            visit(value, "")
    visit(mod["main"].body.body, "")
    return users


Rewrite = Callable[[relax.BlockBuilder, Any, Any, Callable[[Any], Any]], Any]


def emit_named(builder: relax.BlockBuilder, value: Any, name: str) -> Any:
    """Emit `value` into the current dataflow block under exactly `name` (BlockBuilder would replace dots and slashes).

    Types are inferred anew; operands that are calls are bound first, under names that the builder makes up.
    """
    value = builder.normalize(value)
    var = relax.DataflowVar(name, value.ty)
    builder.emit_normalized(relax.VarBinding(var, value))
    return var


def rebuild(mod: tvm.IRModule, rewrite: Rewrite, params: list[Any] | None = None) -> tvm.IRModule:
    """A new module with every binding passed through `rewrite`; types are inferred anew.

    Parameters
    ----------
    mod : IRModule
        Canonical module.
    rewrite : callable (builder, var, value, lookup) -> expression, or None
        Returns what the variable is now: a new call (emitted under the old name), an existing variable (the binding
        disappears), or None to keep the call with its operands replaced. `lookup` maps an old operand expression to
        the new one.
    params : list of Var, optional
        New function parameters, in the old order; by default the old ones.

    Returns
    -------
    IRModule
        One function `main` with the old attributes.
    """
    function = mod["main"]
    params = list(function.params) if params is None else params
    new: dict[Any, Any] = dict(zip(function.params, params, strict=True))

    def lookup(expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return new[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([lookup(field) for field in expr.fields])
        return expr

    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            for var, value in bindings(mod):
                if isinstance(value, (relax.Var, relax.Tuple)):
                    new[var] = lookup(value)
                    continue
                result = rewrite(builder, var, value, lookup)
                if result is None:
                    result = relax.Call(value.op, [lookup(arg) for arg in value.args], value.attrs, list(value.ty_args))
                new[var] = result if isinstance(result, relax.Var) else emit_named(builder, result, var.name)
            output = builder.emit_output(lookup(function.body.body))
        builder.emit_func_output(output)
    result_mod = builder.get()
    if function.attrs is not None and len(function.attrs):
        result_mod["main"] = result_mod["main"].with_attrs(function.attrs)
    return result_mod
