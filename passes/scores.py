"""Importance scores of channels from activations, as the paper defines them, and a seeded random one.

    mean_activation   mu_c = running mean over batches of mean over (n, h, w) of |x[n, c, h, w]|
    zero_fraction     the same with |x| replaced by x != 0
    random            a seeded permutation

x is the tensor that the removed channels would leave from, after the activation function, as its first reader sees it.
The default of the product, exact elimination by output error, is in `eliminate.py`: once weights are re-solved the
paper's importance is no better than random (benchmarks/results/prune.json).

Source: Zhang, Colbert, Das, "Learning Low-Precision Structured Subnetworks Using Joint Layerwise Channel Pruning and
Uniform Quantization", Applied Sciences 2022, 12(15), 7829.
"""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Score = Literal["output_error", "mean_activation", "zero_fraction", "random"]
SCORES: tuple[str, ...] = ("output_error", "mean_activation", "zero_fraction", "random")


class ChannelMean:
    """Running mean over batches of a per-channel statistic; every batch counts the same, as in the paper.

    Parameters
    ----------
    score : str
        "mean_activation" or "zero_fraction".

    Attributes
    ----------
    value : float64[C]
        The mean so far.
    """

    def __init__(self, score: str) -> None:
        self.score = score
        self.batches = 0
        self.value = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """One batch x [N, C, ...]."""
        size = (x != 0) if self.score == "zero_fraction" else x.abs()
        mean = size.double().mean(dim=[axis for axis in range(x.ndim) if axis != 1])
        self.batches += 1
        self.value = mean if self.batches == 1 else self.value + (mean - self.value) / self.batches


def random_scores(count: int, seed: int, name: str) -> Tensor:
    """float64[count]: a permutation of 0..count-1 that depends on the seed and the group's name."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(rng.permutation(count).astype(np.float64))


def unit_scores(channel_scores: Tensor, units: Tensor, count: int) -> Tensor:
    """Mean score of each unit's channels; `units` int64[C] is the unit of each channel, -1 for channels of no unit."""
    member = units >= 0
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, units[member], channel_scores[member])
    number = torch.zeros(count, dtype=torch.float64).index_add_(
        0, units[member], torch.ones(int(member.sum()), dtype=torch.float64)
    )
    return total / number.clamp_min(1)
