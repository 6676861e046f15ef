"""The walk from input to output: at every layer re-solve on the compressed prefix, and choose the masks of the groups
that are first read there.

Removed channels are not sliced while walking: their consumers get zero weights, which is the same network;
`remove_channels` slices once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from lpsn_tvm.frontier import Frontier
from lpsn_tvm.graph import Layer
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.channel_groups import ChannelGroup, Slot
from lpsn_tvm.passes.dense_reference import LayerReference, closing_sums
from lpsn_tvm.passes.eliminate import Elimination, Problem, eliminate, problem_of
from lpsn_tvm.passes.group_columns import columns_of, first_consumers, near_consumers, order_scores, unit_of_channel
from lpsn_tvm.passes.normal_equations import NormalEquations
from lpsn_tvm.passes.resolve import relative_error, solve
from lpsn_tvm.passes.scores import ChannelMean, random_scores, unit_scores


@dataclass(frozen=True)
class Demand:
    """How much of a group is to go: keep `kept` units, or (auto) as few as the error `budget` allows, rounded up by
    `round_up`.
    """

    kept: int
    budget: float | None = None
    round_up: Callable[[int], int] = int


@dataclass(frozen=True)
class Decision:
    """What was chosen for a group.

    Parameters
    ----------
    mask : bool[size]
        True is kept.
    predicted : float
        Added output error as elimination predicts it, relative to the variance of the consumers' targets (0 for other
        scores).
    scores : float64[size]
        Importance; the smallest goes first. For "output_error" the place in the elimination order, units that stay at
        the end.
    consumer : str
        The layer where it was decided.
    """

    mask: np.ndarray
    predicted: float
    scores: np.ndarray
    consumer: str


@dataclass
class _Equations:
    """Sums of one layer on the compressed prefix; `channels` are the input channels (within a group of the layer)
    that have columns.
    """

    sums: NormalEquations
    channels: Tensor
    activity: ChannelMean


@dataclass
class GreedyWalk:
    """State of the walk.

    Parameters
    ----------
    interpreter : TorchInterpreter
        Its parameters become those of the compressed network.
    frontier : Frontier
        Of the compressed network; None where only the dense network is asked about.
    layers : mapping of name to Layer
        In execution order.
    references : mapping of name to LayerReference
    groups : sequence of ChannelGroup
        Those that may lose channels.
    score : str
    seed : int
    resolve : bool
        Re-solve consumers; without it removed channels just leave.
    preset : mapping of group name to scores
        Scores from elsewhere (one-shot); such groups are not scored here.
    """

    interpreter: TorchInterpreter
    frontier: Frontier | None
    layers: Mapping[str, Layer]
    references: Mapping[str, LayerReference]
    groups: tuple[ChannelGroup, ...]
    demands: Mapping[str, Demand]
    score: str
    seed: int
    resolve: bool = True
    preset: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense = dict(self.interpreter.params)
        self.alive_in = {name: torch.ones(layer.in_channels, dtype=torch.bool) for name, layer in self.layers.items()}
        self.alive_out = {name: torch.ones(layer.out_channels, dtype=torch.bool) for name, layer in self.layers.items()}
        self.changed: set[str] = set()
        self.sums = closing_sums(self.interpreter, self.layers)

    def run(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Walk through all layers."""
        assert self.frontier is not None
        first = first_consumers(self.groups, self.layers)
        for number, (name, layer) in enumerate(self.layers.items()):
            undecided = first.get(name, [])
            stale = self._is_stale(layer)
            if undecided or stale:
                self.frontier.advance(layer.data)
                equations = self._equations(layer)
                for group in undecided:
                    self._decide(group, layer, equations)
                self._finish(layer, equations, stale)
            self.references[name].gram = None  # every group that this layer reads is decided now
            progress(number + 1)

    def _is_stale(self, layer: Layer) -> bool:
        """Whether the layer's input differs from the dense network's."""
        dirty = set(self.changed)
        for step in self.interpreter.steps:
            if any(name in dirty for name in step.variables):
                dirty.add(step.name)
            if step.name == layer.acc:
                break
        other = self.sums[layer.name].other if layer.name in self.sums else layer.data
        return layer.data in dirty or other in dirty or not bool(self.alive_in[layer.name].all())

    # --- sums ------------------------------------------------------------

    def _equations(self, layer: Layer) -> _Equations:
        """Sums over the compressed inputs and the dense targets of a layer."""
        assert self.frontier is not None
        reference = self.references[layer.name]
        geometry = reference.geometry
        alive = self.alive_in[layer.name]
        ungrouped = geometry.groups == 1
        channels = alive.nonzero()[:, 0] if ungrouped else torch.arange(geometry.in_channels // geometry.groups)
        columns = len(channels) * geometry.taps + 1
        sums = NormalEquations(geometry.groups, columns, geometry.out_channels // geometry.groups)
        activity = ChannelMean(self.score)
        wants_activity = self.score in ("mean_activation", "zero_fraction")
        closed = self.sums.get(layer.name)
        others = self.frontier.batches(closed.other) if closed is not None else repeat(None)
        for number, (x, other) in enumerate(zip(self.frontier.batches(layer.data), others, strict=False)):
            where = geometry.sample_positions(reference.per_sample, self.seed, layer.name, number)
            rows = geometry.rows(x, where, channels if ungrouped and not bool(alive.all()) else None)
            targets = reference.targets[number]
            sums.add(rows, targets if other is None else targets - geometry.targets(other, where))
            if wants_activity:
                activity.add(x)
        reference.targets.clear()  # read once; late layers need the memory
        return _Equations(sums, channels, activity)

    # --- masks
    # ------------------------------------------------------------------------------------------------------------------

    def _decide(self, group: ChannelGroup, layer: Layer, equations: _Equations) -> None:
        demand = self.demands[group.name]
        predicted = 0.0
        if group.name in self.preset:
            scores = self.preset[group.name]
        elif self.score == "output_error":
            scores, predicted, kept = self._eliminate(group, layer, equations, demand)
            demand = Demand(kept)
        elif self.score == "random":
            scores = random_scores(group.size, self.seed, group.name)
        else:
            slot = next(slot for slot in group.consumers if slot.layer == layer.name)
            scores = unit_scores(equations.activity.value, unit_of_channel(slot, layer.in_channels), group.size)
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[torch.argsort(scores, stable=True)[: group.size - demand.kept]] = False
        self.decisions[group.name] = Decision(mask.numpy(), predicted, scores.numpy(), layer.name)
        gone = (~mask).nonzero()[:, 0]
        for slot in (slot for slot in group.consumers if slot.layer in self.layers):
            self.alive_in[slot.layer][torch.from_numpy(slot.index)[gone].reshape(-1)] = False
        written = [(slot.layer, slot.index) for slot in group.producers]
        written += [(follower.layer, follower.written) for follower in group.followers]
        for name, index in ((name, index) for name, index in written if name in self.layers):
            self.alive_out[name][torch.from_numpy(index)[gone].reshape(-1)] = False

    def _eliminate(
        self, group: ChannelGroup, layer: Layer, equations: _Equations, demand: Demand
    ) -> tuple[Tensor, float, int]:
        """(scores, predicted relative error, units kept) by exact elimination over all consumers."""
        problems: list[Problem] = []
        for slot in near_consumers(group, self.layers):
            consumer = self.layers[slot.layer]
            if slot.layer == layer.name:
                gram, moment, channels = equations.sums.gram, equations.sums.moment, equations.channels
            else:
                gram, moment, channels = self._dense_sums(consumer)
            problems += self._problems(slot, consumer, gram, moment, channels)
        wanted = group.size - demand.kept
        result = eliminate(problems, group.size, wanted, demand.budget)
        removed = len(result.order)
        if demand.budget is not None:
            removed = group.size - demand.round_up(group.size - removed)
        return order_scores(result, group.size), float(result.costs[:removed].sum()), group.size - removed

    def dense_scores(self, group: ChannelGroup) -> Tensor:
        """Scores of a group on the dense network (one-shot); to be called before the walk."""
        slots = near_consumers(group, self.layers)
        if self.score == "random":
            return random_scores(group.size, self.seed, group.name)
        if self.score != "output_error":
            first = self.layers[slots[0].layer]
            activity = self.references[first.name].activity
            assert activity is not None
            return unit_scores(activity.value, unit_of_channel(slots[0], first.in_channels), group.size)
        removed = group.size - self.demands[group.name].kept
        return order_scores(self._eliminate_dense(group, removed), group.size)

    def _eliminate_dense(self, group: ChannelGroup, count: int) -> Elimination:
        problems: list[Problem] = []
        for slot in near_consumers(group, self.layers):
            consumer = self.layers[slot.layer]
            problems += self._problems(slot, consumer, *self._dense_sums(consumer))
        return eliminate(problems, group.size, count)

    def dense_patches(self, group: ChannelGroup, counts: Sequence[int]) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Re-solved consumers of a group alone pruned on the dense network to each of `counts` units; before the
        walk.
        """
        order = self._eliminate_dense(group, group.size - min(counts)).order if counts else torch.zeros(0)
        patches = []
        for count in counts:
            patch = {}
            gone = order[: group.size - count]
            for slot in near_consumers(group, self.layers):
                layer = self.layers[slot.layer]
                alive = torch.ones(layer.in_channels, dtype=torch.bool)
                alive[torch.from_numpy(slot.index)[gone].reshape(-1)] = False
                gram, moment, channels = self._dense_sums(layer)
                full = self._solve_alive(layer.name, gram, moment, channels, alive)
                patch[layer.name] = self.references[layer.name].geometry.split_matrix(full)
            patches.append(patch)
        return patches

    def _problems(self, slot: Slot, consumer: Layer, gram: Tensor, moment: Tensor, channels: Tensor) -> list[Problem]:
        """One problem per group of the consumer; columns of channels that are gone are left out."""
        geometry = self.references[consumer.name].geometry
        share = geometry.out_channels // geometry.groups
        alive_out = self.alive_out[consumer.name].reshape(geometry.groups, share)
        units = unit_of_channel(slot, consumer.in_channels).reshape(geometry.groups, -1)
        alive = self.alive_in[consumer.name].reshape(geometry.groups, -1)
        prior = self._prior(consumer.name, channels)
        spread = self._spread(consumer.name)
        problems = []
        for g in range(geometry.groups):
            left = alive[g][channels].repeat_interleave(geometry.taps)
            columns = torch.cat([left, torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
            outputs = alive_out[g].nonzero()[:, 0]
            whole = len(columns) == gram.shape[1]
            sub = gram[g] if whole else gram[g][columns][:, columns]
            target, old = moment[g][columns][:, outputs], prior[g][columns][:, outputs]
            # Channels that are always zero cost nothing, whatever weights they had.
            old = old * (sub.diagonal() > 0)[:, None]
            of_column = units[g][channels].repeat_interleave(geometry.taps)
            of_column = torch.cat([of_column, torch.tensor([-1])])[columns]
            problems.append(problem_of(sub, target, old, of_column, 1.0 / spread))
        return problems

    def _dense_sums(self, consumer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of a consumer further down, on the dense network's inputs (where its targets are exact)."""
        reference = self.references[consumer.name]
        assert reference.gram is not None
        gram = reference.gram.double()
        matrix = reference.geometry.weight_matrix(*self.dense[consumer.name])
        return gram, gram @ matrix, torch.arange(consumer.in_channels // reference.geometry.groups)

    def _spread(self, name: str) -> float:
        return max(float(self.references[name].spread[self.alive_out[name]].sum()), 1e-30)

    def _prior(self, name: str, channels: Tensor) -> Tensor:
        """The dense weights as a matrix, only the columns of `channels`."""
        geometry = self.references[name].geometry
        return geometry.weight_matrix(*self.dense[name])[:, columns_of(channels, geometry)]

    # --- weights
    # ----------------------------------------------------------------------------------------------------------------

    def _finish(self, layer: Layer, equations: _Equations, stale: bool) -> None:
        """New weights of the layer: zero for channels that are gone, the rest re-solved."""
        name = layer.name
        dead = not bool(self.alive_in[name].all())
        if not (stale or dead):
            return
        reference, geometry = self.references[name], self.references[name].geometry
        sums = equations.sums
        full = self._solve_alive(name, sums.gram, sums.moment, equations.channels, self.alive_in[name])
        columns = columns_of(equations.channels, geometry)
        self.errors[name] = self._error(reference, equations, full[:, columns])
        weight, bias = geometry.split_matrix(full)
        self.interpreter.set_params(name, weight, bias)
        self.changed.add(name)

    def _solve_alive(self, name: str, gram: Tensor, moment: Tensor, channels: Tensor, alive: Tensor) -> Tensor:
        """The full weight matrix: zero for input channels that are not `alive`, the others re-solved (if that is
        wanted).

        `channels` are those (within a group) that `gram` and `moment` have columns for.
        """
        geometry = self.references[name].geometry
        full = geometry.weight_matrix(*self.dense[name])
        old = full.clone()
        columns = columns_of(channels, geometry)
        alive = alive.reshape(geometry.groups, -1)
        for g in range(geometry.groups):
            full[g, :-1] *= alive[g].repeat_interleave(geometry.taps)[:, None]
        if not self.resolve:
            return full
        if bool(alive[:, channels].all()):
            full[:, columns] = solve(gram, moment, old[:, columns])
            return full
        for g in range(geometry.groups):
            left = torch.cat([alive[g][channels].repeat_interleave(geometry.taps), torch.tensor([True])])
            inside = left.nonzero()[:, 0]
            sub = gram[g][inside][:, inside]
            full[g, columns[inside]] = solve(sub[None], moment[g][inside][None], old[g, columns[inside]][None])[0]
        return full

    def _error(self, reference: LayerReference, equations: _Equations, weights: Tensor) -> float:
        """Squared output error over the variance of the targets, both over all outputs."""
        sums = equations.sums
        return relative_error(sums.gram, sums.moment, sums.energy, weights, reference.spread.sum())
