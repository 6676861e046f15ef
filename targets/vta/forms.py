"""What the lanes of a tensor's tiles hold (`Form`), and a tensor of the accelerator during lowering (`Value`).

Lane l of tile (y, x) holds channel `channels[l]` at pixel `(y * steps[0] + dy[l], x * steps[1] + dx[l])`. A plain
tensor is channel l at pixel (y, x). What only renames elements is another form of the same bytes and costs nothing:

    concatenation of 6 and 10 channels      channels 0..5, ten empty lanes, 6..15, six empty lanes
    slice of channels 4..20                 empty lanes, 0..15 from lane 4 on, empty lanes
    flatten of C x 4 x 4                    one pixel of C * 16 channels in the order of the tiles
    depth to space by 2                     channel (c, dy, dx) of a pixel -> channel c, steps (2, 2)

Whoever multiplies by weights arranges them for the form that it reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.vta.ops import Plane
from lpsn_tvm.targets.vta.layout import ceil_div

Array = npt.NDArray[Any]
Image = tuple[int, int, int, int]


@dataclass(frozen=True)
class Form:
    """Meaning of the lanes.

    Parameters
    ----------
    channels : tuple of int
        One per lane, whole blocks; -1: nothing (the lane holds anything).
    dy, dx : tuple of int
        Pixel offset of each lane.
    steps : (int, int)
        Pixels per tile along y and x.
    is_zero_outside : bool
        Lanes whose pixel lies outside the image hold 0 (only tensors that the host packed can promise it).
    """

    channels: tuple[int, ...]
    dy: tuple[int, ...]
    dx: tuple[int, ...]
    steps: tuple[int, int] = (1, 1)
    is_zero_outside: bool = False

    @classmethod
    def plain(cls, channels: int | Iterable[int], block: int) -> Form:
        """One pixel per tile; `channels` lanes in order, or the channel of each lane; filled up to whole blocks."""
        lanes = list(range(channels)) if isinstance(channels, int) else [int(c) for c in channels]
        lanes += [-1] * (ceil_div(len(lanes), block) * block - len(lanes))
        zeros = (0,) * len(lanes)
        return cls(tuple(lanes), zeros, zeros)

    @classmethod
    def gathered(cls, lanes: Iterable[tuple[int, int, int] | None], steps: tuple[int, int], block: int) -> Form:
        """(channel, dy, dx) per lane, packed by the host."""
        filled = [lane or (-1, 0, 0) for lane in lanes]
        filled += [(-1, 0, 0)] * (ceil_div(len(filled), block) * block - len(filled))
        channels, dy, dx = zip(*filled, strict=True)
        return cls(channels, dy, dx, steps, is_zero_outside=True)

    @property
    def lanes(self) -> int:
        """Number of lanes, empty ones included."""
        return len(self.channels)

    @property
    def is_one_pixel(self) -> bool:
        """Whether every tile holds its own pixel only."""
        return self.steps == (1, 1) and not any(self.dy) and not any(self.dx)

    def is_plain(self, channels: int) -> bool:
        """Whether lane l is channel l, and nothing else."""
        used = tuple(range(channels))
        return self.is_one_pixel and self.channels[:channels] == used and all(c < 0 for c in self.channels[channels:])

    @cached_property
    def channel_array(self) -> Array:
        """int64[lanes]."""
        return np.asarray(self.channels, np.int64)

    def per_lane(self, values: Array, fill: int = 0) -> Array:
        """`values[channel]` of each lane (one value: of all channels), `fill` in empty ones."""
        channels = self.channel_array
        if np.size(values) == 1:
            return np.where(channels >= 0, np.asarray(values).reshape(-1)[0], fill)
        return np.where(channels >= 0, np.asarray(values)[np.maximum(channels, 0)], fill)

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The distinct dy and dx of lanes in use, ascending."""
        used = self.channel_array >= 0
        return (
            tuple(int(d) for d in np.unique(np.asarray(self.dy)[used])),
            tuple(int(d) for d in np.unique(np.asarray(self.dx)[used])),
        )

    @cached_property
    def is_complete(self) -> bool:
        """Whether each channel in use has every combination of offsets, once."""
        lanes = [lane for lane in zip(self.channels, self.dy, self.dx, strict=True) if lane[0] >= 0]
        combinations = len(self.offsets[0]) * len(self.offsets[1])
        return len(set(lanes)) == len(lanes) == len({lane[0] for lane in lanes}) * combinations


@dataclass(frozen=True)
class Value:
    """A variable on the accelerator.

    Parameters
    ----------
    name : str
        Variable of the graph.
    image : (N, C, H, W)
        Extents of the variable; [N, K] is one pixel.
    plane : Plane
        Its tiles.
    form : Form
    low, high : int
        No element is outside.
    """

    name: str
    image: Image
    plane: Plane
    form: Form
    low: int
    high: int

    @property
    def is_plain(self) -> bool:
        """Whether lane l of tile (y, x) is channel l of pixel (y, x), and the plane has no gaps."""
        p = self.plane
        dense = Plane.dense(p.region, 0, p.batches, p.blocks, p.height, p.width)
        return self.form.is_plain(self.image[1]) and p == dense
