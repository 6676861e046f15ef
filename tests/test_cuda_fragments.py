"""Fragment layouts of tensor-core instructions, as emulated or on a GPU, against the tables of the PTX ISA.

The formulas below are those of the PTX ISA, section "Matrix multiply-accumulate operation using mma instruction",
written per instruction as they are printed there (`group` is groupID, `tig` is threadID_in_group); the emulation
derives its layout from one rule, so the two are independent. The 8-bit ones agree with the layouts of CUTLASS
(cute/atom/mma_traits_sm80.hpp), which has the same pattern of registers for 1-bit m16n8k256; so do operand order and
signs of the 4-bit ones (cute/arch/mma_sm80.hpp).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from cuda_emulation import EmulationError, UnknownInstructionError
from cuda_emulation import compile_kernel as compile_emulated
from cuda_emulation.build import compiler
from cuda_executors import compile_kernel

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is missing")

Place = Callable[[int, int, int], tuple[int, int]]
# (m, n, k, bits) -> places of a, b and c as functions of (group, tig, i).
TABLES: dict[tuple[int, int, int, int], tuple[Place, Place, Place]] = {
    (8, 8, 16, 8): (
        lambda group, tig, i: (group, tig * 4 + i),
        lambda group, tig, i: (tig * 4 + i, group),
        lambda group, tig, i: (group, tig * 2 + i),
    ),
    (16, 8, 16, 8): (
        lambda group, tig, i: (group if i < 4 else group + 8, tig * 4 + (i & 3)),
        lambda group, tig, i: (tig * 4 + i, group),
        lambda group, tig, i: (group if i < 2 else group + 8, tig * 2 + (i & 1)),
    ),
    (16, 8, 32, 8): (
        lambda group, tig, i: (
            group if 0 <= i < 4 or 8 <= i < 12 else group + 8,
            tig * 4 + (i & 3) if i < 8 else tig * 4 + (i & 3) + 16,
        ),
        lambda group, tig, i: (tig * 4 + (i & 3) if i < 4 else tig * 4 + (i & 3) + 16, group),
        lambda group, tig, i: (group if i < 2 else group + 8, tig * 2 + (i & 1)),
    ),
    (8, 8, 32, 4): (
        lambda group, tig, i: (group, tig * 8 + i),
        lambda group, tig, i: (tig * 8 + i, group),
        lambda group, tig, i: (group, tig * 2 + i),
    ),
    (16, 8, 32, 4): (
        lambda group, tig, i: (group if i < 8 else group + 8, tig * 8 + (i & 7)),
        lambda group, tig, i: (tig * 8 + (i & 7), group),
        lambda group, tig, i: (group if i < 2 else group + 8, tig * 2 + (i & 1)),
    ),
    (16, 8, 64, 4): (
        lambda group, tig, i: (
            group if 0 <= i < 8 or 16 <= i < 24 else group + 8,
            tig * 8 + (i & 7) if i < 16 else tig * 8 + (i & 7) + 32,
        ),
        lambda group, tig, i: (tig * 8 + (i & 7) if i < 8 else tig * 8 + (i & 7) + 32, group),
        lambda group, tig, i: (group if i < 2 else group + 8, tig * 2 + (i & 1)),
    ),
}
SIGNS = tuple(product("su", "su"))


def _name(shape: tuple[int, int, int, int], a: str, b: str, saturate: bool = False) -> str:
    m, n, k, bits = shape
    return f"mma_m{m}n{n}k{k}_{a}{bits}_{b}{bits}" + "_sat" * saturate


def _mma_kernel(shape: tuple[int, int, int, int], a: str, b: str, saturate: bool = False) -> str:
    """One warp: registers from memory, one instruction, registers to memory."""
    m, n, k, bits = shape
    counts = (m * n // 32, m * k * bits // 1024, k * n * bits // 1024, m * n // 32)
    starts = np.cumsum([0, *counts])
    groups = ["{" + ", ".join(f"%{starts[g] + i}" for i in range(count)) + "}" for g, count in enumerate(counts)]
    opcode = f"mma.sync.aligned.m{m}n{n}k{k}.row.col{'.satfinite' * saturate}.s32.{a}{bits}.{b}{bits}.s32 " + ", ".join(
        groups
    )
    outputs = ", ".join(f'"=r"(d[{i}])' for i in range(counts[0]))
    inputs = [
        f'"r"({x}[lane * {count} + {i}])' for x, count in zip("abc", counts[1:], strict=True) for i in range(count)
    ]
    return f"""
