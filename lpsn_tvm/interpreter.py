"""Evaluation of canonical Relax functions with torch: the graph is the truth, torch only computes it.

    interpreter = TorchInterpreter(canonicalize(mod))
    logits = interpreter.run({"input": images})["logits"]

The function is translated once into `Step`s; nothing of TVM is touched while they run. Weights of layers live in
`params` and may be changed between runs.

Batch: the graph is traced with one batch size (usually 1), `run` takes any. Reshapes carry the real batch over
(`lpsn_tvm.interpreter_shapes`), and with it channels that a layer before a flatten has lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax

from lpsn_tvm.errors import CalibrationError, ModelError, UnsupportedOpError
from lpsn_tvm.graph import bindings, call_attrs, constant_value, dtype_of, find_layers, is_constant, op_name, shape_of
from lpsn_tvm.interpreter_ops import FACTORIES, Function, Node

Tensor = torch.Tensor
Transform = Callable[[str, Tensor], Tensor]


class Constant(str):
    """Key of a constant operand in `TorchInterpreter.constants`: `<step name>#<operand position>`."""


@dataclass(frozen=True)
class Step:
    """One operator of the graph.

    Parameters
    ----------
    name : str
        The variable that it computes.
    op : str
        Relax operator, `relax.nn.conv2d`.
    inputs : tuple of str
        Variable names, or `Constant` keys. Weight and bias of a layer are not among them: they are `params[layer]`.
    attrs : dict
        The call's attributes and its non-tensor operands (`min`, `max` of clip; `axes`, `begin`, `end`, `strides` of
        strided_slice).
    shape : tuple of int
        Traced shape of the result.
    layer : str or None
        Layer whose weight (this is the step before the bias) or bias (this is the step `layer`) it applies.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    shape: tuple[int, ...]
    layer: str | None = None
    function: Function = field(repr=False, compare=False, default=torch.Tensor)

    @property
    def variables(self) -> tuple[str, ...]:
        """The inputs that are variables."""
        return tuple(key for key in self.inputs if not isinstance(key, Constant))


@dataclass(frozen=True)
class _Schedule:
    """What one call of `run` does: (step, bias step computed with it or None, values that are dead afterwards)."""

    entries: tuple[tuple[Step, Step | None, tuple[str, ...]], ...]


