"""Instructions of one tile operator under one schedule.

For each output tile: zero the accumulators, add the reduction in chunks (load what is not there, GEMM), then the other
steps, then store. Which unit waits for which is the builder's business; what overlaps follows from the slots.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from lpsn_tvm.schedules.vta.nest import MIN_DISTANCE, SEQUENCE_LIMIT, Body, GemmShape, expand, flat_bodies, gemm_bodies
from lpsn_tvm.schedules.vta.nest_columns import column_bodies
from lpsn_tvm.schedules.vta.ops import Gemm, Pool, Scalar, Step, Store, TileOp, Vector
from lpsn_tvm.schedules.vta.placement import fits, gemm_levels, is_constant, is_dense, is_shared, placement
from lpsn_tvm.schedules.vta.pooling import pool, pool_early
from lpsn_tvm.schedules.vta.recorder import Recorder
from lpsn_tvm.schedules.vta.reduction import Chunk, InputContent, Piece, WeightContent, chunks, split
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.schedules.vta.slots import SlotPool, Transfer, transfers
from lpsn_tvm.schedules.vta.space import candidates, default_schedule
from lpsn_tvm.schedules.vta.tiling import Tile, clip_taps, tiles
from lpsn_tvm.schedules.vta.vector_ops import alu_nest, clear

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.builder import ProgramBuilder

__all__ = ["Schedule", "candidates", "default_schedule", "emit", "fits"]

# The last tile is finished and stored in pieces of at least this many accumulators, so that little is left at the end.
PIECE = 32


def emit(builder: ProgramBuilder, op: TileOp, schedule: Schedule) -> None:
    """Append the instructions of `op`.

    Parameters
    ----------
    builder : ProgramBuilder
        With the regions of the operator declared.
    op : TileOp
        The operator.
    schedule : Schedule
        How it is cut.

    Raises
    ------
    CompileError
        The operator does not fit into SRAM under this schedule.
    """
    _Emitter(builder, pool_early(op), schedule).run()


class _Emitter:
    """The state of one emission: what lies where."""

    def __init__(self, builder: ProgramBuilder, op: TileOp, schedule: Schedule) -> None:
        self.builder, self.op = builder, op
        self.place = place = placement(op, schedule, builder.config)
        self.plan = [(tile, slot, _plan(op, tile, schedule)) for tile, slot in tiles(op, schedule)]
        inp = _behind(builder, "inp", place.inp_tiles, builder.config.inp_depth)
        end = builder.config.wgt_depth - place.shared_slots * place.shared_slot
        wgt = _behind(builder, "wgt", place.wgt_tiles, end)
        slots = {
            "inp": (inp, place.inp_slot, place.inp_slots),
            "constant inp": (inp + place.inp_slot * place.inp_slots, place.constant_inp_slot, place.constant_inp_slots),
            "wgt": (wgt, place.wgt_slot, place.wgt_slots),
            "constant wgt": (wgt + place.wgt_slot * place.wgt_slots, place.constant_wgt_slot, place.constant_wgt_slots),
            "shared wgt": (end, place.shared_slot, place.shared_slots),
        }
        contents: dict[str, list[InputContent | WeightContent]] = {name: [] for name in slots}
        for _, _, plan in self.plan:
            for (step, _), work in zip(gemm_levels(op), plan, strict=True):
                names = _pools(step)
                contents[names[0]] += [chunk.inputs for chunk in work]
                contents[names[1]] += [chunk.weights for chunk in work]
        self.pools = {name: SlotPool(*slots[name], contents[name]) for name in slots}
        vectors = [
            (step.region, step.base + tile.o.start, tile.o.count)
            for tile, _, _ in self.plan
            for step in op.steps
            if isinstance(step, Vector)
        ]
        self.is_starting = True
        # Slots of weights that were loaded ahead of the inputs.
        self.early: deque[int] = deque()
        self.vectors = SlotPool(place.acc_slot * schedule.threads, place.vector_slot, place.vector_slots, vectors)

    def run(self) -> None:
        """All tiles."""
        for index, (tile, slot, plan) in enumerate(self.plan):
            _TileEmitter(self, tile, slot * self.place.acc_slot, plan).run(last=index == len(self.plan) - 1)


def _behind(builder: ProgramBuilder, memory: str, size: int, depth: int) -> int:
    """First tile of `size` tiles behind those of the last operator if there is room, else 0."""
    base = builder.cursors.get(memory, 0)
    base = base if base + size <= depth else 0
    builder.cursors[memory] = base + size
    return base


def _pools(step: Gemm) -> tuple[str, str]:
    """Which slots hold the inputs and the weights of a step."""
    if is_constant(step):
        return "constant inp", "constant wgt"
    return "inp", "shared wgt" if is_shared(step) else "wgt"


def _plan(op: TileOp, tile: Tile, schedule: Schedule) -> list[list[Chunk]]:
    """The chunks of every GEMM step."""
    level, plan = 0, []
    for step in op.steps:
        if isinstance(step, Pool):
            level += 1
        elif isinstance(step, Gemm):
            plan.append(list(chunks(step, tile, level, schedule)))
    return plan


class _TileEmitter:
    """One output tile."""

    def __init__(self, parent: _Emitter, tile: Tile, slot: int, plan: list[list[Chunk]]) -> None:
        self.parent, self.builder, self.place = parent, Recorder(parent.builder), parent.place
        self.tile, self.slot, self.plan = tile, slot, plan
        self.level = 0
        self.gemms = 0
        total = tile.accumulators(0)
        # A rectangle of one or two accumulators has to be summed in parts, else they would recur too early.
        self.parts = 1 if total >= MIN_DISTANCE else -(-MIN_DISTANCE // total)

    @property
    def base(self) -> int:
        """First accumulator of the current rectangle."""
        return self.slot + self.place.levels[self.level]

    def run(self, *, last: bool) -> None:
        """All steps; those after the last GEMM or pooling piece by piece on the last tile."""
        steps = self.parent.op.steps
        clear(self.builder, self.base, self.tile.accumulators(0) * self.parts)
        if not _covered(self.parent.op, self.tile):
            self._immediate(Scalar("add", 0), (0, self.tile.accumulators(0)))
        tail = 1 + max(i for i, step in enumerate(steps) if isinstance(step, Gemm | Pool))
        for index, step in enumerate(steps[:tail]):
            if index and isinstance(steps[index - 1], Gemm) and not isinstance(step, Gemm):
                self._add_parts()
            self._step(step)
        if isinstance(steps[tail - 1], Gemm):
            self._add_parts()
        for piece in self._pieces() if last else [(0, self.tile.o.count, 0, self.tile.rows[self.level].count)]:
            for step in steps[tail:]:
                self._finish(step, piece)
        self.builder.flush()

    def _step(self, step: Step) -> None:
        if isinstance(step, Gemm):
            self._gemm(step)
        elif isinstance(step, Pool):
            source = self.base
            target = self.slot + self.place.levels[self.level + 1]
            pool(self.builder, step, self.tile, self.level, source, target)
            self.level += 1
        else:
            self._finish(step, (0, self.tile.o.count, 0, self.tile.rows[self.level].count))

    # --- reduction ---
    def _gemm(self, step: Gemm) -> None:
        inputs, weights = (self.parent.pools[name] for name in _pools(step))
        if self.parent.is_starting and is_dense(self.parent.op) and not is_shared(step):
            self._load_weights_early(self.plan[self.gemms])
        for chunk in self.plan[self.gemms]:
            inp, new_inputs = inputs.place(chunk.inputs)
            early = self.parent.early
            wgt, new_weights = (early.popleft(), False) if early else weights.place(chunk.weights)
            # Nothing computes yet: begin with the first input block instead of waiting for all.
            pieces = split(chunk) if self.parent.is_starting else [Piece.whole(chunk)]
            self.parent.is_starting = False
            for piece in pieces:
                # Weights first: inputs may still be on their way from the previous operator.
                if new_weights:
                    self._load("wgt", wgt, chunk.weights.region, piece.weight_transfers)
                if new_inputs:
                    self._load("inp", inp, chunk.inputs.plane.region, piece.input_transfers)
                self._reduce(piece, (self.base + chunk.accumulator, inp, wgt), step.passes)
        self.gemms += 1

    def _load_weights_early(self, plan: list[Chunk]) -> None:
        """All weights that fit, ahead of the inputs, which the previous operator may not have stored yet."""
        for chunk in plan[: self.place.wgt_slots]:
            base, missing = self.parent.pools["wgt"].place(chunk.weights)
            if missing:
                self._load("wgt", base, chunk.weights.region, tuple(chunk.weights.transfers()))
            self.parent.early.append(base)

    def _load(self, memory: Literal["inp", "wgt"], base: int, region: str, moves: tuple[Transfer, ...]) -> None:
        for move in moves:
            self.builder.load(
                memory, base + move.sram, region, move.dram, rows=move.rows, columns=move.columns, stride=move.stride
            )

    def _reduce(self, piece: Piece, bases: tuple[int, int, int], passes: int) -> None:
        """The instructions of a piece whose slots begin at `bases`."""
        if self.parts > 1:
            bodies = _in_parts(piece.shape, self.tile.accumulators(0), self.parts)
        else:
            bodies = _bodies(piece.shape)
        offset = np.array(bases) + np.array(piece.offset)
        for _ in range(passes):
            for body in bodies:
                self.builder.gemm(body.uops + offset, body.loops)

    def _add_parts(self) -> None:
        """Partial sums into the first one; from then on there is only that."""
        total = self.tile.accumulators(0)
        for part in range(1, self.parts):
            alu_nest(self.builder, "add", self.base, self.base + part * total, [(total, 1, 1)])
        self.parts = 1

    # --- the other steps, on pieces (first block, blocks, first row, rows) ---
    def _pieces(self) -> list[tuple[int, int, int, int]]:
        rows, columns = self.tile.rows[self.level].count, self.tile.columns[self.level].count
        per_block = rows * columns * self.tile.n.count
        if per_block < PIECE:
            step = -(-PIECE // per_block)
            starts = range(0, self.tile.o.count, step)
            return [(o, min(step, self.tile.o.count - o), 0, rows) for o in starts]
        return [(o, 1, 0, rows) for o in range(self.tile.o.count)]

    def _finish(self, step: Step, piece: tuple[int, int, int, int]) -> None:
        first, count, row, rows = piece
        width, positions = self.tile.columns[self.level].count, self.tile.positions(self.level)
        start = self.base + first * positions + row * width
        batches = (self.tile.n.count, self.tile.o.count * positions)
        if isinstance(step, Vector):
            vector = self._vector(step) + first
            axes = [(*batches, 0), (count, positions, 1), (rows * width, 1, 0)]
            alu_nest(self.builder, step.kind, start, vector, axes)
        elif isinstance(step, Scalar):
            axes = [(n, dst, dst) for n, dst in (batches, (count, positions), (rows * width, 1))]
            if step.kind == "double":
                alu_nest(self.builder, "add", start, start, axes)
            else:
                alu_nest(self.builder, step.kind, start, start, axes, step.value)
        elif isinstance(step, Store):
            self._store(step, piece, start)

    def _immediate(self, step: Scalar, span: tuple[int, int]) -> None:
        start = self.base + span[0]
        alu_nest(self.builder, "add", start, start, [(span[1], 1, 1)], step.value)

    def _vector(self, step: Vector) -> int:
        """First accumulator of the vector's tiles for this tile's blocks."""
        key = (step.region, step.base + self.tile.o.start, self.tile.o.count)
        base, missing = self.parent.vectors.place(key)
        if missing:
            count = self.tile.o.count
            self.builder.load("acc", base, step.region, key[1], columns=count, stride=count)
        return base

    def _store(self, step: Store, piece: tuple[int, int, int, int], start: int) -> None:
        first, count, row, rows = piece
        tile, plane = self.tile, step.plane
        y, x = tile.rows[self.level], tile.columns[self.level]
        for n in range(tile.n.count):
            base = plane.base + (tile.n.start + n) * plane.batch_stride + (tile.o.start + first) * plane.block_stride
            base += (y.start + row) * plane.row_stride + x.start
            axes = [(count, plane.block_stride), (rows, plane.row_stride)]
            sram = start + n * tile.o.count * tile.positions(self.level)
            for move in transfers(base, axes, x.count):
                self.builder.store(
                    sram + move.sram, plane.region, move.dram, rows=move.rows, columns=move.columns, stride=move.stride
                )


def _bodies(shape: GemmShape) -> tuple[Body, ...]:
    """The instructions of a piece; with columns as a loop if asked for, possible, and not too long."""
    bodies = column_bodies(shape) if shape.inner == "x" else ()
    if not bodies or max(len(body.uops) for body in bodies) > SEQUENCE_LIMIT:
        return gemm_bodies(shape)
    return bodies


@lru_cache(maxsize=512)
def _in_parts(shape: GemmShape, total: int, parts: int) -> tuple[Body, ...]:
    """The instructions of a chunk with every accumulator replaced by `parts` partial sums in turn."""
    operations = np.concatenate([expand([body]) for body in gemm_bodies(shape)])
    seen: dict[int, int] = {}
    for row in operations:
        accumulator = int(row[0])
        turn = seen.get(accumulator, 0)
        seen[accumulator] = turn + 1
        row[0] += turn % parts * total
    return tuple(flat_bodies(operations))


def _covered(op: TileOp, tile: Tile) -> bool:
    """Whether every accumulator gets a product or an ALU result before it is stored (a reset alone does not count)."""
    reached = np.zeros((tile.rows[0].count, tile.columns[0].count), bool)
    for step in op.steps:
        if isinstance(step, Store):
            break
        if not isinstance(step, Gemm):
            return True
        for tap in clip_taps(step.taps, tile.rows[0], tile.columns[0]):
            y = tap.dst_y.start + tap.dst_y.step * np.arange(tap.dst_y.count)
            x = tap.dst_x.start + tap.dst_x.step * np.arange(tap.dst_x.count)
            reached[np.ix_(y, x)] = True
    return bool(reached.all())
