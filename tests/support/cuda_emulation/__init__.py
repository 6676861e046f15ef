"""Run CUDA kernels on the host: the source that was generated for the GPU, compiled by g++, one fiber per thread.

`compile_kernel(source, name)` gives a callable `(grid, block, dynamic_shared, *arguments)`; arrays are changed in
place. What holds:

* threads of a block run one at a time and only change over where they wait (`__syncthreads`, warp instructions,
  shuffles); `order` chooses who goes first, so that a kernel that relies on an order shows it;
* shared memory is poisoned when a block starts, and the destination of a `cp.async` until somebody has waited for it;
* with `checked` (the default) every access is looked at: outside of the arrays, misaligned, and races, which are found
  whether or not they changed a result;
* blocks run one after the other to their end: a block cannot wait for another.

Not emulated: clusters, bulk copies (TMA), mbarriers, wgmma, wmma fragments, half precision. Inline assembly that is not
known is refused with `UnknownInstructionError`.
"""

from cuda_emulation.kernel import EmulatedKernel, EmulationError, compile_kernel
from cuda_emulation.ptx import UnknownInstructionError

__all__ = ["EmulatedKernel", "EmulationError", "UnknownInstructionError", "compile_kernel"]
