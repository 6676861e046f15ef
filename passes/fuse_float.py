"""Float operators -> fused float calls that have blocked CPU kernels.

Before -> After, in the order in which the rules are applied (whatever matches none stays plain Relax; integer operators
are not touched):

1. layer: acc, + bias [, + residual of the same shape] [, relu / clip ...] -> one `lpsn.float_conv2d`,
   `float_conv2d_transpose` or `float_dense`. Of two layers that are added, the later one takes the sum.
2. elementwise: connected operators whose inner values nobody else reads -> one `lpsn.float_elementwise` with a program.
   An operator joins its reader only if both have the same shape (a gate of one pixel is not computed again for each
   pixel). A program that reads nothing but a layer, of which nobody else reads, becomes the layer's `program`.
3. pooling, global average, concat, resize, pad, slice, depth to space, reshape, transpose, softmax, instance norm ->
   the call of that name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.float_calls import float_call
from lpsn_tvm.passes.float_moves import single_call
from lpsn_tvm.passes.float_programs import ProgramBuilder, is_elementwise
from lpsn_tvm.passes.operator_rules import Node, as_clip
from lpsn_tvm.passes.regions import OUTPUT, nodes_of

INFINITY = float("inf")
Lookup = Callable[[Any], Any]


@dataclass(frozen=True)
class _FusedLayer:
    layer: graph.Layer
    residual: str | None
    low: float
    high: float


@dataclass
class _Fusions:
    """What becomes of each variable: `calls` makes its new call, `inner` no longer exist."""

    mod: tvm.IRModule
    nodes: dict[str, Node]
    outputs: tuple[str, ...]
    users: dict[str, list[str]]
    layers: dict[str, graph.Layer]
    variables: dict[str, Any]
    calls: dict[str, Callable[[Lookup], Any]] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)
    fused_layers: dict[str, _FusedLayer] = field(default_factory=dict)

    def is_free(self, name: str) -> bool:
        return name not in self.calls and name not in self.inner

    def single_user(self, name: str) -> str | None:
        """The only reader of a variable, if it is a node that no fusion has."""
        users = self.users[name]
        return users[0] if len(users) == 1 and users[0] != OUTPUT and self.is_free(users[0]) else None


def fuse_float(mod: tvm.IRModule) -> tvm.IRModule:
    """Fuse the float operators of a canonical, or partly integer, module; see the module's docstring.

    Parameters
    ----------
    mod : IRModule
        Canonical form, possibly with `lpsn.*` calls.

    Returns
    -------
    IRModule
        The same function with fused calls; results keep the name of the last operator that they contain.
    """
    found = _prepare(mod)
    for name in reversed(list(found.layers)):
        _fuse_layer(found, name)
    _fuse_elementwise(found)
    for name, node in found.nodes.items():
        if found.is_free(name):
            call = single_call(node)
            if call is not None:
                found.calls[name] = call
    return _rewrite(found)


def _prepare(mod: tvm.IRModule) -> _Fusions:
    nodes, inputs, outputs = nodes_of(mod)
    users: dict[str, list[str]] = {name: [] for name in (*inputs, *nodes)}
    for node in nodes.values():
        for name in node.inputs:
            users.setdefault(name, []).append(node.name)
    for name in outputs:
        users[name].append(OUTPUT)
    variables = {param.name: param for param in mod["main"].params}
    variables |= {var.name: var for var, _ in graph.bindings(mod)}
    return _Fusions(mod, nodes, outputs, users, graph.find_layers(mod), variables)


# --- rule 1 -----------------------------------------------------------------------------------------------------------


def _fuse_layer(found: _Fusions, name: str) -> None:
    layer = found.layers[name]
    if (
        found.users[layer.acc] != [name]
        or len(layer.in_shape) not in (2, 4)
        or graph.dtype_of(found.variables[name]) != "float32"
    ):
        return
    if len(layer.in_shape) != (2 if layer.kind == "dense" else 4):
        return
    members, last, residual = [layer.acc, name], name, None
    follower = found.single_user(name)
    if follower is not None and layer.kind != "conv2d_transpose" and found.nodes[follower].op == "relax.add":
        residual = _residual(found, found.nodes[follower], name)
        if residual is not None:
            last = follower
            members.append(follower)
    low, high = -INFINITY, INFINITY
    while (follower := found.single_user(last)) is not None and (clip := as_clip(found.nodes[follower])) is not None:
        low, high = min(max(low, clip[0]), clip[1]), min(max(high, clip[0]), clip[1])
        last = follower
        members.append(follower)
    found.inner.update(members[:-1])
    found.fused_layers[last] = _FusedLayer(layer, residual, low, high)
    found.calls[last] = _layer_call(found, last, "", last)


def _residual(found: _Fusions, node: Node, name: str) -> str | None:
    """The other addend, if it exists in memory and has the sum's shape."""
    if len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
        return None
    other = node.inputs[1] if node.inputs[0] == name else node.inputs[0]
    shape = graph.shape_of(found.variables[name])
    if graph.shape_of(found.variables[other]) != shape or graph.shape_of(node.call) != shape or other in found.inner:
        return None
    return other


