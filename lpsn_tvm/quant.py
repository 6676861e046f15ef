"""The one definition of the arithmetic: quantization parameters, the plan, and every integer operator as numpy.

Each operator `lpsn.<name>` of a quantized graph means exactly the function `<name>` here: same attributes, logical
layout NCHW. Every target equals it bit for bit. Rules that make this possible:

* activations are integers (`uint8` or `int8` containers, values within [qmin, qmax] of their bit width), weights
  `int8`, accumulators `int32`;
* requantization is float32: `v = float32(acc) * scale`, clamped to [qmin - zero_point, qmax - zero_point], rounded
  half to even, plus zero_point. The clamp comes BEFORE the rounding: it bounds the value for the magic-number
  rounding of compiled code and keeps a compiler from contracting product and addition into one fused multiply-add,
  which would round differently;
* where two scaled products are added, each is clamped to +-2**20 first, for the same reason;
* integer accumulators never overflow: lowering refuses a layer whose worst case does not fit int32;
* `rounding="half_up"` is the arithmetic of hardware without multipliers behind its accumulators: every multiplier is
  a power of two, every zero point 0, and requantization is the exact integer `(v + 2**(s-1)) >> s`, then the clamp.
  Where a factor cannot be a power of two (averages), it is a 7-bit integer and a shift (`integer_multiplier`).

This file is over 400 lines on purpose: the project has one definition of its arithmetic, in one place to read when two
targets disagree. Of some 870 lines 430 are signatures and docstrings, 260 compute. A cut would either part operators
from the rounding that they share, or the two roundings, which stand side by side in each operator; and boards get this
very file as one module (made readable for Python 3.8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rounding = Literal["half_even", "half_up"]
LIMIT = np.float32(2**20)


@dataclass(frozen=True)
class QuantParams:
    """How real numbers map to integers: `real = scale * (integer - zero_point)`.

    Parameters
    ----------
    scale : float32[] | float32[C]
        Step size; one value (per tensor) or one per channel along `axis`.
    zero_point : int
        Integer that stands for 0.0; 0 for symmetric schemes.
    bits : int
        2..8.
    signed : bool
        int8 container and range [-2**(b-1), 2**(b-1) - 1], else uint8 and [0, 2**b - 1].
    axis : int or None
        Channel axis, or None for per tensor.
    """

    scale: Array
    zero_point: int
    bits: int
    signed: bool
    axis: int | None = None

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> str:
        """Container: "int8" or "uint8"."""
        return "int8" if self.signed else "uint8"

    @property
    def real_range(self) -> tuple[float, float]:
        """Smallest and largest real number that a per-tensor scheme can hold."""
        scale = float(np.asarray(self.scale).reshape(-1)[0])
        return scale * (self.qmin - self.zero_point), scale * (self.qmax - self.zero_point)


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weight of a layer.

    Parameters
    ----------
    values : int8, in the float weight's layout
    params : QuantParams
        Symmetric; `scale` float32[output channels] (per channel) or float32[].
    bias : float32[output channels]
        After re-solve and bias correction; lowering makes it int32 of scale `input scale * weight scale`.
    """

    values: Array
    params: QuantParams
    bias: Array


@dataclass(frozen=True)
class QuantPlan:
    """Everything quantization decided, keyed by canonical variable name (activations) and layer name (weights).

    `float_nodes` maps what stays float to the reason, for the report.
    """

    activations: Mapping[str, QuantParams]
    weights: Mapping[str, QuantizedWeight]
    float_nodes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantScheme:
    """What integer arithmetic a backend's hardware wants; stated by the backend, obeyed by the planner.

    Parameters
    ----------
    activation_signed, activation_symmetric : bool
        llvm: unsigned and asymmetric. VTA: signed and symmetric.
    weight_per_channel : bool
        One weight scale per output channel.
    power_of_two : bool
        All scales are powers of two (requantization is a shift).
    weight_bits, activation_bits : tuple of int
        Allowed bit widths.
    input_bits : int
        Bits of network inputs (images), which no layer can correct.
    rounding : {"half_even", "half_up"}
        How integers are requantized; "half_up" needs power-of-two ratios of scales and zero points of 0.
    weight_container_bits : int
        Weights must fit this many bits in the end, whatever lowering multiplies them by.
    residual_shift : int
        Largest left shift of a residual on its way into an accumulator ("half_up").
    has_activation_offset : bool
        Tensors that are never negative may be stored less half of their range ("half_up"): biases take the offset up,
        only the padding of convolutions has to know it.
    """

    activation_signed: bool = False
    activation_symmetric: bool = False
    weight_per_channel: bool = True
    power_of_two: bool = False
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    input_bits: int = 8
    rounding: Rounding = "half_even"
    weight_container_bits: int = 8
    residual_shift: int = 6
    has_activation_offset: bool = False


