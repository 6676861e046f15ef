"""Observers: what range of real numbers a tensor takes, learnt from a stream of batches in constant memory.

    observers = observe(interpreter, calibration, names, "mse")
    low, high = observers["relu_3"].range(bits=4, scheme=scheme)
    params = params_from_range(low, high, 4, scheme)

| kind | range |
|---|---|
| minmax | running means of the batches' minimum and maximum (the paper's) |
| percentile | quantiles 0.01 % and 99.99 % |
| mse | the clipping that quantizes the values seen with the least squared error, at the given bits |
| entropy | the clipping whose quantized histogram is nearest to the values seen in Kullback-Leibler divergence |

A tensor that is never negative has low = 0 exactly, whatever the kind. Statistics other than minimum and maximum come
from at most `histogram.SAMPLES` values per batch, taken at a fixed stride.

Source: Zhang et al., Applied Sciences 2022, 12(15), 7829 (minmax); Migacz, GTC 2017 (entropy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from math import log2
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.histogram import BINS, Histogram, kl_divergence, squared_error
from lpsn_tvm.quant import QuantParams, QuantScheme

Kind = Literal["minmax", "percentile", "mse", "entropy"]
KINDS: tuple[Kind, ...] = ("minmax", "percentile", "mse", "entropy")
MIN_SCALE, MAX_SCALE = 2.0**-40, 2.0**122
"""Scales stay where products and quotients of a few of them are normal float32 numbers."""


# --- from a range to parameters ---------------------------------------------------------------------------------------


def params_from_range(low: float, high: float, bits: int, scheme: QuantScheme) -> QuantParams:
    """Per-tensor quantization parameters that hold [low, high].

    Zero is always representable exactly. Asymmetric: scale = (high - low) / (2**bits - 1), the zero point is an integer
    within the range. Symmetric: scale = max(|low|, |high|) / (2**(bits - 1) - 1), zero point 0 (unsigned containers:
    the middle, or 0 if low is 0). Power-of-two schemes round the scale up. An empty range [0, 0] gets the scale of [0,
    1].

    Parameters
    ----------
    low, high : float
        Extended to contain zero.
    bits : int
        2..8.
    scheme : QuantScheme
        Signedness, symmetry and power of two of activations.

    Returns
    -------
    QuantParams
        scale float32[].

    Raises
    ------
    QuantizeError
        `low` or `high` is not finite, low > high, or `bits` out of range.
    """
    if not 2 <= bits <= 8:
        raise QuantizeError(f"{bits} bits; allowed are 2 to 8")
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise QuantizeError(f"the range [{low}, {high}] cannot be quantized; both ends must be finite and in order")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        high = 1.0
    signed = scheme.activation_signed
    qmin = -(2 ** (bits - 1)) if signed else 0
    qmax = qmin + 2**bits - 1
    if scheme.activation_symmetric:
        zero_point = 0 if signed or low == 0.0 else 2 ** (bits - 1)
        scale = _valid_scale(max(-low, high) / (qmax - zero_point), scheme.power_of_two)
    else:
        scale = _valid_scale((high - low) / (qmax - qmin), scheme.power_of_two)
        zero_point = int(np.clip(np.rint(qmin - low / scale), qmin, qmax))
    return QuantParams(np.asarray(scale, np.float32), zero_point, bits, signed)


def _valid_scale(scale: float, power_of_two: bool) -> float:
    scale = min(max(scale, MIN_SCALE), MAX_SCALE)
    if power_of_two:
        # The slack keeps float noise in a range (127.0000001 / 127) from doubling the step.
        return float(2.0 ** np.ceil(log2(scale) - 1e-6))
    return float(np.float32(scale))


# --- observers --------------------------------------------------------------------------------------------------------


class Observer:
    """Base: exact minimum and maximum over all values, and a count of batches."""

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")
        self.batches = 0

    def update(self, tensor: torch.Tensor | npt.NDArray[Any]) -> None:
        """Takes in one batch, float32[N, ...].

        Raises
        ------
        QuantizeError
            The batch has NaN or infinite values.
        """
        values = torch.as_tensor(tensor).detach()
        if not values.numel():
            return
        values = values.to(torch.float32)
        low, high = (float(v) for v in torch.aminmax(values))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise QuantizeError("values are NaN or infinite; the network overflows on the calibration data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.batches += 1
        self._update(values, low, high)

    def range(self, bits: int, scheme: QuantScheme) -> tuple[float, float]:
        """The range to quantize, low <= 0 <= high.

        Raises
        ------
        QuantizeError
            Nothing was observed.
        """
        if not self.batches:
            raise QuantizeError("no values were observed")
        low, high = self._range(bits, scheme)
        low, high = max(float(low), self.low), min(float(high), self.high)
        return (0.0 if self.low >= 0 else min(low, 0.0)), (0.0 if self.high <= 0 else max(high, 0.0))

    def params(self, bits: int, scheme: QuantScheme) -> QuantParams:
        """Parameters of `range`."""
        return params_from_range(*self.range(bits, scheme), bits, scheme)

    def _update(self, values: torch.Tensor, low: float, high: float) -> None:
        raise NotImplementedError

    def _range(self, bits: int, scheme: QuantScheme) -> tuple[float, float]:
        raise NotImplementedError


class MinMaxObserver(Observer):
    """Running means of batch minimum and maximum, weighted by batch size (so that a small last batch counts little)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean_low = self.mean_high = 0.0
        self.samples = 0

    def _update(self, values: torch.Tensor, low: float, high: float) -> None:
        count = values.shape[0] if values.ndim else 1
        self.samples += count
        self.mean_low += (low - self.mean_low) * count / self.samples
        self.mean_high += (high - self.mean_high) * count / self.samples

    def _range(self, bits: int, scheme: QuantScheme) -> tuple[float, float]:
        return self.mean_low, self.mean_high


