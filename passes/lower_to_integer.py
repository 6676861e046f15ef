"""Lower a canonical float network and its quantization plan to integer operators.

Before: canonical float Relax, a `QuantPlan`, the regions. After: `lpsn.*` calls (`quant.py` defines them) between one
`lpsn.quantize` per network input and float32 outputs. Region by region:

1. layer -> `lpsn.conv2d | conv2d_transpose | dense`, bias, residual sum and clamp fused; the last layer writes float32.
2. add, multiply, pool, concat -> the operator of that name, clamp fused.
3. lookup -> one table over the 2**bits values of its source.
4. same -> the integers are moved (max pooling, resize, pad, slice, shapes); DepthToSpace is recognized in the
   importer's spelling.
5. float, and whatever integers cannot express -> the Relax operators as they were, between dequantize and quantize.

A variable keeps its name. Added: `x.q` (a network input in integers), `x.f` (the float value that `x` was quantized
from), `x.dq` (integers read by float operators); a network output that exists in integers is returned dequantized
under its own name, its integers are `x.q`.
"""

from __future__ import annotations

import glob
from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import CompileError, LpsnError, QuantizeError
from lpsn_tvm.passes.integer_ops import IntegerTensor, integer_call, result_attrs, scale_of
from lpsn_tvm.passes.lower_elementwise import lower_add, lower_lookup, lower_multiply
from lpsn_tvm.passes.lower_layers import EVERYTHING, lower_layer
from lpsn_tvm.passes.lower_shapes import (
    concat_axis,
    is_global_average,
    lower_avg_pool2d,
    lower_concat,
    lower_depth_to_space,
    lower_global_avg_pool2d,
    lower_global_max,
    lower_max_pool2d,
    lower_pad,
    lower_reshape,
    lower_resize,
    lower_strided_slice,
    lower_transpose,
    match_depth_to_space,
)
from lpsn_tvm.passes.lower_shifts import lower_add_by_shifts, lower_concat_by_shifts, lower_layer_by_shifts
from lpsn_tvm.passes.regions import Region, Regions, find_regions
from lpsn_tvm.quant import QuantParams, QuantPlan, QuantScheme

_SAME = {
    "relax.nn.max_pool2d": lower_max_pool2d,
    "relax.max": lower_global_max,
    "relax.reshape": lower_reshape,
    "relax.squeeze": lower_reshape,
    "relax.expand_dims": lower_reshape,
    "relax.flatten": lower_reshape,
    "relax.nn.batch_flatten": lower_reshape,
    "relax.permute_dims": lower_transpose,
    "relax.strided_slice": lower_strided_slice,
    "relax.nn.pad": lower_pad,
    "relax.image.resize2d": lower_resize,
}


def lower_to_integer(
    mod: tvm.IRModule, plan: QuantPlan, regions: Regions | None = None, scheme: QuantScheme | None = None
) -> tvm.IRModule:
    """The integer form of a canonical module.

    Parameters
    ----------
    mod : IRModule
        Canonical float module (pruned or not).
    plan : QuantPlan
        Activation parameters of every quantized variable, integer weights of every layer that is not float.
    regions : Regions, optional
        The regions that the plan was made for; found anew by default.
    scheme : QuantScheme, optional
        The backend's; `rounding="half_up"` takes the forms of `lower_shifts`.

    Raises
    ------
    QuantizeError
        A parameter is missing, or an accumulator could overflow; names the layer or variable.
    """
    return _Lowering(mod, plan, plan_regions(mod, plan) if regions is None else regions, scheme or QuantScheme()).run()


def plan_regions(mod: tvm.IRModule, plan: QuantPlan) -> Regions:
    """The regions that `plan` was made for: what it keeps float is not looked at."""
    return find_regions(mod, [glob.escape(name) for name in plan.float_nodes])


