"""Check the rules of contract 1, naming the one that is violated and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import ModelError, UnsupportedOpError

_NAMES = """
add subtract multiply divide maximum minimum power clip sigmoid tanh exp log sqrt rsqrt square abs negative erf floor
ceil round sin cos tan atan sign nn.relu nn.leakyrelu nn.prelu nn.silu nn.gelu nn.gelu_tanh nn.softplus nn.selu
nn.conv2d nn.conv2d_transpose matmul concat strided_slice nn.pad reshape permute_dims broadcast_to take nn.pixel_shuffle
image.resize2d nn.max_pool2d nn.avg_pool2d mean sum max min variance nn.softmax nn.log_softmax nn.instance_norm
nn.group_norm nn.layer_norm
"""
ALLOWED = frozenset(f"relax.{name}" for name in _NAMES.split())
_COMMUTES = {"relax.add", "relax.multiply", "relax.maximum", "relax.minimum"}


def verify_canonical(mod: tvm.IRModule) -> None:
    """Raise unless `mod` is in canonical form.

    Raises
    ------
    ModelError
        "rule <number>: ..." of contract 1, with the variable.
    UnsupportedOpError
        An operator outside the list in `canonicalize`.
    """
    functions = list(mod.get_global_vars())
    if [var.name_hint for var in functions] != ["main"]:
        raise ModelError(f"rule 1: one function main, not {[var.name_hint for var in functions]}")
    blocks = mod["main"].body.blocks
    if len(blocks) != 1 or not isinstance(blocks[0], relax.DataflowBlock):
        raise ModelError(f"rule 1: one dataflow block, not {len(blocks)} blocks", where="main")
    names = {param.name for param in mod["main"].params}
    for param in mod["main"].params:
        _check_type(param)
    bound = list(graph.bindings(mod))
    for var, value in bound:
        if not isinstance(value, relax.Call):
            _check_output(var, value, mod)
            continue
        if var.name in names:
            raise ModelError("rule 2: the name is bound twice", where=var.name)
        names.add(var.name)
        _check_call(var, value)
    _check_layers(mod)


def _check_output(var: Any, value: Any, mod: tvm.IRModule) -> None:
    fields = value.fields if isinstance(value, relax.Tuple) else [value]
    if not all(isinstance(item, relax.Var) for item in fields) or not mod["main"].body.body.same_as(var):
        raise ModelError("rule 1: only the function's output may be bound to a variable or tuple", where=var.name)


def _check_type(var: Any) -> None:
    if (
        not isinstance(var.ty, relax.TensorType)
        or var.ty.shape is None
        or not all(isinstance(e, tvm.tirx.IntImm) for e in var.ty.shape.values)
    ):
        raise ModelError(f"the shape is not static: {var.ty}", where=var.name)
    if graph.dtype_of(var) != "float32":
        raise UnsupportedOpError(
            f"computes {graph.dtype_of(var)} values; only float32 networks are supported", where=f"node {var.name!r}"
        )


def _check_call(var: Any, call: Any) -> None:
    name = graph.op_name(call)
    if name not in ALLOWED:
        raise UnsupportedOpError(
            f"operator {name or type(call.op).__name__} is not in canonical form", where=f"node {var.name!r}"
        )
    _check_type(var)
    for argument in call.args:
        if isinstance(argument, relax.Call):
            raise ModelError("rule 1: operands are variables and constants, not nested calls", where=var.name)
        if isinstance(argument, relax.Tuple) and any(isinstance(item, relax.Call) for item in argument.fields):
            raise ModelError("rule 1: operands are variables and constants, not nested calls", where=var.name)
    if name in _COMMUTES and graph.is_constant(call.args[0]):
        raise ModelError("a constant of a commutative operator stands second", where=var.name)
    attrs = graph.call_attrs(call)
    if len(attrs.get("padding") or (0,) * 4) != 4:
        raise ModelError(f"rule 5: padding is (top, left, bottom, right), not {attrs['padding']}", where=var.name)
    if attrs.get("ceil_mode"):
        raise ModelError("pooling has ceil_mode False", where=var.name)
    if (
        name == "relax.mean"
        and len(graph.shape_of(call.args[0])) == 4
        and tuple(attrs["axis"] or ()) == (2, 3)
        and not attrs["keepdims"]
    ):
        raise ModelError("rule 6: global average pooling keeps its dimensions", where=var.name)


def _check_layers(mod: tvm.IRModule) -> None:
    layers = graph.find_layers(mod)
    accumulators = {layer.acc: layer for layer in layers.values()}
    users = graph.consumers_of(mod)
    for var, value in graph.bindings(mod):
        name = graph.op_name(value)
        if name not in graph.LAYER_OPS:
            continue
        weighted = graph.is_constant(value.args[1]) and not graph.is_constant(value.args[0])
        if not weighted:
            if name != "relax.matmul":
                raise UnsupportedOpError("the weight is computed at run time", where=f"node {var.name!r}")
            continue
        if var.name not in accumulators:
            raise ModelError("rule 3: a layer's accumulator is followed by one add of its bias", where=var.name)
        if len(users[var.name]) != 1 or not var.name.startswith(accumulators[var.name].name + graph.ACC_SUFFIX):
            raise ModelError("rule 3: only the bias reads an accumulator, which is called <layer>.acc", where=var.name)
    for layer in layers.values():
        if layer.bias.size != layer.out_channels:
            raise ModelError(
                f"rule 3: the bias has {layer.bias.size} values for {layer.out_channels} channels", where=layer.name
            )
        if not np.isfinite(layer.weight).all() or not np.isfinite(layer.bias).all():
            raise ModelError("the weights are not finite (NaN or infinity)", where=f"layer {layer.name!r}")
