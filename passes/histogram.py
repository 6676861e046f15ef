"""Histograms that grow with the data and never estimate a count anew, and how well quantization fits one."""

from __future__ import annotations

from math import frexp, gcd

import numpy as np
import numpy.typing as npt
import torch

from lpsn_tvm.quant import QuantParams

BINS = 2048
SAMPLES = 1 << 17
"""At most this many values of a batch are counted."""
Float64 = npt.NDArray[np.float64]


class Histogram:
    """Counts in at most `BINS` bins whose width is a power of two and whose edges are multiples of it.

    When a value falls outside, the width doubles until all fit: two old bins make exactly one new bin, nothing is
    estimated anew. Exact zeros (half of a ReLU's output) are counted apart: they quantize without error.
    """

    def __init__(self) -> None:
        self.exponent: int | None = None
        self.start = 0
        self.counts = np.zeros(BINS, np.int64)
        self.zeros = 0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 0.0 if self.exponent is None else 2.0**self.exponent

    @property
    def centers(self) -> Float64:
        """float64[BINS]: the middle of each bin."""
        return np.asarray((np.arange(BINS) + (self.start + 0.5)) * self.width, np.float64)

    @property
    def total(self) -> int:
        """Number of values, zeros included."""
        return int(self.counts.sum()) + self.zeros

    def add(self, values: torch.Tensor, low: float, high: float) -> None:
        """Counts `values` (a sample of a tensor with minimum `low` and maximum `high`)."""
        flat = values.reshape(-1)
        stride = -(-flat.numel() // SAMPLES)
        # A stride that shares no factor with any extent does not stay on one column or one channel.
        while stride > 1 and gcd(stride, flat.numel()) > 1:
            stride += 1
        flat = flat[::stride]
        nonzero = flat[flat != 0]
        self.zeros += flat.numel() - nonzero.numel()
        if low == 0.0 and high == 0.0:
            return
        self._cover(low, high)
        assert self.exponent is not None
        index = torch.floor(nonzero.to(torch.float64) * 2.0**-self.exponent).to(torch.int64) - self.start
        self.counts += torch.bincount(index.cpu(), minlength=BINS).numpy()

    def _cover(self, low: float, high: float) -> None:
        """Makes [low, high] and what was covered before fit."""
        if self.exponent is None:
            # Between half and all of the bins are used at first; a width below float32's resolution would be of no use.
            span = max(high - low, 1e-6 * max(-low, high))
            self.exponent = max(frexp(span / BINS)[1], -140)
            self.start = int(np.floor(low / self.width))
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]) + self.start, int(used[-1]) + self.start) if len(used) else (None, None)
        doublings = 0
        while True:
            width = self.width * 2.0**doublings
            ends = [int(np.floor(low / width)), int(np.floor(high / width))]
            if first is not None and last is not None:
                ends += [first >> doublings, last >> doublings]
            if max(ends) - min(ends) < BINS:
                break
            doublings += 1
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, ((used + self.start) >> doublings) - min(ends), self.counts[used])
        self.counts, self.start, self.exponent = counts, min(ends), self.exponent + doublings


def squared_error(values: Float64, weights: Float64, params: QuantParams) -> float:
    """Sum of weighted squared differences between `values` and what `params` make of them."""
    scale = float(params.scale)
    q = np.clip(np.rint(values / scale) + params.zero_point, params.qmin, params.qmax)
    return float(np.dot(weights, (values - (q - params.zero_point) * scale) ** 2))


def kl_divergence(centers: Float64, counts: Float64, params: QuantParams) -> float:
    """KL(P || Q).

    P is the histogram with what is clipped piled up at the ends, Q each level's mass spread over its non-empty bins.
    """
    scale = float(params.scale)
    level = np.rint(centers / scale) + params.zero_point
    inside = (level >= params.qmin) & (level <= params.qmax)
    if not inside.any() or not counts[inside].any():
        return float("inf")
    first, last = np.flatnonzero(inside)[[0, -1]]
    kept = counts[first : last + 1]
    p = kept.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    bucket = (level[first : last + 1] - params.qmin).astype(np.int64)
    mass = np.bincount(bucket, weights=kept)
    filled = np.bincount(bucket, weights=(kept > 0).astype(np.float64))
    q = np.where(kept > 0, mass[bucket] / np.maximum(filled[bucket], 1.0), 0.0)
    p, q = p / p.sum(), q / q.sum()
    # A bin that only clipped values fill has no mass in Q: a small one keeps the divergence finite and large.
    q = np.maximum(q, 1e-9)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))