def _layer_call(found: _Fusions, fused: str, program: str, last: str) -> Callable[[Lookup], Any]:
    """The call of the fused layer `fused`, with an elementwise program behind it, that produces `last`."""
    layer, residual = found.fused_layers[fused].layer, found.fused_layers[fused].residual
    bounds = found.fused_layers[fused]
    attrs: dict[str, Any] = {"low": bounds.low, "high": bounds.high, "program": program}
    if layer.kind != "dense":
        attrs |= {key: layer.attrs[key] for key in ("strides", "padding", "dilation", "groups")}
    if layer.kind == "conv2d_transpose":
        attrs["output_padding"] = layer.attrs["output_padding"]
    shape = graph.shape_of(found.variables[last])

    def call(lookup: Lookup) -> Any:
        tensors = [lookup(found.variables[layer.data]), graph.constant(layer.weight), graph.constant(layer.bias)]
        if residual is not None:
            tensors.append(lookup(found.variables[residual]))
        return float_call(f"lpsn.float_{layer.kind}", tensors, attrs, shape)

    return call


# --- rule 2 -----------------------------------------------------------------------------------------------------------


def _fuse_elementwise(found: _Fusions) -> None:
    """Group elementwise nodes, last node first: each joins the group of its readers if they are all in one."""
    group: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for name in reversed(found.nodes):
        node = found.nodes[name]
        if not found.is_free(name) or not is_elementwise(node):
            continue
        readers = {group.get(user) for user in found.users[name]}
        root = readers.pop() if len(readers) == 1 else None
        if root is None or graph.shape_of(node.call) != graph.shape_of(found.nodes[root].call):
            root = name
        group[name] = root
        members.setdefault(root, []).append(name)
    for root, names in members.items():
        _fuse_program(found, root, names[::-1])


def _fuse_program(found: _Fusions, root: str, names: list[str]) -> None:
    shape = graph.shape_of(found.nodes[root].call)
    program = ProgramBuilder(len(shape))
    for name in names:
        program.add(found.nodes[name], lambda var: _resolved(found, var))
    text = program.program()
    found.inner.update(names[:-1])
    source = program.keys[0] if len(program.keys) == 1 else ""
    if source in found.fused_layers and set(found.users[source]) <= set(names):
        found.inner.add(source)
        del found.calls[source]
        found.calls[root] = _layer_call(found, source, text, root)
        return

    def call(lookup: Lookup) -> Any:
        return float_call(
            "lpsn.float_elementwise", [lookup(tensor) for tensor in program.tensors], {"program": text}, shape
        )

    found.calls[root] = call


def _resolved(found: _Fusions, var: Any) -> str:
    """Name of the variable that `var` is an alias of, or its own."""
    name = str(var.name)
    while name not in found.nodes and isinstance(value := _value(found, name), relax.Var):
        name = str(value.name)
    return name


def _value(found: _Fusions, name: str) -> Any:
    return next((value for var, value in graph.bindings(found.mod) if var.name == name), None)


# --- result -----------------------------------------------------------------------------------------------------------


def _rewrite(found: _Fusions) -> tvm.IRModule:
    anything = found.mod["main"].params[0]

    def rewrite(builder: Any, var: Any, value: Any, lookup: Lookup) -> Any:
        if var.name in found.inner:
            # Nobody reads it any more: standing for some variable makes the binding disappear.
            return lookup(anything)
        make = found.calls.get(var.name)
        return make(lookup) if make is not None else None

    return graph.rebuild(found.mod, rewrite)
