"""Converters of elementwise functions and of softmax.

Source: the ONNX operator specifications of the operators named in `CONVERTERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.frontend.node import Expr, Node

op = relax.op


def scalar(value: float) -> Any:
    """A rank-0 float32 constant."""
    return relax.const(float(value), "float32")


def unary(function: Callable[[Expr], Expr]) -> Callable[[Node], Expr]:
    """One operand, no attributes."""
    return lambda node: node.emit(function(node.inputs[0]))


def binary(function: Callable[[Expr, Expr], Expr]) -> Callable[[Node], Expr]:
    """Two operands, numpy broadcasting."""
    return lambda node: node.emit(function(node.inputs[0], node.inputs[1]))


def variadic(function: Callable[[Expr, Expr], Expr], mean: bool = False) -> Callable[[Node], Expr]:
    """Sum, Max, Min, Mean of any number of operands, pairwise."""

    def convert(node: Node) -> Expr:
        if len(node.inputs) == 1:
            return node.inputs[0]
        total = reduce(function, node.inputs)
        return node.emit(op.multiply(total, scalar(1.0 / len(node.inputs))) if mean else total)

    return convert


def clip(node: Node) -> Expr:
    """Clip -> relu, clip, maximum or minimum, whatever the bounds that are there ask for."""
    low, high = (_bound(node, name, index) for index, name in ((1, "min"), (2, "max")))
    data = node.inputs[0]
    if low is not None and high is not None:
        if low > high:
            raise node.unsupported(f"min {low} is greater than max {high}")
        return node.emit(op.clip(data, low, high))
    if low is not None:
        return node.emit(op.nn.relu(data) if low == 0.0 else op.maximum(data, scalar(low)))
    return data if high is None else node.emit(op.minimum(data, scalar(high)))


def _bound(node: Node, name: str, index: int) -> float | None:
    value = node.attrs.get(name)
    if value is None:
        array = node.constant(index, name)
        value = None if array is None else float(array.reshape(()))
    # The attribute form has the largest finite float as its default.
    return None if value is None or not np.isfinite(value) or abs(value) >= 3.4e38 else float(value)


def leaky_relu(node: Node) -> Expr:
    """LeakyRelu -> nn.leakyrelu."""
    return node.emit(op.nn.leakyrelu(node.inputs[0], float(node.attrs.get("alpha", 0.01))))


def prelu(node: Node) -> Expr:
    """PRelu: one slope -> nn.leakyrelu, one per channel -> nn.prelu, else relu(x) + slope * min(x, 0)."""
    slope = node.constant(1, "the slope")
    data, shape = node.inputs[0], node.shape()
    assert slope is not None
    if slope.size == 1:
        return node.emit(op.nn.leakyrelu(data, float(slope.reshape(()))))
    aligned = (1,) * (len(shape) - slope.ndim) + slope.shape
    if slope.size == shape[1] and aligned[1] == shape[1]:
        return node.emit(op.nn.prelu(data, graph.constant(slope.reshape(-1).astype(np.float32)), 1))
    negative = op.multiply(op.minimum(data, scalar(0.0)), graph.constant(slope.astype(np.float32)))
    return node.emit(op.add(op.nn.relu(data), negative))


def hard_sigmoid(node: Node) -> Expr:
    """HardSigmoid -> clip(alpha * x + beta, 0, 1)."""
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    return node.emit(op.clip(op.add(op.multiply(node.inputs[0], scalar(alpha)), scalar(beta)), 0.0, 1.0))


def hard_swish(node: Node) -> Expr:
    """HardSwish -> x * (clip(x + 3, 0, 6) / 6)."""
    data = node.inputs[0]
    gate = op.multiply(op.clip(op.add(data, scalar(3.0)), 0.0, 6.0), scalar(1.0 / 6.0))
    return node.emit(op.multiply(data, gate))


def elu(node: Node) -> Expr:
    """Elu -> relu(x) + alpha * (exp(min(x, 0)) - 1); Celu divides by alpha inside."""
    data, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.0))
    low = op.minimum(data, scalar(0.0))
    if node.op_type == "Celu":
        low = op.multiply(low, scalar(1.0 / alpha))
    return node.emit(op.add(op.nn.relu(data), op.multiply(op.add(op.exp(low), scalar(-1.0)), scalar(alpha))))


def selu(node: Node) -> Expr:
    """Selu -> gamma * (relu(x) + alpha * (exp(min(x, 0)) - 1))."""
    alpha = float(node.attrs.get("alpha", 1.67326319217681884765625))
    gamma = float(node.attrs.get("gamma", 1.05070102214813232421875))
    data = node.inputs[0]
    low = op.multiply(op.add(op.exp(op.minimum(data, scalar(0.0))), scalar(-1.0)), scalar(alpha * gamma))
    return node.emit(op.add(op.multiply(op.nn.relu(data), scalar(gamma)), low))


def gelu(node: Node) -> Expr:
    """Gelu -> nn.gelu, nn.gelu_tanh."""
    tanh = node.attrs.get("approximate", "none") == "tanh"
    return node.emit((op.nn.gelu_tanh if tanh else op.nn.gelu)(node.inputs[0]))


def swish(node: Node) -> Expr:
    """Swish -> nn.silu, or x * sigmoid(alpha * x)."""
    data, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.0))
    if alpha == 1.0:
        return node.emit(op.nn.silu(data))
    return node.emit(op.multiply(data, op.sigmoid(op.multiply(data, scalar(alpha)))))


def mish(node: Node) -> Expr:
    """Mish -> x * tanh(softplus(x))."""
    return node.emit(op.multiply(node.inputs[0], op.tanh(op.nn.softplus(node.inputs[0]))))


def thresholded_relu(node: Node) -> Expr:
    """ThresholdedRelu is discontinuous and has no Relax operator without comparisons."""
    raise node.unsupported("no float32 operator for it; use Relu or LeakyRelu")


def softsign(node: Node) -> Expr:
    """Softsign -> x / (1 + |x|)."""
    return node.emit(op.divide(node.inputs[0], op.add(op.abs(node.inputs[0]), scalar(1.0))))


def softmax(function: Callable[..., Expr]) -> Callable[[Node], Expr]:
    """Softmax, LogSoftmax; before opset 13 all axes from `axis` on are one."""

    def convert(node: Node) -> Expr:
        shape, rank = node.shape(), len(node.shape())
        legacy = node.opset < 13
        axis = int(node.attrs.get("axis", 1 if legacy else -1)) % rank
        if not legacy or all(extent == 1 for extent in shape[axis + 1 :]):
            return node.emit(function(node.inputs[0], axis=axis))
        rows = int(np.prod(shape[:axis], dtype=np.int64))
        flat = op.reshape(node.inputs[0], (rows, int(np.prod(shape[axis:], dtype=np.int64))))
        return node.emit(op.reshape(function(flat, axis=1), shape))

    return convert


def identity(node: Node) -> Expr:
    """Identity and Dropout (inference)."""
    return node.inputs[0]


def identity_cast_like(node: Node) -> Expr:
    """CastLike between float tensors."""
    if graph.dtype_of(node.inputs[0]) != "float32" or graph.dtype_of(node.inputs[1]) != "float32":
        raise node.unsupported("casts to or from types other than float32 are not supported at run time")
    return node.inputs[0]


def cast(node: Node) -> Expr:
    """A cast between float types is the identity here: everything is float32."""
    if graph.dtype_of(node.inputs[0]) != "float32" or node.attrs.get("to") != 1:
        raise node.unsupported("casts to or from types other than float32 are not supported at run time")
    return node.inputs[0]


_UNARY: dict[str, Callable[[Expr], Expr]] = {
    "Relu": op.nn.relu,
    "Sigmoid": op.sigmoid,
    "Tanh": op.tanh,
    "Exp": op.exp,
    "Log": op.log,
    "Sqrt": op.sqrt,
    "Abs": op.abs,
    "Neg": op.negative,
    "Erf": op.erf,
    "Floor": op.floor,
    "Ceil": op.ceil,
    "Round": op.round,
    "Sin": op.sin,
    "Cos": op.cos,
    "Tan": op.tan,
    "Atan": op.atan,
    "Sign": op.sign,
    "Softplus": op.nn.softplus,
}
_BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "Add": op.add,
    "Sub": op.subtract,
    "Mul": op.multiply,
    "Div": op.divide,
    "Pow": op.power,
}

CONVERTERS: dict[str, Callable[[Node], Expr]] = {
    **{name: unary(function) for name, function in _UNARY.items()},
    **{name: binary(function) for name, function in _BINARY.items()},
    "Sum": variadic(op.add),
    "Max": variadic(op.maximum),
    "Min": variadic(op.minimum),
    "Mean": variadic(op.add, mean=True),
    "Reciprocal": lambda node: node.emit(op.divide(scalar(1.0), node.inputs[0])),
    "Clip": clip,
    "LeakyRelu": leaky_relu,
    "PRelu": prelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Elu": elu,
    "Celu": elu,
    "Selu": selu,
    "Gelu": gelu,
    "Swish": swish,
    "Mish": mish,
    "Softsign": softsign,
    "ThresholdedRelu": thresholded_relu,
    "Softmax": softmax(op.nn.softmax),
    "LogSoftmax": softmax(op.nn.log_softmax),
    "Identity": identity,
    "Dropout": identity,
    "Cast": cast,
    "CastLike": identity_cast_like,
}
