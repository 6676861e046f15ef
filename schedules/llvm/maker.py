"""How CPUs make kernels of operators without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lpsn_tvm.schedules.kernel import Array, TensorSpec
from lpsn_tvm.schedules.llvm.pooling import plane_sum, pool
from lpsn_tvm.schedules.llvm.views import LANES, elementwise_kernel, offered_block
from lpsn_tvm.schedules.maker import Maker
from lpsn_tvm.schedules.rounding import parameters


def _filler(number: float, out: TensorSpec) -> tuple[Array, Callable[[Any, Any], Any]]:
    return parameters(number), lambda numbers, c: numbers[0].astype(out.dtype)


MAKER = Maker(
    kernel=elementwise_kernel,
    pool=pool,
    plane_sum=plane_sum,
    common_block=offered_block,
    runs=(LANES,),
    gathers_blocked=False,
    filler=_filler,
)
