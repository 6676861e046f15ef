"""Elementwise kernels without weights: requantize, quantize, dequantize, add, multiply, and fused chains of float
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lpsn_tvm import float_ops
from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import elementwise_kernel, offered_block
from lpsn_tvm.schedules.rounding import bounded, output_range, parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def requantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.requantize`."""
    data = inputs[0]
    out = TensorSpec(data.shape, str(attrs["out_dtype"]), data.block)
    numbers = parameters(attrs["multiplier"], attrs["in_zero_point"], *output_range(attrs))

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: to_integer(scaled(x(*i), p[0], p[1]), p[2], p[3], p[4], out.dtype))

    return elementwise_kernel("requantize", (data,), (numbers,), out, define)


def quantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.quantize`."""
    data, zero_point = inputs[0], int(attrs["zero_point"])
    if data.dtype != "float32":
        return None
    out = TensorSpec(data.shape, str(attrs["out_dtype"]), data.block)
    numbers = parameters(attrs["inv_scale"], attrs["qmin"] - zero_point, attrs["qmax"] - zero_point, zero_point)

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: to_integer(x(*i) * p[0], p[1], p[2], p[3], out.dtype))

    return elementwise_kernel("quantize", (data,), (numbers,), out, define)


def dequantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.dequantize`."""
    data = inputs[0]
    out = TensorSpec(data.shape, "float32", data.block)
    numbers = parameters(attrs["scale"], attrs["zero_point"])

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: scaled(x(*i), p[0], p[1]))

    return elementwise_kernel("dequantize", (data,), (numbers,), out, define)


def add(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.add` (numpy broadcasting between operands of equal rank)."""
    pair = _broadcast_pair(inputs, str(attrs["out_dtype"]))
    if pair is None:
        return None
    read, out = pair
    numbers = parameters(
        attrs["a_multiplier"], attrs["b_multiplier"], attrs["a_zero_point"], attrs["b_zero_point"], *output_range(attrs)
    )

    def define(a: View, b: View, p: Any) -> Any:
        def value(*i: Any) -> Any:
            total = bounded(scaled(a(*i), p[0], p[2])) + bounded(scaled(b(*i), p[1], p[3]))
            return to_integer(total, p[4], p[5], p[6], out.dtype)

        return compute(out, value)

    return elementwise_kernel("add", read, (numbers,), out, define)


