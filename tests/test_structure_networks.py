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
from tvm import relax

import lpsn_tvm
from benchmarks import models as zoo
from lpsn_tvm import graph
from lpsn_tvm.reference import evaluate, run_reference
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
MOVES = {f"lpsn.float_{op}" for op in "resize_nearest strided_slice depth_to_space reshape transpose concat".split()}


def is_float(name: str) -> bool:
    return name.startswith(("relax.", "lpsn.float_")) and name not in MOVES


def with_all_outputs(mod: Any) -> tuple[Any, list[str]]:
    """The function with every intermediate value as an output, and their names."""
    function = mod["main"]
    builder, new = relax.BlockBuilder(), {param: param for param in function.params}

    def lookup(expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([lookup(field) for field in expr.fields])
        return new[expr] if isinstance(expr, relax.Var) else expr

    with builder.function("main", list(function.params)):
        with builder.dataflow():
            for var, value in graph.bindings(mod):
                if isinstance(value, relax.Call):
                    call = relax.Call(value.op, [lookup(arg) for arg in value.args], value.attrs, list(value.ty_args))
                    new[var] = graph.emit_named(builder, call, var.name)
            kept = [var for var in new if var not in set(function.params)]
            output = builder.emit_output(relax.Tuple([new[var] for var in kept]))
        builder.emit_func_output(output)
    return builder.get(), [var.name for var in kept]


def check_each_operator(mod: Any, x: Any) -> None:
    everything, names = with_all_outputs(mod)
    backend = get_backend("llvm")
    compiled = backend.compile(backend.lower(everything))
    values = dict(zip(names, Executable(compiled.library, compiled.params)([x]), strict=True))
    values[mod["main"].params[0].name] = x
    for var, value in graph.bindings(mod):
        if not isinstance(value, relax.Call):
            continue
        want = evaluate(value, values)
        if is_float(graph.op_name(value)):
            scale = max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(values[var.name], want, rtol=0, atol=2e-5 * scale, err_msg=var.name)
        else:
            np.testing.assert_array_equal(values[var.name], want, err_msg=var.name)


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
    names = {graph.op_name(value) for _, value in graph.bindings(mod)}
    if any(is_float(name) for name in names):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(np.ptp(want)))
    else:
        np.testing.assert_array_equal(got, want)
    check_each_operator(mod, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_structure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(zoo.STRUCTURE_NETWORKS[name](**SIZES[name]), monkeypatch)  # type: ignore[call-arg]


def test_small_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    check(zoo.cyclegan_generator(size=32, blocks=1, base=8), monkeypatch)
