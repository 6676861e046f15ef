"""Networks of every common structure, pruned by 30 % and quantized to 8 bits: the module agrees with the reference.

Integer operators must return exactly what `quant` returns for what they were given. Instance norms between them return
the reference's numbers too (their sums are in float64 and end in float32), or else a value next to a rounding boundary
would become its neighbour, and over twenty such layers that would spread. Only the generator's last operator, tanh in
float, differs in the last bits. Every operator is also checked on the compiled module's own operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from each_operator import check_each_operator, is_exact, with_all_outputs

import lpsn_tvm
from benchmarks import models as zoo
from lpsn_tvm.reference import run_reference
from lpsn_tvm.runtime import Executable
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.backend import Backend

SIZES: dict[str, dict[str, int]] = {
    "densenet121": {"size": 64, "classes": 10},
    "mobilenet_v2": {"size": 64, "classes": 10},
    "preact_resnet18": {"size": 16},
    "unet": {"size": 32, "base": 16},
    "frrn": {"size": 32},
    "cyclegan_generator": {"size": 64, "blocks": 3, "base": 16},
}


def compiled_values(mod: Any, x: Any) -> dict[str, Any]:
    """Every variable's value, from one module that returns them all."""
    everything, names = with_all_outputs(mod)
    backend = get_backend("llvm")
    compiled = backend.compile(backend.lower(everything))
    values = dict(zip(names, Executable(compiled.library, compiled.params)([x]), strict=True))
    return {**values, mod["main"].params[0].name: x}


def check(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(1).random((17, *shape[1:])).astype(np.float32)
    lowered: list[Any] = []
    original = Backend.lower

    def remember(self: Backend, mod: Any, *args: Any) -> Any:
        lowered.append(mod)
        return original(self, mod, *args)

    monkeypatch.setattr(Backend, "lower", remember)
    module = lpsn_tvm.build(model, bits=8, sparsity=0.3, align=1, calibration=data[:16], measure=False)
    mod, x = lowered[0], data[16:]
    macs = module.report.totals["macs"]
    assert macs[1] < 0.75 * macs[0]
    got, want = module(x), next(iter(run_reference(mod, {mod["main"].params[0].name: x}).values()))
    np.testing.assert_allclose(got, want, rtol=0, atol=0 if is_exact(mod) else 1e-6 * float(np.ptp(want)))
    check_each_operator(mod, compiled_values(mod, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_structure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(zoo.STRUCTURE_NETWORKS[name](**SIZES[name]), monkeypatch)  # type: ignore[call-arg]


def test_small_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    check(zoo.cyclegan_generator(size=32, blocks=1, base=8), monkeypatch)
