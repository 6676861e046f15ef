"""Networks through `build(target="vta")` together with the integer graph that they were lowered from, and the check of
the whole: bit for bit what the integer graph says, under any order of the units, before and after a save.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import lpsn_tvm
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets import Parts, get_backend
from lpsn_tvm.targets.vta.artifact import VtaArtifact
from lpsn_tvm.targets.vta.backend import make_artifact
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.network import VtaNetwork

INTERLEAVINGS = 10
Feeds = dict[str, np.ndarray]


def build_with_graph(model: Any, *, target: str = "vta", **options: Any) -> tuple[VtaArtifact, Any]:
    """The module, and the integer graph that it was lowered from."""
    kept: list[Any] = []

    def maker(backend: Any, mod: Any, parts: Parts, progress: Any) -> VtaArtifact:
        kept.append(mod)
        return make_artifact(backend, mod, parts, progress)

    backend = get_backend(target)
    backend = replace(backend, specializer=lambda b, bits: replace(get_backend(target).for_bits(bits), maker=maker))
    settings = {"sparsity": None, "search": False, "measure": False, "samples": 8} | options
    module = lpsn_tvm.build(model, target=backend, **settings)
    assert isinstance(module, VtaArtifact)
    return module, kept[0]


def random_feeds(module: VtaArtifact, seed: int = 0, spread: float = 1.0) -> Feeds:
    """Normal inputs; a spread above 1 saturates."""
    rng = np.random.default_rng(seed)
    return {i.name: (spread * rng.standard_normal(i.shape)).astype(np.float32) for i in module.inputs}


def assert_orders_agree(network: VtaNetwork, feeds: Feeds, expected: list[np.ndarray], count: int) -> None:
    """The strict simulator leaves `expected` in program order, and under `count` random orders of the units."""
    for interleaving in (None, *range(count)):
        found = execute(network, feeds, model=None, interleaving=interleaving).outputs
        for name, value in zip(network.outputs, expected, strict=True):
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name}, interleaving {interleaving}")
            assert found[name].dtype == value.dtype


def assert_whole_network_is_exact(
    module: VtaArtifact, mod: Any, *, seed: int = 0, spread: float = 1.0, interleavings: int = INTERLEAVINGS
) -> list[np.ndarray]:
    """Call and simulation equal the numpy reference of the integer graph; returns the outputs."""
    feeds = random_feeds(module, seed, spread)
    expected = list(run_reference(mod, feeds).values())
    result = module(feeds)
    for value, want in zip(result.values() if isinstance(result, dict) else [result], expected, strict=True):
        np.testing.assert_array_equal(value, want)
    assert_orders_agree(module.network, feeds, expected, interleavings)
    return expected


def assert_saved_is_same(module: VtaArtifact, path: Path, *, seed: int = 0) -> None:
    """What was saved and loaded returns the same bytes and cycles."""
    feeds = random_feeds(module, seed)
    loaded = lpsn_tvm.load(module.save(path))
    assert isinstance(loaded, VtaArtifact)
    first, second = module.simulate(feeds), loaded.simulate(feeds)
    assert (first.cycles, first.counters, first.layers) == (second.cycles, second.counters, second.layers)
    for name, value in first.outputs.items():
        np.testing.assert_array_equal(second.outputs[name], value)


def host_layers(module: VtaArtifact) -> dict[str, tuple[str, str]]:
    """Steps on the host: output -> (operator, reason)."""
    return {step.output: (step.op, step.reason) for step in module.network.host_steps}


def free_batch(model: Any) -> Any:
    """The model with a batch that the recipe chooses."""
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    return model
