"""Compilation of a lowered module for CPUs: Relax pipeline, constants lifted to an argument, shared library as bytes,
and a runner for tests.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.compat import check_versions
from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.backend import Backend, Compiled
from lpsn_tvm.targets.default_schedule import DefaultSchedule
from lpsn_tvm.targets.llvm import required_features

WEIGHT_BYTES, LIFTED_BYTES = 1024, 65536
"""Integer weights from the one size and other constants from the other on become the module's last argument, which an
artifact packs; smaller ones stay in the library, where the virtual machine finds them without an instruction each.
"""
COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")


def compile_llvm(backend: Backend, mod: tvm.IRModule) -> Compiled:
    """Compile for a CPU.

    Raises
    ------
    CompileError
        No linker on this machine, or TVM failed; the cause is kept.
    """
    check_versions()
    if any(graph.op_name(value).startswith("lpsn.") for _, value in graph.bindings(mod)):
        mod = backend.lower(mod)
    target = backend.target
    lifted, params = lift_constants(mod)
    try:
        with target, tvm.transform.PassContext(opt_level=3):
            lowered = pipeline()(lifted)
            executable = relax.build(lowered, target, relax_pipeline=None)
    except (ValueError, TypeError, RuntimeError, tvm.error.InternalError) as error:
        raise CompileError(f"TVM could not compile the module: {_last_line(error)}", where=backend.name) from error
    return Compiled(export(executable), tuple(params), required_features(target))


def pipeline() -> Any:
    """Relax passes: what is not a kernel of ours is legalized, fused and given a simple schedule; then memory is
    planned. `KillAfterLastUse` is left out: all storage is planned, so it frees nothing and costs an instruction per
    tensor.
    """
    t = relax.transform
    return tvm.transform.Sequential(
        [
            # A reshape stays an operator that memory planning turns into a view.
            t.LegalizeOps(skip_ops=["relax.reshape"]),
            t.AnnotateTIROpPattern(),
            t.FoldConstant(),
            t.FuseOps(),
            t.FuseTIR(),
            DefaultSchedule(),
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            t.StaticPlanBlockMemory(),
            t.LowerAllocTensor(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            t.AttachGlobalSymbol(),
        ]
    )


def lift_constants(mod: tvm.IRModule) -> tuple[tvm.IRModule, list[npt.NDArray[Any]]]:
    """`main(x)` with large constants -> `main(x, params)`, params the tuple of those constants in order of use."""
    function = mod["main"]
    arrays: list[npt.NDArray[Any]] = []
    places: dict[Any, int] = {}
    for _, value in graph.bindings(mod):
        for constant in _constants(value):
            array = graph.constant_value(constant)
            if constant not in places and is_lifted(array):
                places[constant] = len(arrays)
                arrays.append(array)
    params = relax.Var("params", relax.TupleType([relax.TensorType(array.shape, str(array.dtype)) for array in arrays]))
    builder = relax.BlockBuilder()
    new: dict[Any, Any] = {param: param for param in function.params}
    taken: dict[int, Any] = {}

    def replace(expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return new[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([replace(item) for item in expr.fields])
        if graph.is_constant(expr) and expr in places:
            index = places[expr]
            if index not in taken:
                taken[index] = builder.emit(relax.TupleGetItem(params, index))
            return taken[index]
        return expr

    with builder.function("main", [*function.params, params]):
        with builder.dataflow():
            for var, value in graph.bindings(mod):
                if isinstance(value, relax.Call):
                    call = relax.Call(value.op, [replace(arg) for arg in value.args], value.attrs, list(value.ty_args))
                    new[var] = graph.emit_named(builder, call, var.name)
                else:
                    new[var] = replace(value)
            output = builder.emit_output(replace(function.body.body))
        builder.emit_func_output(output)
    result = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(dict(mod.functions))
    main = builder.get()["main"]
    result.update_func(result.get_global_var("main"), main)
    return result, arrays


def is_lifted(array: npt.NDArray[Any]) -> bool:
    """Whether a constant goes into the argument tuple."""
    is_weight = array.dtype in (np.int8, np.int16) and array.ndim > 2
    return bool(array.nbytes >= (WEIGHT_BYTES if is_weight else LIFTED_BYTES))


def _constants(value: Any) -> list[Any]:
    if graph.is_constant(value):
        return [value]
    if isinstance(value, relax.Call):
        return [constant for arg in value.args for constant in _constants(arg)]
    if isinstance(value, relax.Tuple):
        return [constant for item in value.fields for constant in _constants(item)]
    return []


def export(executable: Any) -> bytes:
    """The executable as a shared library.

    Raises
    ------
    CompileError
        This machine has no C compiler driver to call the linker, or linking failed.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise CompileError(
            f"linking a shared library needs a C compiler driver, none of {', '.join(COMPILERS)} is installed",
            where="llvm",
        )
    with tempfile.TemporaryDirectory(prefix="lpsn_tvm_") as folder:
        path = Path(folder) / "library.so"
        try:
            executable.export_library(str(path), cc=compiler)
        except RuntimeError as error:
            raise CompileError(f"{compiler} could not link the library: {_last_line(error)}", where="llvm") from error
        return path.read_bytes()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def load(compiled: Compiled) -> Callable[[Sequence[npt.NDArray[Any]]], list[npt.NDArray[Any]]]:
    """Run a compiled module in this process: sequence of ndarray in, list of ndarray out (the artifact does the same
    without a compiler).
    """
    from lpsn_tvm.runtime import Executable

    return Executable(compiled.library, [np.asarray(array) for array in compiled.params])
