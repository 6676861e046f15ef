"""How kernels without tensor cores are spread over threads: one thread makes four neighbouring channels (or one
element), neighbouring threads make neighbouring memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.views import compute, te_kernel

LANES = 4
"""Bytes of one 32-bit access: a warp moves 128 contiguous bytes."""
THREADS = 256
SMALL_THREADS = 64
"""Threads of a block where there is not enough work for a GPU full of large ones."""
MANY = 256 * 512
UNROLLED = 64
"""Reductions of at most this many steps are written out."""

Define = Callable[..., Any]
"""(views of the inputs..., TE tensors of the constants...) -> TE tensor named "out"."""


def lanes_of(out: TensorSpec) -> int:
    """Neighbouring elements that one thread makes: 4 where blocks guarantee them, else 1."""
    return LANES if out.block and out.block % LANES == 0 else 1


def vectorized_lanes(sch: Any, block: Any, lanes: int) -> list[Any]:
    """All loops of a block but the innermost `lanes` elements, which become one vector."""
    loops = list(sch.get_loops(block))
    if lanes == 1:
        return loops
    outer, lane = sch.split(loops[-1], [None, lanes])
    sch.vectorize(lane)
    return [*loops[:-1], outer]


def bind(sch: Any, loops: list[Any]) -> None:
    """Spread loops over threads."""
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    threads = THREADS if int(sch.get(fused).extent) >= MANY else SMALL_THREADS
    grid, thread = sch.split(fused, [None, threads])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def schedule_elementwise(func: Any, lanes: int) -> Any:
    """Schedule the block "out"."""
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    bind(sch, vectorized_lanes(sch, sch.get_sblock("out"), lanes))
    return sch.mod["main"]


def schedule_reduction(func: Any, lanes: int, pixels: int = 1) -> Any:
    """Schedule "acc" (a reduction over the last axes), whose sums stay in registers, and its epilogue "out".

    With `pixels` a thread makes that many neighbours of the axis before the last one: what their windows share is
    loaded once, weights too.
    """
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    acc, out = sch.get_sblock("acc"), sch.get_sblock("out")
    rank = len(sch.get(out).iter_vars)
    sch.set_scope(acc, 0, "local")
    loops = vectorized_lanes(sch, out, lanes)
    if pixels > 1:
        first, *neighbours = sch.split(loops[-2], [None, pixels])
        sch.reorder(first, loops[-1], *neighbours)
        sch.unroll(neighbours[0])
        loops[-2] = first
    # Before loops are fused: their indices are simple here, and every primitive understands them.
    sch.compute_at(acc, loops[-1], preserve_unit_loops=True)
    inner = list(sch.get_loops(acc))[len(loops) :]
    spatial, steps = inner[:rank], inner[rank:]
    sch.reorder(*spatial[:-1], *steps, spatial[-1])
    if lanes > 1:
        sch.vectorize(spatial[-1])
    if pixels > 1:
        sch.reorder(*steps, spatial[-2], spatial[-1])
        sch.unroll(spatial[-2])
    if prod(int(sch.get(step).extent) for step in steps) <= UNROLLED:
        for step in steps:
            sch.unroll(step)
    bind(sch, loops)
    return sch.mod["main"]


def reduction(out: TensorSpec, dtype: str, term: Callable[..., Any], finish: Callable[..., Any]) -> Any:
    """TE tensor "out" of `finish(acc, *logical index)`, where "acc" is `term(*logical index)`, a sum or maximum.

    Both are indexed by memory, so that the schedule sees one element read one element.
    """
    from tvm import te

    acc = compute(TensorSpec(out.shape, dtype, out.block), term, "acc")

    def value(*index: Any) -> Any:
        if out.block == 0:
            return finish(acc(*index), *index)
        n, c, *rest, lane = index
        return finish(acc(*index), n, c * out.block + lane, *rest)

    return te.compute(out.memory_shape, value, name="out")


def lowered(func: Any) -> Any:
    """Blocks made opaque and local buffers as small as they can be: the form that kernels written by hand have."""
    import tvm

    t = tvm.s_tir.transform
    passes = tvm.transform.Sequential(
        [
            t.CanonicalizeLoop(),
            t.LowerInitBlock(),
            t.PlanAndUpdateBufferAllocationLocation(),
            t.ConvertBlocksToOpaque(),
            t.CompactBufferAllocation(),
        ]
    )
    return passes(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}))["main"]


def element_kernel(
    name: str,
    inputs: Sequence[TensorSpec],
    constants: Sequence[Array],
    out: TensorSpec,
    define: Define,
    *details: Hashable,
    is_reduction: bool = False,
    is_gathered: bool = False,
    pixels: int = 1,
) -> Kernel:
    """A kernel whose every output element is made by one thread.

    Parameters
    ----------
    name : str
        First part of the key.
    inputs : sequence of TensorSpec
        What the kernel reads.
    constants : sequence of ndarray
        Arguments behind the inputs.
    out : TensorSpec
        What it writes.
    define : callable
        Makes the TE tensor "out" (with `is_reduction`, from one called "acc").
    details : hashable
        Whatever else the code depends on.
    is_reduction : bool
        Whether there is an "acc".
    is_gathered : bool
        Reads are not contiguous along channels: one element per thread.
    pixels : int
        Neighbouring columns that one thread makes (with `is_reduction`, blocked; divides the width).
    """
    # The byte of an only channel would have to be spread over a vector, which the code generator of TVM cannot.
    spreads = any(spec.shape[1:2] == (1,) for spec in inputs)
    lanes = 1 if is_gathered or spreads else lanes_of(out)

    def schedule(func: Any) -> Any:
        return lowered(schedule_reduction(func, lanes, pixels) if is_reduction else schedule_elementwise(func, lanes))

    return te_kernel((name, pixels, *details), inputs, constants, out, define, schedule)


def common_block(*specs: TensorSpec) -> int:
    """The block that kernels of several operands keep: that of the first blocked one, else 0."""
    return next((spec.block for spec in specs if spec.block), 0)
