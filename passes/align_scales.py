"""Activation scales for hardware that requantizes by shifting: ratios are powers of two, scales need not be.

Before: observers of every quantized tensor. After: signed symmetric parameters of zero point 0 such that every ratio
of scales that integer arithmetic multiplies by is a power of two. Only ratios matter, so:

1. A tensor that only layers read and write takes the scale that suits it best, any number: the weight scales of the
   layers on both sides absorb it (`weight_grid`).
2. Tensors that are added or concatenated form a group: they share a mantissa m in [1, 2), each has its own exponent.
   All mantissas of a fine grid are tried; the least sum of relative errors wins. A scheme of `power_of_two` has m = 1.
3. Where the hardware has offsets (`QuantScheme.has_activation_offset`), a tensor of few bits that is never negative
   and that only layers write and read has all 2**bits levels above zero: its zero point is the smallest integer.
4. The average over n numbers of a tensor of scale s gets s / n * 2**t: then dividing by n is a shift, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm import graph
from lpsn_tvm.passes.histogram import squared_error
from lpsn_tvm.passes.integer_ops import scale_of
from lpsn_tvm.passes.lower_shapes import is_global_average
from lpsn_tvm.passes.observers import MAX_SCALE, MIN_SCALE, HistogramObserver, Observer
from lpsn_tvm.passes.regions import Region, Regions
from lpsn_tvm.quant import QuantParams, QuantScheme

MANTISSAS = 32
"""Mantissas that are tried for a group."""
OFFSET_BITS = 5
"""With more bits an offset gains nothing that shows."""
OFFSET_KEPT = frozenset({
    "relax.nn.max_pool2d", "relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims",
    "relax.nn.batch_flatten",
})  # fmt: skip
"""Scale-preserving operators that integers with an offset pass through as they are."""


@dataclass(frozen=True)
class WeightGrid:
    """Weight scales that turn requantization into right shifts: `unit * 2**-k`, at most `largest`.

    Parameters
    ----------
    unit : float
        Output scale / input scale.
    largest : float
        `unit`, or less where a residual has to be shifted left into the accumulator's unit.
    """

    unit: float
    largest: float


def weight_grid(region: Region, regions: Regions, activations: Mapping[str, QuantParams]) -> WeightGrid | None:
    """The grid of a layer region's weight scales; None where its output is float32 and any scale will do."""
    if region.float_output:
        return None
    x, out = (scale_of(activations[regions.source(name)]) for name in (region.inputs[0], region.name))
    unit = float(np.float64(out) / np.float64(x))
    if region.residual is None:
        return WeightGrid(unit, unit)
    residual = scale_of(activations[regions.source(region.residual)])
    return WeightGrid(unit, unit * min(1.0, float(np.exp2(np.rint(np.log2(residual / out))))))


def scale_groups(regions: Regions) -> list[tuple[str, ...]]:
    """Quantized tensors that have parameters of their own, in groups whose ratios must be powers of two."""
    leader = {name: name for name in regions.quantized if name not in regions.shares}

    def find(name: str) -> str:
        name = regions.source(name)
        while leader[name] != name:
            name = leader[name]
        return name

    for region in regions.regions:
        linked: tuple[str, ...] = ()
        if region.kind in ("add", "concat") or region.residual is not None:
            linked = region.inputs if region.kind != "layer" else region.inputs[1:]
        for name in linked:
            first, second = find(region.name), find(name)
            leader[max(first, second)] = min(first, second)
    groups: dict[str, list[str]] = {}
    for name in leader:
        groups.setdefault(find(name), []).append(name)
    return [tuple(members) for members in groups.values()]


def pooled_counts(mod: Any, regions: Regions) -> dict[str, tuple[str, int]]:
    """Averaged variable -> (what is averaged, numbers per average away from borders)."""
    bound = {var.name: value for var, value in graph.bindings(mod)}
    table: dict[str, tuple[str, int]] = {}
    for region in regions.regions:
        if region.kind != "pool":
            continue
        call = bound[region.members[0]]
        extents = graph.shape_of(call.args[0])[2:] if is_global_average(call) else graph.call_attrs(call)["pool_size"]
        table[region.name] = (regions.source(region.inputs[0]), int(np.prod([int(extent) for extent in extents])))
    return table


