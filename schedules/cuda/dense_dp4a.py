"""Dense layers of few samples: reading the weights is all the work, so one warp reads the weights of one output channel
and adds dot products of four bytes (dp4a); eight warps of a block finish eight neighbouring channels.

Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.epilogue import CHANNELS, Epilogue, has_table, tables
from lpsn_tvm.schedules.cuda.geometry import TABLE
from lpsn_tvm.schedules.cuda.isa import BLOCK, WARP, CudaIsa
from lpsn_tvm.schedules.cuda.plain_output import PlainOutput, plain_output
from lpsn_tvm.schedules.cuda.tir import barrier, call, launch, pointer, prim_func, registers, shared, store, when
from lpsn_tvm.schedules.cuda.weights import nibble_shift, parameters, per_channel
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec

MOST_ROWS = 4
"""Samples up to which tensor cores would mostly multiply by nothing."""
STEP = 16
"""Bytes of the input that a lane takes at once."""


@dataclass(frozen=True)
class RowsGeometry:
    """Everything that the code depends on; `in_shape` and `out_shape` are those of the buffers."""

    rows: int
    in_blocks: int
    out_blocks: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_dtype: str
    out_dtype: str
    has_residual: bool
    weight_bits: int
    has_table: bool = False
    plain: PlainOutput | None = None

    @property
    def steps(self) -> int:
        """Pieces of `STEP` bytes in a row."""
        return self.in_blocks * BLOCK // STEP

    @property
    def sum_bytes(self) -> int:
        """Sums of a block in shared memory."""
        return self.rows * CHANNELS * 4

    @property
    def step_bytes(self) -> int:
        """Weights that belong to one piece, in bytes."""
        return STEP * self.weight_bits // 8


def few_rows(
    specs: tuple[TensorSpec, TensorSpec],
    weight: Array,
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    isa: CudaIsa,
    *,
    has_residual: bool,
) -> Kernel:
    """Kernel of a dense layer: `specs` are input and output, in blocks of 32, without pixels or with one; `weight` is
    int8[output channels, input channels].
    """
    data, out = specs
    shift = nibble_shift(weight)
    plain = plain_output(out, attrs)
    geometry = RowsGeometry(
        rows=data.shape[0],
        in_blocks=data.blocks,
        out_blocks=out.blocks,
        in_shape=data.memory_shape,
        out_shape=out.memory_shape if plain is None else plain.spec.shape,
        in_dtype=data.dtype,
        out_dtype=out.dtype,
        has_residual=has_residual,
        weight_bits=8 if shift is None else 4,
        has_table=has_table(attrs),
        plain=plain,
    )
    packed = (
        pack_rows(weight >> (shift or 0), geometry),
        per_channel(constants["bias"], "int32", weight.shape[0], out.blocks),
        per_channel(constants["scale"], "float32", weight.shape[0], out.blocks),
        *parameters(attrs, data.dtype, shift or 0)[:2],
        *tables(attrs),
    )
    wanted = (data, out) if has_residual else (data,)
    out = out if plain is None else plain.spec
    return Kernel(lambda: rows_function(geometry), packed, out, ("dense_dp4a", isa, geometry), wanted)


def pack_rows(weight: Array, geometry: RowsGeometry) -> Array:
    """int8[O, C] -> int8 or uint8[O rounded up, steps, bytes]; with 4 bits, word w of a piece holds bytes 8w .. 8w+3
    in the low nibbles and 8w+4 .. 8w+7 in the high ones.
    """
    g = geometry
    full = np.zeros((g.out_blocks * BLOCK, g.in_blocks * BLOCK), np.int8)
    full[: weight.shape[0], : weight.shape[1]] = weight
    if g.weight_bits == 8:
        return full.reshape(len(full), g.steps, STEP)
    nibbles = full.view(np.uint8).reshape(len(full), g.steps, 2, 2, 4) & 15
    words = nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << 4
    return np.ascontiguousarray(words).reshape(len(full), g.steps, g.step_bytes)


def rows_function(geometry: RowsGeometry) -> Any:
    """The PrimFunc (data, [residual], weight, bias, scale, floats, integers, [table], out)."""
    g = geometry
    channels = g.out_blocks * BLOCK
    arguments: list[tuple[str, tuple[int, ...], str]] = [("data", g.in_shape, g.in_dtype)]
    if g.has_residual:
        arguments.append(("residual", g.out_shape, g.out_dtype))
    arguments += [
        ("weight", (channels, g.steps, g.step_bytes), "int8" if g.weight_bits == 8 else "uint8"),
        ("bias", (g.out_blocks, BLOCK), "int32"),
        ("scale", (g.out_blocks, BLOCK), "float32"),
        ("floats", (4,), "float32"),
        ("integers", (4,), "int32"),
        *([("table", (TABLE,), "uint8")] if g.has_table else []),
        ("out", g.out_shape, g.out_dtype),
    ]

    def body(data: Any, *rest: Any) -> None:
        residual = rest[0] if g.has_residual else None
        weight, bias, scale, floats, integers, *table, out = rest[1:] if g.has_residual else rest
        epilogue = Epilogue(
            bias, scale, floats, integers, residual, out, g.out_dtype, g.weight_bits == 4,
            table=table[0] if table else None, plain=g.plain,
        )  # fmt: skip
        with launch((channels // CHANNELS,), CHANNELS * WARP) as ((block,), thread):
            memory = shared(g.sum_bytes + TABLE) if g.has_table else None
            last = epilogue.with_shared_table(memory, g.sum_bytes, thread)
            totals = registers(g.rows)
            for row in range(g.rows):
                store(totals, row, 0)
            warp, lane = T.truncdiv(thread, WARP), T.truncmod(thread, WARP)
            _add_products(g, totals, data, weight, block * CHANNELS + warp, lane)
            memory = shared(g.sum_bytes) if memory is None else memory
            for row in range(g.rows):
                store(totals, row, call(intrinsics.WARP_SUM, totals[row], returns="int32"))
                with when(lane == 0):
                    call(intrinsics.copy(4), pointer(memory, (row * CHANNELS + warp) * 4), pointer(totals, row))
            barrier()
            with when(thread < g.rows):
                sums = registers(CHANNELS)
                for i in range(0, CHANNELS, 4):
                    call(intrinsics.copy(16), pointer(sums, i), pointer(memory, thread * (CHANNELS * 4) + i * 4))
                last.load(block * CHANNELS)
                last.finish([sums[i] for i in range(CHANNELS)], thread * channels + block * CHANNELS)

    return prim_func(arguments, body)


def _add_products(g: RowsGeometry, totals: Any, data: Any, weight: Any, channel: Any, lane: Any) -> None:
    """totals[row] += what this lane reads of the channel's weights."""
    dot = intrinsics.dot(g.in_dtype)
    words = registers(4)
    values = registers(4)
    packed = registers(2)
    with T.serial(0, -(-g.steps // WARP)) as i:
        step = i * WARP + lane
        with when(True if g.steps % WARP == 0 else step < g.steps):
            source = pointer(weight, (channel * g.steps + step) * g.step_bytes)
            if g.weight_bits == 4:
                call(intrinsics.copy(8), pointer(packed), source)
                call(intrinsics.UNPACK_PAIR, pointer(words), pointer(packed))
            else:
                call(intrinsics.copy(16), pointer(words), source)
            for row in range(g.rows):
                call(intrinsics.copy(16), pointer(values), pointer(data, row * (g.steps * STEP) + step * STEP))
                for k in range(STEP // 4):
                    store(totals, row, call(dot, values[k], words[k], totals[row], returns="int32"))
