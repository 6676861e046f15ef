"""What surrounds the tiled loops of a convolution: the padded copy of the input, and putting the phases of a
transposed convolution together.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.llvm.dot import BLOCK
from lpsn_tvm.schedules.llvm.geometry import Geometry
from lpsn_tvm.schedules.llvm.tir import loop, map_elements, unravel, vcast, vector, vload, vstore


def padded(g: Geometry, data: Any, integers: Any) -> tuple[Any, tuple[int, int, int, int]]:
    """Copy the input into a workspace with the padding value around it, widened to int16 where pairs are multiplied."""
    top, left, bottom, right = g.pads
    rows, columns = g.in_size[0] + top + bottom, g.in_size[1] + left + right
    pixel = g.in_block
    strides = (g.in_blocks * rows * columns * pixel, rows * columns * pixel, columns * pixel, pixel)
    wide = g.quad == 2
    dtype = "int16" if wide else g.in_dtype
    work = T.alloc_buffer((g.batch * strides[0] + 64,), dtype)
    lanes = 32 if wide else 64
    source_row = g.in_size[1] * pixel
    contiguous = g.in_strides[3] == pixel

    def fill(start: Any, count: int) -> None:
        value = T.cast(integers[0], dtype)
        map_elements(count, lanes, lambda i, n: vstore(work, start + i, vector(value, n), n))

    def copy(start: Any, source: Any, count: int) -> None:
        map_elements(count, lanes, lambda i, n: vstore(work, start + i, vcast(vload(data, source + i, n), dtype, n), n))

    total = g.batch * g.in_blocks * rows
    with loop(total, total * columns * pixel * 4) as index:
        n, c, y = unravel(index, g.batch, g.in_blocks, rows)
        base = index * strides[2]
        source = n * g.in_strides[0] + c * g.in_strides[1] + (y - top) * g.in_strides[2]

        def inside() -> None:
            if left:
                fill(base, left * pixel)
            if contiguous:
                copy(base + left * pixel, source, source_row)
            else:
                with T.serial(0, g.in_size[1]) as x:
                    copy(base + (left + x) * pixel, source + x * g.in_strides[3], pixel)
            if right:
                fill(base + (left + g.in_size[1]) * pixel, right * pixel)

        if top or bottom:
            with T.If(T.And(y >= top, y < top + g.in_size[0])):
                with T.Then():
                    inside()
                with T.Else():
                    fill(base, columns * pixel)
        else:
            inside()
    return work, strides


def interleave(g: Geometry, work: Any, out: Any) -> None:
    """Put the phases of a transposed convolution next to each other."""
    assert g.phases is not None
    sy, sx = g.phases.strides
    rows, columns = g.out_size
    height, width = g.phases.out_size
    blocks = g.out_blocks // (sy * sx)
    total = g.batch * blocks * height
    with loop(total, total * width * BLOCK * 4) as index:
        n, o, y = unravel(index, g.batch, blocks, height)
        for px in range(min(sx, width)):
            virtual = (T.floormod(y, sy) * sx + px) * blocks + o
            source = ((n * g.out_blocks + virtual) * rows + T.floordiv(y, sy)) * columns
            with T.serial(0, -(-(width - px) // sx)) as x:
                vstore(out, (index * width + px + x * sx) * BLOCK, vload(work, (source + x) * BLOCK, BLOCK), BLOCK)
