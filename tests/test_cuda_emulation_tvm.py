"""CUDA that TVM generates, run in the emulation: instructions by name, vectors, shared memory, arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from cuda_emulation import EmulationError, compile_kernel
from cuda_emulation.build import compiler
from tvm.script import tirx as T

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is missing")


def _source(function: Any) -> str:
    """The CUDA source of a function. Without a driver TVM embeds the source itself, so nothing has to be compiled."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host="llvm")
    with target:
        module = tvm.compile(tvm.IRModule({"main": function}), target=target).mod
    return str(module.imports[0].inspect_source())


def _matrix_product(lanes: int) -> Any:
    """16 x 32 times 32 x 8 by ldmatrix and mma; shared memory is written in vectors of `lanes`."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, c: T.handle) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        A = T.match_buffer(a, (16, 32), "int8")
        B = T.match_buffer(b, (8, 32), "int8")
        C = T.match_buffer(c, (16, 8), "int32")
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 32)
        tile = T.alloc_buffer((512,), "int8", scope="shared.dyn")
        a_part = T.alloc_buffer((16,), "int8", scope="local")
        b_part = T.alloc_buffer((8,), "int8", scope="local")
        sums = T.alloc_buffer((4,), "int32", scope="local")
        for i in range(16 // lanes):
            for j in T.vectorized(lanes):
                tile[tx * 16 + i * lanes + j] = A[tx // 2, tx % 2 * 16 + i * lanes + j]
        T.evaluate(T.tvm_storage_sync("shared"))
        for i in range(4):
            sums[i] = 0
        for i in range(8):
            b_part[i] = B[tx // 4, tx % 4 * 4 + i % 4 + i // 4 * 16]
        T.evaluate(
            T.ptx_legacy.ldmatrix(
                False, 4, ".b16", a_part.data, 0, tile.data, tx % 16 * 32 + tx // 16 * 16, dtype="int8"
            )
        )
        T.evaluate(
            T.ptx_legacy.mma(
                "m16n8k32", "row", "col", "int8", "int8", "int32", a_part.data, 0, b_part.data, 0, sums.data, 0, False,
                dtype="int32",
            )
        )  # fmt: skip
        for i in range(4):
            C[tx // 4 + i // 2 * 8, tx % 4 * 2 + i % 2] = sums[i]

    return main


def _run_matrix_product(lanes: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (rows, 32)).astype(np.int8) for rows in (16, 8))
    c = np.zeros((16, 8), np.int32)
    compile_kernel(_source(_matrix_product(lanes)), "main_kernel").run_all_orders(1, 32, 512, a, b, c)
    np.testing.assert_array_equal(c, a.astype(np.int32) @ b.T.astype(np.int32))


def test_tensor_core_kernel() -> None:
    _run_matrix_product(lanes=1)


def test_wrong_address_of_retyped_shared_memory_is_found() -> None:
    """Shared memory that is only written in 16-byte vectors gets the type int4 from TVM, but the offset in bytes that
    ldmatrix was given stays as it is, and is then counted in units of 16 bytes.
    """
    with pytest.raises(EmulationError, match=r"of 512 bytes of dynamic shared memory|not in shared memory"):
        _run_matrix_product(lanes=16)


@T.prim_func(s_tir=True)
def _requantize(data: T.handle, factor: T.handle, out: T.handle) -> None:
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    X = T.match_buffer(data, (1024,), "int32")
    F = T.match_buffer(factor, (4,), "float32")
    Y = T.match_buffer(out, (1024,), "uint8")
    bx = T.launch_thread("blockIdx.x", 4)
    tx = T.launch_thread("threadIdx.x", 64)
    for i in T.vectorized(4):
        Y[bx * 256 + tx * 4 + i] = T.Cast(
            "uint8",
            T.Cast("int32", T.nearbyint(T.min(T.max(T.Cast("float32", X[bx * 256 + tx * 4 + i]) * F[i], -9.0), 246.0)))
            + 9,
        )


def test_vector_arithmetic() -> None:
    rng = np.random.default_rng(1)
    x, factor = rng.integers(-2000, 2000, 1024).astype(np.int32), np.float32([0.5, 0.1, 0.0625, 0.2])
    out = np.zeros(1024, np.uint8)
    kernel = compile_kernel(_source(_requantize), "main_kernel")
    # TVM orders the parameters of a kernel as it likes.
    arrays = {"X_ptr": x, "F_ptr": factor, "Y_ptr": out}
    kernel.run_all_orders(4, 64, 0, *(arrays[name] for name in kernel.signature.parameters))
    want = np.rint(np.clip(x.astype(np.float32) * np.resize(factor, 1024), np.float32(-9), np.float32(246))) + 9
    np.testing.assert_array_equal(out, want.astype(np.uint8))
