"""Building candidates, in a worker process: the template is made again from its name and workload, the kernel of the
configuration compiled, and everything that measuring needs written into one file.

For GPUs several candidates share one source and one call of nvcc, most of whose time goes into headers; where that
fails, each is compiled alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsn_tvm import compat
from lpsn_tvm.errors import CompileError, LpsnError
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.tuning.candidate_file import CandidateFile
from lpsn_tvm.tuning.worker_process import last_line, resolve

if TYPE_CHECKING:
    from lpsn_tvm.schedules.kernel import Kernel
    from lpsn_tvm.schedules.template import Template

PATTERN_BYTES = 16381
"""Random weights repeat with this odd period: no time goes into making and packing more."""
WEIGHT_BYTES = 1024
"""8-bit constants from this size on are weights, which may have any values."""


def prepare() -> None:
    """Import what building needs."""
    compat.import_tvm()
    import lpsn_tvm.targets.compile  # noqa: F401


def build(candidates: Sequence[Mapping[str, Any]], target: Mapping[str, Any]) -> list[str]:
    """Build candidates.

    Parameters
    ----------
    candidates : sequence of mapping
        "remaker" (import path), "workload", "config", "path" (the file to write); "constants", the path of a .npz
        file whose arrays replace those of the template made again, or None; "out", the fields of the output's
        `TensorSpec`, or None for the template's.
    target : mapping
        "kind", and "target" (text of a TVM target, llvm) or "arch" (cuda).

    Returns
    -------
    list of str
        Why a candidate could not be built, in one line; "" where it was.
    """
    kernels: dict[int, Kernel] = {}
    errors = [""] * len(candidates)
    for index, candidate in enumerate(candidates):
        errors[index] = _attempt(lambda i=index, c=candidate: kernels.update({i: make_kernel(c)}))
    if target["kind"] == "llvm":
        for index, kernel in kernels.items():
            path, text = Path(candidates[index]["path"]), str(target["target"])
            limits = input_range(candidates[index])
            errors[index] = _attempt(lambda k=kernel, p=path, m=limits, t=text: _llvm(k, t, m).write(p))
        return errors
    files = {index: (candidates[index], kernel) for index, kernel in kernels.items()}
    if _attempt(lambda: _cuda(files, str(target["arch"]))):
        for index, item in files.items():
            errors[index] = _attempt(lambda i=index, f=item: _cuda({i: f}, str(target["arch"])))
    return errors


def _attempt(work: Any) -> str:
    """Do some work; why that failed in one line, or ""."""
    try:
        work()
    except LpsnError as error:
        return f"does not compile: {error}"
    except Exception as error:  # A configuration that a template cannot make must not end the others.
        return f"does not compile: {type(error).__name__}: {last_line(error)}"
    return ""


def input_range(candidate: Mapping[str, Any]) -> tuple[int, int] | None:
    """What values the first input has, where a workload says so: "input_range": [low, high], or "in_bits" of unsigned
    values in its "geometry"; kernels of narrow arithmetic are wrong on others.
    """
    workload = candidate["workload"]
    limits = workload.get("input_range")
    if limits is not None:
        return int(limits[0]), int(limits[1])
    bits = int(workload.get("geometry", {}).get("in_bits", 8))
    return (0, (1 << bits) - 1) if bits < 8 else None


@lru_cache(maxsize=64)
def _remade(remaker: str, workload: str) -> Template:
    template: Template = resolve(remaker)(json.loads(workload))
    return template


def make_kernel(candidate: Mapping[str, Any]) -> Kernel:
    """The kernel of a candidate, with the constants that were given or with made-up ones."""
    template = _remade(candidate["remaker"], json.dumps(candidate["workload"], sort_keys=True))
    kernel = template.make(candidate["config"])
    if candidate["constants"] is None:
        return replace(kernel, constants=tuple(_weights(array) for array in kernel.constants))
    with np.load(candidate["constants"], allow_pickle=False) as stored:
        given = tuple(stored[f"arr_{i}"] for i in range(len(stored.files)))
    kinds = [[(array.shape, array.dtype) for array in arrays] for arrays in (given, kernel.constants)]
    if kinds[0] != kinds[1]:
        raise CompileError("the template made again from its workload has other constants than the network's")
    out = TensorSpec(tuple(candidate["out"]["shape"]), candidate["out"]["dtype"], candidate["out"]["block"])
    return replace(kernel, constants=given, out=out)


def _weights(array: Any) -> Any:
    """Random values where the template made zeros: a GPU runs faster on zeros than on what it will see later."""
    if array.dtype.itemsize != 1 or array.nbytes < WEIGHT_BYTES or array.any():
        return array
    pattern = np.random.default_rng(0).integers(0, 256, PATTERN_BYTES, np.uint8)
    return np.resize(pattern, array.nbytes).view(array.dtype).reshape(array.shape)


def _llvm(kernel: Kernel, target: str, limits: tuple[int, int] | None) -> CandidateFile:
    import tvm

    from lpsn_tvm.targets.compile import export

    parsed = tvm.target.Target(json.loads(target))
    with parsed, tvm.transform.PassContext(opt_level=3):
        library = export(tvm.compile(kernel.build().with_attr("global_symbol", "main"), target=parsed))
    return CandidateFile("llvm", kernel.inputs, kernel.out, limits, library, kernel.constants)


def _cuda(files: Mapping[int, tuple[Mapping[str, Any], Kernel]], arch: str) -> None:
    """Compile kernels in one source and write the file of each."""
    from lpsn_tvm.targets.cuda_build import program
    from lpsn_tvm.targets.cuda_compile import compile_cubin, cuda_source
    from lpsn_tvm.targets.cuda_planning import plan

    functions = {f"candidate{index}": kernel.build() for index, (_, kernel) in files.items()}
    source = cuda_source(functions, arch)
    binary, _ = compile_cubin(source.source, arch)
    for index, (candidate, kernel) in files.items():
        planned = plan(_network(kernel, f"candidate{index}", functions[f"candidate{index}"]), source.functions)
        made = program(arch, planned, binary, has_ptx=False)
        built = CandidateFile("cuda", kernel.inputs, kernel.out, input_range(candidate), program=made)
        built.write(Path(candidate["path"]))


def _network(kernel: Kernel, name: str, function: Any) -> Any:
    """A lowered module of one kernel, as planning wants it."""
    from tvm import relax

    from lpsn_tvm import graph

    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", relax.TensorType(spec.memory_shape, spec.dtype)) for i, spec in enumerate(kernel.inputs)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            constants = [graph.constant(array) for array in kernel.constants]
            out = relax.TensorType(kernel.out.memory_shape, kernel.out.dtype)
            called = builder.add_func(function, name)
            result = graph.emit_named(builder, relax.call_tir(called, [*inputs, *constants], out), name)
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    return builder.get()
