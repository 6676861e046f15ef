"""Operators that stay on the host, and what the host fetches for them."""

from __future__ import annotations

import numpy as np

from lpsn_tvm.targets.vta.forms import Array
from lpsn_tvm.targets.vta.gemm import copy_into
from lpsn_tvm.targets.vta.integer_graph import Node
from lpsn_tvm.targets.vta.lower_context import Context
from lpsn_tvm.targets.vta.network import HostStep


def lower_to_host(context: Context, node: Node, reason: str) -> None:
    """`node` as a host step; what it reads is fetched."""
    for name in node.variables:
        fetch(context, name)
    emit_on_host(context, node, reason)
    context.host_made.add(node.name)


def emit_on_host(context: Context, node: Node, reason: str) -> None:
    """The host step itself."""
    inputs: list[str] = []
    constants: dict[str, Array] = {}
    for index, operand in enumerate(node.operands):
        if isinstance(operand, str):
            inputs.append(operand)
        else:
            inputs.append(f"constant{index}")
            constants[inputs[-1]] = operand
    context.emit(HostStep(node.op, tuple(inputs), node.name, dict(node.attrs), constants, reason))
    context.on_host.add(node.name)
    context.shapes[node.name] = node.shape
    if node.dtype in ("int8", "uint8"):
        context.ranges[node.name] = _range(node, context)


def _range(node: Node, context: Context) -> tuple[int, int]:
    """Smallest and largest integer that the step can make."""
    container = (0, 255) if node.dtype == "uint8" else (-128, 127)
    if node.op in ("lpsn.lookup", "lpsn.channel_lookup"):
        table = node.operands[1]
        if isinstance(table, np.ndarray):
            return int(table.min()), int(table.max())
    known = [context.ranges[name] for name in node.variables if name in context.ranges]
    if "qmin" in node.attrs and "qmax" in node.attrs:
        clamped = int(node.attrs["qmin"]), int(node.attrs["qmax"])
        if node.op != "lpsn.concat":
            return clamped
        known.append(clamped)  # operands in the result's scale are copied, whatever they hold
    if node.op == "lpsn.pad":
        known.append((int(node.attrs["value"]), int(node.attrs["value"])))
    if len(known) < len(node.variables) or not known:
        return container
    return min(low for low, _ in known), max(high for _, high in known)


def fetch(context: Context, name: str) -> None:
    """Make a variable readable by the host: as it lies in memory, by the operator that only renamed it, or by a copy
    into plain form.
    """
    if name in context.on_host:
        return
    value = context.values[name]
    tensor = context.tensors.get(value.plane.region)
    if tensor is not None and tensor.value == name and value.is_plain:
        context.on_host.add(name)
        return
    node = context.renaming.get(name)
    if node is not None:
        fetch(context, node.variable(0))
        emit_on_host(context, node, "moves no data on the accelerator, and the host reads it")
        return
    region = context.new_region(f"{name}.fetched", name, context.shapes[name])
    copy_into(context, region, value, context.plain_value(name, region, value.image, value.low, value.high))
    context.on_host.add(name)


def fetch_outputs(context: Context) -> None:
    """Make the network's outputs readable."""
    for name in context.graph.outputs:
        fetch(context, name)