class _Lowering:
    """State of one lowering: which variables exist as integers, which as floats."""

    def __init__(self, mod: tvm.IRModule, plan: QuantPlan, regions: Regions, scheme: QuantScheme) -> None:
        self.function = mod["main"]
        self.plan, self.regions, self.scheme = plan, regions, scheme
        self.by_shifts = scheme.rounding == "half_up"
        self.layers = graph.find_layers(mod)
        self.bound = {var.name: value for var, value in graph.bindings(mod)}
        self.builder = relax.BlockBuilder()
        self.integers: dict[str, IntegerTensor] = {}
        self.floats: dict[str, Any] = {}
        self.alias: dict[str, str] = {
            name: value.name for name, value in self.bound.items() if isinstance(value, relax.Var)
        }
        self.depth_to_space: dict[str, tuple[str, int, str]] = {}
        self.absorbed: set[str] = set()
        self._find_depth_to_space(mod)

    def _find_depth_to_space(self, mod: tvm.IRModule) -> None:
        users = graph.consumers_of(mod)
        for region in self.regions.regions:
            if region.kind != "same":
                continue
            match = match_depth_to_space(self.bound[region.name], self.bound, lambda name: len(users[name]) == 1)
            if match is not None:
                source, block, mode, absorbed = match
                self.depth_to_space[region.name] = (self._resolve(source.name), block, mode)
                self.absorbed.update(absorbed)

    def _resolve(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    # --- the walk ---
    def run(self) -> tvm.IRModule:
        """Lower every region in order and return the new module with the old function's attributes."""
        with self.builder.function("main", list(self.function.params)):
            with self.builder.dataflow():
                for param in self.function.params:
                    self.floats[param.name] = param
                for region in self.regions.regions:
                    if region.name in self.absorbed:
                        continue
                    try:
                        self._lower(region)
                    except LpsnError:
                        raise
                    except Exception as error:
                        raise CompileError(
                            f"lowering a {region.kind} region to integers failed: {error}", where=region.name
                        ) from error
                output = self.builder.emit_output(self._outputs())
            self.builder.emit_func_output(output)
        result = self.builder.get()
        if self.function.attrs is not None and len(self.function.attrs):
            result["main"] = result["main"].with_attrs(self.function.attrs)
        return result

    def _outputs(self) -> Any:
        values = [self.as_float(name) for name in self.regions.outputs]
        if isinstance(self.function.ret_ty, relax.TupleType):
            return relax.Tuple(values)
        return values[0]

    def _lower(self, region: Region) -> None:
        if region.kind == "float":
            self._lower_float(region)
            return
        call = None
        if region.kind == "layer":
            call = self._layer(region)
        elif region.kind == "same":
            call = self._same(region)
        else:
            call = self._rescaling(region)
        if call is None:
            self._lower_float(region)
        elif region.float_output:
            self._set_float(region.name, call)
        else:
            params = self.integer(region.inputs[0]).params if region.kind == "same" else self.params(region.name)
            name = f"{region.name}.q" if region.name in self.regions.outputs else region.name
            self.integers[region.name] = IntegerTensor(graph.emit_named(self.builder, call, name), params)

    # --- values ---
    def params(self, name: str) -> QuantParams:
        """Parameters of a quantized variable."""
        source = self.regions.source(name)
        params = self.plan.activations.get(name, self.plan.activations.get(source))
        if params is None:
            raise QuantizeError("the plan has no activation parameters for this tensor", where=name)
        scale = np.asarray(params.scale)
        if scale.size != 1 or not np.isfinite(scale).all() or not (scale > 0).all():
            raise QuantizeError("an activation needs one positive finite scale", where=name)
        return params

    def integer(self, name: str) -> IntegerTensor:
        """Variable `name` in integers, quantized on first use if it was produced in float."""
        if name not in self.integers:
            params = self.params(name)
            kind = "q" if name in self.regions.inputs or name in self.regions.outputs else None
            call = self._quantize(self.floats[name], params)
            var = graph.emit_named(self.builder, call, f"{name}.{kind}" if kind else name)
            self.integers[name] = IntegerTensor(var, params)
            self.floats.pop(name)
        return self.integers[name]

    def as_float(self, name: str) -> Any:
        """Variable `name` in float32; the rounded numbers where it is quantized."""
        if name not in self.floats:
            x = self.integers[name]
            call = integer_call("lpsn.dequantize", [x.expr], {"scale": x.scale, "zero_point": x.zero_point})
            is_output = name in self.regions.outputs and name not in self.regions.inputs
            self.floats[name] = graph.emit_named(self.builder, call, name if is_output else f"{name}.dq")
        return self.floats[name]

    def _quantize(self, value: Any, params: QuantParams) -> Any:
        scale, attrs = scale_of(params), result_attrs(params)
        attrs["zero_point"] = attrs.pop("out_zero_point")
        inverse = np.float32(1.0) / np.float32(scale)
        return integer_call("lpsn.quantize", [value], {"inv_scale": inverse, "scale": scale} | attrs)

    def _set_float(self, name: str, call: Any) -> None:
        """Bind a float result; if integer operators read it too, everybody sees the rounded numbers."""
        quantized = self.regions.is_quantized(name)
        self.floats[name] = graph.emit_named(self.builder, call, f"{name}.f" if quantized else name)
        if quantized:
            self.integer(name)

    # --- regions ---
    def _layer(self, region: Region) -> Any | None:
        layer = self.layers[str(region.layer)]
        weight = self.plan.weights.get(layer.name)
        if weight is None:
            return None
        residual = None if region.residual is None else self.integer(region.residual)
        out = None if region.float_output else self.params(region.name)
        x, interval = self.integer(region.inputs[0]), region.activation or EVERYTHING
        if self.by_shifts:
            return lower_layer_by_shifts(
                layer, weight, x, out, interval, residual, self.scheme, self._emit, region.name
            )
        return lower_layer(layer, weight, x, out, interval, residual)

    def _emit(self, call: Any, name: str) -> Any:
        return graph.emit_named(self.builder, call, name)

    def _rescaling(self, region: Region) -> Any | None:
        out, interval = self.params(region.name), region.activation or EVERYTHING
        parts = [self.integer(name) for name in region.inputs]
        call = self.bound[region.members[0]]
        if region.kind == "add":
            by_shifts = lower_add_by_shifts(parts[0], parts[1], out, interval) if self.by_shifts else None
            return lower_add(parts[0], parts[1], out, interval) if by_shifts is None else by_shifts
        if region.kind == "multiply":
            return lower_multiply(parts[0], parts[1], out, interval)
        if region.kind == "concat":
            by_shifts = lower_concat_by_shifts(concat_axis(call), parts, out) if self.by_shifts else None
            return lower_concat(call, self._clamped(parts, out, region.name), out) if by_shifts is None else by_shifts
        if region.kind == "lookup":
            members = [(name, self.bound[name]) for name in region.members]
            return lower_lookup(region.inputs[0], members, parts[0], out, region.per_channel)
        if is_global_average(call):
            return lower_global_avg_pool2d(parts[0], out, interval, self.scheme.rounding)
        if graph.op_name(call) == "relax.nn.avg_pool2d":
            return lower_avg_pool2d(call, parts[0], out, interval, self.scheme.rounding)
        return None

    def _clamped(self, parts: list[IntegerTensor], out: QuantParams, name: str) -> list[IntegerTensor]:
        """Parts within the range of `out`: what has its scale and zero point is copied, however many bits it has."""
        result = []
        for i, part in enumerate(parts):
            is_copied = (part.scale, part.zero_point) == (scale_of(out), int(out.zero_point))
            if is_copied and (part.params.qmin < out.qmin or part.params.qmax > out.qmax):
                attrs = {"multiplier": 1.0, "in_zero_point": part.zero_point, **result_attrs(out)}
                call = integer_call("lpsn.requantize", [part.expr], attrs)
                part = IntegerTensor(self._emit(call, f"{name}.part{i}"), out)
            result.append(part)
        return result

    def _same(self, region: Region) -> Any | None:
        if region.name in self.depth_to_space:
            source, block, mode = self.depth_to_space[region.name]
            # The absorbed variables never exist; the scale is the source's.
            self.integers[region.inputs[0]] = x = self.integer(source)
            return lower_depth_to_space(x, block, mode)
        call = self.bound[region.name]
        rule = _SAME.get(graph.op_name(call))
        return None if rule is None else rule(call, self.integer(region.inputs[0]))

    def _lower_float(self, region: Region) -> None:
        """Keep the region's Relax operators."""
        local: dict[str, Any] = {}
        for name in region.members[:-1]:
            local[name] = graph.emit_named(self.builder, self._float_call(name, local), name)
        self._set_float(region.name, self._float_call(region.name, local))

    def _float_call(self, name: str, local: dict[str, Any]) -> Any:
        def operand(expr: Any) -> Any:
            if isinstance(expr, relax.Tuple):
                return relax.Tuple([operand(field) for field in expr.fields])
            if not isinstance(expr, relax.Var):
                return expr
            source = self._resolve(expr.name)
            return local[source] if source in local else self.as_float(source)

        call = self.bound[name]
        return relax.Call(call.op, [operand(arg) for arg in call.args], call.attrs, list(call.ty_args))