# --- scalar rules


def round_half_even(x: Array) -> Array:
    """Round to the nearest integer, ties to even (IEEE 754 default), as float32."""
    return np.rint(x)


def to_integer(value: Array, zero_point: int, qmin: int, qmax: int, dtype: str) -> Array:
    """float32 value in units of the output scale -> clamped, rounded integer: `rint(clip(v, qmin - zp, qmax - zp))
    + zp`.
    """
    low, high = np.float32(qmin - zero_point), np.float32(qmax - zero_point)
    clamped = np.clip(value.astype(np.float32), low, high)
    return (np.rint(clamped).astype(np.int32) + np.int32(zero_point)).astype(dtype)


def exponent_of(multiplier: Any) -> Array:
    """log2 of powers of two, int64; `exponent_of([0.5, 4]) == [-1, 2]`.

    Raises
    ------
    ValueError
        A value is not a power of two.
    """
    mantissa, exponent = np.frexp(np.asarray(multiplier, np.float64))
    if not np.all(mantissa == 0.5):
        raise ValueError(f"rounding half up needs powers of two, not {multiplier}")
    return np.asarray(exponent, np.int64) - 1


def integer_multiplier(multiplier: float) -> tuple[int, int]:
    """`multiplier` as `m * 2**-t` with m in [1, 127] and t >= 0, within 0.8 %; m is odd unless t is 0.

    `integer_multiplier(1 / 49) == (21, 10)`: 84 / 4096 in lowest terms.
    """
    fraction, exponent = np.frexp(np.float64(multiplier))
    m, t = int(np.rint(fraction * 128)), 7 - int(exponent)
    while (m > 127 or m % 2 == 0) and t > 0 and m > 0:
        m, t = m // 2, t - 1
    if not 0 < m < 128 or t < 0:
        raise ValueError(f"the factor {multiplier} is not within (0, 127]")
    return m, t


def _shift_half_up(value: Array, shift: Any) -> Array:
    """`floor(value / 2**shift + 1/2)`, exact; `shift` >= 0, per element or for all."""
    shift = np.asarray(shift, np.int64)
    result: Array = np.right_shift(value.astype(np.int64) + ((np.int64(1) << shift) >> 1), shift)
    return result


def _rescale_half_up(q: Array, multiplier: float) -> Array:
    """Integers times a power of two, rounded half up."""
    exponent = int(exponent_of(multiplier))
    return q.astype(np.int64) << exponent if exponent >= 0 else _shift_half_up(q, -exponent)


def _clamp(value: Array, qmin: int, qmax: int, dtype: str) -> Array:
    return np.clip(value, qmin, qmax).astype(dtype)


def _check_half_up(*zero_points: int) -> None:
    if any(zero_points):
        raise ValueError("rounding half up needs zero points of 0")


def _check_range(x: Array, x_qmax: int) -> None:
    if x.size and int(x.max()) > x_qmax:
        raise ValueError(f"an input holds {int(x.max())}, above the {x_qmax} that it was said to hold at most")


def _bounded(value: Array) -> Array:
    return np.clip(value.astype(np.float32), -LIMIT, LIMIT)


def quantize(
    x: Array, *, inv_scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: str, scale: float | None = None
) -> Array:
    """float32 -> integer: `rint(clip(x * inv_scale, qmin - zp, qmax - zp)) + zp`; `inv_scale` is float32(1 /
    scale). NaN is not allowed.
    """
    return to_integer(x.astype(np.float32) * np.float32(inv_scale), zero_point, qmin, qmax, out_dtype)


