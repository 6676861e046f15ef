"""The integer dot product of every instruction set, and the epilogue that all weighted integer kernels share."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import bounded, requantized, vcast, vector, vload, vstore

BLOCK = 16
"""Channels per block of tensors between operators, and of every weight layout."""


def quad_of(isa: Isa, dtype: str) -> int:
    """How many products the dot instruction adds per lane: 4 (VNNI, uint8 data), 2 (vpmaddwd on int16), 1 (none)."""
    if isa.dot == "none":
        return 1
    return 4 if isa.dot.startswith("vnni") and dtype == "uint8" else 2


def lanes_of(isa: Isa) -> int:
    """int32 lanes of one vector statement; without a dot instruction LLVM cuts a whole block as it likes."""
    return BLOCK if isa.dot == "none" else isa.vector_bytes // 4


def store_epilogue(
    acc: Any, scale: Any, residual: Any, floats: Any, integers: Any, out: Any, at: Any, lanes: int
) -> None:
    """Finish one vector: scale, optional residual, requantize or float32 (the accumulator started at the bias)."""
    value = vcast(acc, "float32", lanes) * scale
    dtype = str(out.dtype)
    if dtype == "float32":
        vstore(out, at, value, lanes)
        return
    if residual is not None:
        other = vcast(vload(residual, at, lanes), "int32", lanes) - vector(integers[2], lanes)
        scaled = vcast(other, "float32", lanes) * vector(floats[2], lanes)
        value = bounded(value, lanes) + bounded(scaled, lanes)
    vstore(out, at, requantized(value, floats[0], floats[1], integers[1], dtype, lanes), lanes)


def broadcast_quad(data: Any, at: Any, quad: int, lanes: int) -> Any:
    """`data[at : at + quad]` repeated in every lane, as the dot instruction wants its first operand."""
    if quad == 1:
        return vector(T.cast(data[at], "int32"), lanes)
    scalar = vector(T.reinterpret("int32", vload(data, at, quad)), lanes)
    return T.reinterpret(f"int8x{lanes * 4}" if quad == 4 else f"int16x{lanes * 2}", scalar)


def dot(isa: Isa, acc: Any, data: Any, weights: Any, quad: int, lanes: int) -> Any:
    """`acc + sum over each quad of data * weights`, lane by lane, exactly in int32."""
    if quad == 1:
        return acc + data * vcast(weights, "int32", lanes)
    if quad == 4:
        intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.avx512.vpdpbusd.{lanes * 32}")
        return T.call_llvm_pure_intrin(intrinsic, acc, data, weights, dtype=f"int32x{lanes}")
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd")
    return acc + T.call_llvm_pure_intrin(intrinsic, data, weights, dtype=f"int32x{lanes}")
