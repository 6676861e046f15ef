"""Which tensors of a network exist as integers, and which operators are fused between two of them.

Before: a canonical float function (Contract 1). After: a `Regions` value; the graph is not changed. Planner, fake
quantization and lowering use the
same value, so they round at the same places. Rules, in the order in which they are applied:

1. A node is **float** if its operator has no integer form or the user asked for it.
2. What only leads to the network's outputs, without passing another weighted layer, is float: a last layer writes
   float32 directly.
3. An elementwise node with a float operand is float; a layer, or an elementwise node, that only float nodes read
   produces float.
4. A **layer** region is acc -> bias [-> residual add] [-> clamps]; a residual is added only if nothing else reads
   the layer's output.
5. Standalone **add**, **multiply** and **pool** take following clamps along.
6. What is computed element by element from ONE quantized tensor is a **lookup** region, however many operators that
   takes.
7. **same** nodes hand the scale of their input on; **concat** inputs are requantized to the output's scale.

A variable in `Regions.quantized` exists as integers only: every reader, float nodes too, sees the rounded numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.operator_rules import Node, as_clip, classify
from lpsn_tvm.passes.region_types import Region, RegionKind, Regions

__all__ = ["OUTPUT", "Region", "RegionKind", "Regions", "find_regions", "nodes_of"]

OUTPUT = ""
"""Pseudo reader of the variables that the function returns."""


def find_regions(mod: Any, ignore: Iterable[str] = ()) -> Regions:
    """Find the regions of a canonical module.

    Parameters
    ----------
    mod : IRModule
        Canonical float module.
    ignore : iterable of str
        Layer or variable names, fnmatch patterns, that stay float.
    """
    finder = _Finder(mod, tuple(ignore))
    finder.find_float()
    finder.find_layers()
    finder.find_fused()
    finder.find_lookups()
    return finder.result()


def nodes_of(mod: Any) -> tuple[dict[str, Node], tuple[str, ...], tuple[str, ...]]:
    """(nodes by variable name in execution order, function inputs, returned variables), aliases resolved."""
    alias: dict[str, str] = {}
    tuples: dict[str, Any] = {}

    def resolve(expr: Any) -> list[str]:
        if isinstance(expr, relax.Var):
            return resolve(tuples[expr.name]) if expr.name in tuples else [alias.get(expr.name, expr.name)]
        if isinstance(expr, relax.Tuple):
            return [name for item in expr.fields for name in resolve(item)]
        return []

    nodes: dict[str, Node] = {}
    for var, value in graph.bindings(mod):
        if isinstance(value, relax.Var):
            alias[var.name] = resolve(value)[0]
        elif isinstance(value, relax.Tuple):
            tuples[var.name] = value
        else:
            inputs = tuple(name for arg in value.args for name in resolve(arg))
            nodes[var.name] = classify(var.name, value, inputs)
    function = mod["main"]
    return nodes, tuple(param.name for param in function.params), tuple(resolve(function.body.body))


class _Finder:
    """Working state of `find_regions`; every method applies some of the rules of the module's docstring."""

    def __init__(self, mod: Any, ignore: tuple[str, ...]) -> None:
        self.mod = mod
        self.nodes, self.inputs, self.outputs = nodes_of(mod)
        self.order = {name: index for index, name in enumerate(self.nodes)}
        self.users: dict[str, list[str]] = {name: [] for name in (*self.inputs, *self.nodes)}
        for node in self.nodes.values():
            for name in node.inputs:
                self.users[name].append(node.name)
        for name in self.outputs:
            self.users[name].append(OUTPUT)
        self.layers = graph.find_layers(mod)
        self.acc = {layer.acc: name for name, layer in self.layers.items()}
        self.float: dict[str, str] = {name: node.reason for name, node in self.nodes.items() if node.kind == "float"}
        for name, layer in self.layers.items():
            if any(fnmatchcase(name, pattern) for pattern in ignore):
                self.float[name] = self.float[layer.acc] = "kept at float on request"
        for name, node in self.nodes.items():
            if node.kind == "layer" and name not in self.acc:
                self.float[name] = "weighted operator without a bias: not in canonical form"
            elif name not in self.layers and any(fnmatchcase(name, pattern) for pattern in ignore):
                self.float.setdefault(name, "kept at float on request")
        self.float_output: set[str] = set()
        self.taken: set[str] = set()
        self.found: dict[str, Region] = {}

    # --- rules 1 to 3 ---
    def find_float(self) -> None:
        """Spread float from the nodes that have no integer form until nothing changes."""
        self._mark_tail()
        changed = True
        while changed:
            before = len(self.float) + len(self.float_output)
            self._spread_backward()
            self._spread_forward()
            changed = len(self.float) + len(self.float_output) != before

    def _is_layer_part(self, name: str) -> bool:
        return name in self.layers or name in self.acc

    def _mark_tail(self) -> None:
        tail = {OUTPUT}
        for name in reversed(self.nodes):
            if not self._is_layer_part(name) and all(user in tail for user in self.users[name]):
                tail.add(name)
                self.float.setdefault(name, "leads only to the network's output")

    def _reads_as_float(self, user: str) -> bool:
        return user == OUTPUT or user in self.float

    def _spread_backward(self) -> None:
        for name in reversed(self.nodes):
            if name in self.float or not all(self._reads_as_float(user) for user in self.users[name]):
                continue
            if name in self.layers:
                self.float_output.add(name)
            elif self.nodes[name].kind in ("elementwise", "add", "multiply") and name not in self.acc:
                self.float[name] = "read only by float operators"

    def _spread_forward(self) -> None:
        for name, node in self.nodes.items():
            if name in self.float or self._is_layer_part(name) or node.kind not in ("elementwise", "add", "multiply"):
                continue
            source = next((item for item in node.inputs if item in self.float or item in self.float_output), None)
            if source is not None:
                self.float[name] = f"elementwise on {source}, which is float"

    # --- rules 4 and 5 ---
    def _is_free(self, name: str) -> bool:
        return name not in self.float and name not in self.taken

    def _take_clamps(self, name: str, members: list[str]) -> tuple[str, tuple[float, float] | None]:
        """Follow single readers that are clamps; returns the last variable and the combined clamp."""
        bounds: tuple[float, float] | None = None
        while len(self.users[name]) == 1 and self.users[name][0] != OUTPUT and self._is_free(self.users[name][0]):
            node = self.nodes[self.users[name][0]]
            clip = as_clip(node)
            if clip is None:
                break
            low, high = clip
            bounds = clip if bounds is None else (min(max(bounds[0], low), high), min(max(bounds[1], low), high))
            members.append(node.name)
            name = node.name
        return name, bounds

    def _add(self, region: Region) -> None:
        self.found[region.name] = region
        self.taken.update(region.members)

    def find_layers(self) -> None:
        """Layer regions, last layer first: of two addends the later one takes the sum."""
        for name in reversed(list(self.layers)):
            layer = self.layers[name]
            if name in self.float:
                continue
            members = [layer.acc, name]
            if name in self.float_output:
                self._add(Region("layer", name, (layer.data,), tuple(members), layer=name, float_output=True))
                continue
            last, residual = self._take_residual(name, members)
            last, activation = self._take_clamps(last, members)
            inputs = (layer.data,) if residual is None else (layer.data, residual)
            self._add(Region("layer", last, inputs, tuple(members), name, activation, residual))

    def _take_residual(self, name: str, members: list[str]) -> tuple[str, str | None]:
        users = self.users[name]
        if len(users) != 1 or users[0] == OUTPUT or self.layers[name].kind == "conv2d_transpose":
            return name, None
        node = self.nodes[users[0]]
        if node.kind != "add" or not self._is_free(node.name) or len(set(node.inputs)) != 2:
            return name, None
        other = node.inputs[1] if node.inputs[0] == name else node.inputs[0]
        if self._shape(other) != self._shape(name) or self._is_inside_layer(other):
            return name, None
        members.append(node.name)
        return node.name, other

    def _is_inside_layer(self, name: str) -> bool:
        """Whether an earlier region has `name` as an inner variable, so that it never exists in memory."""
        return name in self.taken and name not in self.found

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self.nodes:
            return graph.shape_of(self.nodes[name].call)
        return next(graph.shape_of(param) for param in self.mod["main"].params if param.name == name)

    def find_fused(self) -> None:
        """Standalone sums, products and poolings with their clamps; concatenations and scale-preserving operators."""
        for name, node in self.nodes.items():
            if not self._is_free(name) or self._is_layer_part(name):
                continue
            if node.kind == "pool":
                members = [name]
                last, activation = self._take_clamps(name, members)
                self._add(Region("pool", last, node.inputs, tuple(members), activation=activation))
            elif node.kind == "concat":
                self._add(Region("concat", name, node.inputs, (name,)))
            elif node.kind == "same":
                self._add(Region("same", name, node.inputs, (name,)))

    # --- rule 6 ---
    def find_lookups(self) -> None:
        """Join the remaining elementwise nodes into tables; what reads two tensors is a sum, a product, or float."""
        while True:
            roots, broken = self._roots()
            if broken is None:
                break
            # Not computed from one tensor and no integer form: float, and everything that follows from it.
            self.float[broken] = f"{self.nodes[broken].op.removeprefix('relax.')} of two tensors has no integer form"
            self.found.clear()
            self.taken.clear()
            self.find_float()
            self.find_layers()
            self.find_fused()
        for name in roots:
            if self._is_visible(name, roots):
                members = self._cone(name, roots[name])
                per_channel = any(self.nodes[member].per_channel for member in members)
                self._add(Region("lookup", name, (roots[name],), members, per_channel=per_channel))

    def _roots(self) -> tuple[dict[str, str], str | None]:
        """Elementwise variable -> the one materialised tensor it is computed from; sums and products become regions."""
        fixed: set[str] = set()  # table outputs that must exist in memory
        while True:
            roots: dict[str, str] = {}
            pairs: list[str] = []
            clash = False
            for name, node in self.nodes.items():
                if not self._is_free(name) or self._is_layer_part(name):
                    continue
                sources = {item if item in fixed else roots.get(item, item) for item in node.inputs}
                if len(sources) == 1 and self._covers(node, sources):
                    roots[name] = next(iter(sources))
                elif node.kind == "elementwise":
                    return roots, name
                else:
                    pairs.append(name)
                    inner = {item for item in node.inputs if item in roots} - fixed
                    clash |= bool(inner)
                    fixed |= inner
            visible = {name for name in roots if self._is_visible(name, roots)} - fixed
            if not visible and not clash:
                break
            fixed |= visible
        before = len(self.found)
        for name in pairs:
            self._add_pair(name)
        return (roots, None) if len(self.found) == before else self._roots()

    def _covers(self, node: Node, sources: set[str]) -> bool:
        """A table needs equal shapes of source and result."""
        return self._shape(node.name) == self._shape(next(iter(sources)))

    def _add_pair(self, name: str) -> None:
        if not self._is_free(name):
            return
        node = self.nodes[name]
        members = [name]
        last, activation = self._take_clamps(name, members)
        kind: RegionKind = "add" if node.kind == "add" else "multiply"
        self._add(Region(kind, last, node.inputs, tuple(members), activation=activation))

    def _is_visible(self, name: str, roots: Mapping[str, str]) -> bool:
        return any(user not in roots or roots[user] != roots[name] for user in self.users[name])

    def _cone(self, name: str, root: str) -> tuple[str, ...]:
        """Nodes between `root` and `name`, in execution order."""
        seen: set[str] = set()
        stack = [name]
        while stack:
            item = stack.pop()
            if item == root or item in seen:
                continue
            seen.add(item)
            stack.extend(self.nodes[item].inputs)
        return tuple(sorted(seen, key=self.order.__getitem__))

    # --- rule 7 and the result ---
    def result(self) -> Regions:
        """Regions in order, with the variables that exist as integers."""
        for name, reason in self.float.items():
            self._add(Region("float", name, self.nodes[name].inputs, (name,), float_output=True, reason=reason))
        regions = sorted(self.found.values(), key=lambda region: self.order[region.name])
        read_by_integer = {item for region in regions if region.kind != "float" for item in region.inputs}
        produced = {region.name for region in regions if not region.float_output}
        shares: dict[str, str] = {}
        for region in regions:
            if region.kind == "same":
                shares[region.name] = shares.get(region.inputs[0], region.inputs[0])
        names = (*self.inputs, *(region.name for region in regions))
        quantized = tuple(name for name in names if name in produced or name in read_by_integer)
        return Regions(tuple(regions), quantized, shares, self.inputs, self.outputs)