def dequantize(q: Array, *, scale: float, zero_point: int) -> Array:
    """Integer -> float32: `float32(q - zero_point) * scale`."""
    return (q.astype(np.int32) - np.int32(zero_point)).astype(np.float32) * np.float32(scale)


def requantize(
    q: Array,
    *,
    multiplier: float,
    in_zero_point: int,
    out_zero_point: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
    rounding: Rounding = "half_even",
) -> Array:
    """Integer -> integer of another scale: `multiplier` is float32(scale_in / scale_out)."""
    if rounding == "half_up":
        _check_half_up(in_zero_point, out_zero_point)
        return _clamp(_rescale_half_up(q, multiplier), qmin, qmax, out_dtype)
    value = (q.astype(np.int32) - np.int32(in_zero_point)).astype(np.float32) * np.float32(multiplier)
    return to_integer(value, out_zero_point, qmin, qmax, out_dtype)


def fake_quantize(x: Array, params: QuantParams) -> Array:
    """dequantize(quantize(x)): the float32 numbers that the integer network sees. Per tensor or per channel."""
    scale = np.asarray(params.scale, np.float32)
    if params.axis is not None and scale.ndim == 1:
        shape = [1] * x.ndim
        shape[params.axis] = -1
        scale = scale.reshape(shape)
    inv = np.float32(1.0) / scale
    low, high = np.float32(params.qmin - params.zero_point), np.float32(params.qmax - params.zero_point)
    result: Array = np.rint(np.clip(x.astype(np.float32) * inv, low, high)) * scale
    return result


# --- weighted layers


