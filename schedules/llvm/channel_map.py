"""Blocked tensors whose channels are gathered from blocked tensors by a fixed map: concatenation and slices at any
offset.

An output block that takes its 16 lanes from few input blocks is one shuffle of those; neighbouring output blocks that
do the same, one block further on, share a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm.tir import loop, nest, unravel, vload, vstore

BLOCK = 16
CHUNK = 64
"""Pixels that one task moves."""

LONGEST = 48
"""More runs than this would be long to compile."""


@dataclass(frozen=True)
class Run:
    """`count` output blocks from `first` on; block `first + k` takes lane `i` from lane `lanes[i]` of the concatenated
    input blocks `(input, block + k) for input, block in blocks`.
    """

    first: int
    count: int
    blocks: tuple[tuple[int, int], ...]
    lanes: tuple[int, ...]


def runs(sources: Sequence[tuple[int, int]]) -> tuple[Run, ...] | None:
    """The runs of a channel map: output channel -> (input, channel of the input); None where there are too many."""
    found: list[Run] = []
    for first in range(0, len(sources), BLOCK):
        wanted = sources[first : first + BLOCK]
        blocks = tuple(dict.fromkeys((tensor, channel // BLOCK) for tensor, channel in wanted))
        lanes = [blocks.index((tensor, channel // BLOCK)) * BLOCK + channel % BLOCK for tensor, channel in wanted]
        # What stands in lanes beyond the last channel does not matter.
        full = len(wanted) == BLOCK
        lanes += [i if lanes[0] == 0 else lanes[0] for i in range(len(wanted), BLOCK)]
        last = found[-1] if found else None
        follows = last and full and tuple(lanes) == last.lanes
        if last and follows and blocks == tuple((t, b + last.count) for t, b in last.blocks):
            found[-1] = Run(last.first, last.count + 1, last.blocks, last.lanes)
        else:
            found.append(Run(first // BLOCK, 1, blocks, tuple(lanes)))
    return tuple(found) if len(found) <= LONGEST else None


def emit(
    plan: Sequence[Run],
    inputs: Sequence[TensorSpec],
    out: TensorSpec,
    data: Sequence[Any],
    target: Any,
    convert: Callable[[int, Any], Any],
) -> None:
    """The loops: `convert(input, 16 lanes)` of every input block, shuffled into the output's blocks.

    `inputs` and `out` are blocked by 16 and equal but for the channels; `data` and `target` are their flat buffers.
    """
    pixels = 1
    for extent in out.shape[2:]:
        pixels *= extent
    step = min(CHUNK, pixels)
    chunks, batch, size = -(-pixels // step), out.shape[0], pixels * BLOCK
    with loop(batch * chunks, batch * size * out.blocks * 16) as index:
        n, chunk = unravel(index, batch, chunks)
        # The last chunk overlaps its neighbour.
        first = T.min(chunk * step, pixels - step) if pixels % step else chunk * step
        for run in plan:
            with nest(run.count, step) as (k, p):
                parts = [
                    convert(i, vload(data[i], (n * inputs[i].blocks + b + k) * size + (first + p) * BLOCK, BLOCK))
                    for i, b in run.blocks
                ]
                is_copy = run.lanes == tuple(range(BLOCK))
                value = parts[0] if is_copy else tirx.Shuffle(_at_least(parts), list(run.lanes))
                vstore(target, (n * out.blocks + run.first + k) * size + (first + p) * BLOCK, value, BLOCK)


def _at_least(parts: list[Any]) -> list[Any]:
    return parts if len(parts) > 1 else parts * 2
