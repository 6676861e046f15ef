"""Tile operators: what the accelerator computes, in units of its tiles, before anything is scheduled.

A tensor lives in DRAM as tiles `[n][block][y][x]`, each tile `[BATCH][BLOCK]` values (`Plane`). An operator owns a
rectangle of accumulator tiles per output (`[n][block][y][x]` too) and runs a list of steps on every one of them:

    Gemm(source)   acc += taps of a source plane x weight tiles (convolution, identity, selection, depthwise, ...)
    Vector(kind)   acc = acc + bias[block] | acc >> shift[block]     (int32 tiles, one per output block)
    Scalar(kind)   acc = min | max | add | shr (acc, immediate);  "double": acc = acc + acc
    Pool(...)      the rectangle shrinks: maximum over windows
    Store(plane)   the low bits of acc go to DRAM

The accumulators start at zero. The steps are a specification: an emitter may fold, split or reorder them as long as
the stored bytes stay the same (a bias as one more reduction step, resets left out where data is loaded, ...).
Worked example, 3x3 convolution, stride 1, padding 1, 8 rows: tap dy = 0 reads row y - 1, so it exists for y = 1..7:
`Tap(dst_y=Span(1, 1, 7), src_y=Span(0, 1, 7), ...)`. Nothing is ever multiplied by a padding zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Plane:
    """A tensor in DRAM, or a channel range of one.

    Parameters
    ----------
    region : str
        Memory region of the program.
    base : int
        First tile, from the region's start, in tiles.
    batches, blocks, height, width : int
        Extents in tiles (`batches` = ceil(N / BATCH), `blocks` = ceil(C / BLOCK)).
    batch_stride, block_stride, row_stride : int
        Distances in tiles; x is contiguous.
    """

    region: str
    base: int
    batches: int
    blocks: int
    height: int
    width: int
    batch_stride: int
    block_stride: int
    row_stride: int

    @classmethod
    def dense(cls, region: str, base: int, batches: int, blocks: int, height: int, width: int) -> Plane:
        """A whole tensor without gaps."""
        return cls(region, base, batches, blocks, height, width, blocks * height * width, height * width, width)

    @property
    def tiles(self) -> int:
        """Number of tiles it holds."""
        return self.batches * self.blocks * self.height * self.width


@dataclass(frozen=True)
class Span:
    """`start, start + step, ...`: `count` positions along y or x."""

    start: int
    step: int
    count: int


@dataclass(frozen=True)
class Tap:
    """One kernel position: for i < y.count, j < x.count it adds
    `source(src_y[i], src_x[j]) x weight[tap]` to `acc(dst_y[i], dst_x[j])`. Counts of dst and src are equal.

    convolution: dst step 1, src step = stride. Transposed: dst step = stride, src step 1. `weight` is the tile offset
    of this tap inside the weights of one (output block, input block) pair.
    """

    dst_y: Span
    dst_x: Span
    src_y: Span
    src_x: Span
    weight: int


@dataclass(frozen=True)
class Gemm:
    """`acc[n, o, y, x] += sum over k < fan_in and taps of source[n, first(o) + k, ...] x W^T`.

    Parameters
    ----------
    source : Plane
    taps : tuple of Tap
        Empty taps (count 0) are left out.
    weights : str
        Region of the weight tiles ([BLOCK_OUT][BLOCK_IN] each).
    weight_base, output_stride, input_stride : int
        Tile of (o, k, tap) = weight_base + o * output_stride + k * input_stride + tap.weight.
        An identity shared by all blocks has both strides 0.
    fan_in : int
        Input blocks that each output block reads.
    first_input : tuple of int
        Per output block, its first input block: all 0 (dense), 0, 1, 2, ... (depthwise, identity).
    passes : int
        The whole sum is added this many times (identity times more than a weight can hold).
    """

    source: Plane
    taps: tuple[Tap, ...]
    weights: str
    weight_base: int
    output_stride: int
    input_stride: int
    fan_in: int
    first_input: tuple[int, ...]
    passes: int = 1


@dataclass(frozen=True)
class Vector:
    """A per-channel operand, int32 accumulator tiles [blocks] in DRAM: "add" (bias) or "shr" (amounts 0..15)."""

    kind: Literal["add", "shr"]
    region: str
    base: int


@dataclass(frozen=True)
class Scalar:
    """An immediate operand, signed 16 bits; "shr" 0..15; "double" has none: acc + acc."""

    kind: Literal["min", "max", "add", "shr", "double"]
    value: int = 0


@dataclass(frozen=True)
class Pool:
    """Maximum over windows of the accumulator rectangle; padding never wins. Later steps see the pooled rectangle."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]
    height: int
    width: int


@dataclass(frozen=True)
class Store:
    """The current rectangle goes to `plane` (low bits of every accumulator)."""

    plane: Plane


Step = Gemm | Vector | Scalar | Pool | Store


@dataclass(frozen=True)
class TileOp:
    """One operator of the accelerator.

    Parameters
    ----------
    name : str
        Variable of the graph, for reports and errors.
    batches, blocks, height, width : int
        Rectangle of accumulator tiles before any `Pool`.
    steps : tuple of Step
        At least one `Gemm` first and one `Store` last.
    macs : int
        Useful multiply-accumulates of the layer, for utilization figures.
    """

    name: str
    batches: int
    blocks: int
    height: int
    width: int
    steps: tuple[Step, ...]
    macs: int = 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Operators are keys of many caches, and a walk over all taps for every look-up would cost more than they save.
        return hash((self.name, self.batches, self.blocks, self.height, self.width, self.steps, self.macs))

    @property
    def micro_operations(self) -> int:
        """GEMM micro-operations that its taps need, resets not counted: the lower bound on the array."""
        total = 0
        for step in self.steps:
            if isinstance(step, Gemm):
                positions = sum(tap.dst_y.count * tap.dst_x.count for tap in step.taps)
                total += self.batches * self.blocks * step.fan_in * step.passes * positions
        return total
