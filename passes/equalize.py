"""Equalize channels across layers: every channel of a tensor gets a factor, so that one scale suits them all.

Before: a canonical float network whose channels have ranges far apart. After: the same function; the weights that
write channel c are multiplied by r[c], the weights that read it divided, and the tensors in between hold r[c] * x.

1. A **class** is a set of variables that share their channels' factors: what relu, leaky relu, PReLU, sums, poolings,
   zero padding, resizes and reshapes of 1 x 1 images connect. All of these are positively homogeneous, so a positive
   factor passes through exactly.
2. Layers separate classes: a depthwise layer takes factors in and gives others out.
3. A class is **fixed** (all factors 1) where it touches the network's inputs or outputs or any other operator, ReLU6
   and clip among them: a factor does not pass through a bound.
4. Factors come from calibration data: with `best[t, c]` the step that suits channel c of quantized tensor t alone
   (least squared error), `log r[c] = -strength * mean_t(log best[t, c] - mean_c log best[t, c])`. Classes whose
   channels are alike stay as they are (`SMALLEST_SPREAD`).

Source: Nagel, van Baalen, Blankevoort, Welling, "Data-free quantization through weight equalization and bias
correction", 2019 (the idea; the rule for the factors is this project's).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.graph import Layer
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.lower_layers import per_output
from lpsn_tvm.passes.operator_rules import Node
from lpsn_tvm.passes.regions import Regions, nodes_of
from lpsn_tvm.quant import Array

UNARY = frozenset({
    "relax.nn.relu", "relax.nn.leakyrelu", "relax.nn.prelu", "relax.nn.max_pool2d", "relax.nn.avg_pool2d",
    "relax.image.resize2d", "relax.nn.adaptive_avg_pool2d",
})  # fmt: skip
RESHAPES = frozenset({
    "relax.reshape", "relax.squeeze", "relax.flatten", "relax.nn.batch_flatten", "relax.expand_dims",
})  # fmt: skip
VALUES = 4096
"""Values per channel and tensor that the search for its step looks at."""
SHARES = tuple(float(share) for share in np.geomspace(1.0, 0.1, 28))
"""Fractions of a channel's range that are tried."""
LARGEST_FACTOR = 1024.0
SMALLEST_SPREAD = 0.7
"""Standard deviation of log r below which a class stays as it is: measured, nothing is gained there (half an octave is
normal for networks with batch norm); at 1.0 W8A8 loses 0.7 points without equalization, at 2.0 everything."""


def channel_classes(mod: Any) -> dict[str, str]:
    """Variable -> name of its class; variables of fixed classes are left out (rules 1 to 3)."""
    nodes, inputs, outputs = nodes_of(mod)
    layers = graph.find_layers(mod)
    accumulators = {layer.acc for layer in layers.values()}
    leader = {name: name for name in (*inputs, *nodes)}
    fixed = {*inputs, *outputs}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for name, node in nodes.items():
        if name in accumulators:
            continue
        if name in layers or _is_homogeneous(node):
            for source in node.inputs:
                leader[find(source)] = find(name)
        else:
            fixed.update((name, *node.inputs))
    fixed = {find(name) for name in fixed}
    return {name: find(name) for name in leader if name not in accumulators and find(name) not in fixed}


def _is_homogeneous(node: Node) -> bool:
    """Whether positive factors per channel (axis 1) pass through the operator."""
    call = node.call
    shapes = [graph.shape_of(arg) for arg in call.args if isinstance(arg, relax.Var)]
    out = graph.shape_of(call)
    if node.op in UNARY:
        return True
    if node.op == "relax.add":
        return len(node.inputs) == 2 and all(shape == out for shape in shapes)
    if node.op in RESHAPES:
        return shapes[0][:2] == out[:2] and all(extent == 1 for extent in (*shapes[0][2:], *out[2:]))
    attrs = graph.call_attrs(call)
    if node.op in ("relax.mean", "relax.max"):
        return node.kind in ("pool", "same")
    if node.op == "relax.nn.pad":
        return node.kind == "same" and (attrs["pad_mode"] != "constant" or float(attrs["pad_value"]) == 0.0)
    return False


