"""Simple schedules for whatever is not a kernel of ours: producers inlined, then every remaining block by itself, as
the target says. On CPUs outer loops run in parallel and the innermost one is vectorized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx

LANES = 16


def schedule_rest(
    mod: tvm.IRModule, schedule_block: Callable[[Any, Any], None], lowered: Callable[[Any], Any] | None = None
) -> tvm.IRModule:
    """Schedule every PrimFunc of the module that is neither a kernel of ours nor already scheduled.

    Parameters
    ----------
    mod : IRModule
        Kernels of ours have the attribute "lpsn.kernel".
    schedule_block : callable (schedule, block) -> None
        What the target does with a block that could not be inlined.
    lowered : callable (PrimFunc) -> PrimFunc, optional
        What the target makes of a scheduled function.
    """
    functions = {}
    for name, function in mod.functions.items():
        if isinstance(function, tirx.PrimFunc) and "lpsn.kernel" not in (function.attrs or {}):
            function = _scheduled(function, schedule_block)
            function = lowered(function) if lowered is not None else function
        functions[name] = function
    return tvm.IRModule(functions, attrs=mod.attrs)


def _scheduled(function: Any, schedule_block: Callable[[Any, Any], None]) -> Any:
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import ScheduleError

    sch = Schedule(function)
    root = sch.get_sblock("root")
    for block in sch.get_child_blocks(root):
        for inline in (sch.compute_inline, sch.reverse_compute_inline):
            try:
                inline(block)
                break
            except ScheduleError:
                continue  # Not inlinable: a reduction, an output, or read by a reduction's initial value.
    for block in sch.get_child_blocks(root):
        schedule_block(sch, block)
    return sch.mod["main"].with_attrs(dict(function.attrs)) if function.attrs else sch.mod["main"]


def spatial_loops(sch: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """Loops of a block that may run in any order, and the others; none of the first where loops and block iterators do
    not match one to one.
    """
    loops = list(sch.get_loops(block))
    kinds = [int(iterator.iter_type) for iterator in sch.get(block).iter_vars]
    if len(kinds) != len(loops):
        return [], loops
    pairs = list(zip(loops, kinds, strict=True))
    spatial = [loop for loop, kind in pairs if kind == tirx.IterVar.DataPar]
    return spatial, [loop for loop, kind in pairs if kind != tirx.IterVar.DataPar]


@tvm.transform.module_pass(opt_level=0, name="DefaultSchedule")
class DefaultSchedule:
    """`schedule_rest` for CPUs."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        """PrimFuncs without the mark -> scheduled PrimFuncs."""
        return schedule_rest(mod, _parallel_block)


def _parallel_block(sch: Any, block: Any) -> None:
    from tvm.s_tir.schedule import ScheduleError

    spatial, reduction = spatial_loops(sch, block)
    if not spatial:
        return
    try:
        if not reduction:
            fused = sch.fuse(*spatial) if len(spatial) > 1 else spatial[0]
            outer, inner = sch.split(fused, [None, LANES])
            sch.parallel(outer)
            sch.vectorize(inner)
            return
        sch.reorder(*spatial, *reduction)
        outer = sch.fuse(*spatial[:-1]) if len(spatial) > 2 else spatial[0]
        sch.parallel(outer)
        sch.decompose_reduction(block, reduction[0])
    except ScheduleError:
        return  # An irregular block (scan, sort): what a primitive refuses is left as it is, and runs correctly.
