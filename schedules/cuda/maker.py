"""How GPUs make kernels of operators without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.plane_sums import plane_sum
from lpsn_tvm.schedules.cuda.pooling import pool
from lpsn_tvm.schedules.cuda.threads import common_block
from lpsn_tvm.schedules.cuda.vectors import elementwise_kernel
from lpsn_tvm.schedules.kernel import Array, TensorSpec
from lpsn_tvm.schedules.maker import Maker


def _filler(number: float, out: TensorSpec) -> tuple[Array, Callable[[Any, Any], Any]]:
    # One number for every lane: TVM's code generator cannot spread one byte over a vector.
    lanes = max(out.block, 1)
    return np.full(lanes, number, out.dtype), lambda numbers, c: numbers[c % lanes]


MAKER = Maker(
    kernel=elementwise_kernel,
    pool=pool,
    plane_sum=plane_sum,
    common_block=common_block,
    runs=(16, 4),
    gathers_blocked=True,
    filler=_filler,
)