class TorchInterpreter:
    """Runs a canonical module step by step.

    Parameters
    ----------
    mod : IRModule
        Canonical form (CONTRIBUTING.md, contract 1), float32.
    device : str
        torch device; constants and parameters are put there.

    Attributes
    ----------
    steps : tuple of Step
        In execution order.
    useful : tuple of Step
        Those that the outputs depend on.
    inputs, outputs : tuple of str
        Names of function parameters, and of the variables that are returned (the bound operators, not `gv` aliases).
    params : dict of str to (Tensor, Tensor)
        float32 weight and bias [C] by layer name; may be replaced between runs (`set_params`, or assignment).
    shapes : dict of str to tuple of int
        Traced shapes of inputs and variables.

    Raises
    ------
    UnsupportedOpError
        The graph has an operator that cannot be evaluated; names variable and operator.
    """

    def __init__(self, mod: tvm.IRModule, device: str = "cpu") -> None:
        self.device = torch.device(device)
        function = mod["main"]
        self.shapes: dict[str, tuple[int, ...]] = {p.name: shape_of(p) for p in function.params}
        self.dtypes: dict[str, str] = {p.name: dtype_of(p) for p in function.params}
        self.inputs = tuple(p.name for p in function.params)
        self.constants: dict[str, Tensor] = {}
        layers = find_layers(mod)
        self.params: dict[str, tuple[Tensor, Tensor]] = {
            name: (self._tensor(layer.weight), self._tensor(layer.bias)) for name, layer in layers.items()
        }
        self.accumulators = {layer.acc: name for name, layer in layers.items()}
        # `emit_output` binds what the function returns once more, under a name of its own: aliases are seen through.
        aliases = {var.name: value for var, value in bindings(mod) if isinstance(value, (relax.Var, relax.Tuple))}
        self.steps = tuple(self._steps(mod, aliases))
        self.outputs = _flat_outputs(function.body.body, aliases)
        self.by_name = {step.name: step for step in self.steps}
        self._order = {step.name: position for position, step in enumerate(self.steps)}
        self._consumers: dict[str, list[str]] = {}
        for step in self.steps:
            for name in dict.fromkeys(step.variables):
                self._consumers.setdefault(name, []).append(step.name)
        self.useful = tuple(self.needed(self.outputs, self.inputs))
        self._schedules: dict[tuple[frozenset[str], frozenset[str]], _Schedule] = {}

    # --- translation --------------------------------------------------------------------------------------------------

    def _tensor(self, value: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(value)).to(self.device)

    def _steps(self, mod: tvm.IRModule, aliases: Mapping[str, Any]) -> Iterable[Step]:
        for var, value in bindings(mod):
            op = op_name(value)
            if var.name in aliases:
                continue
            if op not in FACTORIES:
                raise UnsupportedOpError(
                    f"operator {op or type(value).__name__} cannot be evaluated for calibration", where=var.name
                )
            yield self._step(var, value, op)

    def _step(self, var: Any, call: Any, op: str) -> Step:
        name = var.name
        layer = self.accumulators.get(name) or (name if name in self.params else None)
        attrs = call_attrs(call)
        operands = operands_of(call, op, attrs)
        if layer is not None:
            # The constant operand is the layer's weight or bias: it is read from `params` when the step runs.
            operands = operands[:1]
        inputs: list[str] = []
        for position, operand in enumerate(operands):
            if is_constant(operand):
                key = Constant(f"{name}#{position}")
                self.constants[key] = self._tensor(constant_value(operand))
                inputs.append(key)
            elif isinstance(operand, relax.Var):
                inputs.append(operand.name)
            else:
                raise UnsupportedOpError(f"operator {op} has an operand {operand} that is no tensor", where=name)
        self.shapes[name], self.dtypes[name] = shape_of(var), dtype_of(var)
        shapes = tuple(tuple(self.constants[k].shape) if isinstance(k, Constant) else self.shapes[k] for k in inputs)
        node = Node(name, op, attrs, shapes, self.shapes[name])
        return Step(name, op, tuple(inputs), attrs, self.shapes[name], layer, FACTORIES[op](node))

    # --- structure ----------------------------------------------------------------------------------------------------

    def consumers(self, name: str) -> tuple[str, ...]:
        """Names of the steps that read `name`, in execution order."""
        return tuple(self._consumers.get(name, ()))

    def needed(self, targets: Iterable[str], available: Iterable[str]) -> list[Step]:
        """The steps, in execution order, that lead from the values `available` to `targets`.

        Raises
        ------
        ModelError
            A target does not exist, or needs a function input that is not available.
        """
        have, wanted = set(available), set()
        stack = [name for name in targets if name not in have]
        while stack:
            name = stack.pop()
            if name in wanted or name in have:
                continue
            if name not in self.by_name:
                what = "is an input that was not fed" if name in self.inputs else "is not a variable of the graph"
                raise ModelError(f"cannot be computed: it {what}", where=name)
            wanted.add(name)
            stack += self.by_name[name].variables
        return [self.steps[i] for i in sorted(self._order[name] for name in wanted)]

    def set_params(self, layer: str, weight: Tensor | np.ndarray, bias: Tensor | np.ndarray) -> None:
        """Replaces weight and bias of a layer (float32; converted and copied to the device)."""
        if layer not in self.params:
            raise ModelError("is not a layer of this graph", where=layer)
        self.params[layer] = (
            torch.as_tensor(weight, dtype=torch.float32, device=self.device),
            torch.as_tensor(bias, dtype=torch.float32, device=self.device).reshape(-1),
        )

    # --- running ------------------------------------------------------------------------------------------------------

    def run(
        self, feeds: Mapping[str, Any], fetch: Iterable[str] | None = None, transform: Transform | None = None
    ) -> dict[str, Tensor]:
        """Computes `fetch` from `feeds`, drops values as soon as they are dead.

        Parameters
        ----------
        feeds : mapping of str to ndarray or Tensor
            Function inputs, or any intermediate variables; what is not reachable from `fetch` through them is not
            computed.
        fetch : iterable of str, optional
            Variables to return; the function's outputs by default.
        transform : callable (name, tensor) -> tensor, optional
            Sees every function input that is fed and every tensor that is produced, and says what the consumers get
            (observers, fake quantization). The sum before the bias (`<layer>.acc`) is computed together with the bias
            and not shown, unless it is fetched or read elsewhere.

        Returns
        -------
        dict of str to Tensor
            In the order of `fetch`.
        """
        fetched = tuple(self.outputs if fetch is None else fetch)
        values = {name: self._feed(name, value) for name, value in feeds.items()}
        if transform is not None:
            for name in values:
                if name in self.inputs:
                    values[name] = transform(name, values[name])
        for step, bias_step, dead in self._schedule(frozenset(fetched), frozenset(values)).entries:
            name = step.name if bias_step is None else bias_step.name
            result = self._compute(step, values, with_bias=bias_step is not None)
            values[name] = result if transform is None else transform(name, result)
            for key in dead:
                values.pop(key, None)
        return {name: values[name] for name in fetched}

    def apply_layer(self, layer: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Output (after bias) of one layer for its input `x`, with other weights than its own if given."""
        own_weight, own_bias = self.params[layer]
        acc = next(step for step in self.by_name[layer].variables)
        return self.by_name[acc].function(
            x, own_weight if weight is None else weight, own_bias if bias is None else bias
        )

    def _feed(self, name: str, value: Any) -> Tensor:
        if name not in self.shapes:
            allowed = ", ".join(self.inputs)
            raise CalibrationError(f"the graph has no variable of this name; its inputs are {allowed}", where=name)
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        dtype = getattr(torch, self.dtypes[name])
        return tensor.to(device=self.device, dtype=dtype)

    def _compute(self, step: Step, values: Mapping[str, Tensor], *, with_bias: bool) -> Tensor:
        operands = [self.constants[k] if isinstance(k, Constant) else values[k] for k in step.inputs]
        if step.layer is None:
            return step.function(*operands)
        weight, bias = self.params[step.layer]
        if step.layer == step.name:
            acc = operands[0]
            return acc + bias.reshape(1, -1, *[1] * (acc.ndim - 2))
        return step.function(operands[0], weight, bias) if with_bias else step.function(operands[0], weight)

    def _schedule(self, fetched: frozenset[str], fed: frozenset[str]) -> _Schedule:
        key = (fetched, fed)
        if key not in self._schedules:
            if len(self._schedules) > 4096:
                self._schedules.clear()
            self._schedules[key] = self._make_schedule(fetched, fed)
        return self._schedules[key]

    def _make_schedule(self, fetched: frozenset[str], fed: frozenset[str]) -> _Schedule:
        steps = self.needed(fetched, fed)
        readers: dict[str, int] = {}
        for position, step in enumerate(steps):
            readers.update(dict.fromkeys(step.variables, position))
        fused: dict[str, Step] = {}
        wanted = {step.name for step in steps}
        for step in steps:
            if step.name in self.accumulators and step.name not in fetched:
                users = [name for name in self._consumers[step.name] if name in wanted]
                if users == [self.accumulators[step.name]]:
                    fused[step.name] = self.by_name[users[0]]
        absorbed = {step.name for step in fused.values()}
        dying: dict[int, list[str]] = {}
        for name, position in readers.items():
            if name not in fetched and name not in fused:
                dying.setdefault(position, []).append(name)
        entries = [
            (step, fused.get(step.name), tuple(dying.get(position, ())))
            for position, step in enumerate(steps)
            if step.name not in absorbed
        ]
        return _Schedule(tuple(entries))


def _flat_outputs(expr: Any, aliases: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the variables behind what a function returns."""
    if isinstance(expr, relax.Tuple):
        return tuple(name for field in expr.fields for name in _flat_outputs(field, aliases))
    if not isinstance(expr, relax.Var):
        raise ModelError(f"the function returns {type(expr).__name__}; only variables can be returned")
    return _flat_outputs(aliases[expr.name], aliases) if expr.name in aliases else (expr.name,)


def operands_of(call: Any, op: str, attrs: dict[str, Any]) -> list[Any]:
    """The tensor operands of a call; what else it is given goes into `attrs`."""
    args = list(call.args)
    if op == "relax.clip":
        attrs["min"], attrs["max"] = (float(arg.value) for arg in args[1:3])
        return args[:1]
    if op == "relax.strided_slice":
        for key, arg in zip(("axes", "begin", "end", "strides"), args[1:], strict=False):
            attrs[key] = tuple(int(field.value) for field in arg.fields)
        return args[:1]
    if op in ("relax.reshape", "relax.broadcast_to", "relax.image.resize2d"):
        return args[:1]
    if len(args) == 1 and isinstance(args[0], relax.Tuple):
        return list(args[0].fields)
    return args
