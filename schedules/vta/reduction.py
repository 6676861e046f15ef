"""The reduction of one output tile in chunks: which input and weight tiles each chunk needs, and its loop nest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lpsn_tvm.schedules.vta.nest import Axis, GemmShape
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Tap
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.schedules.vta.slots import Transfer, transfers
from lpsn_tvm.schedules.vta.tiling import (
    Range,
    Tile,
    Window,
    block_runs,
    clip_taps,
    cut,
    local_taps,
    window,
)

SHORT_TRANSFER = 8  # weight tiles; a transfer costs tens of cycles before the first one


@dataclass(frozen=True)
class InputContent:
    """A window of some blocks of a plane, in SRAM as [n][block][row][column]."""

    plane: Plane
    n: Range
    blocks: Range
    window: Window

    @property
    def tiles(self) -> int:
        """Size in SRAM."""
        return self.n.count * self.blocks.count * self.window.tiles

    def transfers(self) -> Iterator[Transfer]:
        """The transfers that bring it."""
        plane, seen = self.plane, self.window
        base = plane.base + self.n.start * plane.batch_stride + self.blocks.start * plane.block_stride
        base += seen.row * plane.row_stride + seen.column
        axes = [
            (self.n.count, plane.batch_stride),
            (self.blocks.count, plane.block_stride),
            (seen.rows, seen.row_step * plane.row_stride),
        ]
        return transfers(base, axes, seen.columns)


@dataclass(frozen=True)
class WeightContent:
    """Weight tiles in SRAM as [output][input][tap]; axes of stride 0 are shared and have one entry."""

    region: str
    base: int
    outputs: int
    output_stride: int
    inputs: int
    input_stride: int
    taps: int

    @property
    def tiles(self) -> int:
        """Size in SRAM."""
        return self.outputs * self.inputs * self.taps

    def transfers(self) -> Iterator[Transfer]:
        """The transfers that bring it."""
        return transfers(self.base, [(self.outputs, self.output_stride), (self.inputs, self.input_stride)], self.taps)


@dataclass(frozen=True)
class Chunk:
    """A piece of reduction of a tile: contents, accumulator offset inside the tile's rectangle, loop nest."""

    inputs: InputContent
    weights: WeightContent
    accumulator: int
    shape: GemmShape


@dataclass(frozen=True)
class Piece:
    """A part of a chunk that is loaded and reduced at once; `offset` (dst, src, wgt) from the chunk's slots."""

    shape: GemmShape
    offset: tuple[int, int, int]
    input_transfers: tuple[Transfer, ...]
    weight_transfers: tuple[Transfer, ...]

    @classmethod
    def whole(cls, chunk: Chunk) -> Piece:
        """All of it."""
        return cls(chunk.shape, (0, 0, 0), tuple(chunk.inputs.transfers()), tuple(chunk.weights.transfers()))


