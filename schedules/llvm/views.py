"""The two loop nests that most kernels without weights need, and what CPUs want of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.maker import Kind
from lpsn_tvm.schedules.views import has_block, te_kernel

LANES = 16
"""Channels in a block; every kernel of this folder vectorizes over them."""

PARALLEL_ELEMENTS = 65536
"""Outputs smaller than this are not worth waking the thread pool."""


def parallel_outer(sch: Any, loops: Sequence[Any], inner: int) -> Any:
    """Fuse `loops` without the last `inner` ones and run them in parallel, if the work is worth it; the fused loop."""
    extents = [int(sch.get(loop).extent) for loop in loops]
    outer = sch.fuse(*loops[: len(loops) - inner])
    total = 1
    for extent in extents:
        total *= extent
    if total >= PARALLEL_ELEMENTS:
        sch.parallel(outer)
    return outer


def schedule_elementwise(func: Any, out: TensorSpec, vectorized: bool = True) -> Any:
    """Schedule the block "out": vectorized over the lanes (plain: left to the compiler's vectorizer), parallel over
    rows.

    Blocks before it: "pad" is made row by row where it is read.
    """
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    loops = list(sch.get_loops(sch.get_sblock("out")))
    if out.block and vectorized:
        sch.vectorize(loops[-1])
    inner = min(len(loops) - 1, 2 if out.block else 1)
    outer = parallel_outer(sch, loops, inner)
    if has_block(sch, "pad"):
        pad = sch.get_sblock("pad")
        sch.compute_at(pad, outer, preserve_unit_loops=True)
        if out.block:
            sch.vectorize(sch.get_loops(pad)[-1])
    return sch.mod["main"]


def schedule_reduction(func: Any, out: TensorSpec) -> Any:
    """Schedule "acc" (a reduction over the last axes) and "out" (its epilogue), lanes vectorized, parallel over the
    outer axes.
    """
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    rank = len(out.memory_shape)
    loops = list(sch.get_loops(sch.get_sblock("out")))
    if out.block:
        sch.vectorize(loops[-1])
    acc = sch.get_sblock("acc")
    total = 1
    for loop in sch.get_loops(acc):
        total *= int(sch.get(loop).extent)
    outer = sch.fuse(*loops[:2])
    if total >= PARALLEL_ELEMENTS:
        sch.parallel(outer)
    sch.compute_at(acc, outer, preserve_unit_loops=True)
    spatial, reduction = sch.get_loops(acc)[1 : rank + 1], sch.get_loops(acc)[rank + 1 :]
    if out.block:
        sch.reorder(*spatial[:-1], *reduction, spatial[-1])
        sch.vectorize(spatial[-1])
    sch.decompose_reduction(acc, reduction[0])
    return sch.mod["main"]


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
    # A vector gather of bytes is slower than 16 loads.
    vectorized = run in (0, LANES) and kind != "lookup"
    key = (name, *details)
    return te_kernel(key, inputs, constants, out, define, lambda func: schedule_elementwise(func, out, vectorized))


def offered_block(*specs: TensorSpec) -> int:
    """The block that elementwise kernels keep: 16 if any full-rank operand has it already."""
    return LANES if any(spec.block == LANES for spec in specs) else 0