def choose_factors(
    mod: Any,
    regions: Regions,
    batches: Iterable[Mapping[str, Any]],
    bits: int,
    strength: float = 1.0,
) -> dict[str, Array]:
    """Factors per class (rule 4), float64[C], all within [1 / `LARGEST_FACTOR`, `LARGEST_FACTOR`].

    Parameters
    ----------
    mod : IRModule
        Canonical module.
    regions : Regions
        Its regions; quantized tensors of a class decide its factors.
    batches : iterable of dict of str to float32 batches
        Calibration data.
    bits : int
        Of activations.
    strength : float
        0: no equalization; 1: every channel has the step that suits it.
    """
    classes = channel_classes(mod)
    wanted = {name for name in regions.quantized if name not in regions.shares and name in classes}
    if not wanted:
        return {}
    samples = _collect(TorchInterpreter(mod), batches, wanted)
    logs: dict[str, list[Array]] = {}
    for name in sorted(wanted):
        step = _best_steps(samples[name], bits)
        used = step > 0
        if used.any():
            value = np.where(used, np.log(np.where(used, step, 1.0)), 0.0)
            logs.setdefault(classes[name], []).append(np.where(used, value - value[used].mean(), 0.0))
    bound = float(np.log(LARGEST_FACTOR))
    means = {name: np.mean(rows, axis=0) for name, rows in logs.items()}
    return {
        name: np.exp(np.clip(-strength * mean, -bound, bound))
        for name, mean in means.items()
        if float(np.std(mean)) >= SMALLEST_SPREAD
    }


def _collect(
    interpreter: TorchInterpreter, batches: Iterable[Mapping[str, Any]], wanted: set[str]
) -> dict[str, Tensor]:
    """float32[C, n] values per channel of every wanted variable."""
    kept: dict[str, list[Tensor]] = {name: [] for name in wanted}
    counts = dict.fromkeys(wanted, 0)

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in wanted and counts[name] < VALUES:
            rows = tensor.transpose(0, 1).reshape(tensor.shape[1], -1)
            rows = rows[:, :: max(1, rows.shape[1] // 256)].clone()
            kept[name].append(rows)
            counts[name] += rows.shape[1]
        return tensor

    with torch.no_grad():
        for feeds in batches:
            interpreter.run(feeds, transform=look)
            if all(count >= VALUES for count in counts.values()):
                break
    return {name: torch.cat(rows, dim=1) for name, rows in kept.items()}


def _best_steps(values: Tensor, bits: int) -> Array:
    """Step of each row at which signed integers of `bits` bits have the least squared error; 0 for rows of zeros."""
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    top = values.abs().amax(dim=1, keepdim=True)
    scaled = values / torch.where(top > 0, top, torch.ones_like(top))
    best = torch.full((len(values),), float("inf"))
    share = torch.ones(len(values))
    for candidate in SHARES:
        step = candidate / high
        error = (scaled - torch.clamp(torch.round(scaled / step), low, high) * step).square().sum(dim=1)
        share = torch.where(error < best, torch.full_like(share, candidate), share)
        best = torch.minimum(best, error)
    return np.asarray((share * top[:, 0] / high).double().numpy())


def apply_factors(mod: Any, factors: Mapping[str, Array]) -> Any:
    """The module with factors per class moved into its weights; the same function."""
    if not factors:
        return mod
    classes, layers = channel_classes(mod), graph.find_layers(mod)
    alias = _aliases(mod)

    def factor(variable: str, channels: int) -> Array:
        name = classes.get(alias.get(variable, variable))
        return factors.get(name, np.ones(channels)) if name is not None else np.ones(channels)

    by_acc = {layer.acc: layer for layer in layers.values()}

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name in by_acc:
            layer = by_acc[var.name]
            weight = scaled_weight(layer, factor(layer.data, layer.in_channels), factor(layer.name, layer.out_channels))
            operands = [lookup(value.args[0]), graph.constant(weight)]
            return relax.Call(value.op, operands, value.attrs, list(value.ty_args))
        if var.name in layers:
            bias = graph.constant_value(value.args[1])
            scaled = bias.reshape(-1) * factor(var.name, bias.size)
            return relax.op.add(lookup(value.args[0]), graph.constant(scaled.astype(np.float32).reshape(bias.shape)))
        return None

    return graph.rebuild(mod, rewrite)


def _aliases(mod: Any) -> dict[str, str]:
    alias: dict[str, str] = {}
    for var, value in graph.bindings(mod):
        if isinstance(value, relax.Var):
            alias[var.name] = alias.get(value.name, value.name)
    return alias


def scaled_weight(layer: Layer, reads: Array, writes: Array) -> Array:
    """The float32 weight that reads `reads[c] * x[c]` and writes `writes[c] * y[c]`."""
    weight = layer.weight.astype(np.float64)
    inputs: Array
    if layer.kind == "dense":
        inputs = reads.reshape(-1, 1)
    elif layer.kind == "conv2d_transpose":
        inputs = reads.reshape(-1, 1, 1, 1)
    else:
        # OIHW: the rows of group g read its part of the input channels.
        rows = np.repeat(reads.reshape(layer.groups, -1), layer.out_channels // layer.groups, axis=0)
        inputs = rows[:, :, None, None]
    return (weight / inputs * per_output(layer, writes, weight.ndim)).astype(np.float32)
