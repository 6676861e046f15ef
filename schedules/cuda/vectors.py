"""Elementwise kernels and kernels that move elements, spread over threads so that memory is read and written 16 bytes
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import gcd, prod
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.threads import LANES, bind, lowered, schedule_elementwise
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Kind
from lpsn_tvm.schedules.views import te_kernel

VECTOR_BYTES = 16
"""The widest access of one thread."""
MANY_ELEMENTS = 1 << 19
"""Fewer outputs are made four by four: more threads hide more of the latency than wide accesses save."""
CHANNELS = {"element": 16, "lookup": 16, "program": 4}
"""Neighbouring channels that one thread makes where there is enough work."""


def elementwise_kernel(
    name: str,
    inputs: Sequence[TensorSpec],
    constants: Sequence[Array],
    out: TensorSpec,
    define: Callable[..., Any],
    *details: Hashable,
    kind: Kind = "element",
    run: int = 0,
) -> Kernel:
    """A kernel of one block without reduction; parameters as `Maker.kernel` has them."""
    # The byte of an only channel would have to be spread over a vector, which the code generator of TVM cannot.
    spreads = any(spec.shape[1:2] == (1,) for spec in inputs)
    group = gcd(out.block, run) if out.block else 1
    wide = CHANNELS.get(kind)
    is_staged = wide is not None and group % wide == 0 and prod(out.memory_shape) >= MANY_ELEMENTS
    widest = VECTOR_BYTES // np.dtype(out.dtype).itemsize if kind == "move" else LANES
    lanes = 1 if spreads or kind == "program" else gcd(group, widest)

    whole = [f"x{i}" for i, spec in enumerate(inputs) if spec.shape[1:2] == out.shape[1:2]]

    def schedule(func: Any) -> Any:
        if is_staged and wide is not None:
            return lowered(schedule_staged(func, wide, lanes, whole))
        return lowered(schedule_elementwise(func, lanes))

    return te_kernel((name, lanes, is_staged, *details), inputs, constants, out, define, schedule)


def schedule_staged(func: Any, channels: int, lanes: int, inputs: Sequence[str]) -> Any:
    """Schedule the block "out": a thread loads `channels` neighbours of each of the `inputs` into registers, makes the
    outputs `lanes` at a time, and stores them together.
    """
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    block = sch.get_sblock("out")
    write = sch.cache_write(block, 0, "local")
    loops = list(sch.get_loops(write))
    outer, _ = sch.split(loops[-1], [None, channels])
    sch.compute_at(block, outer, preserve_unit_loops=True)
    names = [str(region.source.name) for region in sch.get(block).reads]
    reads = [sch.cache_read(block, names.index(name), "local") for name in inputs if name in names]
    for read in reads:
        sch.compute_at(read, outer, preserve_unit_loops=True)
    for copy in (write, *reads):
        _vectorize(sch, copy, VECTOR_BYTES // np.dtype(str(sch.get(copy).writes[0].source.dtype)).itemsize)
    _vectorize(sch, block, lanes)
    bind(sch, [*loops[:-1], outer])
    return sch.mod["main"]


def _vectorize(sch: Any, block: Any, lanes: int) -> None:
    """The innermost loop of a block as vectors of `lanes`, written out one after another."""
    steps, lane = sch.split(sch.get_loops(block)[-1], [None, lanes])
    sch.unroll(steps)
    if lanes > 1:
        sch.vectorize(lane)
