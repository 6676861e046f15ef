"""TE expressions of float operations, and of whole elementwise programs: what every target's kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lpsn_tvm import float_ops
from lpsn_tvm.errors import CompileError


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
