"""Which channels belong together: labels on tensor elements, and the links between labels.

Every variable carries an integer array of its own rank whose axes are either full or 1 (constant along that axis).
Elements that can only be removed together carry labels that end in one class. Moving data around (reshape, transpose,
slice, concat) is then the same numpy operation on the labels, and agreement (residual add, elementwise multiplication)
is a link between two label arrays; no operator needs to know what the channel axis of another one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpsn_tvm.graph import Layer

Labels = NDArray[np.int64]
_MANY = 4096
"""Links of large arrays (an image behind depth-to-space) repeat: beyond this many they are made unique at once."""
Scalar = TypeVar("Scalar", bound=np.generic)


def compress(labels: NDArray[Scalar]) -> NDArray[Scalar]:
    """`labels` with every axis along which they are constant shortened to 1."""
    for axis, extent in enumerate(labels.shape):
        if extent > 1:
            first = labels.take([0], axis)
            if (labels == first).all():
                labels = first
    return labels


def reshape_labels(labels: Labels, old: Sequence[int], new: Sequence[int]) -> Labels:
    """Labels of a row-major reshape from shape `old` to shape `new`.

    Leading and trailing axes that stay and carry one label are left out, so batch, height and width are rarely spelt
    out.
    """
    old, new = tuple(old), tuple(new)
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head] and labels.shape[head] == 1:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail] and labels.shape[-1 - tail] == 1:
        tail += 1
    middle = labels.reshape(labels.shape[head : labels.ndim - tail])
    full = np.broadcast_to(middle, old[head : len(old) - tail]).reshape(new[head : len(new) - tail])
    return compress(full).reshape((1,) * head + compress(full).shape + (1,) * tail)


@dataclass
class Flow:
    """What the walk over the function collects; see `lpsn_tvm.passes.channel_flow`.

    Parameters
    ----------
    layers : dict of str to Layer
        Weighted layers by the name of their `acc` variable.
    labels, shapes : dict
        Labels and shape of every variable.
    frozen : dict of int to str
        Label -> why it must stay (the first reason).
    producers, consumers : list of (layer name, label per channel)
    followers : list of (layer name, label per input channel, label per output channel)
        Depthwise layers and grouped layers whose groups are removed whole.
    axes : dict of (binding, operand) to {axis: label per index}
        How the weights of layers are sliced.
    constants : dict of (binding, operand) to Labels
        How every other constant is sliced; the labels have the constant's rank.
    """

    layers: dict[str, Layer]
    labels: dict[str, Labels] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    producers: list[tuple[str, Labels]] = field(default_factory=list)
    consumers: list[tuple[str, Labels]] = field(default_factory=list)
    followers: list[tuple[str, Labels, Labels]] = field(default_factory=list)
    axes: dict[tuple[str, int], dict[int, Labels]] = field(default_factory=dict)
    constants: dict[tuple[str, int], Labels] = field(default_factory=dict)
    count: int = 0
    _left: list[Labels] = field(default_factory=list)
    _right: list[Labels] = field(default_factory=list)

    def fresh(self, count: int) -> Labels:
        """`count` labels that nothing carries yet."""
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def link(self, first: Labels, second: Labels) -> None:
        """Tie the labels of two arrays together, element by element with broadcasting."""
        one, two = np.broadcast_arrays(first, second)
        different = one != two
        left, right = one[different], two[different]
        if left.size > _MANY:
            pairs = np.unique(left * self.count + right)
            left, right = pairs // self.count, pairs % self.count
        self._left.append(left)
        self._right.append(right)

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep all channels that carry one of `labels`."""
        for label in np.unique(labels).tolist():
            self.frozen.setdefault(label, reason)

    def tie_across(self, labels: Labels, axis: int) -> Labels:
        """Tie `labels` so that they depend on the index along `axis` only; returns those that are left."""
        rows = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
        if rows.shape[1] > 1:
            self.link(rows[:, :1], rows[:, 1:])
        return rows[:, 0]

    def fold(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """`labels` without variation along `axes`: tied across them, unless they vary along no other axis.

        Channels behind depth-to-space vary along height and width too; an operator that mixes those needs one label
        per channel.
        """
        chosen = [axis for axis in axes if labels.shape[axis] > 1]
        if chosen and any(extent > 1 for axis, extent in enumerate(labels.shape) if axis not in chosen):
            for axis in chosen:
                first = labels.take([0], axis)
                self.link(labels, first)
                labels = first
        return labels

    def along(self, name: str, axis: int) -> Labels:
        """One label per index of variable `name` along `axis`; what it carries along other axes is tied together."""
        return np.broadcast_to(self.tie_across(self.labels[name], axis), (self.shapes[name][axis],)).copy()

    def classes(self) -> Labels:
        """Label -> class, with all links followed; makes every variable depend on one axis only.

        A variable that still depends on two axes (the middle of a channel shuffle) keeps the axis with more classes:
        what lies across it is tied together, so that removing a class always leaves a full rectangle.
        """
        component = self._components()
        before = len(self._left)
        for labels in self.labels.values():
            if sum(extent > 1 for extent in labels.shape) < 2:
                continue
            mapped = compress(component[labels])
            if sum(extent > 1 for extent in mapped.shape) >= 2:
                lines = (
                    np.moveaxis(mapped, axis, 0).reshape(mapped.shape[axis], -1)[:, 0] for axis in range(mapped.ndim)
                )
                self.tie_across(labels, int(np.argmax([len(np.unique(line)) for line in lines])))
        return component if len(self._left) == before else self._components()

    def _components(self) -> Labels:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        left = np.concatenate([*self._left, np.empty(0, np.int64)])
        right = np.concatenate([*self._right, np.empty(0, np.int64)])
        graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        component: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
        return component


@dataclass(frozen=True)
class Node:
    """One binding as the rules see it: name, operator, attributes, operands, shape of the result."""

    name: str
    op: str
    attrs: dict[str, Any]
    args: tuple[Any, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op.removeprefix('relax.')} {self.name!r}"


def normalize_axes(axes: int | Iterable[int] | None, rank: int) -> tuple[int, ...]:
    """Non-negative axes; None means all."""
    if axes is None:
        return tuple(range(rank))
    return tuple(sorted(int(axis) % rank for axis in ([axes] if isinstance(axes, int) else axes)))
