"""Hand-written CUDA: a double-buffered int8 GEMM on tensor cores, and a dp4a dot product."""

from __future__ import annotations

import numpy as np

GEMM = r"""
// C[m][n] = sum_k A[m][k] * B[n][k]; a block of 4 warps makes 32 x 32, in steps of 32 along k, two buffers deep.
constexpr int STRIDE = 48;  // 32 bytes of k, and 16 more so that ldmatrix has no bank conflicts
constexpr int TILE = 32 * STRIDE;

__device__ __forceinline__ void copy16(void* to, const void* from) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void load(signed char* stage, const signed char* a, const signed char* b, int k, int depth) {
  const int row = threadIdx.x / 2 % 32, half = threadIdx.x % 2 * 16;
  const bool is_b = threadIdx.x >= 64;
  const signed char* from = is_b ? b + (blockIdx.x * 32 + row) * k : a + (blockIdx.y * 32 + row) * k;
  copy16(stage + (is_b ? TILE : 0) + row * STRIDE + half, from + depth * 32 + half);
  asm volatile("cp.async.commit_group;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(128) gemm(const signed char* __restrict__ a,
                                                       const signed char* __restrict__ b, int* __restrict__ c,
                                                       int n, int k) {
  extern __shared__ __align__(16) signed char stages[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp / 2 * 16, column0 = warp % 2 * 16;
  int sums[2][4] = {};
  load(stages, a, b, k, 0);
  #pragma unroll 1
  for (int depth = 0; depth < k / 32; ++depth) {
    signed char* stage = stages + depth % 2 * 2 * TILE;
    if (depth + 1 < k / 32) {
      load(stages + (depth + 1) % 2 * 2 * TILE, a, b, k, depth + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();  // arrived
    unsigned fa[4], fb[4];
    unsigned from_a = (unsigned)__cvta_generic_to_shared(stage + (row0 + lane % 16) * STRIDE + lane / 16 * 16);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(from_a) : "memory");
    unsigned from_b = (unsigned)__cvta_generic_to_shared(
        stage + TILE + (column0 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 16);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fb[0]), "=r"(fb[1]), "=r"(fb[2]), "=r"(fb[3]) : "r"(from_b) : "memory");
    #pragma unroll
    for (int half = 0; half < 2; ++half)
      asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                   "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+r"(sums[half][0]), "+r"(sums[half][1]), "+r"(sums[half][2]), "+r"(sums[half][3])
                   : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[2 * half]), "r"(fb[2 * half + 1]));
    __syncthreads();  // consumed
  }
  #pragma unroll
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i) {
      const int row = blockIdx.y * 32 + row0 + lane / 4 + i / 2 * 8;
      c[row * n + blockIdx.x * 32 + column0 + half * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
    }
}
"""
GEMM_SHARED = 2 * 2 * 32 * 48

DOT = r"""
extern "C" __global__ void dot(const int* __restrict__ a, const int* __restrict__ b, int* out, int words) {
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x)
    sum = __dp4a(a[i], b[i], sum);
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
  if (threadIdx.x % 32 == 0) atomicAdd(out, sum);
}
"""


def gemm_problem(m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A, B, memory for C, and what C must be; m and n multiples of 32."""
    rng = np.random.default_rng(m + n + k)
    a, b = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    return a, b, np.zeros((m, n), np.int32), a.astype(np.int32) @ b.T.astype(np.int32)
