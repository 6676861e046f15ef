"""A canonical (pruned) network as ONNX: float, or with QuantizeLinear / DequantizeLinear pairs where the plan rounds.

The QDQ model computes on the same grid as the integer network: one pair at every quantized tensor, a Clip before it
where the bit width is below the container's 8, int8 weights dequantized per channel, int32 biases. ONNX Runtime
therefore agrees with the compiled module within a step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.container import write_atomically
from lpsn_tvm.errors import LpsnError, QuantizeError, UnsupportedOpError
from lpsn_tvm.export_ops import EXPORTERS
from lpsn_tvm.export_writer import GraphWriter
from lpsn_tvm.passes.integer_ops import scale_of
from lpsn_tvm.passes.lower_layers import integer_weight
from lpsn_tvm.passes.lower_to_integer import plan_regions
from lpsn_tvm.passes.regions import Region, Regions, nodes_of
from lpsn_tvm.quant import QuantizedWeight, QuantParams, QuantPlan

OPSETS = range(17, 22)
_IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}
BATCH = "N"


def to_onnx(
    mod: Any,
    path: str | os.PathLike[str] | None = None,
    plan: QuantPlan | None = None,
    opset: int = 17,
    *,
    regions: Regions | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    name: str = "lpsn",
) -> onnx.ModelProto:
    """The ONNX form of a canonical float module.

    Parameters
    ----------
    mod : IRModule
        Canonical module; layers keep their names, parameters are the inputs.
    path : path, optional
        Where to write the model; written whole or not at all.
    plan : QuantPlan, optional
        With it the model has QDQ pairs and integer weights, without it the model is float.
    opset : int
        17..21.
    regions : Regions, optional
        What the plan was made for; found anew by default.
    output_names : sequence of str, optional
        Names of the outputs, in order; by default those of the variables.
    dynamic_batch : bool
        Make axis 0 of inputs and outputs a symbol.
    name : str
        Name of the graph.

    Raises
    ------
    UnsupportedOpError
        An operator has no ONNX form; names variable and operator.
    LpsnError
        The opset is out of range, the model cannot be written.
    """
    if opset not in OPSETS:
        raise LpsnError(f"opset {opset} is not supported; allowed are {OPSETS[0]} to {OPSETS[-1]}")
    model = _Exporter(mod, plan, regions, opset, output_names, dynamic_batch).run(name)
    if path is not None:
        try:
            data = model.SerializeToString()
        except Exception as error:
            raise LpsnError(
                f"the model cannot be serialized (ONNX files end at 2 GiB): {error}", where=str(path)
            ) from error
        write_atomically(Path(path), data)
    return model


class _Exporter:
    """Walks the bindings and writes them; `tensors` maps variable names to what readers see."""

    def __init__(
        self,
        mod: Any,
        plan: QuantPlan | None,
        regions: Regions | None,
        opset: int,
        output_names: Sequence[str] | None,
        dynamic: bool,
    ) -> None:
        self.mod, self.plan, self.opset, self.is_dynamic = mod, plan, opset, dynamic
        nodes, self.inputs, self.outputs = nodes_of(mod)
        self.aliases = {var.name: value.name for var, value in graph.bindings(mod) if isinstance(value, relax.Var)}
        self.shapes = {param.name: graph.shape_of(param) for param in mod["main"].params}
        self.shapes |= {key: graph.shape_of(node.call) for key, node in nodes.items()}
        self.output_names = list(output_names) if output_names is not None else list(dict.fromkeys(self.outputs))
        if len(self.output_names) != len(self.outputs) and output_names is not None:
            raise LpsnError(f"{len(self.outputs)} outputs need as many names, not {len(self.output_names)}")
        if output_names is None and len(self.output_names) != len(self.outputs):
            self.output_names = [f"{key}.{index}" for index, key in enumerate(self.outputs)]
        self.layers = graph.find_layers(mod)
        self.accumulators = {layer.acc for layer in self.layers.values()}
        self.regions = None if plan is None else (regions or plan_regions(mod, plan))
        self.w = GraphWriter(opset, dynamic)
        self.w.taken.update((*self.inputs, *self.output_names))
        self.tensors: dict[str, str] = {}

    def run(self, name: str) -> onnx.ModelProto:
        """Write all nodes and return the checked model."""
        for param in self.inputs:
            self._finish(param, param)
        for var, value in graph.bindings(self.mod):
            if var.name in self.accumulators or isinstance(value, (relax.Var, relax.Tuple)):
                continue
            raw = self._raw_name(var.name)
            if var.name in self.layers:
                self._layer(self.layers[var.name], raw)
            else:
                self._operator(var.name, value, raw)
            self._finish(var.name, raw)
        for source, target in zip(self.outputs, self.output_names, strict=True):
            if self.tensors[source] != target:
                self.w.node("Identity", [self.tensors[source]], target)
        proto = helper.make_graph(
            self.w.nodes,
            name,
            self._values(self.inputs, self.inputs),
            self._values(self.output_names, self.outputs),
            self.w.initializers,
        )
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", self.opset)], producer_name="lpsn-tvm")
        model.ir_version = _IR_VERSION[self.opset]
        if model.ByteSize() < 2**31:
            onnx.checker.check_model(model)
        return model

    def _values(self, names: Sequence[str], sources: Sequence[str]) -> list[onnx.ValueInfoProto]:
        values = []
        for name, source in zip(names, sources, strict=True):
            shape: list[int | str] = list(self.shapes[source])
            if self.is_dynamic and shape:
                shape[0] = BATCH
            values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return values

    # --- names ---
    def _final_name(self, name: str) -> str:
        """The tensor that readers of variable `name` see: named as the output that it is, else as the variable."""
        if name in self.outputs and name not in self.inputs:
            return self.output_names[self.outputs.index(name)]
        return self.w.unique(name)

    def _params(self, name: str) -> QuantParams | None:
        """Parameters at which `name` is rounded, if the model has them."""
        if self.plan is None or self.regions is None or not self.regions.is_quantized(name):
            return None
        params = self.plan.activations.get(name, self.plan.activations.get(self.regions.source(name)))
        if params is None:
            raise QuantizeError("the plan has no activation parameters for this tensor", where=name)
        return params

    def _raw_name(self, name: str) -> str:
        if self._params(name) is not None:
            return self.w.unique(f"{name}.f")
        self.tensors[name] = self._final_name(name)
        return self.tensors[name]

    def _finish(self, name: str, raw: str) -> None:
        """Make `name` visible to its readers, rounded if the plan says so."""
        params = self._params(name)
        if params is None:
            self.tensors[name] = raw
            return
        final = self.w.unique(f"{name}.dq") if name in self.inputs else self._final_name(name)
        scale = self.w.constant(np.asarray(params.scale, np.float32).reshape(()), f"{name}.scale")
        zero = self.w.constant(np.array(params.zero_point, params.dtype), f"{name}.zero_point")
        # What only moves numbers keeps them inside the range.
        if params.bits < 8 and self.regions is not None and self.regions.source(name) == name:
            low, high = params.real_range
            raw = self.w.node(
                "Clip", [raw, self.w.number(low, name), self.w.number(high, name)], self.w.unique(f"{name}.clip")
            )
        quantized = self.w.node("QuantizeLinear", [raw, scale, zero], self.w.unique(f"{name}.q"))
        self.tensors[name] = self.w.node(
            "DequantizeLinear", [quantized, scale, zero], final, node_name=f"{quantized}.dequantize"
        )

    def _operand(self, expr: Any, out: str) -> str:
        if graph.is_constant(expr):
            return self.w.constant(graph.constant_value(expr), f"{out}.constant")
        name = expr.name
        while name in self.aliases:
            name = self.aliases[name]
        return self.tensors[name]

    # --- operators ---
    def _operator(self, name: str, call: Any, raw: str) -> None:
        op = graph.op_name(call)
        if op not in EXPORTERS:
            raise UnsupportedOpError(f"operator {op} has no ONNX form", where=name)
        operands = call.args[0].fields if len(call.args) and isinstance(call.args[0], relax.Tuple) else call.args
        # PRelu and the norms write their constants themselves where ONNX wants another shape.
        skip = {"relax.nn.prelu": 1, "relax.nn.group_norm": 1}.get(op, len(operands))
        tensors = [arg for arg in operands[:skip] if isinstance(arg, relax.Var) or graph.is_constant(arg)]
        EXPORTERS[op](self.w, call, [self._operand(arg, name) for arg in tensors], raw)

    def _layer(self, layer: graph.Layer, raw: str) -> None:
        region = None if self.regions is None else self.regions.by_layer.get(layer.name)
        weight = self.plan.weights.get(layer.name) if self.plan is not None and region is not None else None
        x = self.aliases.get(layer.data, layer.data)
        if weight is None or region is None:
            tensors = self._float_weight(layer)
        else:
            tensors = self._integer_weight(layer, region, weight, x)
        if layer.kind == "dense":
            if len(layer.in_shape) == 2:
                self.w.node("Gemm", [self.tensors[x], *tensors], raw, node_name=layer.name)
            else:
                product = self.w.inner("MatMul", [self.tensors[x], tensors[0]], raw)
                self.w.node("Add", [product, tensors[1]], raw, node_name=layer.name)
            return
        attrs: dict[str, Any] = {
            "kernel_shape": layer.weight.shape[2:],
            "strides": layer.attrs["strides"],
            "pads": layer.attrs["padding"],
            "dilations": layer.attrs["dilation"],
            "group": layer.groups,
        }
        if layer.kind == "conv2d_transpose":
            attrs["output_padding"] = layer.attrs["output_padding"]
        op = "Conv" if layer.kind == "conv2d" else "ConvTranspose"
        self.w.node(op, [self.tensors[x], *tensors], raw, node_name=layer.name, **attrs)

    def _float_weight(self, layer: graph.Layer) -> list[str]:
        return [
            self.w.constant(layer.weight, f"{layer.name}.weight"),
            self.w.constant(layer.bias, f"{layer.name}.bias"),
        ]

    def _integer_weight(self, layer: graph.Layer, region: Region, weight: QuantizedWeight, x: str) -> list[str]:
        """int8 weight and int32 bias, each behind a DequantizeLinear: exactly the integers that lowering uses."""
        name, axis = layer.name, 0 if layer.kind == "conv2d" else 1
        params = self._params(x)
        if params is None:
            raise QuantizeError("an integer layer reads a tensor that is not quantized", where=name)
        out = None if region.float_output else self._params(region.name)
        values, bias, unit = integer_weight(layer, weight, params, out)
        scale = (unit / scale_of(params)).astype(np.float32)
        real_weight = self.w.unique(f"{name}.weight")
        if layer.kind == "conv2d_transpose" and layer.groups > 1 and np.ptp(scale) > 0:
            # ONNX has one scale per index of axis 1, which the groups share: several groups get their real numbers.
            per_group = scale.reshape(layer.groups, 1, -1, 1, 1)
            real = values.reshape(layer.groups, -1, *values.shape[1:]) * per_group
            self.w.initializers.append(
                numpy_helper.from_array(real.reshape(values.shape).astype(np.float32), real_weight)
            )
        else:
            if np.ptp(scale) == 0:
                scale = scale[0]
            integers = self.w.constant(values, f"{name}.weight.q")
            steps = self.w.constant(scale, f"{name}.weight.scale")
            zeros = self.w.constant(np.zeros(scale.shape, np.int8), f"{name}.weight.zero_point")
            self.w.node("DequantizeLinear", [integers, steps, zeros], real_weight, axis=axis if scale.ndim else None)
        steps = self.w.constant(unit.astype(np.float32), f"{name}.bias.scale")
        zeros = self.w.constant(np.zeros(unit.shape, np.int32), f"{name}.bias.zero_point")
        integers = self.w.constant(bias, f"{name}.bias.q")
        return [
            real_weight,
            self.w.node("DequantizeLinear", [integers, steps, zeros], self.w.unique(f"{name}.bias"), axis=0),
        ]


def initializer_bytes(model: onnx.ModelProto) -> Mapping[str, int]:
    """Bytes of each initializer, for reports."""
    return {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
