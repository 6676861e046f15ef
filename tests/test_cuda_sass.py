"""The reader of machine code: expected instructions are counted, spills are seen."""

from __future__ import annotations

import pytest
from cuda_samples import DOT, GEMM
from cuda_sass import ARCHITECTURES, FLAGS, kernel_code, require_tools

# An array that is indexed by a value of memory cannot stay in registers.
INDEXED = """
extern "C" __global__ void indexed(const int* from, int* to) {
  int values[32];
  for (int i = 0; i < 32; ++i) values[i] = from[i];
  for (int i = 0; i < 32; ++i) values[from[i + 32] & 31] += i;
  for (int i = 0; i < 32; ++i) to[i] = values[i];
}
extern "C" __global__ void many(const volatile int* from, volatile int* to) {
  int values[64];
  #pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = from[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 64; ++i) to[i * 1024 + threadIdx.x] = values[63 - i] * values[i];
}
"""


@pytest.fixture(autouse=True)
def _tools() -> None:
    require_tools()


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES[2:]] + ["sm_80"])
def test_gemm_uses_tensor_cores_and_asynchronous_copies(arch: str) -> None:
    code = kernel_code(GEMM, arch)["gemm"]
    assert code.tensor_core == 2 == code.count("IMMA.16832.S8.S8")
    assert code.count("LDSM") == 2 and code.count("LDGSTS") >= 2
    assert code.local_memory == code.stack_bytes == code.spill_bytes == 0
    assert 16 < code.registers < 64
    assert code.dot_products == 0


@pytest.mark.parametrize("arch", ["sm_75", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_dot_uses_dp4a(arch: str) -> None:
    code = kernel_code(DOT, arch)["dot"]
    assert code.dot_products >= 1 and code.count("IDP.4A.S8.S8") == code.dot_products
    assert code.tensor_core == 0


def test_local_memory_and_spills_are_seen() -> None:
    codes = kernel_code(INDEXED, "sm_80", (*FLAGS, "-maxrregcount=32"))
    assert codes["indexed"].local_memory > 0 and codes["indexed"].stack_bytes >= 128
    assert codes["many"].spill_bytes > 0 and codes["many"].local_memory > 0
    assert codes["many"].registers <= 32


def test_errors_of_nvcc_are_shown() -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        kernel_code('extern "C" __global__ void k() { nonsense(); }', "sm_80")
