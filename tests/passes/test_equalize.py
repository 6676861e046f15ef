"""Equalization keeps the function; it undoes channel factors that make a network unquantizable."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from random_graphs import models
from small_graphs import Net, random_feed
from tvm import relax

from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.equalize import apply_factors, channel_classes, choose_factors
from lpsn_tvm.passes.regions import find_regions
from lpsn_tvm.reference import run_reference


def random_factors(mod: Any, spread: float) -> dict[str, Any]:
    """Factors for every class of a module."""
    values = run_reference(mod, random_feed(mod), fetch=list(channel_classes(mod)))
    rng = np.random.default_rng(0)
    return {c: np.exp(rng.normal(0, spread, values[name].shape[1])) for name, c in channel_classes(mod).items()}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=models())
def test_factors_do_not_change_the_function(model: Any) -> None:
    mod = canonicalize(import_model(load_model(model)).mod)
    feeds = random_feed(mod, 1)
    before, after = run_reference(mod, feeds), run_reference(apply_factors(mod, random_factors(mod, 1.0)), feeds)
    for value, want in zip(after.values(), before.values(), strict=True):
        np.testing.assert_allclose(value, want, atol=2e-3 * max(1.0, float(np.abs(want).max())))


def test_uneven_channels_become_even_and_even_ones_stay() -> None:
    net = Net((4, 3, 8, 8))
    x = relax.op.nn.relu(net.conv(net.input, 16))
    x = relax.op.nn.relu(net.conv(net.emit(x), 16))
    mod = net.module(net.conv(net.emit(x), 4))
    feeds = [random_feed(mod, seed) for seed in range(3)]
    assert choose_factors(mod, find_regions(mod), feeds, 8) == {}
    uneven = apply_factors(mod, random_factors(mod, 2.0))
    found = choose_factors(uneven, find_regions(uneven), feeds, 8)
    assert len(found) == 2
    again = apply_factors(uneven, found)
    assert choose_factors(again, find_regions(again), feeds, 8) == {}
