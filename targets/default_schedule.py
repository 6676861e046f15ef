"""A simple CPU schedule for whatever is not a kernel of ours: producers inlined, outer loops parallel, the innermost
vectorized.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

LANES = 16


@tvm.transform.module_pass(opt_level=0, name="DefaultSchedule")
class DefaultSchedule:
    """Schedule every PrimFunc of the module that is neither a kernel of ours nor already scheduled."""

    def transform_module(self, mod: tvm.IRModule, context: Any) -> tvm.IRModule:
        """PrimFuncs without the mark -> scheduled PrimFuncs."""
        functions = {}
        for name, function in mod.functions.items():
            if isinstance(function, tirx.PrimFunc) and "lpsn.kernel" not in (function.attrs or {}):
                function = scheduled(function)
            functions[name] = function
        return tvm.IRModule(functions, attrs=mod.attrs)


def scheduled(function: Any) -> Any:
    """Inline what can be inlined, then treat every remaining block by itself; what a primitive refuses is left as it
    is.
    """
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
        try:
            _one_block(sch, block)
        except ScheduleError:
            continue  # An irregular block (scan, sort): runs serially, correctly.
    return sch.mod["main"].with_attrs(dict(function.attrs)) if function.attrs else sch.mod["main"]


def _one_block(sch: Any, block: Any) -> None:
    loops = sch.get_loops(block)
    kinds = [int(iterator.iter_type) for iterator in sch.get(block).iter_vars]
    if not loops or len(kinds) != len(loops):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != tirx.IterVar.DataPar]
    if not spatial:
        return
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
