// The inner product of one GEMM micro-operation, for any geometry and fast for blocks of 8 n.
#pragma once

#include <cstdint>

namespace vta {

// Tiles of inputs are int16 [batch][pairs * 2], of weights int16 [pairs][block_out][2] (pairs of input channels side by
// side, as a multiply-add instruction wants them), accumulators int32 [batch][block_out].
struct GemmShape {
  int64_t batch, block_out, pairs;
};

// acc += inp x wgt^T. Bit 31 of the result is set where an accumulator overflowed.
using GemmKernel = int32_t (*)(const GemmShape&, int32_t* acc, const int16_t* inp, const int16_t* wgt);

GemmKernel gemm_kernel(const GemmShape& shape);

}  // namespace vta