def multiply(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.multiply` (numpy broadcasting between operands of equal rank)."""
    pair = _broadcast_pair(inputs, str(attrs["out_dtype"]))
    if pair is None:
        return None
    read, out = pair
    numbers = parameters(attrs["multiplier"], attrs["a_zero_point"], attrs["b_zero_point"], *output_range(attrs))

    def define(a: View, b: View, p: Any) -> Any:
        def value(*i: Any) -> Any:
            left = a(*i).astype("int32") - p[1].astype("int32")
            product = left * (b(*i).astype("int32") - p[2].astype("int32"))
            return to_integer(product.astype("float32") * p[0], p[3], p[4], p[5], out.dtype)

        return compute(out, value)

    return elementwise_kernel("multiply", read, (numbers,), out, define)


def _broadcast_pair(inputs: Inputs, dtype: str) -> tuple[Inputs, TensorSpec] | None:
    """Operands in one common layout, and the output; None where the ranks differ."""
    if len(inputs) != 2 or len(inputs[0].shape) != len(inputs[1].shape):
        return None
    shape = np.broadcast_shapes(inputs[0].shape, inputs[1].shape)
    block = offered_block(*[spec for spec in inputs if spec.shape == shape] or inputs)
    return tuple(spec.with_block(block) for spec in inputs), TensorSpec(shape, dtype, block)


# --- float chains -----------------------------------------------------------------------------------------------------


def float_elementwise(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_elementwise`: the whole program on 16 channels at a time."""
    rank = max(len(spec.shape) for spec in inputs)
    if any(len(spec.shape) != rank or spec.dtype != "float32" for spec in inputs):
        return None
    shape = np.broadcast_shapes(*[spec.shape for spec in inputs])
    block = offered_block(*[spec for spec in inputs if spec.shape == shape] or inputs)
    read = tuple(spec.with_block(block) for spec in inputs)
    out = TensorSpec(shape, "float32", block)
    text = str(attrs["program"])
    program = float_ops.decode_program(text)

    # Argument positions of the constants: `tensors3` is the fourth argument.
    fixed = {int(name.removeprefix("tensors")): array for name, array in constants.items()}
    specs = {position: TensorSpec(array.shape, "float32", block) for position, array in fixed.items()}
    packed = tuple(specs[position].pack(array) for position, array in fixed.items())

    def define(*arguments: Any) -> Any:
        given = iter(arguments[: len(inputs)])
        extra = {
            position: View(t, specs[position]) for position, t in zip(fixed, arguments[len(inputs) :], strict=True)
        }
        views = [extra[k] if k in extra else next(given) for k in range(len(arguments))]
        return compute(out, lambda *i: evaluate(program, [view(*i) for view in views]))

    return elementwise_kernel("float_elementwise", read, packed, out, define, text, tuple(fixed))


def evaluate(program: float_ops.Program, values: list[Any]) -> Any:
    """The TE expression of an elementwise program over scalar operand expressions.

    Every intermediate value gets a name: as a tree, functions that use their operand often would grow exponentially.
    """
    from tvm import tirx

    names: list[tuple[Any, Any]] = []
    known: list[Any] = []

    def bind(value: Any) -> None:
        known.append(tirx.Var(f"v{len(known)}", "float32"))
        names.append((known[-1], value))

    for value in values:
        bind(value)
    for name, *operands in program:
        if name not in _EXPRESSIONS:
            raise CompileError(f"unknown elementwise operation; known: {', '.join(sorted(_EXPRESSIONS))}", where=name)
        bind(_EXPRESSIONS[name](*[known[o] if isinstance(o, int) else tirx.const(o, "float32") for o in operands]))
    result = known[-1]
    for var, value in reversed(names):
        result = tirx.Let(var, value, result)
    return result


def _number(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _call(name: str) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        from tvm import tirx

        return getattr(tirx, name)(x)

    return apply


def _max(a: Any, b: Any) -> Any:
    from tvm import tirx

    return tirx.max(a, b)


def _min(a: Any, b: Any) -> Any:
    from tvm import tirx

    return tirx.min(a, b)


def _select(condition: Any, a: Any, b: Any) -> Any:
    from tvm import tirx

    return tirx.Select(condition, a, b)


def exponential(x: Any) -> Any:
    """exp(x) in float32 without a library call, so that it vectorizes: 2**n by exponent bits times a polynomial of
    degree 6.

    Relative error below 3e-7 between -87 and 88; clamped outside (result 1.2e-38 below, 1.7e38 above).
    """
    from tvm import tirx

    clamped = _min(_max(x, _number(-87.3)), _number(88.0))
    # Not by a magic addition: TIR simplifies (x + c) - c.
    n = tirx.floor(clamped * _number(1.4426950408889634) + _number(0.5))
    # ln 2 in two parts: the first has few bits, so that n times it is exact.
    rest = clamped - n * _number(0.693359375) + n * _number(2.12194440e-4)
    poly = _number(1.0 / 720)
    for coefficient in (1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        poly = poly * rest + _number(coefficient)
    power = n.astype("int32") + tirx.const(127, "int32")
    return poly * tirx.reinterpret("float32", power << tirx.const(23, "int32"))


def _sigmoid(x: Any) -> Any:
    return _number(1.0) / (_number(1.0) + exponential(-x))


def _tanh(x: Any) -> Any:
    """Through exp where |x| is large; near 0 that would cancel, so an odd polynomial there."""
    square = x * x
    series = _number(-17.0 / 315)
    for coefficient in (2.0 / 15, -1.0 / 3):
        series = series * square + _number(coefficient)
    far = _number(1.0) - _number(2.0) / (exponential(x * _number(2.0)) + _number(1.0))
    return _select(square < _number(0.03), x + x * square * series, far)


def _erf(x: Any) -> Any:
    """Abramowitz and Stegun 7.1.26 with five terms: absolute error below 1.5e-7."""
    magnitude = _max(x, -x)
    t = _number(1.0) / (_number(1.0) + _number(0.3275911) * magnitude)
    poly = _number(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + _number(coefficient)
    value = _number(1.0) - poly * t * exponential(-(magnitude * magnitude))
    return _select(x < _number(0.0), -value, value)


_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "maximum": _max,
    "minimum": _min,
    "power": lambda a, b: _call_two("power", a, b),
    "negative": lambda x: _number(0.0) - x,
    "abs": lambda x: _max(x, _number(0.0) - x),
    "exp": exponential,
    "log": _call("log"),
    "sqrt": _call("sqrt"),
    "rsqrt": lambda x: _number(1.0) / _call("sqrt")(x),
    "square": lambda x: x * x,
    "floor": _call("floor"),
    "ceil": _call("ceil"),
    "tanh": _tanh,
    "erf": _erf,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: _max(x, _number(0.0)),
    "clip": lambda x, low, high: _min(_max(x, low), high),
    "leaky_relu": lambda x, alpha: _select(x > _number(0.0), x, x * alpha),
    "prelu": lambda x, slope: _select(x > _number(0.0), x, x * slope),
    "round": lambda x: _call("nearbyint")(x),
    "sign": lambda x: _select(x > _number(0.0), _number(1.0), _select(x < _number(0.0), _number(-1.0), _number(0.0))),
    "softplus": lambda x: _max(x, _number(0.0)) + _call("log")(_number(1.0) + exponential(_number(0.0) - _max(x, -x))),
    "selu": lambda x: (
        _number(1.0507009873554805)
        * _select(
            x > _number(0.0), x, _number(1.6732632423543772) * (exponential(_min(x, _number(0.0))) - _number(1.0))
        )
    ),
    "gelu_tanh": lambda x: (
        _number(0.5) * x * (_number(1.0) + _tanh(_number(0.7978845608028654) * (x + _number(0.044715) * x * x * x)))
    ),
    "gelu": lambda x: _number(0.5) * x * (_number(1.0) + _erf(x * _number(0.7071067811865476))),
}
"""Operation -> TE expression; the same names as `float_ops.ELEMENTWISE`."""


def _call_two(name: str, a: Any, b: Any) -> Any:
    from tvm import tirx

    return getattr(tirx, name)(a, b)
