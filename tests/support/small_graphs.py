"""A writer of small canonical Relax functions for tests, and plans for them made from random data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from lpsn_tvm import graph, quant
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.regions import find_regions
from lpsn_tvm.quant import QuantizedWeight, QuantParams, QuantPlan
from lpsn_tvm.reference import run_reference


class Net:
    """Builds a canonical function: `net = Net((1, 3, 8, 8)); x = net.conv(net.input, 8); mod = net.module(x)`."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.input = relax.Var("input", relax.TensorType(shape, "float32"))
        self.builder = relax.BlockBuilder()
        self.function = self.builder.function("main", [self.input])
        self.function.__enter__()
        self.block = self.builder.dataflow()
        self.block.__enter__()
        self.count = 0

    def emit(self, call: Any, name: str | None = None) -> Any:
        self.count += 1
        return graph.emit_named(self.builder, call, name or f"node.{self.count}")

    def _layer(self, call: Any, bias_shape: tuple[int, ...], name: str | None, bias: np.ndarray | None) -> Any:
        self.count += 1
        name = name or f"layer/{self.count}"
        acc = self.emit(call, f"{name}.acc")
        value = self.rng.normal(0, 0.1, bias_shape).astype(np.float32) if bias is None else bias.reshape(bias_shape)
        return self.emit(relax.op.add(acc, graph.constant(value)), name)

    def conv(
        self,
        x: Any,
        out: int,
        kernel: int = 3,
        name: str | None = None,
        bias: np.ndarray | None = None,
        groups: int = 1,
        padding: Any = None,
        **attrs: Any,
    ) -> Any:
        channels = graph.shape_of(x)[1] // groups
        weight = self.rng.normal(0, (2 / (channels * kernel * kernel)) ** 0.5, (out, channels, kernel, kernel)).astype(
            np.float32
        )
        attrs["padding"] = [kernel // 2] * 4 if padding is None else padding
        return self._layer(
            relax.op.nn.conv2d(x, graph.constant(weight), groups=groups, **attrs), (1, out, 1, 1), name, bias
        )

    def conv_transpose(
        self, x: Any, out: int, kernel: int = 2, name: str | None = None, groups: int = 1, **attrs: Any
    ) -> Any:
        channels = graph.shape_of(x)[1]
        weight = self.rng.normal(0, (2 / channels) ** 0.5, (channels, out // groups, kernel, kernel)).astype(np.float32)
        return self._layer(
            relax.op.nn.conv2d_transpose(x, graph.constant(weight), groups=groups, **attrs), (1, out, 1, 1), name, None
        )

    def dense(self, x: Any, out: int, name: str | None = None) -> Any:
        inputs = graph.shape_of(x)[-1]
        weight = self.rng.normal(0, inputs**-0.5, (inputs, out)).astype(np.float32)
        return self._layer(relax.op.matmul(x, graph.constant(weight)), (out,), name, None)

    def module(self, *outputs: Any) -> Any:
        """Close the function; several outputs become a tuple."""
        value = self.builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(list(outputs)))
        self.block.__exit__(None, None, None)
        self.builder.emit_func_output(value)
        self.function.__exit__(None, None, None)
        return self.builder.get()


def random_feed(mod: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """One random batch per function parameter."""
    rng = np.random.default_rng(seed)
    return {p.name: rng.normal(0, 1, graph.shape_of(p)).astype(np.float32) for p in mod["main"].params}


def range_params(values: np.ndarray, bits: int, signed: bool = False) -> QuantParams:
    """Asymmetric (unsigned) or symmetric (signed) per-tensor parameters that cover `values` and zero."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 1e-3)
    if signed:
        return QuantParams(np.float32(max(-low, high) / (2 ** (bits - 1) - 1)), 0, bits, True)
    scale = np.float32((high - low) / (2**bits - 1))
    return QuantParams(scale, int(np.clip(np.rint(-low / scale), 0, 2**bits - 1)), bits, False)


def weight_params(layer: graph.Layer, bits: int) -> QuantizedWeight:
    """Round-to-nearest symmetric weight, one scale per output channel."""
    axis = 0 if layer.kind == "conv2d" else 1
    if layer.kind == "conv2d_transpose" and layer.groups > 1:
        scale = np.full(layer.out_channels, np.abs(layer.weight).max() / (2 ** (bits - 1) - 1), np.float32)
        steps = layer.weight / scale[0]
    else:
        others = tuple(i for i in range(layer.weight.ndim) if i != axis)
        scale = (np.maximum(np.abs(layer.weight).max(axis=others), 1e-6) / (2 ** (bits - 1) - 1)).astype(np.float32)
        shape = [1] * layer.weight.ndim
        shape[axis] = -1
        steps = layer.weight / scale.reshape(shape)
    values = np.clip(np.rint(steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)
    return QuantizedWeight(values, QuantParams(scale, 0, bits, True, axis), layer.bias)


def simple_plan(
    mod: Any, weight_bits: int = 8, activation_bits: int = 8, signed: bool = False, seed: int = 0
) -> QuantPlan:
    """A min-max plan from one random batch: everything that regions quantize."""
    regions = find_regions(mod)
    feeds = random_feed(mod, seed)
    names = [name for name in regions.quantized if name not in feeds]
    values = {**feeds, **run_reference(mod, feeds, fetch=names)}
    activations: dict[str, QuantParams] = {}
    for name in regions.quantized:
        source = regions.source(name)
        activations[name] = (
            activations[source] if source in activations else range_params(values[name], activation_bits, signed)
        )
    layers = graph.find_layers(mod)
    weights = {
        region.layer: weight_params(layers[region.layer], weight_bits)
        for region in regions.regions
        if region.kind == "layer" and region.layer
    }
    return QuantPlan(activations, weights)


def real_weight(layer: graph.Layer, weight: QuantizedWeight) -> np.ndarray:
    """The float32 numbers that an integer weight stands for."""
    shape = [1] * layer.weight.ndim
    shape[0 if layer.kind == "conv2d" else 1] = -1
    scale = np.asarray(weight.params.scale, np.float32)
    if layer.kind == "conv2d_transpose" and layer.groups > 1:
        scale = scale[: layer.weight.shape[1]]
    return weight.values.astype(np.float32) * scale.reshape(shape)


def fake_quantized(
    mod: Any, plan: QuantPlan, feeds: dict[str, np.ndarray], fetch: list[str] | None = None
) -> dict[str, np.ndarray]:
    """Float evaluation of `mod` with rounded weights and every quantized tensor rounded: what the integer network
    approximates."""
    regions = find_regions(mod)
    layers = graph.find_layers(mod)
    interpreter = TorchInterpreter(mod)
    for name, weight in plan.weights.items():
        interpreter.set_params(name, real_weight(layers[name], weight), weight.bias)

    def rounded(name: str, value: torch.Tensor) -> torch.Tensor:
        if not regions.is_quantized(name):
            return value
        return torch.from_numpy(quant.fake_quantize(value.numpy(), plan.activations[name]))

    results = interpreter.run(feeds, fetch=[*interpreter.outputs, *(fetch or [])], transform=rounded)
    return {name: value.numpy() for name, value in results.items()}


def check_regions(mod: Any, plan: QuantPlan, lowered: Any, feeds: dict[str, np.ndarray]) -> int:
    """Every integer region against float arithmetic on exactly the numbers that it read: at most one step apart.
    Returns how many were checked.

    Comparing region by region, not at the end, keeps a value that lies on a rounding boundary from spreading through
    the network.
    """
    regions = find_regions(mod)
    layers = graph.find_layers(mod)
    bound = {var.name for var, _ in graph.bindings(lowered)} | set(feeds)
    at = {name: f"{name}.q" if f"{name}.q" in bound else name for name in regions.quantized}
    at |= {region.name: region.name for region in regions.regions if region.float_output and region.name not in at}
    values = run_reference(lowered, feeds, fetch=[variable for variable in at.values() if variable in bound])
    real: dict[str, np.ndarray] = {}
    for name, variable in at.items():
        if variable not in bound:
            continue
        value = values[variable]
        params = plan.activations.get(name)
        real[name] = (
            value
            if value.dtype == np.float32 or params is None
            else quant.dequantize(value, scale=float(params.scale), zero_point=params.zero_point)
        )
    interpreter = TorchInterpreter(mod)
    for name, weight in plan.weights.items():
        interpreter.set_params(name, real_weight(layers[name], weight), weight.bias)
    checked = 0
    for region in regions.regions:
        if region.kind == "float" or not all(name in real for name in (*region.inputs, region.name)):
            continue
        want = interpreter.run({name: real[name] for name in region.inputs}, fetch=[region.name])[region.name].numpy()
        if region.float_output:
            layer = layers[str(region.layer)]
            unit = float(np.max(plan.weights[layer.name].params.scale)) * float(plan.activations[layer.data].scale)
            np.testing.assert_allclose(real[region.name], want, atol=unit, rtol=1e-4, err_msg=region.name)
        else:
            params = plan.activations[region.name]
            steps = np.abs(real[region.name] - quant.fake_quantize(want, params)) / float(params.scale)
            assert np.max(steps) < 1.01, f"{region.kind} {region.name} is {np.max(steps)} steps off"
        checked += 1
    return checked
