"""From a kernel's PrimFunc to CUDA source, the list of its launches, and machine code from nvcc; needs no GPU and no
driver.

Never run on a GPU so far: the launch descriptions are derived from TVM's host code and checked in emulation only.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.cuda.tir import EXPLICIT, ROLLED
from lpsn_tvm.targets.cuda_nvcc import Nvcc

NVCC_FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Xptxas", "-v")
DEVICE_LAUNCH = 2
"""`calling_conv` of a device function."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a function.

    Parameters
    ----------
    kernel : str
        Symbol in the source.
    arguments : tuple of str
        Names of the PrimFunc's buffers (or workspaces) in the order of the kernel's parameters, all pointers.
    grid, block : tuple of int
        Three extents each.
    shared_bytes : int
        Dynamic shared memory; above 48 KiB the function attribute has to allow it.
    """

    kernel: str
    arguments: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class CudaFunction:
    """What runs one PrimFunc.

    Parameters
    ----------
    parameters : tuple of str
        Names of the PrimFunc's buffers in order.
    launches : tuple of Launch
        In order.
    workspaces : mapping of str to int
        Device memory that lives for one call: name -> bytes.
    """

    parameters: tuple[str, ...]
    launches: tuple[Launch, ...]
    workspaces: Mapping[str, int]


@dataclass(frozen=True)
class CudaSource:
    """CUDA source of several functions, and how each is launched."""

    source: str
    functions: Mapping[str, CudaFunction]


def cuda_target(arch: str) -> Any:
    """TVM's target of an architecture, "sm_80"."""
    return tvm.target.Target({"kind": "cuda", "arch": arch}, host=tvm.target.Target("llvm"))


def _block_passes() -> Any:
    """Lowering of the blocks of scheduled functions. Explicit kernels are kept from it: it would cut their shared
    memory down to the elements whose addresses are taken.
    """
    s = tvm.s_tir.transform
    return tvm.transform.Sequential(
        [
            s.CanonicalizeLoop(),
            s.LowerInitBlock(),
            s.PlanAndUpdateBufferAllocationLocation(),
            s.ConvertBlocksToOpaque(),
            s.LiftThreadBinding(),
            s.CompactBufferAllocation(),
        ]
    )


def _passes() -> Any:
    """TVM's lowering without the passes that insert barriers or share buffers: kernels say both themselves."""
    t, s = tirx.transform, tvm.s_tir.transform
    return tvm.transform.Sequential(
        [
            s.UnifyThreadBinding(),
            s.LowerMatchBuffer(),
            s.StmtSimplify(),
            s.LowerOpaqueBlock(),
            t.FlattenBuffer(),
            t.NarrowDataType(32),
            s.LoopPartition(),
            t.VectorizeLoop(True),
            t.UnrollLoop(),
            s.RenormalizeSplitPattern(),
            t.StmtSimplify(),
            t.RemoveNoOp(),
            s.RewriteUnsafeSelect(),
            t.VerifyMemory(),
            t.AnnotateEntryFunc(),
            s.MergeSharedMemoryAllocations(),
            t.SplitHostDevice(),
        ]
    )


def cuda_source(functions: Mapping[str, Any], arch: str) -> CudaSource:
    """Generate CUDA source.

    Parameters
    ----------
    functions : mapping of str to PrimFunc
        Symbol -> function; kernels are named after it (`<symbol>_kernel`, `<symbol>_kernel_1`, ...).
    arch : str
        "sm_80".

    Raises
    ------
    CompileError
        TVM could not lower a function.
    """
    target = cuda_target(arch)
    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    try:
        mod = tirx.transform.BindTarget(target)(tvm.IRModule(named))
        with target, tvm.transform.PassContext(opt_level=3):
            explicit = {v: f for v, f in mod.functions.items() if EXPLICIT in f.attrs}
            scheduled = {v: f for v, f in mod.functions.items() if EXPLICIT not in f.attrs}
            mod = _block_passes()(tvm.IRModule(scheduled))
            mod.update(tvm.IRModule(explicit))
            mod = _passes()(mod)
        device = tvm.IRModule({v: f for v, f in mod.functions.items() if _is_device(f)})
        source = _device_source(device, target)
    except (ValueError, TypeError, RuntimeError, tvm.error.InternalError) as error:
        raise CompileError(f"TVM could not lower the kernels: {_last_line(error)}", where=arch) from error
    parameters = {
        variable.name_hint: tuple(_plain(parameter.name) for parameter in function.params)
        for variable, function in device.functions.items()
    }
    hosts = {v.name_hint: f for v, f in mod.functions.items() if not _is_device(f)}
    return CudaSource(source, {name: _described(hosts[name], parameters) for name in functions})