def _accumulate_conv2d(
    x: Array,
    weight: Array,
    strides: tuple[int, int],
    padding: tuple[int, ...],
    dilation: tuple[int, int],
    groups: int,
    pad: int,
) -> Array:
    """int32 NCHW convolution; padding pixels hold the integer `pad`. Zero points are the bias's business."""
    top, left, bottom, right = padding
    data = np.pad(x.astype(np.int32), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=pad)
    n, channels, height, width = data.shape
    out_channels, group_channels, kh, kw = weight.shape
    oh = (height - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (width - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    per_group = out_channels // groups
    acc = np.zeros((n, out_channels, oh, ow), np.int64)
    w = weight.astype(np.float64)
    for r in range(kh):
        for s in range(kw):
            y0, x0 = r * dilation[0], s * dilation[1]
            patch = data[
                :, :, y0 : y0 + (oh - 1) * strides[0] + 1 : strides[0], x0 : x0 + (ow - 1) * strides[1] + 1 : strides[1]
            ]
            if groups == channels and group_channels == 1 and per_group == 1:
                acc += patch.astype(np.int64) * weight[:, 0, r, s].astype(np.int64)[None, :, None, None]
                continue
            for g in range(groups):
                part = patch[:, g * group_channels : (g + 1) * group_channels].astype(np.float64)
                # float64 products and sums of these integers are exact (far below 2**53) and use BLAS.
                out = np.tensordot(w[g * per_group : (g + 1) * per_group, :, r, s], part, axes=([1], [1]))
                acc[:, g * per_group : (g + 1) * per_group] += np.moveaxis(out, 0, 1).astype(np.int64)
    return _fits_int32(acc)


def _fits_int32(acc: Array) -> Array:
    if acc.size and (acc.max() > 2**31 - 1 or acc.min() < -(2**31)):
        raise OverflowError("an accumulator left int32; lowering should have refused this layer")
    return acc.astype(np.int32)


def _accumulate_conv2d_transpose(
    x: Array,
    weight: Array,
    strides: tuple[int, int],
    padding: tuple[int, ...],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    x_zero_point: int,
) -> Array:
    """int32 transposed convolution of `x - x_zero_point` (absent contributions are real zeros); weight IOHW."""
    n, channels, height, width = x.shape
    _, group_out, kh, kw = weight.shape
    group_in = channels // groups
    full_h = (height - 1) * strides[0] + dilation[0] * (kh - 1) + 1 + output_padding[0]
    full_w = (width - 1) * strides[1] + dilation[1] * (kw - 1) + 1 + output_padding[1]
    acc = np.zeros((n, group_out * groups, full_h, full_w), np.int64)
    data = x.astype(np.float64) - x_zero_point
    for g in range(groups):
        part = data[:, g * group_in : (g + 1) * group_in]
        w = weight[g * group_in : (g + 1) * group_in].astype(np.float64)
        for r in range(kh):
            for s in range(kw):
                out = np.moveaxis(np.tensordot(w[:, :, r, s], part, axes=([0], [1])), 0, 1).astype(np.int64)
                y0, x0 = r * dilation[0], s * dilation[1]
                acc[
                    :,
                    g * group_out : (g + 1) * group_out,
                    y0 : y0 + (height - 1) * strides[0] + 1 : strides[0],
                    x0 : x0 + (width - 1) * strides[1] + 1 : strides[1],
                ] += out
    top, left, bottom, right = padding
    return _fits_int32(acc[:, :, top : full_h - bottom, left : full_w - right])


def _finish(
    acc: Array,
    bias: Array,
    scale: Array,
    residual: Array | None,
    residual_multiplier: float,
    residual_zero_point: int,
    out_zero_point: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
) -> Array:
    """Epilogue of every weighted layer: bias, scale, optional residual, clamp, round; float32 output skips the
    rounding.
    """
    shape = (1, -1) + (1,) * (acc.ndim - 2)
    total = acc + bias.astype(np.int32).reshape(shape)
    value = total.astype(np.float32) * np.asarray(scale, np.float32).reshape(shape)
    if out_dtype == "float32":
        return value
    if residual is not None:
        other = (residual.astype(np.int32) - np.int32(residual_zero_point)).astype(np.float32) * np.float32(
            residual_multiplier
        )
        value = _bounded(value) + _bounded(other)
    return to_integer(value, out_zero_point, qmin, qmax, out_dtype)


def _finish_half_up(
    acc: Array,
    bias: Array,
    scale: Array,
    residual: Array | None,
    residual_multiplier: float,
    residual_shift: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
) -> Array:
    """Epilogue of a weighted layer in shifts: `scale[c]` is `2**-s[c]`, s >= 0; float32 output skips the shift.

    Without a residual: `(acc + bias + 2**(s-1)) >> s`. A residual is `k = s + log2(residual_multiplier)` >= 0 bits left
    of the accumulator's unit; where k exceeds `residual_shift`, the accumulator first drops the excess
    `p = k - residual_shift` (floor): `(((acc + bias + (2**(s-p-1) << p)) >> p) + (residual << (k - p))) >> (s - p)`.
    """
    shape = (1, -1) + (1,) * (acc.ndim - 2)
    total = acc.astype(np.int64) + bias.astype(np.int64).reshape(shape)
    if out_dtype == "float32":
        return _fits_int32(total).astype(np.float32) * np.asarray(scale, np.float32).reshape(shape)
    shift = -exponent_of(np.asarray(scale)).reshape(shape)
    if np.any(shift < 0):
        raise ValueError("the accumulator's unit is coarser than the output's; lowering should have refused this layer")
    if residual is None:
        _fits_int32(total + ((np.int64(1) << shift) >> 1))
        return _clamp(_shift_half_up(total, shift), qmin, qmax, out_dtype)
    left = shift + exponent_of(residual_multiplier)
    drop = np.maximum(left - residual_shift, 0)
    rest = shift - drop
    if np.any(left < 0) or np.any(rest < 0):
        raise ValueError("the residual's scale is too far from the accumulator's; lowering should have kept it apart")
    _fits_int32(total + (((np.int64(1) << rest) >> 1) << drop))
    value = np.right_shift(total, drop) + (residual.astype(np.int64) << (left - drop))
    return _clamp(_shift_half_up(value, rest), qmin, qmax, out_dtype)


def _looked_up(q: Array, table: Sequence[int] | None, qmin: int, out_dtype: str) -> Array:
    """The last step of a weighted layer: its own table, where it has one."""
    return q if table is None else lookup(q, np.asarray(table, out_dtype), qmin=qmin)


def conv2d(  # noqa: D417  (the attributes are those of the module docstring)
    x: Array,
    weight: Array,
    bias: Array,
    scale: Array,
    residual: Array | None = None,
    *,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    x_zero_point: int = 0,
    x_qmax: int = 255,
    out_zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out_dtype: str = "uint8",
    residual_multiplier: float = 0.0,
    residual_zero_point: int = 0,
    residual_shift: int = 6,
    rounding: Rounding = "half_even",
    table: Sequence[int] | None = None,
    block_size: int = 1,
    mode: Literal["DCR", "CRD"] = "DCR",
    **_: Any,
) -> Array:
    """Integer convolution, requantized; ReLU and ReLU6 are `qmin` / `qmax` (a clamp in units of the output scale).

    Parameters
    ----------
    x : uint8 | int8[N, C, H, W]
    weight : int8[O, C/groups, kh, kw]
    bias : int32[O]
        In units of x_scale * w_scale, with `- x_zero_point * sum(weight)` folded in (padding writes `x_zero_point`).
    scale : float32[O]
        x_scale * w_scale / out_scale (out_dtype float32: x_scale * w_scale).
    x_qmax : int
        Nothing in x is larger, so that a target may choose narrower arithmetic.
    residual : uint8 | int8[N, O, OH, OW], optional
        Added in the output's scale: `residual_multiplier` is float32(residual_scale / out_scale).
    table : int[qmax - qmin + 1], optional
        A `lookup` in the epilogue: the output is `table[q - qmin]` of `out_dtype`, where q is what it would be else.
    block_size, mode :
        float32 output only: the result's channels become rows and columns (`depth_to_space`).
    """
    _check_range(x, x_qmax)
    acc = _accumulate_conv2d(x, weight, strides, padding, dilation, groups, x_zero_point)
    dtype = out_dtype if table is None else "int32"
    if rounding == "half_up":
        # `x_zero_point` is what padding holds; all else that zero points mean is folded into the bias.
        _check_half_up(out_zero_point, residual_zero_point)
        q = _finish_half_up(acc, bias, scale, residual, residual_multiplier, residual_shift, qmin, qmax, dtype)
    else:
        q = _finish(
            acc, bias, scale, residual, residual_multiplier, residual_zero_point, out_zero_point, qmin, qmax, dtype
        )
    out = _looked_up(q, table, qmin, out_dtype)
    return depth_to_space(out, block_size=block_size, mode=mode) if block_size > 1 else out


def conv2d_transpose(
    x: Array,
    weight: Array,
    bias: Array,
    scale: Array,
    *,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    output_padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    x_zero_point: int = 0,
    x_qmax: int = 255,
    out_zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out_dtype: str = "uint8",
    rounding: Rounding = "half_even",
    table: Sequence[int] | None = None,
    **_: Any,
) -> Array:
    """Integer transposed convolution, weight int8[C, O/groups, kh, kw]; the zero point is subtracted from x (bias
    has no zero-point term); `table` as in `conv2d`.
    """
    _check_range(x, x_qmax)
    acc = _accumulate_conv2d_transpose(x, weight, strides, padding, output_padding, dilation, groups, x_zero_point)
    dtype = out_dtype if table is None else "int32"
    if rounding == "half_up":
        _check_half_up(x_zero_point, out_zero_point)
        q = _finish_half_up(acc, bias, scale, None, 1.0, 0, qmin, qmax, dtype)
    else:
        q = _finish(acc, bias, scale, None, 0.0, 0, out_zero_point, qmin, qmax, dtype)
    return _looked_up(q, table, qmin, out_dtype)


def dense(
    x: Array,
    weight: Array,
    bias: Array,
    scale: Array,
    residual: Array | None = None,
    *,
    x_zero_point: int = 0,
    x_qmax: int = 255,
    out_zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out_dtype: str = "uint8",
    residual_multiplier: float = 0.0,
    residual_zero_point: int = 0,
    residual_shift: int = 6,
    rounding: Rounding = "half_even",
    table: Sequence[int] | None = None,
    **_: Any,
) -> Array:
    """Integer dense layer: x uint8 | int8[N, K], weight int8[K, M], bias int32[M] with the zero-point term folded
    in, scale float32[M]; `table` as in `conv2d`.
    """
    _check_range(x, x_qmax)
    acc = _fits_int32((x.astype(np.float64) @ weight.astype(np.float64)).astype(np.int64))
    dtype = out_dtype if table is None else "int32"
    if rounding == "half_up":
        _check_half_up(x_zero_point, out_zero_point, residual_zero_point)
        q = _finish_half_up(acc, bias, scale, residual, residual_multiplier, residual_shift, qmin, qmax, dtype)
    else:
        q = _finish(
            acc, bias, scale, residual, residual_multiplier, residual_zero_point, out_zero_point, qmin, qmax, dtype
        )
    return _looked_up(q, table, qmin, out_dtype)


# --- operators without weights


def add(
    a: Array,
    b: Array,
    *,
    a_multiplier: float,
    b_multiplier: float,
    a_zero_point: int,
    b_zero_point: int,
    out_zero_point: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
    rounding: Rounding = "half_even",
) -> Array:
    """Sum of two tensors (numpy broadcasting) of different scales; multipliers are float32(scale_in / scale_out).

    Half up: both are brought to the finer of the two units and the output's, added exactly, shifted once.
    """
    if rounding == "half_up":
        _check_half_up(a_zero_point, b_zero_point, out_zero_point)
        exponents = int(exponent_of(a_multiplier)), int(exponent_of(b_multiplier))
        shift = max(0, -min(exponents))
        total = (a.astype(np.int64) << (exponents[0] + shift)) + (b.astype(np.int64) << (exponents[1] + shift))
        return _clamp(_shift_half_up(_fits_int32(total), shift), qmin, qmax, out_dtype)
    left = (a.astype(np.int32) - np.int32(a_zero_point)).astype(np.float32) * np.float32(a_multiplier)
    right = (b.astype(np.int32) - np.int32(b_zero_point)).astype(np.float32) * np.float32(b_multiplier)
    return to_integer(_bounded(left) + _bounded(right), out_zero_point, qmin, qmax, out_dtype)


def multiply(
    a: Array,
    b: Array,
    *,
    multiplier: float,
    a_zero_point: int,
    b_zero_point: int,
    out_zero_point: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
) -> Array:
    """Product of two tensors (numpy broadcasting, squeeze-excitation); `multiplier` is float32(scale_a * scale_b /
    scale_out).
    """
    product = (a.astype(np.int32) - np.int32(a_zero_point)) * (b.astype(np.int32) - np.int32(b_zero_point))
    return to_integer(product.astype(np.float32) * np.float32(multiplier), out_zero_point, qmin, qmax, out_dtype)


def lookup(q: Array, table: Array, *, qmin: int) -> Array:
    """Any function of one quantized tensor, element by element: `table[q - qmin]`; table has 2**bits entries of
    the output's dtype.
    """
    return table[q.astype(np.int32) - qmin]


def channel_lookup(q: Array, table: Array, *, qmin: int) -> Array:
    """`lookup` with one table per channel (PReLU): table [C, 2**bits], q [N, C, ...]."""
    channel = np.arange(q.shape[1]).reshape((1, -1) + (1,) * (q.ndim - 2))
    return table[channel, q.astype(np.int32) - qmin]


def concat(
    *tensors: Array,
    axis: int,
    multipliers: tuple[float, ...],
    zero_points: tuple[int, ...],
    out_zero_point: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
    rounding: Rounding = "half_even",
) -> Array:
    """Concatenation; each input is requantized, except where its multiplier is 1 and its zero point the output's
    (then copied).
    """
    parts = [
        t.astype(out_dtype)
        if m == 1.0 and z == out_zero_point
        else requantize(
            t,
            multiplier=m,
            in_zero_point=z,
            out_zero_point=out_zero_point,
            qmin=qmin,
            qmax=qmax,
            out_dtype=out_dtype,
            rounding=rounding,
        )
        for t, m, z in zip(tensors, multipliers, zero_points, strict=True)
    ]
    return np.concatenate(parts, axis=axis)


def _windows(
    x: Array,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, ...],
    dilation: tuple[int, int],
    ceil_mode: bool,
    fill: int,
) -> list[Array]:
    """The shifted, strided views of padded x, one per kernel position, each [N, C, OH, OW]."""
    top, left, bottom, right = padding
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    rounding = (strides[0] - 1, strides[1] - 1) if ceil_mode else (0, 0)
    oh = (height - dilation[0] * (kernel[0] - 1) - 1 + rounding[0]) // strides[0] + 1
    ow = (width - dilation[1] * (kernel[1] - 1) - 1 + rounding[1]) // strides[1] + 1
    need_h = (oh - 1) * strides[0] + dilation[0] * (kernel[0] - 1) + 1
    need_w = (ow - 1) * strides[1] + dilation[1] * (kernel[1] - 1) + 1
    extra_h, extra_w = max(0, need_h - height), max(0, need_w - width)
    data = np.pad(
        x.astype(np.int32), ((0, 0), (0, 0), (top, bottom + extra_h), (left, right + extra_w)), constant_values=fill
    )
    return [
        data[
            :,
            :,
            r * dilation[0] : r * dilation[0] + (oh - 1) * strides[0] + 1 : strides[0],
            s * dilation[1] : s * dilation[1] + (ow - 1) * strides[1] + 1 : strides[1],
        ]
        for r in range(kernel[0])
        for s in range(kernel[1])
    ]


def max_pool2d(
    x: Array,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> Array:
    """Maximum over windows; the scale does not change. Padding never wins (it is the container's smallest value)."""
    fill = int(np.iinfo(x.dtype).min)
    windows = np.stack(_windows(x, kernel, strides, padding, dilation, ceil_mode, fill))
    result: Array = windows.max(axis=0).astype(x.dtype)
    return result


def avg_pool2d(
    x: Array,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    in_zero_point: int,
    out_zero_point: int,
    multiplier: float,
    qmin: int,
    qmax: int,
    out_dtype: str,
    ceil_mode: bool = False,
    count_include_pad: bool = False,
    rounding: Rounding = "half_even",
) -> Array:
    """Average over windows: int32 sum of (x - zp), times float32(multiplier / count), requantized; multiplier is
    scale_in / scale_out.

    Only real pixels are counted unless `count_include_pad` (then explicit padding counts too, the overhang of
    `ceil_mode` never).
    """
    dilation = (1, 1)
    total = sum(_windows(x.astype(np.int32) - in_zero_point, kernel, strides, padding, dilation, ceil_mode, 0))
    top, left, bottom, right = padding
    ones = np.ones((1, 1, *x.shape[2:]), np.int32)
    if count_include_pad:
        ones = np.pad(ones, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=1)
        count = sum(_windows(ones, kernel, strides, (0, 0, 0, 0), dilation, ceil_mode, 0))
    else:
        count = sum(_windows(ones, kernel, strides, padding, dilation, ceil_mode, 0))
    factor = np.float32(multiplier) / np.maximum(np.asarray(count), 1).astype(np.float32)
    if rounding == "half_up":
        _check_half_up(in_zero_point, out_zero_point)
        return _clamp(_scale_half_up(np.asarray(total), factor), qmin, qmax, out_dtype)
    return to_integer(np.asarray(total).astype(np.float32) * factor, out_zero_point, qmin, qmax, out_dtype)


def _scale_half_up(total: Array, factor: Array) -> Array:
    """Sums times a factor per position: `(total * m + 2**(t-1)) >> t` with `(m, t) = integer_multiplier(factor)`."""
    pairs = {float(value): integer_multiplier(float(value)) for value in np.unique(factor)}
    m = np.vectorize(lambda value: pairs[float(value)][0], otypes=[np.int64])(factor)
    t = np.vectorize(lambda value: pairs[float(value)][1], otypes=[np.int64])(factor)
    return _shift_half_up(_fits_int32(total.astype(np.int64) * m), t)


def global_avg_pool2d(
    x: Array,
    *,
    in_zero_point: int,
    out_zero_point: int,
    multiplier: float,
    qmin: int,
    qmax: int,
    out_dtype: str,
    rounding: Rounding = "half_even",
) -> Array:
    """Mean over H and W (kept as 1): int32 sum of x minus H*W*zp, times float32(scale_in / scale_out / (H*W)) =
    `multiplier`, requantized.
    """
    total = x.astype(np.int32).sum(axis=(2, 3), keepdims=True, dtype=np.int32) - np.int32(
        x.shape[2] * x.shape[3] * in_zero_point
    )
    if rounding == "half_up":
        _check_half_up(in_zero_point, out_zero_point)
        return _clamp(_scale_half_up(total, np.asarray(np.float32(multiplier))), qmin, qmax, out_dtype)
    return to_integer(total.astype(np.float32) * np.float32(multiplier), out_zero_point, qmin, qmax, out_dtype)


def resize_nearest(x: Array, *, rows: tuple[int, ...], columns: tuple[int, ...]) -> Array:
    """Nearest-neighbour resize: output pixel (i, j) is input pixel (rows[i], columns[j])."""
    return x[:, :, list(rows)][:, :, :, list(columns)]


def resize_linear(
    x: Array,
    *,
    rows: tuple[int, ...],
    row_weights: tuple[int, ...],
    columns: tuple[int, ...],
    column_weights: tuple[int, ...],
    qmin: int,
    qmax: int,
) -> Array:
    """Bilinear resize in integers, scale unchanged.

    Output row i mixes input rows `rows[2i]` and `rows[2i+1]` with integer weights `row_weights[2i]` and `[2i+1]` that
    sum to 128; columns likewise. Result is `(sum + 2**13) >> 14`, clamped.
    """
    data = x.astype(np.int32)
    rw, cw = np.asarray(row_weights, np.int32), np.asarray(column_weights, np.int32)
    tall = data[:, :, list(rows[0::2])] * rw[0::2][:, None] + data[:, :, list(rows[1::2])] * rw[1::2][:, None]
    total: Array = tall[:, :, :, list(columns[0::2])] * cw[0::2] + tall[:, :, :, list(columns[1::2])] * cw[1::2]
    result: Array = np.clip(np.right_shift(total + (1 << 13), 14), qmin, qmax).astype(x.dtype)
    return result


def pad(
    x: Array, *, pad_width: tuple[int, ...], value: int, mode: Literal["constant", "reflect", "edge"] = "constant"
) -> Array:
    """Spatial padding (top, left, bottom, right) with the integer `value` (the zero point for real zero), or
    reflected / replicated.
    """
    top, left, bottom, right = pad_width
    spec = ((0, 0), (0, 0), (top, bottom), (left, right))
    if mode == "constant":
        return np.pad(x, spec, constant_values=value)
    return np.pad(x, spec, mode=mode)


def strided_slice(
    x: Array, *, axes: tuple[int, ...], begin: tuple[int, ...], end: tuple[int, ...], strides: tuple[int, ...]
) -> Array:
    """`x[begin:end:stride]` along `axes`; begin and end are resolved (non-negative, within the extent, end may be
    -1 beyond 0 for negative strides).
    """
    index: list[slice] = [slice(None)] * x.ndim
    for axis, b, e, s in zip(axes, begin, end, strides, strict=True):
        index[axis] = slice(b, None if s < 0 and e < 0 else e, s)
    return x[tuple(index)]


def depth_to_space(x: Array, *, block_size: int, mode: Literal["DCR", "CRD"] = "DCR") -> Array:
    """ONNX DepthToSpace: [N, C*b*b, H, W] -> [N, C, H*b, W*b]; any integer or float dtype."""
    n, c, h, w = x.shape
    b = block_size
    if mode == "DCR":
        return x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)
    return x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (b * b), h * b, w * b)


def reshape(x: Array, *, shape: tuple[int, ...]) -> Array:
    """Row-major reshape (flatten included)."""
    return x.reshape(shape)


def transpose(x: Array, *, axes: tuple[int, ...]) -> Array:
    """Axis permutation."""
    return np.ascontiguousarray(x.transpose(axes))


OPERATORS: dict[str, Any] = {
    f"lpsn.{function.__name__}": function
    for function in (
        quantize,
        dequantize,
        requantize,
        conv2d,
        conv2d_transpose,
        dense,
        add,
        multiply,
        lookup,
        channel_lookup,
        concat,
        max_pool2d,
        avg_pool2d,
        global_avg_pool2d,
        resize_nearest,
        resize_linear,
        pad,
        strided_slice,
        depth_to_space,
        reshape,
        transpose,
    )
}
"""Packed-function name -> its meaning."""
