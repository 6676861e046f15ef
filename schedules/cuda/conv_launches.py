"""The launches of a tensor-core layer: the product itself, and the one that adds the parts of a divided inner
dimension.
"""

from __future__ import annotations

from typing import Any

from lpsn_tvm.schedules.cuda import intrinsics
from lpsn_tvm.schedules.cuda.conv_core import BlockProgram
from lpsn_tvm.schedules.cuda.epilogue import CHANNELS, Epilogue
from lpsn_tvm.schedules.cuda.geometry import KSTEP, TABLE, ConvGeometry
from lpsn_tvm.schedules.cuda.isa import BLOCK, CudaIsa
from lpsn_tvm.schedules.cuda.tir import (
    call,
    launch,
    pointer,
    prim_func,
    registers,
    store,
    unravel,
    when,
)

REDUCE_THREADS = 128


def convolution(geometry: ConvGeometry, isa: CudaIsa) -> Any:
    """The PrimFunc (data, [residual], weight, bias, scale, floats, integers, padding, [table], out); constants as
    `weights` makes them.
    """
    g = geometry
    arguments: list[tuple[str, tuple[int, ...], str]] = [("data", g.in_shape, g.in_dtype)]
    if g.has_residual:
        arguments.append(("residual", g.out_shape, g.out_dtype))
    arguments += [
        ("weight", g.weight_shape, "int8" if g.weight_bits == 8 else "uint8"),
        ("bias", (g.packed_blocks, BLOCK), "int32"),
        ("scale", (g.packed_blocks, BLOCK), "float32"),
        ("floats", (4,), "float32"),
        ("integers", (4,), "int32"),
        ("padding", (KSTEP,), g.in_dtype),
        *([("table", (TABLE,), "uint8")] if g.has_table else []),
        ("out", g.written_shape, g.out_dtype),
    ]
    parts = [("workspace", (g.tile.splits, *g.out_shape), "int32")] if g.tile.splits > 1 else []

    def body(data: Any, *rest: Any) -> None:
        residual = rest[0] if g.has_residual else None
        weight, bias, scale, floats, integers, padding, *last = rest[1:] if g.has_residual else rest
        table = last.pop(0) if g.has_table else None
        out, *parts = last
        is_unpacked = g.weight_bits == 4 and not g.multiplies_nibbles
        epilogue = Epilogue(
            bias, scale, floats, integers, residual, out, g.out_dtype, is_unpacked, g.multiplies_nibbles,
            g.clamps_residual, table=table, plain=g.plain,
        )  # fmt: skip
        workspace = parts[0] if parts else None
        with launch((g.row_tiles * g.column_tiles, g.tile.splits), g.tile.threads) as (blocks, thread):
            BlockProgram(g, isa, data, weight, padding, epilogue, workspace, blocks[0], blocks[1], thread).emit()
        if workspace is not None:
            _add_parts(g, workspace, epilogue)

    return prim_func(arguments, body, parts)


def _add_parts(g: ConvGeometry, workspace: Any, epilogue: Epilogue) -> None:
    """Second launch: eight channels of one pixel per thread."""
    pixels = g.out_size[0] * g.out_size[1]
    pieces = BLOCK // CHANNELS
    total = g.batch * g.out_blocks * pixels * pieces
    with launch((-(-total // REDUCE_THREADS),), REDUCE_THREADS) as ((block,), thread):
        index = block * REDUCE_THREADS + thread
        with when(True if total % REDUCE_THREADS == 0 else index < total):
            sums, part = registers(CHANNELS), registers(CHANNELS)
            for split in range(g.tile.splits):
                for i in range(0, CHANNELS, 4):
                    source = pointer(workspace, split * total * CHANNELS + index * CHANNELS + i)
                    call(intrinsics.copy(16), pointer(part if split else sums, i), source)
                if split:
                    for i in range(CHANNELS):
                        store(sums, i, sums[i] + part[i])
            _, channel_block, _, piece = unravel(index, g.batch, g.out_blocks, pixels, pieces)
            epilogue.load(channel_block * BLOCK + piece * CHANNELS)
            epilogue.finish([sums[i] for i in range(CHANNELS)], index * CHANNELS)