def _is_device(function: Any) -> bool:
    return int(function.attrs.get("calling_conv", 0)) == DEVICE_LAUNCH


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _described(host: Any, parameters: Mapping[str, tuple[str, ...]]) -> CudaFunction:
    """Launches and workspaces of a host function after the split."""
    launches: list[Launch] = []
    workspaces: dict[str, int] = {}
    launch_op = tvm.ir.Op.get("tirx.call_ffi_kernel")

    def visit(node: Any) -> None:
        if isinstance(node, tirx.SeqStmt):
            for statement in node.seq:
                visit(statement)
        elif isinstance(node, tirx.AttrStmt):
            visit(node.body)
        elif isinstance(node, tirx.AllocBuffer):
            buffer = node.buffer
            size = int(np.prod([int(extent) for extent in buffer.shape]))
            workspaces[_plain(buffer.name)] = size * int(np.dtype(str(buffer.dtype)).itemsize)
        elif isinstance(node, tirx.Evaluate) and getattr(node.value, "op", None) == launch_op:
            launches.append(_launch(node.value, parameters))

    visit(host.body)
    return CudaFunction(tuple(parameter.name for parameter in host.params), tuple(launches), workspaces)


def _launch(call: Any, parameters: Mapping[str, tuple[str, ...]]) -> Launch:
    kernel = str(call.args[0].value)
    names = parameters[kernel]
    extents = dict(zip(map(str, call.attrs["launch_params"]), map(int, call.args[1 + len(names) :]), strict=True))

    def three(kind: str) -> tuple[int, int, int]:
        x, y, z = (extents.get(f"{kind}Idx.{axis}", 1) for axis in "xyz")
        return x, y, z

    shared = extents.get("tirx.use_dyn_shared_memory", 0)
    return Launch(kernel, names, three("block"), three("thread"), shared)


def _device_source(device: Any, target: Any) -> str:
    importlib.import_module("tvm.support.nvcc")
    device = importlib.import_module("tvm.tirx").compilation_pipeline.finalize_device_passes()(device)
    compile_name = "tvm_callback_cuda_compile"
    original = tvm.get_global_func(compile_name)
    try:
        # The source is all that is wanted here; compiling it is `compile_cubin`'s business.
        tvm.register_global_func(compile_name, lambda code: b"\x7fELF", override=True)
        module = tvm.get_global_func("target.build.cuda")(device, target)
    finally:
        tvm.register_global_func(compile_name, original, override=True)
    source = re.sub(rf"{ROLLED[0]}\(\);\n(\s*for )", r"#pragma unroll 1\n\1", str(module.inspect_source()))
    # A loop of one iteration is gone.
    return re.sub(rf" *{ROLLED[0]}\(\);\n", "", source)


def _plain(name: str) -> str:
    """Buffer name of a device parameter: `data_flat_ptr` -> `data`."""
    return re.sub(r"(_flat)?(_ptr)?$", "", name)


def compile_cubin(source: str, arch: str, flags: Sequence[str] = ()) -> tuple[bytes, str]:
    """Machine code of one architecture, and what ptxas reports (registers, spills) per kernel.

    Raises
    ------
    CompileError
        nvcc is not installed, or refuses the source.
    """
    with start_nvcc(source, arch, flags=flags) as compiler:
        return compiler.result()


def start_nvcc(source: str, arch: str, *, with_ptx: bool = False, flags: Sequence[str] = ()) -> Nvcc:
    """Nvcc in the background, making machine code of one architecture; with PTX, a fatbinary of both.

    Raises
    ------
    CompileError
        nvcc is not installed, or there is no place for its files.
    """
    number = arch.removeprefix("sm_")
    kind = (
        ["-gencode", f"arch=compute_{number},code=[sm_{number},compute_{number}]", "-fatbin"]
        if with_ptx
        else [f"-arch={arch}", "-cubin"]
    )
    return Nvcc(source, [*kind, *NVCC_FLAGS, *flags], arch)


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def kernel_usage(report: str) -> dict[str, Usage]:
    """Registers and spills per kernel from ptxas' verbose report."""
    found: dict[str, Usage] = {}
    for block in re.split(r"Compiling entry function '", report)[1:]:
        numbers = {
            name: int(match.group(1)) if (match := re.search(pattern, block)) else 0
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("spill_bytes", r"(\d+) bytes spill stores"),
                ("stack_bytes", r"(\d+) bytes stack frame"),
                ("shared_bytes", r"(\d+) bytes smem"),
            )
        }
        found[block.split("'", 1)[0]] = Usage(**numbers)
    return found