extern "C" __global__ void {_name(shape, a, b, saturate)}(const unsigned* a, const unsigned* b, const int* c,
                                                          int* out) {{
  const int lane = threadIdx.x;
  int d[{counts[0]}];
  asm volatile("{opcode};" : {outputs} : {", ".join(inputs)});
  for (int i = 0; i < {counts[0]}; ++i) out[lane * {counts[0]} + i] = d[i];
}}
"""


MMA_SOURCE = "".join(_mma_kernel(shape, a, b) for shape in TABLES for a, b in SIGNS) + _mma_kernel(
    (16, 8, 32, 8), "u", "s", saturate=True
)


def _random(rng: np.random.Generator, sign: str, bits: int, shape: tuple[int, int]) -> np.ndarray:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if sign == "s" else (0, 1 << bits)
    return rng.integers(low, high, shape)


def _to_registers(matrix: np.ndarray, place: Place, bits: int) -> np.ndarray:
    """The 32-bit registers of all lanes; element i of a lane fills bits [i * bits, ...) of its registers."""
    per_lane, per_register = matrix.size // 32, 32 // bits
    registers = np.zeros((32, per_lane // per_register), np.uint64)
    for lane, i in product(range(32), range(per_lane)):
        value = int(matrix[place(lane >> 2, lane % 4, i)]) & (1 << bits) - 1
        registers[lane, i // per_register] |= np.uint64(value << i % per_register * bits)
    return registers.astype(np.uint32)


def _from_registers(registers: np.ndarray, place: Place, shape: tuple[int, int]) -> np.ndarray:
    matrix = np.full(shape, 1 << 40)
    for lane, i in product(range(32), range(registers.shape[1])):
        matrix[place(lane >> 2, lane % 4, i)] = registers[lane, i]
    return matrix


@pytest.mark.parametrize(("a_sign", "b_sign"), SIGNS)
@pytest.mark.parametrize("shape", TABLES, ids=str)
def test_mma_equals_a_matrix_product(shape: tuple[int, int, int, int], a_sign: str, b_sign: str) -> None:
    m, n, k, bits = shape
    place_a, place_b, place_c = TABLES[shape]
    rng = np.random.default_rng(m * k + bits)
    a, b = _random(rng, a_sign, bits, (m, k)), _random(rng, b_sign, bits, (k, n))
    c = rng.integers(-(1 << 31), 1 << 31, (m, n))
    c_registers = _to_registers(c, place_c, 32).view(np.int32)
    out = np.zeros_like(c_registers)
    kernel = compile_kernel(MMA_SOURCE, _name(shape, a_sign, b_sign))
    kernel.run_all_orders(1, 32, 0, _to_registers(a, place_a, bits), _to_registers(b, place_b, bits), c_registers, out)
    wrapped = (a @ b + c).astype(np.uint32).view(np.int32).reshape(m, n)
    np.testing.assert_array_equal(_from_registers(out, place_c, (m, n)), wrapped)


def test_satfinite_clamps() -> None:
    shape = (16, 8, 32, 8)
    a, b = np.full((16, 32), 255), np.repeat([[127], [-128]], [16, 16], axis=0) * np.ones((1, 8), int)
    b[:, :4] = 127
    b[:, 4:] = -128
    c = np.where(np.arange(8) < 4, 2**31 - 1, -(2**31)) * np.ones((16, 1), int)
    out = np.zeros((32, 4), np.int32)
    place_a, place_b, place_c = TABLES[shape]
    compile_kernel(MMA_SOURCE, _name(shape, "u", "s", saturate=True))(
        1, 32, 0, _to_registers(a, place_a, 8), _to_registers(b, place_b, 8), _to_registers(c, place_c, 32), out
    )
    np.testing.assert_array_equal(_from_registers(out, place_c, (16, 8)), c)


def test_mma_needs_a_whole_warp() -> None:
    kernel = compile_emulated(MMA_SOURCE, _name((8, 8, 16, 8), "s", "s"))
    registers = np.zeros((32, 2), np.int32)
    with pytest.raises(EmulationError, match="fewer than 32 threads"):
        kernel(1, 16, 0, registers, registers.copy(), registers.copy(), registers.copy())


LDMATRIX_SOURCE = "".join(
    f"""
extern "C" __global__ void ldmatrix_x{count}{trans}(const uint4* rows, const int* address, unsigned* out) {{
  __shared__ uint4 tile[{8 * count}];
  const int lane = threadIdx.x;
  if (lane < {8 * count}) tile[lane] = rows[lane];
  __syncthreads();
  unsigned d[{count}];
  const unsigned row = lane < {8 * count} ? (unsigned)__cvta_generic_to_shared(&tile[address[lane]]) : 0;
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{".trans" * bool(trans)}.shared.b16 "
               "{{{", ".join(f"%{i}" for i in range(count))}}}, [%{count}];"
               : {", ".join(f'"=r"(d[{i}])' for i in range(count))} : "r"(row));
  for (int i = 0; i < {count}; ++i) out[lane * {count} + i] = d[i];
}}
"""
    for count in (1, 2, 4)
    for trans in ("", "_trans")
)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", "_trans"])
def test_ldmatrix(count: int, trans: str) -> None:
    """Lanes 8 q .. 8 q + 7 give the row addresses of matrix q; a lane receives, of every matrix, row lane / 4 and the
    elements 2 (lane % 4) and 2 (lane % 4) + 1; with .trans these of the transposed matrix.
    """
    rng = np.random.default_rng(count)
    rows = rng.integers(0, 1 << 16, (8 * count, 8)).astype(np.uint16)
    address = rng.permutation(8 * count).astype(np.int32)
    address = np.resize(address, 32)
    out = np.zeros((32, count), np.uint32)
    compile_kernel(LDMATRIX_SOURCE, f"ldmatrix_x{count}{trans}").run_all_orders(1, 32, 0, rows, address, out)
    for lane, q in product(range(32), range(count)):
        matrix = rows[address[8 * q : 8 * q + 8]]
        matrix = matrix.T if trans else matrix
        row, column = lane // 4, lane % 4 * 2
        assert out[lane, q] == int(matrix[row, column]) | int(matrix[row, column + 1]) << 16


@pytest.mark.parametrize(
    "text",
    [
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 %0, %0, %0, %0;",
        "mma.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0}, {%0}, {%0}, {%0};",
        "wgmma.fence.sync.aligned;",
        "ex2.approx.f32 %0, %0;",
    ],
)
def test_unknown_instructions_are_refused(text: str) -> None:
    source = f'extern "C" __global__ void k(int* p) {{ asm volatile("{text}" : "+r"(p[0])); }}'
    with pytest.raises(UnknownInstructionError):
        compile_emulated(source, "k")
