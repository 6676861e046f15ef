"""How GPUs make kernels of operators without weights."""

from __future__ import annotations

from lpsn_tvm.schedules.cuda.block_reduction import block_sum
from lpsn_tvm.schedules.cuda.pooling import pool
from lpsn_tvm.schedules.cuda.threads import common_block, elementwise_kernel
from lpsn_tvm.schedules.maker import Maker

MAKER = Maker(
    kernel=elementwise_kernel,
    pool=pool,
    plane_sum=block_sum,
    common_block=common_block,
    runs=(4,),
    gathers_blocked=True,
    # TVM's code generator cannot spread a byte that is no constant over a vector.
    pads_with_literals=True,
)
