"""Table lookups: any function of one quantized tensor. Tables are widened to 256 entries, so that every byte is a
valid index.

A table of bytes lies in registers: four of 64 bytes for `vpermi2b`, or sixteen of 16 bytes for `pshufb`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import loop, prim_func, vector, vload, vstore
from lpsn_tvm.schedules.llvm.views import elementwise_kernel
from lpsn_tvm.schedules.views import View, compute

PIECE = 4096
"""Bytes of one task."""


def lookup(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.lookup`: `table[q - qmin]`."""
    data, table = inputs[0], constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    wide = widened(table, data.dtype, int(attrs["qmin"]))
    lanes = table_lanes(isa, out.dtype)
    size = int(np.prod(data.memory_shape))
    if lanes and size >= lanes:
        return Kernel(lambda: _vectorized(data, out, size, isa), (wide,), out, ("lookup", data, out, isa), (data,))

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda *i: t[_byte(q(*i))])

    return elementwise_kernel("lookup", (data,), (wide,), out, define, vectorized=False)


def channel_lookup(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.channel_lookup`: one table per channel."""
    data, table = inputs[0], constants.get("table")
    if table is None or data.dtype not in ("uint8", "int8"):
        return None
    out = TensorSpec(data.shape, str(table.dtype), data.block)
    channels = data.blocks * data.block if data.block else data.shape[1]
    wide = np.zeros((channels, 256), table.dtype)
    wide[: table.shape[0]] = widened(table, data.dtype, int(attrs["qmin"]))

    def define(q: View, t: Any) -> Any:
        return compute(out, lambda n, c, *rest: t[c, _byte(q(n, c, *rest))])

    return elementwise_kernel("channel_lookup", (data,), (wide,), out, define, vectorized=False)


def widened(table: Array, dtype: str, qmin: int) -> Array:
    """[..., 2**bits] -> [..., 256], indexed by the byte of the stored integer (two's complement)."""
    entries = table.shape[-1]
    index = np.clip(np.arange(256, dtype=np.uint8).view(dtype).astype(np.int32) - qmin, 0, entries - 1)
    return np.ascontiguousarray(table[..., index])


def _byte(q: Any) -> Any:
    return q.astype("int32") & 255


# --- tables in registers ----------------------------------------------------------------------------------------------


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
