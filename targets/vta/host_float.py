"""Float operators that no fused form covers (reductions, matmul of two tensors, gather, rare paddings and norms) as
numpy, for the host: a network keeps working whatever stays float. numpy only: a board runs them, too.

Named `relax.<operator>` after the graph's operators, with attributes of their own; `host_calls` writes the calls.
Arithmetic is in float64, results are float32: within rounding of any float kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _wide(x: Array) -> Array:
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (
        "abs add ceil cos divide exp floor log maximum minimum multiply negative power sign sin sqrt square subtract "
        "tan tanh"
    ).split()},
    "atan": np.arctan,
    "clip": np.clip,
    "identity": lambda x: x,
    "leakyrelu": lambda x, alpha: np.where(x > 0, x, x * alpha),
    "relu": lambda x: np.maximum(x, 0.0),
    "round": np.rint,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "softplus": lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))),
}  # fmt: skip
"""Operation -> its meaning, with numpy broadcasting."""
REDUCTIONS: Mapping[str, Callable[..., Any]] = {
    "max": np.max, "mean": np.mean, "min": np.min, "sum": np.sum,
}  # fmt: skip


def elementwise(*tensors: Array, name: str, dtype: str, scalars: tuple[float, ...] = ()) -> Array:
    """`ELEMENTWISE[name]` of broadcastable tensors, then of the scalars."""
    return np.asarray(ELEMENTWISE[name](*[_wide(x) for x in tensors], *scalars)).astype(dtype)


def reduce(x: Array, *, name: str, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Maximum, mean, minimum or sum over axes."""
    return np.asarray(REDUCTIONS[name](_wide(x), axis=tuple(axes), keepdims=keepdims)).astype(x.dtype)


def matmul(a: Array, b: Array) -> Array:
    """Matrix product, leading axes broadcast."""
    return np.asarray(_wide(a) @ _wide(b)).astype(a.dtype)


def take(x: Array, indices: Array, *, axis: int) -> Array:
    """Gather along an axis; negative indices count from the end."""
    return np.take(x, indices, axis=axis)


def pad(x: Array, *, widths: tuple[int, ...], value: float, mode: str) -> Array:
    """Padding of any axes: `widths` are (before, after) of each; numpy's modes."""
    pairs = list(zip(widths[0::2], widths[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, pairs, constant_values=value)
    return np.pad(x, pairs, mode=mode)  # type: ignore[call-overload, no-any-return]


def broadcast_to(x: Array, *, shape: tuple[int, ...]) -> Array:
    """Axes of extent 1 repeated."""
    return np.array(np.broadcast_to(x, tuple(shape)))


def reshape(x: Array, *, shape: tuple[int, ...]) -> Array:
    """Row-major reshape."""
    return x.reshape(tuple(shape))


def permute(x: Array, *, axes: tuple[int, ...]) -> Array:
    """Axis permutation."""
    return np.ascontiguousarray(x.transpose(tuple(axes)))


def softmax(x: Array, *, axis: int, log: bool) -> Array:
    """Softmax along an axis, or its logarithm."""
    shifted = _wide(x) - x.max(axis=axis, keepdims=True)
    total = np.exp(shifted).sum(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(total) if log else np.exp(shifted) / total).astype(x.dtype)


def normalize(
    x: Array, scale: Array, shift: Array, *, axes: tuple[int, ...], affine: tuple[int, ...], epsilon: float
) -> Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + shift` over `axes`; scale and shift of shape `affine`."""
    data, axes = _wide(x), tuple(axes)
    centred = (data - data.mean(axes, keepdims=True)) / np.sqrt(data.var(axes, keepdims=True) + epsilon)
    return np.asarray(centred * scale.reshape(tuple(affine)) + shift.reshape(tuple(affine))).astype(x.dtype)


def resize(x: Array, rows: Array, columns: Array) -> Array:
    """`rows @ x @ columns.T` of every channel: any linear resize."""
    return np.asarray(_wide(rows) @ _wide(x) @ _wide(columns).T).astype(x.dtype)


def tile(x: Array, *, repeats: tuple[int, ...]) -> Array:
    """The tensor repeated along its axes."""
    return np.tile(x, tuple(repeats))


def repeat(x: Array, *, repeats: int, axis: int) -> Array:
    """Every element repeated along an axis."""
    return np.repeat(x, repeats, axis=axis)


def concat(*tensors: Array, axis: int) -> Array:
    """Tensors along an axis."""
    return np.concatenate(tensors, axis=axis)


OPERATORS: Mapping[str, Callable[..., Array]] = {
    f"relax.{function.__name__}": function
    for function in (
        elementwise, reduce, matmul, take, pad, broadcast_to, reshape, permute, softmax, normalize, resize, tile,
        repeat, concat,
    )
}  # fmt: skip
"""Name -> meaning."""
