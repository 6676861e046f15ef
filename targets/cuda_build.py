"""Compilation of a lowered module for GPUs: what is left of Relax legalized and scheduled, memory planned, machine code
made by nvcc. Needs neither a GPU nor a driver.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax, tirx

from lpsn_tvm import graph
from lpsn_tvm.compat import check_versions
from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.backend import Backend
from lpsn_tvm.targets.cuda_compile import CudaSource, cuda_source, start_nvcc
from lpsn_tvm.targets.cuda_nvcc import toolkit_version
from lpsn_tvm.targets.cuda_planning import Plan, plan
from lpsn_tvm.targets.cuda_program import CudaProgram
from lpsn_tvm.targets.cuda_schedule import schedule_rest


def compile_cuda(backend: Backend, mod: tvm.IRModule) -> tuple[CudaProgram, ...]:
    """Machine code and launches for every architecture of the backend; the newest also as PTX.

    Raises
    ------
    CompileError
        An operator has no kernel, or nvcc refuses what was generated.
    """
    isas = architectures(backend)
    newest = max(isas, key=lambda isa: isa.number)
    with ExitStack() as running:
        started = []
        for isa in isas:
            # nvcc works on one architecture while TVM generates the source of the next one.
            source, planned = generate(replace(backend, geometry=isa), mod)
            compiler = running.enter_context(start_nvcc(source.source, isa.arch, with_ptx=isa is newest))
            started.append((isa.arch, planned, compiler))
        return tuple(
            program(
                arch,
                planned,
                compiler.result()[0],
                has_ptx=arch == newest.arch,
                toolkit=toolkit_version(compiler.compiler),
            )
            for arch, planned, compiler in started
        )


def architectures(backend: Backend) -> tuple[Any, ...]:
    """The `CudaIsa` of every architecture that the backend's target names."""
    from lpsn_tvm.targets.cuda import isas_of

    return isas_of(backend.tvm_target)


def program(arch: str, planned: Plan, binary: bytes, *, has_ptx: bool, toolkit: str = "") -> CudaProgram:
    """What a plan and its machine code make together."""
    return CudaProgram(
        arch=arch,
        launches=planned.launches,
        inputs=planned.inputs,
        outputs=planned.outputs,
        arena_bytes=planned.arena_bytes,
        constants=planned.constants,
        binary=binary,
        has_ptx=has_ptx,
        toolkit=toolkit,
    )


def generate(backend: Backend, mod: tvm.IRModule) -> tuple[CudaSource, Plan]:
    """CUDA source of all kernels, and the launches over planned memory."""
    check_versions()
    if any(graph.op_name(value).startswith("lpsn.") for _, value in graph.bindings(mod)):
        mod = backend.lower(mod)
    mod = only_kernels(mod)
    functions = {v.name_hint: f for v, f in mod.functions.items() if isinstance(f, tirx.PrimFunc)}
    source = cuda_source(functions, backend.geometry.arch)
    return source, plan(mod, source.functions)


def only_kernels(mod: tvm.IRModule) -> tvm.IRModule:
    """Ordinary Relax operators become kernels too; reshapes stay, they cost nothing."""
    t = relax.transform
    passes = tvm.transform.Sequential(
        [t.LegalizeOps(skip_ops=["relax.reshape"]), t.AnnotateTIROpPattern(), t.FuseOps(), t.FuseTIR()]
    )
    try:
        with tvm.transform.PassContext(opt_level=3):
            return schedule_rest(passes(mod))
    except (ValueError, TypeError, RuntimeError, tvm.error.InternalError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        message = lines[-1] if lines else type(error).__name__
        raise CompileError(f"TVM could not lower the module: {message}", where="cuda") from error
