"""Table lookups with the table in registers: four of 64 bytes for `vpermi2b`, or sixteen of 16 bytes for `pshufb`.
Tables of wider elements, and CPUs without such instructions, are left to the shared kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import loop, prim_func, vector, vload, vstore
from lpsn_tvm.schedules.lookup import byte_table

PIECE = 4096
"""Bytes of one task."""


def lookup(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.lookup` with a table of bytes."""
    data, table = inputs[0], byte_table(inputs[0], constants, attrs)
    if table is None:
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    lanes = table_lanes(isa, out.dtype)
    size = int(np.prod(data.memory_shape))
    if not lanes or size < lanes:
        return None
    return Kernel(lambda: _vectorized(data, out, size, isa), (table,), out, ("lookup", data, out, isa), (data,))


def table_lanes(isa: Isa, dtype: str) -> int:
    """Bytes that one vector lookup handles; 0 where the table is read byte by byte."""
    if dtype not in ("uint8", "int8"):
        return 0
    return 64 if isa.has_vbmi else isa.vector_bytes if isa.vector_bytes >= 32 else 0


def table_reader(isa: Isa, table: Any) -> Callable[[Any], Any]:
    """A function of `table_lanes` unsigned byte indices that gives the bytes of `table` (a flat buffer of 256)."""
    if isa.has_vbmi:
        quarters = [T.reinterpret("int8x64", vload(table, 64 * i, 64)) for i in range(4)]
        permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpermi2var.qi.512")

        def read(index: Any) -> Any:
            # The instruction looks at the low seven bits; the sign chooses between the halves.
            signed = T.reinterpret("int8x64", index)
            low, high = (
                T.call_llvm_pure_intrin(permute, quarters[i], signed, quarters[i + 1], dtype="int8x64") for i in (0, 2)
            )
            return tirx.Select(signed < vector(tirx.const(0, "int8"), 64), high, low)

        return read
    lanes = isa.vector_bytes
    rows = [tirx.Shuffle([vload(table, 16 * i, 16)] * (lanes // 16), list(range(lanes))) for i in range(16)]
    name = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}[lanes]
    shuffle, saturating = T.llvm_lookup_intrinsic_id(name), T.llvm_lookup_intrinsic_id("llvm.uadd.sat")
    kind = f"int8x{lanes}"

    def read_rows(index: Any) -> Any:
        result = None
        for i, row in enumerate(rows):
            # Indices of row i become 0x70..0x7f, all others at least 0x80: for those `pshufb` gives zero.
            moved = index - vector(tirx.const(16 * i, "uint8"), lanes)
            marked = T.call_llvm_pure_intrin(
                saturating, moved, vector(tirx.const(0x70, "uint8"), lanes), dtype=f"uint8x{lanes}"
            )
            found = T.call_llvm_pure_intrin(shuffle, T.reinterpret(kind, row), T.reinterpret(kind, marked), dtype=kind)
            result = found if result is None else result | found
        return result

    return read_rows


def _vectorized(data: TensorSpec, out: TensorSpec, size: int, isa: Isa) -> Any:
    """Bytes in, bytes out; the last vector overlaps its neighbour."""
    lanes = table_lanes(isa, out.dtype)
    arguments = [
        ("data", data.memory_shape, data.dtype),
        ("table", (256,), out.dtype),
        ("out", out.memory_shape, out.dtype),
    ]

    def body(source: Any, table: Any, target: Any) -> None:
        def step(at: Any) -> None:
            read = table_reader(isa, table)
            index = T.reinterpret(f"uint8x{lanes}", vload(source, at, lanes))
            vstore(target, at, T.reinterpret(f"{out.dtype}x{lanes}", read(index)), lanes)

        pieces = size // PIECE
        if pieces:
            with loop(pieces, size * 8) as i, T.serial(0, PIECE // lanes) as j:
                step(i * PIECE + j * lanes)
        rest = size - pieces * PIECE
        if rest >= lanes:
            with T.serial(0, rest // lanes) as j:
                step(pieces * PIECE + j * lanes)
        if size % lanes:
            step(size - lanes)

    return prim_func(arguments, body)
