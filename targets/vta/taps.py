"""Kernel positions of one axis as runs of tiles: which tile of the result reads which tile of the source, and which
kernel position each pair of lanes means there.

A convolution relates pixels by `in = out * stride - padding + r * dilation`, a transposed one by
`out = in * stride - padding + r * dilation`. Where tiles hold several pixels, the same relation holds between lanes:
result tiles fall into phases (tile = phase + i * period), and in one phase a source tile at a fixed distance gives each
pair (result offset, source offset) at most one r. Worked example, stride 2, kernel 3, source packed by 2 along the axis
(offsets 0 and 1), no padding: the result reads its own tile (r = 0, 1) and the next one (r = 2 at offset 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from lpsn_tvm.schedules.vta.ops import Span
from lpsn_tvm.targets.vta.layout import ceil_div


@dataclass(frozen=True)
class Side:
    """One axis of the source or the result.

    Parameters
    ----------
    pixels : int
        Extent of the variable.
    tiles : int
        Extent of the plane.
    step : int
        Pixels per tile.
    offsets : tuple of int
        Pixels that a tile holds, relative to `tile * step`.
    is_zero_outside : bool
        Offsets that point outside the image hold 0.
    """

    pixels: int
    tiles: int
    step: int = 1
    offsets: tuple[int, ...] = (0,)
    is_zero_outside: bool = False


@dataclass(frozen=True)
class Window:
    """`in = out * stride - padding + r * dilation` (transposed: in and out exchanged), 0 <= r < kernel."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    is_transposed: bool = False


@dataclass(frozen=True)
class AxisTap:
    """A run of tiles; `positions[(result offset, source offset)]` is the kernel position r."""

    dst: Span
    src: Span
    positions: tuple[tuple[tuple[int, int], int], ...]


Item = tuple[int, int]
"""(result offset, kernel position): what one phase must sum over."""


def axis_taps(window: Window, source: Side, result: Side) -> tuple[AxisTap, ...] | None:
    """All runs, or None where the source's form cannot give the result (a copy of it in plain form can)."""
    period, advance = _period(window, source.step, result.step)
    taps: list[AxisTap] = []
    for phase in range(min(period, result.tiles)):
        chosen = _Phase(window, source, result, phase, period, advance).cover()
        if chosen is None:
            return None
        taps += chosen
    return tuple(taps)


def _period(window: Window, in_step: int, out_step: int) -> tuple[int, int]:
    """Tiles of the result, and of the source, after which the relation repeats."""
    if window.is_transposed:
        common = gcd(out_step, window.stride * in_step)
        return window.stride * in_step // common, out_step // common
    common = gcd(in_step, window.stride * out_step)
    return in_step // common, window.stride * out_step // common


@dataclass(frozen=True)
class _Phase:
    """Result tiles `phase + i * period`; they read source tiles `distance + i * advance`."""

    window: Window
    source: Side
    result: Side
    phase: int
    period: int
    advance: int

    def cover(self) -> list[AxisTap] | None:
        """Every item once, from as few distances as a greedy cover finds."""
        needed, offers = self._offers()
        taps: list[AxisTap] = []
        while needed:
            found = [(len(needed & items.keys()), -abs(distance), distance) for distance, items in offers.items()]
            count, _, best = max(found, default=(0, 0, 0))
            if count == 0:
                return None
            items = {item: offers[best][item] for item in sorted(needed & offers[best].keys())}
            taps.append(self._tap(best, items))
            needed -= items.keys()
        return taps

    def _offers(self) -> tuple[set[Item], dict[int, dict[Item, int]]]:
        """What the phase must sum over; per distance, which of it that tile holds, and at which offset."""
        needed: set[Item] = set()
        offers: dict[int, dict[Item, int]] = {}
        for e in self.result.offsets:
            for r in range(self.window.kernel):
                pixel = self._source_pixel(self.phase * self.result.step + e, r)
                runs = [i for i in self._runs(e) if pixel is not None and self._is_in_image(pixel, i)]
                if pixel is None or not runs:
                    continue
                needed.add((e, r))
                for d in self.source.offsets:
                    distance, rest = divmod(pixel - d, self.source.step)
                    if rest == 0 and self._is_sound(distance, pixel, runs, e):
                        offers.setdefault(distance, {})[e, r] = d
        return needed, offers

    def _source_pixel(self, outside: int, r: int) -> int | None:
        w = self.window
        if not w.is_transposed:
            return outside * w.stride - w.padding + r * w.dilation
        pixel, rest = divmod(outside + w.padding - r * w.dilation, w.stride)
        return pixel if rest == 0 else None

    def _runs(self, e: int) -> list[int]:
        """Numbers i of the result tiles whose pixel at offset `e` exists."""
        result = self.result
        tiles = range(self.phase, result.tiles, self.period)
        return [i for i, tile in enumerate(tiles) if 0 <= tile * result.step + e < result.pixels]

    def _is_in_image(self, pixel: int, i: int) -> bool:
        return 0 <= pixel + i * self.advance * self.source.step < self.source.pixels

    def _is_sound(self, distance: int, pixel: int, runs: list[int], e: int) -> bool:
        """Whether the tiles at this distance hold every pixel that is needed, and zeros where there is none."""
        source = self.source

        def is_there(i: int) -> bool:
            return 0 <= distance + i * self.advance < source.tiles

        if not all(is_there(i) for i in runs):
            return False
        return source.is_zero_outside or all(self._is_in_image(pixel, i) for i in self._runs(e) if is_there(i))

    def _tap(self, distance: int, items: dict[Item, int]) -> AxisTap:
        """The run of all tiles that exist on both sides."""
        first = max(0, ceil_div(-distance, self.advance))
        last = min(
            (self.result.tiles - 1 - self.phase) // self.period, (self.source.tiles - 1 - distance) // self.advance
        )
        count = last - first + 1
        return AxisTap(
            Span(self.phase + first * self.period, self.period, count),
            Span(distance + first * self.advance, self.advance, count),
            tuple(((e, d), r) for (e, r), d in items.items()),
        )
