"""Filling the report of a build: layers before and after, totals, notes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.frontend.importer import ImportedModel
from lpsn_tvm.graph import Layer, find_layers
from lpsn_tvm.passes.pipeline import Network
from lpsn_tvm.report import LayerRecord, Report
from lpsn_tvm.statistics import activation_elements, count_macs, count_parameters, peak_activation_elements
from lpsn_tvm.targets.backend import Backend


def make_report(model: str, backend: Backend, net: Network, seconds: dict[str, float]) -> Report:
    """Everything about the build that is known without running it."""
    recipe, data = net.recipe, net.calibration
    notes = (
        []
        if not data.synthetic
        else ["calibrated on seeded synthetic inputs: no calibration data was given; only dead channels were removed"]
    )
    if not data.synthetic:
        notes.extend(data.notes)
    if recipe.sparsity == "auto" and not data.synthetic and count_parameters(net.dense) == count_parameters(net.pruned):
        notes.append(
            'sparsity="auto" removed nothing: every channel is worth more than the error of the bit width; '
            "give a fraction to remove more"
        )
    if net.kept_scales and recipe.bits:
        notes.append(f"{len(net.kept_scales)} scales of the model's own QuantizeLinear nodes were kept")
    pruning = net.pruning
    return Report(
        model=model,
        target=backend.name,
        bits=recipe.bits,
        layers=_layers(net),
        totals=_totals(net),
        float_nodes=dict(net.plan.float_nodes) if net.plan else {},
        whole_groups=dict(pruning.frozen) if pruning else {},
        notes=notes + (list(pruning.notes) if pruning else []),
        seconds=seconds,
        calibration={"samples": len(data), "digest": data.digest, "synthetic": data.synthetic},
    )


def _layers(net: Network) -> list[LayerRecord]:
    before, after = find_layers(net.dense), find_layers(net.pruned)
    errors = net.pruning.layer_errors if net.pruning else {}
    records = []
    for name, old in before.items():
        new = after.get(name)
        weight = net.plan.weights.get(name) if net.plan else None
        activation = net.plan.activations.get(new.data) if net.plan and new else None
        if new is None:
            continue
        records.append(
            LayerRecord(
                name=name,
                kind="depthwise" if old.is_depthwise else old.kind,
                in_channels=(old.in_channels, new.in_channels),
                out_channels=(old.out_channels, new.out_channels),
                macs=(old.macs, new.macs),
                parameters=(_size(old), _size(new)),
                weight_bits=weight.params.bits if weight else None,
                activation_bits=activation.bits if activation and weight else None,
                error=errors.get(name),
                kept_float="" if weight or not net.plan else net.plan.float_nodes.get(name, "kept float"),
            )
        )
    return records


def _size(layer: Layer) -> int:
    return int(layer.weight.size + layer.bias.size)


def _totals(net: Network) -> dict[str, tuple[float, float]]:
    dense, pruned = net.dense, net.pruned
    weights = net.plan.weights if net.plan else {}
    packed = sum(
        weights[name].values.size * weights[name].params.bits / 8 + 8 * layer.bias.size
        if name in weights
        else 4 * _size(layer)
        for name, layer in find_layers(pruned).items()
    )
    width = 1 if net.plan else 4
    return {
        "macs": (count_macs(dense), count_macs(pruned)),
        "parameters": (count_parameters(dense), count_parameters(pruned)),
        "weight_bytes": (4 * count_parameters(dense), packed),
        "activation_elements": (activation_elements(dense), activation_elements(pruned)),
        "peak_activation_bytes": (4 * peak_activation_elements(dense), width * peak_activation_elements(pruned)),
    }


def model_name(model: Any) -> str:
    """What the report calls the model: file name, graph name, or "model"."""
    if isinstance(model, (str, os.PathLike)):
        return Path(model).name
    graph = getattr(model, "graph", None)
    return str(getattr(graph, "name", "") or "model")


def input_infos(imported: ImportedModel) -> list[TensorInfo]:
    """Names and shapes of the model's inputs."""
    return [TensorInfo(name, shape) for name, shape in imported.signature.items()]


def output_infos(imported: ImportedModel) -> list[TensorInfo]:
    """Names and shapes of the model's outputs."""
    body = imported.mod["main"].body.body
    types = body.ty.fields if len(imported.output_names) > 1 else [body.ty]
    shapes = [tuple(int(extent) for extent in kind.shape.values) for kind in types]
    return [TensorInfo(name, shape) for name, shape in zip(imported.output_names, shapes, strict=True)]
