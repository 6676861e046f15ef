"""How kernels without tensor cores are spread over threads: one thread makes four neighbouring channels (or one
element), neighbouring threads make neighbouring memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.views import View, has_block, placeholder, prim_func

BLOCK = 32
"""Channels in a block of the device's layout: one pixel of it is 32 contiguous bytes."""
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


def bind_elements(sch: Any, block: Any, lanes: int) -> Any:
    """Spread all loops of a block over threads, the innermost `lanes` elements as one vector; the thread's loop."""
    loops = list(sch.get_loops(block))
    lane = None
    if lanes > 1:
        outer, lane = sch.split(loops[-1], [None, lanes])
        loops[-1] = outer
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    count = int(sch.get(fused).extent)
    threads = THREADS if count >= MANY else SMALL_THREADS
    grid, thread = sch.split(fused, [None, threads])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    if lane is not None:
        sch.vectorize(lane)
    return thread


def schedule_elementwise(func: Any, lanes: int) -> Any:
    """Schedule the block "out" and inline everything before it."""
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if sch.get(block).name_hint != "out":
            sch.compute_inline(block)
    bind_elements(sch, sch.get_sblock("out"), lanes)
    return sch.mod["main"]


def schedule_reduction(func: Any, lanes: int) -> Any:
    """Schedule "acc" (a reduction over the last axes), whose sums stay in registers, and its epilogue "out"."""
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    if has_block(sch, "pad"):
        sch.compute_inline(sch.get_sblock("pad"))
    thread = bind_elements(sch, sch.get_sblock("out"), lanes)
    acc = sch.get_sblock("acc")
    rank = len(sch.get(sch.get_sblock("out")).iter_vars)
    sch.set_scope(acc, 0, "local")
    sch.compute_at(acc, thread, preserve_unit_loops=True)
    inner = list(sch.get_loops(acc))[2:]
    spatial, reduction = inner[:rank], inner[rank:]
    sch.reorder(*spatial[:-1], *reduction, spatial[-1])
    if lanes > 1:
        sch.vectorize(spatial[-1])
    if prod(int(sch.get(loop).extent) for loop in reduction) <= UNROLLED:
        for loop in reduction:
            sch.unroll(loop)
    sch.decompose_reduction(acc, reduction[0])
    return sch.mod["main"]


def element_kernel(
    name: str,
    inputs: Sequence[TensorSpec],
    constants: Sequence[Array],
    out: TensorSpec,
    define: Define,
    *details: Hashable,
    is_reduction: bool = False,
    is_gathered: bool = False,
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
    """
    lanes = 1 if is_gathered else lanes_of(out)

    def build() -> Any:
        from tvm import te

        data = [placeholder(spec, f"x{i}") for i, spec in enumerate(inputs)]
        extra = [te.placeholder(array.shape, str(array.dtype), name=f"p{i}") for i, array in enumerate(constants)]
        views = [View(tensor, spec) for tensor, spec in zip(data, inputs, strict=True)]
        func = prim_func([*data, *extra, define(*views, *extra)])
        return schedule_reduction(func, lanes) if is_reduction else schedule_elementwise(func, lanes)

    shapes = tuple((array.shape, str(array.dtype)) for array in constants)
    return Kernel(build, tuple(constants), out, (name, tuple(inputs), out, shapes, *details), tuple(inputs))


def common_block(*specs: TensorSpec) -> int:
    """The block that kernels of several operands keep: that of the first blocked one, else 0."""
    return next((spec.block for spec in specs if spec.block), 0)
