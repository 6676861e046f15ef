"""Operators that move data, batch-polymorphic.

The graph was traced with one batch size and is run with others, and layers before a reshape may have lost channels.
`adapted_shape` carries a traced reshape over to the real operand by these rules, on runs of axes that multiply to the
same number:

1. one axis to one axis: the real extent;
2. several axes to one (flatten): the product of the real extents;
3. to several axes, extents unchanged: as traced;
4. to several axes of which all but one are 1: the product goes to that one;
5. to several axes, and only the batch changed: the first extent scales with the batch (it is the outermost in memory).

Anything else (channels lost before a channel shuffle, say) is an error: such graphs are rebuilt when channels are
removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from lpsn_tvm.interpreter_node import Node

Tensor = torch.Tensor
Shape = tuple[int, ...]


def axis_runs(source: Shape, target: Shape) -> list[tuple[range, range]]:
    """Pairs of smallest runs of source and target axes with equal products; ones at the end join the last run."""
    runs: list[tuple[range, range]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        i0, j0, left, right = i, j, source[i], target[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * source[i], i + 1
            else:
                right, j = right * target[j], j + 1
        runs.append((range(i0, i), range(j0, j)))
    if runs and (i < len(source) or j < len(target)):
        last_source, last_target = runs.pop()
        runs.append((range(last_source.start, len(source)), range(last_target.start, len(target))))
    return runs


def adapted_shape(source: Shape, target: Shape, real: Sequence[int]) -> Shape | None:
    """The target of a reshape traced as source -> target, for an operand of shape `real`; None where not defined."""
    if tuple(real) == source:
        return target
    result: list[int] = []
    for inputs, outputs in axis_runs(source, target):
        count, traced = prod(real[i] for i in inputs), prod(source[i] for i in inputs)
        extents = [target[j] for j in outputs]
        wide = [k for k, extent in enumerate(extents) if extent != 1]
        if count == traced:
            pass
        elif len(extents) == 1:
            extents = [count]
        elif (
            0 in inputs
            and all(real[i] == source[i] for i in inputs if i > 0)
            and (extents[0] * real[0]) % source[0] == 0
        ):
            extents[0] = extents[0] * real[0] // source[0]
        elif len(wide) == 1:
            extents[wide[0]] = count
        else:
            return None
        result += extents
    return tuple(result)


def reshape(node: Node) -> Callable[[Tensor], Tensor]:
    """Row-major reshape, batch-polymorphic; rules in the module's docstring."""
    source, target = node.in_shapes[0], node.shape

    def run(x: Tensor) -> Tensor:
        shape = adapted_shape(source, target, x.shape)
        if shape is None:
            raise node.refuse(f"reshape was traced as {source} -> {target} and is not defined for {tuple(x.shape)}")
        return x.reshape(shape)

    return run


def flatten(node: Node) -> Callable[[Tensor], Tensor]:
    """All axes into one."""
    return lambda x: x.reshape(-1)


def broadcast_to(node: Node) -> Callable[[Tensor], Tensor]:
    """Expands axes of extent 1; an axis that was traced with its final extent keeps its real one."""
    source, target = node.in_shapes[0], node.shape
    new = len(target) - len(source)
    sizes = [e if i < new or source[i - new] != e else -1 for i, e in enumerate(target)]
    return lambda x: x.expand(sizes)


def concat(node: Node) -> Callable[..., Tensor]:
    """Concatenation; an operand that does not depend on the inputs (batch 1) is repeated over the batch."""
    axis = int(node.attrs.get("axis") or 0) % len(node.shape)

    def run(*tensors: Tensor) -> Tensor:
        batch = max(t.shape[0] for t in tensors)
        if axis > 0 and any(t.shape[0] != batch for t in tensors):
            tensors = tuple(t.expand(batch, *t.shape[1:]) for t in tensors)
        return torch.cat(tensors, dim=axis)

    return run


def strided_slice(node: Node) -> Callable[[Tensor], Tensor]:
    """`x[begin:end:stride]` along axes, negative strides too; a slice up to the traced end goes to the real end."""
    shape = node.in_shapes[0]
    attrs = node.attrs
    axes = [int(a) % len(shape) for a in attrs["axes"]]
    strides = [int(s) for s in attrs.get("strides") or (1,) * len(axes)]
    index: list[slice] = [slice(None)] * len(shape)
    flipped: list[tuple[int, range]] = []
    for axis, begin, end, stride in zip(axes, attrs["begin"], attrs["end"], strides, strict=True):
        resolved = range(shape[axis])[slice(int(begin), int(end), stride)]
        if stride < 0:
            flipped.append((axis, resolved))
        else:
            index[axis] = slice(resolved.start, None if int(end) >= shape[axis] else resolved.stop, stride)
    key = tuple(index)

    def run(x: Tensor) -> Tensor:
        x = x[key]
        for axis, resolved in flipped:
            x = x.index_select(axis, torch.tensor(list(resolved), device=x.device))
        return x

    return run