class HistogramObserver(Observer):
    """Base of the observers that choose a clipping from a histogram."""

    def __init__(self) -> None:
        super().__init__()
        self.histogram = Histogram()

    def _update(self, values: torch.Tensor, low: float, high: float) -> None:
        self.histogram.add(values, low, high)


class PercentileObserver(HistogramObserver):
    """Quantiles `100 - percentile` and `percentile` of the values seen, in percent."""

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 50 < percentile <= 100:
            raise QuantizeError(f"percentile is {percentile}; allowed is more than 50 and at most 100")
        self.percentile = percentile

    def _range(self, bits: int, scheme: QuantScheme) -> tuple[float, float]:
        h = self.histogram
        if self.percentile == 100 or not h.counts.any():
            return self.low, self.high
        edges = np.append(np.arange(BINS), BINS) * h.width + h.start * h.width
        cumulative = np.concatenate([[0.0], np.cumsum(h.counts)]).astype(np.float64)
        # Zeros sit between the negative and the positive bins.
        cumulative += np.where(edges > 0, h.zeros, 0)
        share = (1 - self.percentile / 100) * h.total
        high = float(np.interp(h.total - share, cumulative, edges))
        low = float(np.interp(share, cumulative, edges))
        return low, high


class MseObserver(HistogramObserver):
    """The clipping with the least squared error of quantized values, found by shrinking both ends in turn."""

    def _range(self, bits: int, scheme: QuantScheme) -> tuple[float, float]:
        h = self.histogram
        used = h.counts > 0
        if not used.any():
            return self.low, self.high
        values, weights = h.centers[used], h.counts[used].astype(np.float64)
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        shares = np.linspace(1.0, 0.02, 99)

        def error(candidate: tuple[float, float]) -> float:
            return squared_error(values, weights, params_from_range(*candidate, bits, scheme))

        if scheme.activation_symmetric:
            ends = ((max(low, -max(-low, high) * s), min(high, max(-low, high) * s)) for s in shares)
            return min(ends, key=error)
        for _ in range(2 if low < 0 < high else 1):
            if high > 0:
                high = min((max(self.high, 0.0) * s for s in shares), key=lambda end: error((low, end)))
            if low < 0:
                low = min((self.low * s for s in shares), key=lambda end: error((end, high)))
        return low, high


class EntropyObserver(HistogramObserver):
    """The clipping whose quantized distribution is nearest to the clipped one; both ends shrink by the same share."""

    def _range(self, bits: int, scheme: QuantScheme) -> tuple[float, float]:
        h = self.histogram
        if not h.counts.any():
            return self.low, self.high
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        centers = h.centers
        counts = h.counts.astype(np.float64)

        def divergence(share: float) -> float:
            params = params_from_range(low * share, high * share, bits, scheme)
            return kl_divergence(centers, counts, params)

        # A clipping that leaves fewer than two bins per level compares a histogram with itself.
        reach = max(high - low, h.width)
        smallest = min(1.0, 2 * 2**bits * h.width / reach)
        best = min(np.linspace(1.0, max(smallest, 0.05), 96), key=divergence)
        return low * float(best), high * float(best)


_OBSERVERS: Mapping[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "entropy": EntropyObserver,
}


def make_observer(kind: str) -> Observer:
    """A new observer: "minmax", "percentile", "mse" or "entropy"."""
    if kind not in _OBSERVERS:
        raise QuantizeError(f"unknown observer {kind!r}; allowed are {', '.join(_OBSERVERS)}")
    return _OBSERVERS[kind]()


def observe(
    interpreter: TorchInterpreter,
    batches: Iterable[Mapping[str, Any]],
    names: Iterable[str],
    kind: str = "mse",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Observer]:
    """Observes variables in one pass over the data.

    Parameters
    ----------
    interpreter : TorchInterpreter
        Run with its current parameters; only what `names` need is computed, and only live values are held.
    batches : iterable of dict of str to ndarray
        A `CalibrationSet`.
    names : iterable of str
        Variables, function inputs included.
    kind : str
        See `make_observer`.
    progress : callable (batches done, batches), optional
        Batches is 0 where `batches` does not say how many there are.

    Returns
    -------
    dict of str to Observer

    Raises
    ------
    QuantizeError
        No batches, or a variable is not finite; names it.
    """
    observers = {name: make_observer(kind) for name in names}
    # The sum before a bias is only shown to a transform when it is asked for; the last values are fetched, everything
    # else dies on the way.
    fetch = _last_needed(interpreter, observers)

    def look(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in observers:
            try:
                observers[name].update(tensor)
            except QuantizeError as error:
                raise QuantizeError(str(error), where=name) from error
        return tensor

    total = len(batches) if isinstance(batches, Sized) else 0
    size = int(getattr(batches, "batch", 1))
    done = 0
    for feeds in batches:
        interpreter.run(feeds, fetch=fetch, transform=look)
        done += 1
        if progress is not None:
            progress(done, -(-total // size))
    if not done:
        raise QuantizeError("no calibration data to observe ranges on")
    return observers


def _last_needed(interpreter: TorchInterpreter, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that no other one depends on, and sums before a bias: fetching these computes them all."""
    names = list(names)
    wanted = set(names)
    inner: set[str] = set()
    for step in interpreter.needed(names, interpreter.inputs):
        inner.update(step.variables)
    return tuple(n for n in names if n in interpreter.accumulators or (n not in inner and n in wanted))
