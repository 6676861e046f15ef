"""Remove channels greedily on calibration data; every consumer is re-solved to give the dense network's output.

Group by group from input to output, on the already sparsified prefix:

1. the consumer's normal equations are summed over the compressed prefix's values, against the dense network's
   pre-activation outputs (of the whole sum, where the layer closes a residual block);
2. the mask of every group that is first read here is chosen. A residual stream's mask is chosen once, at its first
   consumer, with the costs of all its consumers, each over the variance of its target; consumers further down are
   evaluated on the dense network's values;
3. weights and bias of the consumer are re-solved by least squares (the bias is undamped, so the mean error is zero);
4. depthwise layers are re-solved channel by channel; their group is scored at the projection behind them.

Source: Zhang, Colbert, Das, "Learning Low-Precision Structured Subnetworks Using Joint Layerwise Channel Pruning and
Uniform Quantization", Applied Sciences 2022, 12(15), 7829 (greedy order, `score="mean_activation"`). Coupled groups,
the output-error score and the re-solve are this product's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tvm

from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.errors import CalibrationError, RecipeError
from lpsn_tvm.frontier import Frontier, layer_inputs
from lpsn_tvm.graph import Layer, find_layers
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.allocate import MEASURE_SAMPLES, allocate, output_error
from lpsn_tvm.passes.channel_groups import ChannelGroup, find_channel_groups
from lpsn_tvm.passes.dense_reference import LayerReference, ReferenceOptions, batch_size, read_dense_network
from lpsn_tvm.passes.greedy_walk import Demand, GreedyWalk
from lpsn_tvm.passes.group_columns import near_consumers
from lpsn_tvm.passes.prune_result import GroupRecord, PruneResult, whole_records
from lpsn_tvm.passes.removal_counts import check_names, fraction_of, is_ignored, kept_rounded_up, kept_units
from lpsn_tvm.passes.remove_channels import remove_channels
from lpsn_tvm.passes.scores import SCORES

Progress = Callable[[str, int, int], None]
FLOAT_TOLERANCE = 1e-3
"""`sparsity="auto"` without a bit width: output error that removing one group may add, relative to the variance of
the consumers' outputs.
"""
MAX_SAMPLES = 512


def prune(
    mod: tvm.IRModule,
    calibration: CalibrationSet,
    *,
    sparsity: float | Mapping[str, float] | Literal["auto"] | None,
    align: int = 1,
    score: str = "output_error",
    order: str = "greedy",
    allocation: str = "uniform",
    ignore: Sequence[str] = (),
    seed: int = 0,
    memory_budget: int = 3 << 27,
    bits: tuple[int, int] | None = None,
    resolve: bool = True,
    progress: Progress | None = None,
) -> PruneResult:
    """Remove channels of a canonical module.

    Parameters
    ----------
    mod : IRModule
        Canonical form; not changed.
    calibration : CalibrationSet
        Unlabelled samples; as many are used as fit the memory budget.
    sparsity : float, mapping of layer name (or shell pattern) to float, "auto" or None
        Fraction of channels to remove per layer. "auto": as long as the output error that removing a group adds stays
        below the error that `bits` add
        to its consumers anyway (without bits: below `FLOAT_TOLERANCE`). None removes nothing.
    align : int
        Kept channels are rounded to the nearest multiple ("auto": up), in layers of at least twice as many channels;
        1: `int(sparsity * C)` are removed.
    score : {"output_error", "mean_activation", "zero_fraction", "random"}
        How channels are ranked; "mean_activation" is the paper's importance.
    order : {"greedy", "one_shot"}
        One-shot scores every group on the dense network.
    allocation : {"uniform", "nonuniform"}
        Nonuniform: the MACs that the uniform fraction would leave, spent where the output error is least.
    ignore : sequence of str
        Names or shell patterns of layers that keep all their output channels.
    seed : int
        Of sampled positions and of the random score.
    memory_budget : int
        Bytes of activations held at once.
    bits : (int, int), optional
        Weight and activation bits, for "auto".
    resolve : bool
        Re-solve consumers by least squares; False is for comparison.
    progress : callable (stage, done, total), optional
        Called often; an exception from it (KeyboardInterrupt too) leaves everything as it was.

    Raises
    ------
    RecipeError
        An unknown layer name or choice.
    CalibrationError
        Not one sample fits the memory budget.
    """
    _check_choices(score, order, allocation, sparsity)
    layers = find_layers(mod)
    check_names(ignore, list(layers), "ignore")
    if isinstance(sparsity, Mapping):
        check_names(sparsity, list(layers), "sparsity")
    found = find_channel_groups(mod)
    reasons = _left_whole(found.groups, layers, ignore)
    groups = tuple(group for group in found.groups if group.name not in reasons)
    whole = [*((name, why) for name, why in found.frozen.items()), *reasons.items()]
    if sparsity is None or not groups:
        return PruneResult(mod, tuple(whole_records(whole, layers)), {}, dict(whole), {}, 0)
    job = _Job(mod, layers, groups, calibration, score, order, seed, memory_budget, progress or _silent)
    demands = job.demands(sparsity, align, allocation, bits)
    return job.run(demands, whole, resolve)


@dataclass
class _Job:
    """One call of `prune`."""

    mod: tvm.IRModule
    layers: dict[str, Layer]
    groups: tuple[ChannelGroup, ...]
    calibration: CalibrationSet
    score: str
    order: str
    seed: int
    memory_budget: int
    progress: Progress

    def __post_init__(self) -> None:
        self.interpreter = TorchInterpreter(self.mod)
        reachable = {step.name for step in self.interpreter.useful}
        self.layers = {name: layer for name, layer in self.layers.items() if name in reachable}
        stops = layer_inputs(self.interpreter)
        fits = Frontier.max_samples(self.interpreter, self.memory_budget, stops=stops)
        self.samples = min(len(self.calibration), fits, MAX_SAMPLES)
        if self.samples < 1:
            raise CalibrationError(f"not one sample fits a memory budget of {self.memory_budget >> 20} MiB")
        self.data = (
            self.calibration.take(self.samples, self.seed) if self.samples < len(self.calibration) else self.calibration
        )
        self.batch = batch_size(self.interpreter)
        self.references: dict[str, LayerReference] = {}

    def demands(self, sparsity: Any, align: int, allocation: str, bits: tuple[int, int] | None) -> dict[str, Demand]:
        """Read the dense network and say how much of every group is to go."""
        is_auto = sparsity == "auto"
        everything = self.order == "one_shot" or allocation == "nonuniform"
        scored = {slot.layer for group in self.groups for slot in near_consumers(group, self.layers)}
        wanted = (
            scored
            if everything
            else {slot.layer for group in self.groups for slot in near_consumers(group, self.layers)[1:]}
        )
        if self.score != "output_error" and not everything:
            wanted = set()
        options = ReferenceOptions(
            self.seed, self.memory_budget // 2, frozenset(wanted), self.score, bits if is_auto else None
        )
        self.references = read_dense_network(
            self.interpreter,
            self.layers,
            self.data.batches(self.batch),
            self.samples,
            options,
            lambda done: self.progress("read the dense network", done, self.samples),
        )
        if is_auto:
            return {group.name: self._auto(group, align, bits) for group in self.groups}
        kept = {group.name: kept_units(group, fraction_of(group, sparsity), align) for group in self.groups}
        if allocation == "nonuniform":
            kept = self._nonuniform(kept, align)
        return {name: Demand(count) for name, count in kept.items()}

    def _nonuniform(self, uniform: Mapping[str, int], align: int) -> dict[str, int]:
        """Counts at the MACs of `uniform` that cost the least output error; every group is tried alone on the dense
        network.
        """
        feeds = list(self.data.take(MEASURE_SAMPLES, self.seed).batches(self.batch))
        targets = [self.interpreter.run(feed) for feed in feeds]
        trial = GreedyWalk(self.interpreter, None, self.layers, self.references, self.groups, {}, self.score, self.seed)
        done = 0

        def measure(group: ChannelGroup, counts: Sequence[int]) -> list[float]:
            nonlocal done
            patches = trial.dense_patches(group, counts)
            errors = [output_error(self.interpreter, patch, feeds, targets) for patch in patches]
            done += 1
            self.progress("try every group", done, len(self.groups))
            return errors

        def round_up(group: ChannelGroup, kept: int) -> int:
            return kept_rounded_up(group, kept, align)

        return allocate(self.layers, self.groups, uniform, round_up, measure)

    def _auto(self, group: ChannelGroup, align: int, bits: tuple[int, int] | None) -> Demand:
        slots = near_consumers(group, self.layers)
        budget = FLOAT_TOLERANCE
        if bits is not None:
            parts = [self.references[slot.layer] for slot in slots]
            budget = sum(p.quantization_error / max(float(p.spread.sum()), 1e-30) for p in parts)
        return Demand(1, budget, lambda kept: kept_rounded_up(group, kept, align))

    def run(self, demands: Mapping[str, Demand], whole: Sequence[tuple[str, str]], resolve: bool) -> PruneResult:
        """Walk and remove."""
        frontier = Frontier(self.interpreter, self.data.batches(self.batch))
        walk = GreedyWalk(
            self.interpreter,
            frontier,
            self.layers,
            self.references,
            self.groups,
            demands,
            self.score,
            self.seed,
            resolve,
        )
        if self.order == "one_shot":
            walk.preset = {group.name: walk.dense_scores(group) for group in self.groups}
        walk.run(lambda done: self.progress("remove channels", done, len(self.layers)))
        masks = {name: decision.mask for name, decision in walk.decisions.items()}
        params = {}
        for name in walk.changed:
            weight, bias = self.interpreter.params[name]
            params[name] = (weight.cpu().numpy(), bias.cpu().numpy())
        removed = remove_channels(self.mod, {name: mask for name, mask in masks.items() if not mask.all()}, params)
        records = [self._record(group, walk) for group in self.groups if group.name in walk.decisions]
        records += whole_records(whole, self.layers)
        return PruneResult(removed, tuple(records), masks, dict(whole), dict(walk.errors), self.samples)

    def _record(self, group: ChannelGroup, walk: GreedyWalk) -> GroupRecord:
        decision = walk.decisions[group.name]
        width = group.producers[0].index.shape[1] if group.producers else group.followers[0].written.shape[1]
        names = tuple([slot.layer for slot in group.producers] + [follower.layer for follower in group.followers])
        return GroupRecord(
            group.name,
            names,
            group.size * width,
            int(decision.mask.sum()) * width,
            decision.predicted,
            walk.errors.get(decision.consumer, 0.0),
            "",
            decision.scores,
        )


def _silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def _check_choices(score: str, order: str, allocation: str, sparsity: Any) -> None:
    for option, value, allowed in (
        ("score", score, SCORES),
        ("order", order, ("greedy", "one_shot")),
        ("allocation", allocation, ("uniform", "nonuniform")),
    ):
        if value not in allowed:
            raise RecipeError(f"{value!r} is not one of {', '.join(allowed)}", where=option)
    if sparsity == "auto" and (score != "output_error" or order != "greedy" or allocation != "uniform"):
        raise RecipeError(
            '"auto" needs score="output_error", order="greedy" and allocation="uniform"', where="sparsity"
        )
    if sparsity is not None and sparsity != "auto":
        for value in sparsity.values() if isinstance(sparsity, Mapping) else (sparsity,):
            if not 0 <= float(value) < 1:
                raise RecipeError(f"{value} is out of range; a fraction in [0, 1) is allowed", where="sparsity")


def _left_whole(groups: Sequence[ChannelGroup], layers: Mapping[str, Layer], ignore: Sequence[str]) -> dict[str, str]:
    """Groups that this pass leaves whole -> why."""
    reasons = {}
    for group in groups:
        ignored = is_ignored(group, ignore)
        if ignored is not None:
            reasons[group.name] = f"layer {ignored} is ignored"
        elif not any(slot.layer in layers for slot in group.consumers):
            reasons[group.name] = "no layer with weights reads these channels, so nothing could make up for them"
    return reasons
