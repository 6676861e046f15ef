"""From a PrimFunc to CUDA source, launches and machine code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.cuda.tir import barrier, launch, prim_func, registers, rolled, shared, store
from lpsn_tvm.targets.cuda_compile import Launch, compile_cubin, cuda_source, kernel_usage

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")


def _two_launches() -> Any:
    def body(data: Any, out: Any, parts: Any) -> None:
        with launch((4, 2), 64) as (blocks, thread):
            memory, total = shared(128), registers(1)
            store(memory, thread, data[thread])
            barrier()
            store(total, 0, 0)
            with rolled(5) as i:
                store(total, 0, total[0] + T.cast(memory[63 - thread], "int32") * i)
            store(parts, (blocks[1] * 4 + blocks[0]) * 64 + thread, total[0])
        with launch((4,), 64) as (blocks, thread):
            store(out, blocks[0] * 64 + thread, parts[blocks[0] * 64 + thread])

    arguments = [("data", (4, 16), "uint8"), ("out", (256,), "int32")]
    return prim_func(arguments, body, [("parts", (512,), "int32")])


def test_launches_are_described() -> None:
    function = cuda_source({"twice": _two_launches()}, "sm_80").functions["twice"]
    assert function.parameters == ("data", "out")
    assert function.workspaces == {"parts": 2048}
    assert function.launches == (
        Launch("twice_kernel", ("data", "parts"), (4, 2, 1), (64, 1, 1), 128),
        Launch("twice_kernel_1", ("out", "parts"), (4, 1, 1), (64, 1, 1), 0),
    )


def test_source_is_as_written() -> None:
    """One barrier, no unrolling, shared memory as large as asked for."""
    source = cuda_source({"twice": _two_launches()}, "sm_80").source
    assert source.count("__syncthreads()") == 1
    assert source.count("#pragma unroll 1\n") == 1
    assert "lpsn_rolled" not in source


DRIVER = (
    *("cuInit", "cuDriverGetVersion", "cuGetProcAddress", "cuGetProcAddress_v2", "cuDeviceGetName", "cuModuleLoadData"),
    *("cuModuleUnload", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx", "cuTensorMapEncodeTiled"),
    *("cuGetErrorName", "cuGetErrorString"),
)
"""What TVM's CUDA runtime and NVIDIA's want of the driver before they load."""
GENERATE = """
import sys
import tvm
from lpsn_tvm.targets.cuda_compile import cuda_source
from test_cuda_compile import _two_launches

source = cuda_source({"twice": _two_launches()}, "sm_80").source
print(any("libtvm_runtime_cuda" in line for line in open("/proc/self/maps")))
sys.stdout.write(source)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is missing")
def test_where_a_driver_is_the_source_is_the_same(tmp_path: Path) -> None:
    """Only there TVM loads its CUDA runtime, which brings code generation of its own along."""
    (tmp_path / "driver.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", GENERATE], env=environment, capture_output=True, text=True, check=True)
    is_loaded, source = done.stdout.split("\n", 1)
    if is_loaded == "False":
        pytest.skip("TVM's CUDA runtime needs NVIDIA's, which is not here")
    assert source == cuda_source({"twice": _two_launches()}, "sm_80").source


@needs_nvcc
def test_machine_code() -> None:
    source = cuda_source({"twice": _two_launches()}, "sm_86").source
    binary, report = compile_cubin(source, "sm_86")
    assert binary.startswith(b"\x7fELF")
    usage = kernel_usage(report)
    assert set(usage) == {"twice_kernel", "twice_kernel_1"}
    assert all(0 < kernel.registers < 64 and kernel.spill_bytes == 0 for kernel in usage.values())


@needs_nvcc
def test_errors_name_the_cause() -> None:
    with pytest.raises(CompileError, match="no_such_type"):
        compile_cubin("no_such_type x;", "sm_80")


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CompileError, match="needs nvcc"):
        compile_cubin("", "sm_80")