def split(chunk: Chunk) -> list[Piece]:
    """The input blocks of a chunk one by one or a few at a time, so that a transfer is not too short."""
    shape, inputs, weights = chunk.shape, chunk.inputs, chunk.weights
    simple = shape.batches.count == 1 and inputs.blocks.count == shape.inputs.count == weights.inputs
    size = -(-SHORT_TRANSFER // weights.taps)
    if not simple or shape.inputs.count <= size:
        return [Piece.whole(chunk)]
    pieces = []
    for k, stop in ((piece.start, piece.stop) for piece in cut(shape.inputs.count, size)):
        block = replace(inputs, blocks=Range(inputs.blocks.start + k, inputs.blocks.start + stop))
        one = replace(weights, base=weights.base + k * weights.input_stride, inputs=stop - k)
        # In the slot, the weights of these input blocks of consecutive output blocks are not neighbours.
        per_output = [
            replace(move, sram=o * shape.outputs.wgt + k * shape.inputs.wgt)
            for o in range(weights.outputs)
            for move in replace(one, base=one.base + o * weights.output_stride, outputs=1).transfers()
        ]
        pieces.append(
            Piece(
                replace(shape, inputs=replace(shape.inputs, count=stop - k)),
                (0, k * shape.inputs.src, k * shape.inputs.wgt),
                tuple(replace(move, sram=move.sram + k * shape.inputs.src) for move in block.transfers()),
                tuple(per_output),
            )
        )
    return pieces


def tap_range(taps: tuple[Tap, ...]) -> Range:
    """Tile offsets of the taps inside the weights of one pair of blocks."""
    return Range(min(tap.weight for tap in taps), max(tap.weight for tap in taps) + 1)


def chunk_blocks(step: Gemm, schedule: Schedule) -> tuple[int, int]:
    """(output blocks, input blocks) of a chunk: where outputs read different inputs, few outputs, too."""
    inputs = min(schedule.tile_ci, step.fan_in)
    dense = len(set(step.first_input)) == 1
    return schedule.tile_co if dense else max(1, schedule.tile_ci // inputs), inputs


def chunks(step: Gemm, tile: Tile, level: int, schedule: Schedule) -> Iterator[Chunk]:
    """The chunks that add `step` to a tile, in order."""
    clipped = clip_taps(step.taps, tile.rows[level], tile.columns[level])
    if not clipped:
        return
    seen, reach = window(clipped), tap_range(step.taps)
    # Counted inside the window and inside a chunk's weights.
    taps = tuple(Tap(t.dst_y, t.dst_x, t.src_y, t.src_x, t.weight - reach.start) for t in local_taps(clipped, seen))
    outputs, inputs = chunk_blocks(step, schedule)
    shapes: dict[tuple[int, int, int], GemmShape] = {}
    for run, advance in block_runs(step, tile.o):
        for piece in cut(run.count, outputs):
            o = Range(run.start + piece.start, run.start + piece.stop)
            for k in cut(step.fan_in, inputs):
                key = o.count, k.count, advance
                if key not in shapes:
                    shapes[key] = _shape(step, tile, level, key, seen, taps, schedule.inner)
                yield _chunk(step, tile, level, o, k, advance, seen, shapes[key])


def _shape(
    step: Gemm, tile: Tile, level: int, counts: tuple[int, int, int], seen: Window, taps: tuple[Tap, ...], inner: str
) -> GemmShape:
    """The loop nest of chunks with so many output blocks, input blocks, and input blocks from output to output."""
    outputs, inputs, advance = counts
    positions, reach = tile.positions(level), tap_range(step.taps).count
    to_input = reach if step.input_stride else 0
    to_output = (inputs if step.input_stride else 1) * reach if step.output_stride else 0
    blocks = (outputs - 1) * advance + inputs
    return GemmShape(
        taps=taps,
        row_dst=tile.columns[level].count,
        row_src=seen.columns,
        batches=Axis("n", tile.n.count, tile.o.count * positions, blocks * seen.tiles, 0),
        outputs=Axis("co", outputs, positions, advance * seen.tiles, to_output),
        inputs=Axis("ci", inputs, 0, seen.tiles, to_input),
        inner=inner,
    )


def _chunk(
    step: Gemm, tile: Tile, level: int, o: Range, k: Range, advance: int, seen: Window, shape: GemmShape
) -> Chunk:
    reach = tap_range(step.taps)
    first = step.first_input[o.start]
    blocks = Range(first + k.start, first + (o.count - 1) * advance + k.stop)
    base = step.weight_base + o.start * step.output_stride + k.start * step.input_stride + reach.start
    weights = WeightContent(
        step.weights,
        base,
        o.count if step.output_stride else 1,
        step.output_stride,
        k.count if step.input_stride else 1,
        step.input_stride,
        reach.count,
    )
    accumulator = (o.start - tile.o.start) * tile.positions(level)
    return Chunk(InputContent(step.source, tile.n, blocks, seen), weights, accumulator, shape)
