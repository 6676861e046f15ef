"""Streaming normal equations of a layer: X^T X and X^T Y over sampled output positions.

A layer is linear in its weights: at every output position its output is `row @ matrix`, where `row` holds the input
values under the kernel and a one
(for the bias). All layer kinds share one batched form, `groups` independent systems of `k = in_channels / groups *
taps` columns and the bias column:

====================  =========================  =========================
layer                 row matrix X               weight matrix W
====================  =========================  =========================
conv2d                [groups, rows, k + 1]      [groups, k + 1, O/groups]
depthwise             [C, rows, taps + 1]        [C, taps + 1, O/C]
conv2d_transpose      [groups, rows, k + 1]      [groups, k + 1, O/groups]
dense                 [1, rows, K + 1]           [1, K + 1, M]
====================  =========================  =========================

Column `c * taps + t` is input channel c (within the group) under kernel tap t = r * kw + s; the last column is the
bias.

Source: Frantar and Alistarh, "Optimal Brain Compression", 2022
(layer-wise least squares).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOAT64_LIMIT = 640
"""Up to this many columns products are formed in float64; above, in float32 per batch and summed in float64.

Measured harmless (tests): the error of the float32 products is a few 1e-6 of the diagonal, the damping 1e-4 of it.
"""


@dataclass(frozen=True)
class LayerGeometry:
    """Where each output position of a layer reads its input.

    Parameters
    ----------
    kind : str
        "conv2d", "conv2d_transpose" or "dense".
    groups, in_channels, out_channels : int
        Of the layer, before any removal.
    kernel, strides, dilation : tuple of int
        (height, width); (1, 1) for dense.
    padding : tuple of int
        Top, left, bottom, right.
    in_size, out_size : tuple of int
        Spatial extents of input and output; (1, 1) for dense.
    """

    kind: str
    groups: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    in_size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, layer: Any) -> LayerGeometry:
        """The geometry of a `lpsn_tvm.graph.Layer`."""
        if layer.kind == "dense":
            return cls("dense", 1, layer.in_channels, layer.out_channels)
        attrs = layer.attrs
        return cls(
            layer.kind,
            layer.groups,
            layer.in_channels,
            layer.out_channels,
            kernel=(int(layer.weight.shape[2]), int(layer.weight.shape[3])),
            strides=_pair(attrs.get("strides", (1, 1))),
            dilation=_pair(attrs.get("dilation", (1, 1))),
            padding=_four(attrs.get("padding", (0, 0, 0, 0))),
            in_size=(layer.in_shape[2], layer.in_shape[3]),
            out_size=(layer.out_shape[2], layer.out_shape[3]),
        )

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel[0] * self.kernel[1]

    @property
    def positions(self) -> int:
        """Output positions of one sample."""
        return self.out_size[0] * self.out_size[1]

    @property
    def columns(self) -> int:
        """Columns of one of the `groups` systems, the bias column not counted."""
        return self.in_channels // self.groups * self.taps

    @cached_property
    def source(self) -> Tensor:
        """int64[positions, taps]: flat input position that each tap reads; `height * width` where it reads padding."""
        ys, valid_y = self._axis(0)
        xs, valid_x = self._axis(1)
        height, width = self.in_size
        flat = ys[:, None, :, None] * width + xs[None, :, None, :]
        valid = valid_y[:, None, :, None] & valid_x[None, :, None, :]
        return torch.from_numpy(np.where(valid, flat, height * width).reshape(self.positions, self.taps))

    def _axis(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Input coordinate and validity along one axis, each [out extent, kernel extent]."""
        out = np.arange(self.out_size[axis])[:, None]
        tap = np.arange(self.kernel[axis])[None, :] * self.dilation[axis]
        stride, pad = self.strides[axis], self.padding[axis]
        if self.kind == "conv2d_transpose":
            numerator = out + pad - tap
            where, valid = numerator // stride, numerator % stride == 0
        else:
            where = out * stride - pad + tap
            valid = np.ones(where.shape, bool)
        return where, valid & (where >= 0) & (where < self.in_size[axis])

    def weight_matrix(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Weight and bias as W[groups, k + 1, O/groups] (float64)."""
        g = self.groups
        if self.kind == "dense":
            matrix = weight[None]
        elif self.kind == "conv2d":
            matrix = weight.reshape(g, self.out_channels // g, -1).transpose(1, 2)
        else:
            shaped = weight.reshape(g, self.in_channels // g, self.out_channels // g, self.taps)
            matrix = shaped.permute(0, 1, 3, 2).reshape(g, -1, self.out_channels // g)
        return torch.cat([matrix.double(), bias.double().reshape(g, 1, -1)], dim=1)

    def split_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `weight_matrix`: weight in the layer's layout and bias[O], float32."""
        g, out = self.groups, self.out_channels
        body, bias = matrix[:, :-1].float(), matrix[:, -1].float().reshape(-1)
        if self.kind == "dense":
            return body[0].contiguous(), bias
        if self.kind == "conv2d":
            weight = body.transpose(1, 2).reshape(out, self.in_channels // g, *self.kernel)
        else:
            shaped = body.reshape(g, self.in_channels // g, self.taps, out // g).permute(0, 1, 3, 2)
            weight = shaped.reshape(self.in_channels, out // g, *self.kernel)
        return weight.contiguous(), bias

    def sample_positions(self, per_sample: int, seed: int, name: str, batch: int) -> Tensor:
        """Sorted int64[min(per_sample, positions)] output positions, the same for the same seed, layer name and batch
        number.
        """
        if per_sample >= self.positions:
            return torch.arange(self.positions)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), batch])
        return torch.from_numpy(np.sort(rng.choice(self.positions, per_sample, replace=False)))

    def rows(self, x: Tensor, where: Tensor, channels: Tensor | None = None) -> Tensor:
        """Row matrix X[groups, rows, k + 1] of input `x` at the output positions `where`.

        Parameters
        ----------
        x : float32[N, C, H, W] | float32[N, K]
            Input of the layer.
        where : int64[P]
            Output positions, of every sample; rows are ordered sample by sample.
        channels : int64[A], optional
            Only these input channels (ungrouped layers): columns of the others are left out.
        """
        if channels is not None:
            x = x.index_select(1, channels)
        samples, width = x.shape[0], x.shape[1]
        flat = x.reshape(samples, width, -1)
        taps = self.source[where]
        flat = torch.nn.functional.pad(flat, (0, 1))
        body = flat.index_select(2, taps.reshape(-1)).reshape(
            samples, self.groups, width // self.groups, len(where), self.taps
        )
        body = body.permute(1, 0, 3, 2, 4).reshape(self.groups, samples * len(where), -1)
        return torch.cat([body, torch.ones_like(body[:, :, :1])], dim=2)

    def targets(self, y: Tensor, where: Tensor) -> Tensor:
        """Outputs [N * P, O] of the layer at the positions `where`, in the row order of `rows`."""
        flat = y.reshape(y.shape[0], y.shape[1], -1).index_select(2, where)
        return flat.permute(0, 2, 1).reshape(-1, y.shape[1])


def _pair(value: Any) -> tuple[int, int]:
    first, second = (int(v) for v in (value if len(value) == 2 else (value[0], value[0])))
    return first, second


def _four(value: Any) -> tuple[int, int, int, int]:
    values = [int(v) for v in value]
    values = values * 4 if len(values) == 1 else values * 2 if len(values) == 2 else values
    return values[0], values[1], values[2], values[3]


class NormalEquations:
    """X^T X and, where targets are given, X^T Y, summed batch by batch in float64.

    Parameters
    ----------
    groups, columns, outputs : int
        Independent systems, columns of each (bias included), outputs of each.

    Attributes
    ----------
    gram : float64[groups, columns, columns]
    moment : float64[groups, columns, outputs]
    energy : float64[]
        Sum of squares of Y.
    rows : int
    """

    def __init__(self, groups: int, columns: int, outputs: int) -> None:
        self.gram = torch.zeros(groups, columns, columns, dtype=torch.float64)
        self.moment = torch.zeros(groups, columns, outputs, dtype=torch.float64)
        self.energy = torch.zeros((), dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows X[groups, n, columns] and their targets Y[n, groups * outputs]."""
        groups, count, columns = x.shape
        double = columns <= FLOAT64_LIMIT
        x = x.double() if double else x.float()
        if double:
            self.gram.baddbmm_(x.transpose(1, 2), x)
        else:
            _add_symmetric_product(self.gram, x)
        if y is not None:
            self.energy += y.double().square().sum()
            y = y.reshape(count, groups, -1).transpose(0, 1).to(x.dtype)
            self.moment += torch.bmm(x.transpose(1, 2), y)
        self.rows += count


def _add_symmetric_product(gram: Tensor, x: Tensor, block: int = 1152) -> None:
    """`gram += x^T x` in blocks: half of the products are others transposed, no second matrix of that size is made."""
    columns = x.shape[2]
    for start in range(0, columns, block):
        left = x[:, :, start : start + block].transpose(1, 2)
        for other in range(start, columns, block):
            product = torch.bmm(left, x[:, :, other : other + block]).double()
            gram[:, start : start + block, other : other + block] += product
            if other != start:
                gram[:, other : other + block, start : start + block] += product.transpose(1, 2)
