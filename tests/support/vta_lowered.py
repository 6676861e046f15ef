"""A lowered network in numpy, operator by operator (`schedules.vta.evaluate`): what its programs must compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.vta.evaluate import evaluate
from lpsn_tvm.schedules.vta.ops import Gemm, Store, TileOp
from lpsn_tvm.targets.vta.execute import HOST_OPERATORS
from lpsn_tvm.targets.vta.forms import Array
from lpsn_tvm.targets.vta.layout import TileLayout, pack_integers, unpack_integers
from lpsn_tvm.targets.vta.network import HostStep, LoweredNetwork


def run_lowered(network: LoweredNetwork, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All values that the host sees: inputs, results of host steps, and what they and the caller read.

    Parameters
    ----------
    network : LoweredNetwork
        Operators on symbolic tensors.
    feeds : mapping of input name to array
        One for every input of the graph.
    """
    values = {name: np.asarray(array) for name, array in feeds.items()}
    memory: dict[str, Array] = {**network.weights, **network.vectors, **network.data}
    written: set[str] = set()
    for step in network.steps:
        if isinstance(step, HostStep):
            operands = [_operand(network, memory, values, step, name) for name in step.inputs]
            values[step.output] = np.asarray(HOST_OPERATORS[step.op](*operands, **step.attrs))
        else:
            _run_operator(network, memory, values, step, written)
    for name in network.outputs:
        values[name] = _value(network, memory, values, name)
    return values


def _run_operator(
    network: LoweredNetwork, memory: dict[str, Array], values: dict[str, Array], op: TileOp, written: set[str]
) -> None:
    for part in op.steps:
        if isinstance(part, Gemm) and part.source.region not in memory:
            tensor = network.tensors[part.source.region]
            memory[part.source.region] = _tiles(tensor.layout.pack(values[tensor.value]), tensor.layout)
        elif isinstance(part, Store) and part.plane.region not in written:
            layout = network.tensors[part.plane.region].layout
            memory[part.plane.region] = np.zeros((layout.tiles, layout.batch, layout.block), np.int8)
            written.add(part.plane.region)
    evaluate(op, memory, network.config)


def _tiles(data: bytes, layout: Any) -> Array:
    count = layout.tiles * layout.batch * layout.block
    return unpack_integers(data, count, layout.bits).reshape(layout.tiles, layout.batch, layout.block)


def _operand(
    network: LoweredNetwork, memory: Mapping[str, Array], values: Mapping[str, Array], step: HostStep, name: str
) -> Array:
    return step.constants[name] if name in step.constants else _value(network, memory, values, name)


def _value(network: LoweredNetwork, memory: Mapping[str, Array], values: Mapping[str, Array], name: str) -> Array:
    """A value of the host, fetched from the accelerator's memory if it was made there."""
    if name in values:
        return values[name]
    region = next(key for key, tensor in network.tensors.items() if tensor.value == name and key in memory)
    layout = network.tensors[region].layout
    assert isinstance(layout, TileLayout), "only plain tensors are fetched"
    return layout.unpack(pack_integers(memory[region], layout.bits))
