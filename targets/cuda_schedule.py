"""A simple GPU schedule for whatever is not a kernel of ours: producers inlined, one thread per element."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from lpsn_tvm.schedules.cuda.threads import bind, lowered


def schedule_rest(mod: tvm.IRModule) -> tvm.IRModule:
    """Schedule every PrimFunc of the module that is not a kernel of ours."""
    functions = {
        name: scheduled(function)
        if isinstance(function, tirx.PrimFunc) and "lpsn.kernel" not in (function.attrs or {})
        else function
        for name, function in mod.functions.items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs)


def scheduled(function: Any) -> Any:
    """Inline what can be inlined; every remaining block becomes a launch of its own."""
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
        _one_block(sch, block)
    return lowered(sch.mod["main"])


def _one_block(sch: Any, block: Any) -> None:
    """Spatial loops over threads, reductions within one; what no loop of can be shared runs on one thread."""
    loops = list(sch.get_loops(block))
    kinds = [int(iterator.iter_type) for iterator in sch.get(block).iter_vars]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=False) if kind == tirx.IterVar.DataPar]
    if len(kinds) != len(loops) or not spatial:
        bind(sch, [sch.add_unit_loop(loops[0] if loops else block)])
        return
    sch.reorder(*spatial, *[loop for loop in loops if loop not in spatial])
    bind(sch, spatial)
