"""Random networks on the accelerator equal the numpy reference bit for bit, break no rule of the hardware, and give the
same bytes in any order of its units.

Two kinds: integer graphs of layers of any shape on every build of the hardware (also ones with tiny buffers), with
default and with random schedules; and ONNX networks through `build`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import BLOCKS, DrawnChoices, SeededChoices, random_model
from vta_graphs import GraphBuilder, host_reasons
from vta_random import CONFIGS, programs_of, random_network
from vta_whole import (
    INTERLEAVINGS,
    assert_orders_agree,
    assert_whole_network_is_exact,
    build_with_graph,
    free_batch,
)

from lpsn_tvm.targets.vta.config import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
BUILDS: list[tuple[str, Any]] = [
    ("vta", 8),
    ("vta -preset=pynq-0.0.2", 8),
    ("vta", 4),
    ("vta", (4, 8)),
    ("vta -preset=pynq-4x8", 8),
    ("vta -preset=ultra96", 5),
    ("vta -preset=pynq-i4", 3),
]


def check_integer_network(choices: Any, name: str, schedules: int | None, interleavings: int = INTERLEAVINGS) -> None:
    builder, outputs = random_network(choices, CONFIGS[name])
    network = programs_of(builder.graph(*outputs), builder.config, schedules)
    feeds = {info.name: builder.values[info.name] for info in builder.inputs}
    assert_orders_agree(network, feeds, [builder.values[output] for output in outputs], interleavings)


def check_onnx_network(seed: int, interleavings: int = INTERLEAVINGS) -> None:
    """Geometry, bits, batch and spread of the inputs follow the seed."""
    target, bits = BUILDS[seed % len(BUILDS)]
    batch = 1 if seed % 3 else 3
    # Shuffles name the batch in the shapes of their reshapes.
    blocks = tuple(BLOCKS) if batch == 1 else tuple(block for block in BLOCKS if block != "shuffle")
    model = random_model(seed, blocks, max_blocks=8)
    module, mod = build_with_graph(free_batch(model) if batch > 1 else model, target=target, bits=bits, batch=batch)
    spread = 3.0 if seed % 2 else 1.0
    assert_whole_network_is_exact(module, mod, seed=seed, spread=spread, interleavings=interleavings)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, **CHECKS)
@given(data=st.data(), schedules=st.none() | st.integers(0, 999))
def test_layers_of_any_shape(name: str, data: st.DataObject, schedules: int | None) -> None:
    check_integer_network(DrawnChoices(data.draw), name, schedules)


@pytest.mark.parametrize("seed", range(700, 714))
def test_onnx_networks(seed: int) -> None:
    check_onnx_network(seed)


# Global averages beyond the input buffer (45, 106), a pooled kernel beyond it (1195), hundreds of tokens in a queue
# (2004, 2327), inputs of 7 bits copied by a concatenation on 4-bit hardware (430).
@pytest.mark.parametrize("seed", [45, 106, 430, 1195, 2004, 2327])
def test_layers_that_once_failed(seed: int) -> None:
    name = sorted(CONFIGS)[seed % len(CONFIGS)]
    check_integer_network(SeededChoices(seed), name, seed if seed % 2 else None, 2)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1200, 100))
def test_many_layers_of_any_shape(start: int) -> None:
    for seed in range(start, start + 100):
        name = sorted(CONFIGS)[seed % len(CONFIGS)]
        check_integer_network(SeededChoices(seed), name, seed if seed % 2 else None)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 600, 50))
def test_many_onnx_networks(start: int) -> None:
    for seed in range(start, start + 50):
        check_onnx_network(seed)


@pytest.mark.parametrize("kind", ["concat", "pad"])
def test_wide_inputs_that_the_host_moves_stay_wide(kind: str) -> None:
    """A network input of 7 bits on 4-bit hardware is split in two where a layer reads it, also behind a host step."""
    b = GraphBuilder(PRESETS["pynq-i4"])
    x = b.input(1, 5, 6, 7, bits=7)
    y = b.concat(x, x) if kind == "concat" else b.pad(x, 1, 2, 0, 1)
    network = b.check(b.dequantize(b.conv2d(y, 20)))
    assert "more than 4 bits" in host_reasons(network)[y]
    feeds = {info.name: b.values[info.name] for info in b.inputs}
    output = b.nodes[-1].name
    assert_orders_agree(programs_of(b.graph(output), b.config), feeds, [b.values[output]], 1)


def test_the_check_notices_a_wrong_bit() -> None:
    builder, outputs = random_network(SeededChoices(2), CONFIGS["pynq"])
    network = programs_of(builder.graph(*outputs), builder.config)
    feeds = {info.name: builder.values[info.name] for info in builder.inputs}
    expected = [np.array(builder.values[output]) for output in outputs]
    expected[-1].flat[0] += 1
    with pytest.raises(AssertionError, match="interleaving None"):
        assert_orders_agree(network, feeds, expected, 0)
