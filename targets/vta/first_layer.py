"""How a layer's input reaches the accelerator; packing of first layers with few channels."""

from __future__ import annotations

from lpsn_tvm.targets.vta.forms import Array, Value
from lpsn_tvm.targets.vta.gemm import Rectangle, Windows
from lpsn_tvm.targets.vta.lower_context import Context


def sources_of(
    context: Context, variable: str, weight: Array, groups: int, windows: Windows, result: Rectangle
) -> list[tuple[Value, int]]:
    """The parts of `variable` that a layer sums over, each with the number of doublings that follow it."""
    return [(context.value(variable), 0)]
