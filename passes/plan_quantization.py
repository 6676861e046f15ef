"""Decide every number of the quantized network: activation ranges, integer weights, corrected biases.

Before: a canonical float network, calibration data, bits and the backend's scheme. After: a `QuantPlan`; the graph
is not changed.

1. Observe: the float network runs over all calibration data once; ranges come from streaming statistics (`observers`).
2. Walk from input to output on two frontiers, one of the float network, one whose prefix is already quantized. Each
   layer is re-solved so that it
   repeats the float layer's output on the quantized inputs, gets its ranges and its rounding, and a bias that makes
   its mean output right.

At 8 bits rounding to nearest with the bias correction is within noise of the rest, needs only means, and a few
dozen samples; below, all of step 2 is done.
Network inputs (and what tables, slices and reshapes make of them) keep the scheme's `input_bits`: images are 8-bit
data, and their rounding cannot be corrected by any layer.
Hardware that requantizes by shifting (`rounding="half_up"`) takes activation scales from `align_scales`, weight scales
from the grid that they leave; scales that a model came with give way where they do not fit.

Source: Zhang, Colbert, Das, Applied Sciences 2022, 12(15), 7829, Sections 2 and 3 (greedy layer-by-layer order,
uniform quantizers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpsn_tvm.frontier import Frontier
from lpsn_tvm.graph import Layer, find_layers
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.align_scales import align_scales, weight_grid
from lpsn_tvm.passes.fake_quantize import FakeQuantizer, set_quantized_weights
from lpsn_tvm.passes.normal_equations import LayerGeometry, NormalEquations
from lpsn_tvm.passes.observers import observe
from lpsn_tvm.passes.quantize_layer import LayerSums, quantize_layer
from lpsn_tvm.passes.quantize_options import (
    DEFAULT_BUDGET,
    LayerBits,
    ObserverKind,
    QuantizeOptions,
    Rounding,
    bits_of,
    check_bits,
    check_finite,
    override,
    to_scheme,
)
from lpsn_tvm.passes.regions import Region, Regions, find_regions
from lpsn_tvm.progress import ProgressCallback, silent
from lpsn_tvm.quant import QuantizedWeight, QuantParams, QuantPlan, QuantScheme

Batches = Iterable[Mapping[str, Any]]

BATCH_BYTES = 24 << 20
MEAN_SAMPLES, MEAN_ROWS = 48, 4096
SUM_SAMPLES, SUM_ROWS = 512, 24576


def plan_quantization(
    mod: Any,
    calibration: Batches,
    *,
    weight_bits: int,
    activation_bits: int,
    scheme: QuantScheme | None = None,
    observer: ObserverKind = "mse",
    rounding: Rounding = "auto",
    resolve: bool = True,
    keep: Mapping[str, QuantParams] | None = None,
    keep_weights: Mapping[str, QuantParams] | None = None,
    ignore: Iterable[str] = (),
    layer_bits: LayerBits | None = None,
    input_bits: int | None = None,
    seed: int = 0,
    memory_budget: int = DEFAULT_BUDGET,
    regions: Regions | None = None,
    progress: ProgressCallback | None = None,
) -> QuantPlan:
    """Plan the quantization of a canonical module.

    Parameters
    ----------
    mod : IRModule
        Canonical float module.
    calibration : CalibrationSet, or any re-iterable of dict of str to float32 batches
        Unlabelled inputs.
    weight_bits, activation_bits : int
        2..8, as far as the scheme allows.
    scheme : QuantScheme
        What the backend's arithmetic wants; llvm's by default.
    observer : {"mse", "minmax", "percentile", "entropy"}
        How activation ranges are chosen.
    rounding : {"auto", "gptq", "nearest"}
        "auto": nearest where a layer has 8-bit weights and 8-bit activations, else GPTQ.
    resolve : bool
        Whether weights are re-solved on the quantized prefix (where GPTQ is used).
    keep : mapping of variable to QuantParams, optional
        Scales of a model that came with QuantizeLinear nodes; used as they are.
    keep_weights : mapping of layer to QuantParams, optional
        Weight scales of such a model; those layers are rounded to nearest.
    ignore : iterable of str
        Layer names or patterns that stay float.
    layer_bits : mapping of layer name or pattern to bits, optional
        Other bits for some layers: (weight bits, bits of the layer's input), or one number for both.
    input_bits : int, optional
        Bits of network inputs (at least `activation_bits`); the scheme's by default.
    seed : int
        Of the sampled rows and samples.
    memory_budget : int
        Bytes of cached activations; fewer samples are used for step 2 if they do not fit.
    regions : Regions, optional
        Found anew by default.
    progress : callable (stage, done, total), optional
        Told after every batch observed and every layer quantized.

    Raises
    ------
    QuantizeError
        No calibration data, bits that the scheme does not have, an unknown layer name, weights or activations that
        are not
        finite (names the layer), an accumulator that could leave int32.
    """
    scheme = scheme or QuantScheme()
    input_bits = scheme.input_bits if input_bits is None else input_bits
    options = QuantizeOptions(
        weight_bits, activation_bits, scheme, observer, rounding, resolve, dict(keep or {}),
        dict(keep_weights or {}),
        dict(layer_bits or {}), max(input_bits, activation_bits), seed, memory_budget,
    )  # fmt: skip
    regions = find_regions(mod, ignore) if regions is None else regions
    with torch.no_grad():
        return _Planner(mod, regions, calibration, options, progress or silent).run()


class _Planner:
    def __init__(
        self,
        mod: Any,
        regions: Regions,
        calibration: Batches,
        options: QuantizeOptions,
        progress: ProgressCallback,
    ) -> None:
        self.regions, self.calibration, self.options, self.progress = regions, calibration, options, progress
        self.layers = {name: layer for name, layer in find_layers(mod).items() if name in regions.by_layer}
        self.bits = {name: bits_of(name, options) for name in self.layers}
        check_bits(self.bits, options)
        check_finite(self.layers)
        self.mod, self.interpreter = mod, TorchInterpreter(mod)
        self.by_shifts = options.scheme.rounding == "half_up"
        self.batch = _batch_size(self.interpreter)
        self.weights: dict[str, QuantizedWeight] = {}
        self.activations: dict[str, QuantParams] = {}

    def run(self) -> QuantPlan:
        self._choose_activations()
        self._walk()
        activations = {name: self.activations[self.regions.source(name)] for name in self.regions.quantized}
        return QuantPlan(activations, self.weights, self.regions.float_nodes)

    # --- activations ---
    def _choose_activations(self) -> None:
        found = {name: to_scheme(params, self.options.scheme) for name, params in self.options.keep.items()}
        names = [name for name in self.regions.quantized if name not in self.regions.shares]
        kept = {name: params for name, params in found.items() if params is not None and name in names}
        # Where scales have to fit each other, what is kept may have to give way.
        wanted = [name for name in names if self.by_shifts or name not in kept]
        batches = _Batches(self.calibration, self.batch)
        kind, report = self.options.observer, self._report_observation
        seen = observe(self.interpreter, batches, wanted, kind, report) if wanted else {}
        bits = self._activation_bits()
        if self.by_shifts:
            self.activations = align_scales(self.mod, self.regions, seen, bits, self.options.scheme, kept)
            return
        for name in names:
            params = kept.get(name)
            self.activations[name] = seen[name].params(bits[name], self.options.scheme) if params is None else params

    def _report_observation(self, done: int, total: int) -> None:
        self.progress("observe ranges", done, max(done, total))

    def _activation_bits(self) -> dict[str, int]:
        """Bits of every quantized variable that has parameters of its own."""
        bits = {name: self.options.activation_bits for name in self.regions.quantized}
        for name in _input_like(self.regions):
            bits[self.regions.source(name)] = self.options.input_bits
        asked: dict[str, int] = {}
        for name, layer in self.layers.items():
            if override(name, self.options.layer_bits) is not None:
                source = self.regions.source(layer.data)
                asked[source] = max(asked.get(source, 0), self.bits[name][1])
        return {**bits, **asked}

    # --- weights ---
    def _walk(self) -> None:
        scheme = self.options.scheme
        order = [region for region in self.regions.regions if region.kind == "layer"]
        needs_sums = any(self._rounding(region) == "gptq" for region in order)
        subset = self._subset(order, SUM_SAMPLES if needs_sums else MEAN_SAMPLES)
        quantized = TorchInterpreter.__new__(TorchInterpreter)
        quantized.__dict__.update(self.interpreter.__dict__)
        quantized.params = dict(self.interpreter.params)
        dense = Frontier(self.interpreter, subset)
        prefix = Frontier(quantized, subset, transform=FakeQuantizer(self.regions, self.activations, scheme.rounding))
        for index, region in enumerate(order):
            assert region.layer is not None
            layer = self.layers[region.layer]
            prefix.advance(layer.data)
            dense.advance(layer.name)
            sums = self._sums(region, layer, prefix, dense, self._rounding(region) == "gptq")
            weight = quantize_layer(
                layer, sums, self.bits[layer.name][0], scheme,
                self.activations[self.regions.source(layer.data)],
                resolve=self.options.resolve, rounding=self._rounding(region),
                kept=None if self.by_shifts else self.options.keep_weights.get(layer.name),
                grid=weight_grid(region, self.regions, self.activations) if self.by_shifts else None,
            )  # fmt: skip
            self.weights[layer.name] = weight
            set_quantized_weights(quantized, {layer.name: weight})
            self.progress("quantize layers", index + 1, len(order))

    def _rounding(self, region: Region) -> str:
        assert region.layer is not None
        if region.layer in self.options.keep_weights and not self.by_shifts:
            return "nearest"
        if self.options.rounding != "auto":
            return self.options.rounding
        weight_bits = self.bits[region.layer][0]
        bits = self.activations[self.regions.source(region.inputs[0])].bits
        return "nearest" if weight_bits == 8 and bits == 8 else "gptq"

    def _subset(self, order: list[Region], wanted: int) -> list[Mapping[str, Any]]:
        """Samples for the walk: as many as wanted, or as fit into the memory budget (twice: two frontiers)."""
        stops: list[str] = []
        for region in order:
            assert region.layer is not None
            stops += [self.layers[region.layer].data, region.layer]
        fits = Frontier.max_samples(self.interpreter, self.options.memory_budget // 2, stops=dict.fromkeys(stops))
        count = max(1, min(wanted, fits))
        source = self.calibration
        if hasattr(source, "take"):
            source = source.take(count, seed=self.options.seed)
        picked: list[Mapping[str, Any]] = []
        for feeds in _in_batches(source, min(self.batch, count)):
            size = len(next(iter(feeds.values())))
            picked.append({name: value[:count] for name, value in feeds.items()} if size > count else feeds)
            count -= size
            if count <= 0:
                break
        return picked

    def _sums(self, region: Region, layer: Layer, prefix: Frontier, dense: Frontier, needs_gram: bool) -> LayerSums:
        """Sums over sampled output positions of the layer's quantized inputs and float outputs.

        Where a residual is added, its own quantization error is part of the target: the layer makes up for what it can.
        """
        geometry = LayerGeometry.of(layer)
        rows = min(SUM_ROWS, max(8192, 4 * geometry.columns)) if needs_gram else MEAN_ROWS
        per_sample = max(1, -(-rows // dense.samples))
        outputs = geometry.out_channels // geometry.groups
        equations = NormalEquations(geometry.groups, geometry.columns + 1, outputs) if needs_gram else None
        sum_x = torch.zeros(geometry.groups, geometry.columns + 1, dtype=torch.float64)
        sum_y = torch.zeros(geometry.out_channels, dtype=torch.float64)
        for number, (x, y) in enumerate(
            _pairs(prefix.batches(layer.data), self._targets(region, layer, prefix, dense))
        ):
            where = geometry.sample_positions(per_sample, self.options.seed, layer.name, number)
            matrix, targets = geometry.rows(x, where), geometry.targets(y, where)
            if equations is not None:
                equations.add(matrix, targets)
            else:
                sum_x += matrix.sum(dim=1, dtype=torch.float64)
                sum_y += targets.sum(dim=0, dtype=torch.float64)
        if equations is not None:
            return LayerSums.from_normal_equations(equations.gram, equations.moment)
        count = sum_x[:, -1:]
        return LayerSums(sum_x[:, :-1] / count, sum_y.reshape(geometry.groups, -1) / count)

    def _targets(self, region: Region, layer: Layer, prefix: Frontier, dense: Frontier) -> Iterator[Tensor]:
        if region.residual is None:
            yield from dense.batches(layer.name)
            return
        prefix.advance(region.residual)
        sources = dense.batches(layer.name), dense.batches(region.residual), prefix.batches(region.residual)
        for y, wanted, given in zip(*sources, strict=True):
            yield y + (wanted - given)


def _pairs(first: Iterator[Tensor], second: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(first, second, strict=True)


class _Batches:
    """Calibration data in batches of the planner's choice, where the data can be cut anew."""

    def __init__(self, calibration: Batches, size: int) -> None:
        self.calibration, self.batch = calibration, size

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return _in_batches(self.calibration, self.batch)

    def __len__(self) -> int:
        length = getattr(self.calibration, "__len__", None)
        if length is None:
            return 0
        return int(length()) * (1 if hasattr(self.calibration, "batches") else self.batch)


def _in_batches(calibration: Batches, size: int) -> Iterator[Mapping[str, Any]]:
    batches: Callable[[int], Iterator[Mapping[str, Any]]] | None = getattr(calibration, "batches", None)
    return iter(calibration) if batches is None else batches(size)


def _batch_size(interpreter: TorchInterpreter) -> int:
    """Samples per batch at which the largest tensor stays within `BATCH_BYTES`."""
    largest = max(int(np.prod(shape)) * 4 // max(1, shape[0] if shape else 1) for shape in interpreter.shapes.values())
    return int(np.clip(BATCH_BYTES // max(1, largest), 1, 64))


def _input_like(regions: Regions) -> list[str]:
    """Network inputs and what tables and scale-preserving operators make of them."""
    names = list(regions.inputs)
    for region in regions.regions:
        if region.kind in ("lookup", "same") and region.inputs[0] in names:
            names.append(region.name)
    return [name for name in names if regions.is_quantized(name)]