def with_offset(mod: Any, regions: Regions) -> frozenset[str]:
    """Quantized tensors that may have a zero point (rule 3)."""
    kinds = {name: layer.kind for name, layer in graph.find_layers(mod).items()}
    bound = {var.name: value for var, value in graph.bindings(mod)}
    written = {region.name for region in regions.regions if region.kind == "layer" and not region.float_output}
    refused: set[str] = {regions.source(name) for name in regions.outputs}
    for region in regions.regions:
        if region.kind == "layer" and kinds[str(region.layer)] != "conv2d_transpose":
            continue
        if region.kind == "same" and graph.op_name(bound[region.name]) in OFFSET_KEPT:
            continue
        refused.update(regions.source(name) for name in region.inputs)
    return frozenset(written - refused)


def align_scales(
    mod: Any,
    regions: Regions,
    observers: Mapping[str, Observer],
    bits: Mapping[str, int],
    scheme: QuantScheme,
    kept: Mapping[str, QuantParams],
) -> dict[str, QuantParams]:
    """Parameters of every quantized tensor that has its own.

    Parameters
    ----------
    mod : IRModule
        Canonical module.
    regions : Regions
        Of the module.
    observers : mapping of variable to Observer
        Of all tensors that are not in `kept`.
    bits : mapping of variable to int
        Of all of them.
    scheme : QuantScheme
        Signed, symmetric, "half_up".
    kept : mapping of variable to QuantParams
        Scales that the model came with; they count where a tensor is in no group with others.
    """
    pools = pooled_counts(mod, regions)
    shifted = with_offset(mod, regions) if scheme.has_activation_offset else frozenset()
    result: dict[str, QuantParams] = {}
    for members in scale_groups(regions):
        free = {name: _Choice(observers[name], bits[name], scheme, name in shifted) for name in members}
        if len(members) == 1 and members[0] in kept:
            result[members[0]] = kept[members[0]]
        elif len(members) == 1 and members[0] in pools:
            continue
        elif len(members) == 1 and not scheme.power_of_two:
            result[members[0]] = free[members[0]].ideal
        else:
            result.update(_joint(free, [1.0] if scheme.power_of_two else _mantissas()))
    for name, (source, count) in pools.items():
        if name in bits and name not in result and name not in regions.shares:
            choice = _Choice(observers[name], bits[name], scheme)
            result.update(_joint({name: choice}, [scale_of(result[source]) / count]))
    return result


def _mantissas() -> list[float]:
    return [float(2.0 ** (step / MANTISSAS)) for step in range(MANTISSAS)]


class _Choice:
    """What scales suit one tensor."""

    def __init__(self, observer: Observer, bits: int, scheme: QuantScheme, may_offset: bool = False) -> None:
        self.observer = observer
        # An asymmetric signed range from 0 on has the smallest integer as its zero point.
        is_symmetric = not (may_offset and bits <= OFFSET_BITS and observer.low >= 0)
        self.ideal = observer.params(bits, replace(scheme, power_of_two=False, activation_symmetric=is_symmetric))

    def at(self, mantissa: float) -> tuple[float, QuantParams]:
        """(relative error, parameters) of the best scale `mantissa * 2**k`."""
        above = int(np.ceil(np.log2(scale_of(self.ideal) / mantissa) - 1e-6))
        found = [self._error(mantissa * 2.0**k) for k in self._exponents(above)]
        return min(found, key=lambda pair: pair[0])

    def _exponents(self, above: int) -> Iterable[int]:
        return (above - 1, above, above + 1) if isinstance(self.observer, HistogramObserver) else (above,)

    def _error(self, scale: float) -> tuple[float, QuantParams]:
        scale = min(max(scale, MIN_SCALE), MAX_SCALE)
        params = replace(self.ideal, scale=np.asarray(scale, np.float32))
        if not isinstance(self.observer, HistogramObserver) or not self.observer.histogram.counts.any():
            return (scale / scale_of(self.ideal)) ** 2, params
        histogram = self.observer.histogram
        used = histogram.counts > 0
        values, weights = histogram.centers[used], histogram.counts[used].astype(np.float64)
        return squared_error(values, weights, params) / float(np.dot(weights, values**2)), params


def _joint(choices: Mapping[str, _Choice], mantissas: Iterable[float]) -> dict[str, QuantParams]:
    """Parameters at the mantissa with the least sum of relative errors."""
    best: tuple[float, dict[str, QuantParams]] | None = None
    for mantissa in mantissas:
        found = {name: choice.at(mantissa) for name, choice in choices.items()}
        total = sum(error for error, _ in found.values())
        if best is None or total < best[0]:
            best = total, {name: params for name, (_, params) in found.items()}
    assert best is not None
    return best[1]
