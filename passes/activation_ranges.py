"""Activation ranges: from what an observer saw to scale and zero point.

* ``minmax``: running means of the batch minima and maxima (the paper's statistics);
* ``percentile``: all but 1 value of 10,000 on either side, for long-tailed activations;
* ``mse``: the clipping that has the least squared error at the given bits;
* ``entropy``: the clipping whose quantized histogram loses the least information (Kullback-Leibler).

Zero is always representable exactly (padding, ReLU). Source: Zhang, Colbert, Das, Applied Sciences 2022, 12(15), 7829, Section 3 (minmax); Migacz,
"8-bit inference with TensorRT", 2017 (entropy).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lpsn_tvm.passes.observers import TensorObserver
from lpsn_tvm.quant import Array, QuantParams, QuantScheme

ObserverKind = Literal["mse", "minmax", "percentile", "entropy"]
PERCENTILE = 1e-4
SMALLEST_SCALE = 2.0**-96
"""Far from where a float32 reciprocal overflows."""


def params_of_range(low: float, high: float, bits: int, scheme: QuantScheme) -> QuantParams:
    """Scale and zero point that cover [low, high] (widened to contain 0); an empty range gets scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    signed = scheme.activation_signed
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if scheme.activation_symmetric:
        # Without a zero point an unsigned container holds no negative number: only the positive side is covered.
        span, steps = (max(-low, high), qmax) if signed else (high, qmax)
    else:
        span, steps = high - low, qmax - qmin
    scale = span / steps if span > 0 else 1.0
    if scheme.power_of_two:
        scale = 2.0 ** float(np.ceil(np.log2(scale) - 1e-6))
    scale = max(scale, SMALLEST_SCALE)
    zero_point = 0 if scheme.activation_symmetric else int(np.clip(np.rint(qmin - low / scale), qmin, qmax))
    return QuantParams(np.asarray(scale, np.float32), zero_point, bits, signed)


def choose_params(seen: TensorObserver, bits: int, scheme: QuantScheme, kind: ObserverKind) -> QuantParams:
    """Quantization parameters of one tensor.

    Parameters
    ----------
    seen : TensorObserver
        At least one batch.
    bits : int
        2..8.
    """
    if kind == "minmax":
        return params_of_range(seen.mean_low, seen.mean_high, bits, scheme)
    values, weights = seen.points()
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    if kind == "percentile":
        return params_of_range(*_percentile(values, weights), bits, scheme)
    return best_clipping(values, weights, (seen.low, seen.high), bits, scheme, kind)


def _percentile(values: Array, weights: Array) -> tuple[float, float]:
    below = np.cumsum(weights) / weights.sum()
    low = values[np.searchsorted(below, PERCENTILE)]
    high = values[min(np.searchsorted(below, 1.0 - PERCENTILE), len(values) - 1)]
    return float(low), float(high)


def best_clipping(
    values: Array, weights: Array, span: tuple[float, float], bits: int, scheme: QuantScheme, kind: ObserverKind = "mse"
) -> QuantParams:
    """Search a clipping of `span`: first both ends together, then each end alone, twice as fine.

    Parameters
    ----------
    values, weights : float64[bins]
        Sorted values and how often they occur.
    """
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    loss = _squared_error if kind == "mse" else _information_loss

    def evaluate(a: float, b: float) -> tuple[float, QuantParams]:
        params = params_of_range(low * a, high * b, bits, scheme)
        return loss(values, weights, params), params

    smallest = 0.05 if bits <= 4 else 0.3
    best = (1.0, 1.0)
    candidates = [(float(r), float(r)) for r in np.linspace(1.0, smallest, 48)]
    for _ in range(3):
        scored = [(evaluate(a, b)[0], index) for index, (a, b) in enumerate(candidates)]
        best = candidates[min(scored)[1]]
        steps = np.linspace(0.85, 1.15, 13)
        candidates = [best, *((best[0] * float(s), best[1]) for s in steps), *((best[0], best[1] * float(s)) for s in steps)]
    return evaluate(*best)[1]


def _on_grid(values: Array, params: QuantParams) -> Array:
    scale = float(params.scale)
    low, high = params.qmin - params.zero_point, params.qmax - params.zero_point
    return np.asarray(np.rint(np.clip(values / scale, low, high)) * scale)


def _squared_error(values: Array, weights: Array, params: QuantParams) -> float:
    return float(np.dot(weights, (values - _on_grid(values, params)) ** 2))


def _information_loss(values: Array, weights: Array, params: QuantParams) -> float:
    """Kullback-Leibler divergence of the clipped histogram from the one that is spread evenly within each quantization level.

    Zero is left out: every scheme holds it exactly, and its spike behind a ReLU would hide everything else.
    """
    nonzero = values != 0.0
    values, weights = values[nonzero], weights[nonzero]
    if not len(values):
        return 0.0
    scale = float(params.scale)
    low, high = (params.qmin - params.zero_point - 0.5) * scale, (params.qmax - params.zero_point + 0.5) * scale
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return float("inf")
    kept = weights[inside]
    reference = kept.copy()
    reference[0] += weights[values < low].sum()
    reference[-1] += weights[values > high].sum()
    level = np.rint(values[inside] / scale).astype(np.int64)
    level -= level.min()
    total, bins = np.bincount(level, kept), np.bincount(level)
    spread = (total / np.maximum(bins, 1))[level]
    p, q = reference / reference.sum(), spread / kept.sum()
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-30))))
