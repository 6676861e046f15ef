"""Where a network's time goes on the CPU: every kernel of a compiled module by itself, on one thread.

    python benchmarks/llvm_profile.py espcn [--bits 8] [--target llvm] [--rounds 30] [--top 20] [--sparsity 0.5]

Each distinct function of the lowered module is compiled and timed alone (minimum over rounds) and multiplied by how
often it is called; data are warm in the caches then, so the sum is a lower bound of the network's latency.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np


def lowered(network: str, bits: int | None, target: str, sparsity: float | None) -> tuple[Any, Any]:
    """(backend, module of kernel calls) of a network of the zoo."""
    import lpsn_tvm
    from benchmarks import models
    from lpsn_tvm.targets import get_backend
    from lpsn_tvm.targets.backend import Backend

    kept: list[Any] = []
    backend = get_backend(target)

    class Recording(Backend):
        def lower(self, mod: Any) -> Any:
            kept.append(super().lower(mod))
            return kept[-1]

    recording = Recording(**{name: getattr(backend, name) for name in Backend.__dataclass_fields__})
    model = getattr(models, network)()
    shape = tuple(d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim)
    lpsn_tvm.build(
        model,
        target=recording,
        bits=bits,
        calibration=models.smooth_noise((4, *shape[1:]), 5),
        sparsity=sparsity,
        measure=False,
        progress=False,
    )
    return backend, kept[0]


def calls(mod: Any) -> Counter[str]:
    """Function name -> number of calls."""
    from lpsn_tvm import graph

    values = [value for _, value in graph.bindings(mod)]
    return Counter(value.args[0].name_hint for value in values if graph.op_name(value) == "relax.call_tir")


def seconds(function: Any, target: Any, rounds: int) -> float:
    """Fastest of `rounds` runs of a PrimFunc on random data."""
    import tvm

    run = tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]
    rng = np.random.default_rng(0)
    arguments = []
    for param in function.params:
        buffer = param.ty
        shape, dtype = [int(extent) for extent in buffer.shape], str(buffer.dtype)
        # Small integers: they may be indices.
        array = rng.standard_normal(shape) if dtype == "float32" else rng.integers(0, 2, shape)
        arguments.append(tvm.runtime.tensor(array.astype(dtype)))
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def shapes(function: Any) -> str:
    """First input -> output."""
    buffers = [param.ty for param in function.params]
    return " -> ".join(f"{b.dtype}{[int(extent) for extent in b.shape]}" for b in (buffers[0], buffers[-1]))


def main() -> None:
    from lpsn_tvm import graph

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--bits", type=int, default=8, help="0: float")
    parser.add_argument("--target", default="llvm")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=None)
    options = parser.parse_args()
    backend, mod = lowered(options.network, options.bits or None, options.target, options.sparsity)
    count = calls(mod)
    rows = []
    for variable, function in mod.functions.items():
        name = variable.name_hint
        if count[name]:
            each = seconds(function, backend.target, options.rounds) * 1e3
            rows.append((each * count[name], each, count[name], name, shapes(function)))
    others = Counter(graph.op_name(value) for _, value in graph.bindings(mod))
    for total, each, times, name, text in sorted(rows, reverse=True)[: options.top]:
        print(f"{total:8.3f} ms = {times:3d} x {each:7.3f}  {name:24s} {text}")
    total, number = sum(row[0] for row in rows), sum(row[2] for row in rows)
    print(f"{total:8.3f} ms in {number} calls of {len(rows)} functions; operators: {dict(others)}")


if __name__ == "__main__":
    main()
