"""A simple GPU schedule for whatever is not a kernel of ours: every block that cannot be inlined is a launch of its
own, one thread per element.
"""

from __future__ import annotations

from typing import Any

import tvm

from lpsn_tvm.schedules.cuda.threads import bind, lowered
from lpsn_tvm.targets import default_schedule
from lpsn_tvm.targets.default_schedule import spatial_loops


def schedule_rest(mod: tvm.IRModule) -> tvm.IRModule:
    """Schedule every PrimFunc of the module that is not a kernel of ours."""
    return default_schedule.schedule_rest(mod, _one_block, lowered)


def _one_block(sch: Any, block: Any) -> None:
    """Spatial loops over threads, reductions within one; what no loop of can be shared runs on one thread."""
    spatial, others = spatial_loops(sch, block)
    if not spatial:
        bind(sch, [sch.add_unit_loop(others[0] if others else block)])
        return
    sch.reorder(*spatial, *others)
    bind(sch, spatial)
