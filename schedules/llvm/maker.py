"""How CPUs make kernels of operators without weights."""

from __future__ import annotations

from lpsn_tvm.schedules.llvm.pooling import plane_sum, pool
from lpsn_tvm.schedules.llvm.views import LANES, elementwise_kernel, offered_block
from lpsn_tvm.schedules.maker import Maker

MAKER = Maker(
    kernel=elementwise_kernel,
    pool=pool,
    plane_sum=plane_sum,
    common_block=offered_block,
    runs=(LANES,),
    gathers_blocked=False,
    pads_with_literals=False,
)
