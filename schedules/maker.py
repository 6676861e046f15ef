"""How a target makes the kernels of operators without weights: what such an operator computes is written once
(`elementwise`, `concat`, `data_movement`, `lookup`, `pooling`, `resize`), loops and layouts are the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec

Kind = Literal["element", "move", "gather", "lookup", "program"]
"""How outputs come from inputs: by arithmetic on elements of the same index ("element"), unchanged from anywhere
("move"), by arithmetic on elements from anywhere ("gather"), from a table at an index that is data ("lookup"), by a
chain of float operations ("program").
"""


@dataclass(frozen=True)
class Maker:
    """What a target does with a computation.

    Parameters
    ----------
    kernel : callable (name, inputs, constants, out, define, *details, kind="element", run=0) -> Kernel
        A kernel without reduction. `define(views of the inputs..., TE tensors of the constants...)` gives the TE tensor
        "out". Where channels are blocked, `run` neighbouring channels, counted from a multiple of it, are computed
        alike from neighbouring channels; 0: all channels of a block.
    pool : callable (name, data, constants, out, window, pooling) -> Kernel
        A reduction over a window (`pooling.Window`, `pooling.Pooling`).
    plane_sum : callable (name, data, out, dtype, numbers, finish) -> Kernel
        `finish(sum over H and W in dtype, numbers)`.
    common_block : callable (*specs) -> int
        Channels per block that a kernel of several operands keeps; 0 for the plain layout.
    runs : tuple of int
        Values of `run` that make a difference, the best first.
    gathers_blocked : bool
        Whether a slice whose channels are no runs keeps the blocked layout; otherwise its output is plain.
    filler : callable (number, out) -> (constant, read)
        How the value of a padding is read from memory: `read(constant, c)` is it in `out`'s type at channel `c`.
    """

    kernel: Callable[..., Kernel]
    pool: Callable[..., Kernel]
    plane_sum: Callable[..., Kernel]
    common_block: Callable[..., int]
    runs: tuple[int, ...]
    gathers_blocked: bool
    filler: Callable[[float, TensorSpec], tuple[Array, Callable[[Any, Any], Any]]]

    def run_of(self, *offsets: int) -> int:
        """The best run that all offsets are multiples of; 1 where there is none."""
        return next((run for run in self.runs if all(offset % run == 0 for offset in offsets)), 1)
