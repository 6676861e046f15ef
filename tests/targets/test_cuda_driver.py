"""Entry points of the driver against the toolkit's header, and errors in words."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cuda_modules import SmallNetwork
from fake_driver import FakeDriver

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets import cuda_dlpack, cuda_driver
from lpsn_tvm.targets.cuda_entry_points import OPTIONAL, SIGNATURES, KernelNode
from lpsn_tvm.targets.cuda_errors import ADVICE, DriverError, is_dead

KEPT = {"cuEventElapsedTime": "cuEventElapsedTime_v2"}
"""Older forms that are called on purpose: the newer one came with 12.8."""
SCALARS = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned char": ctypes.c_ubyte,
    "size_t": ctypes.c_size_t,
    "cuuint64_t": ctypes.c_uint64,
    "unsigned long long": ctypes.c_uint64,
    "CUdeviceptr": ctypes.c_uint64,
    "CUdevice": ctypes.c_int,
    "CUresult": ctypes.c_int,
}
ENUMS = ("attribute", "option", "Mode", "Status")


@pytest.fixture(scope="module")
def header(tmp_path_factory: Any) -> Path:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs the CUDA toolkit")
    source = tmp_path_factory.mktemp("header") / "includes.cu"
    source.write_text("#include <cuda.h>\n")
    listed = subprocess.run([compiler, "-M", str(source)], check=True, capture_output=True, text=True).stdout
    return Path(next(word for word in listed.split() if word.endswith("/cuda.h")))


def size_and_kind(text: str) -> tuple[int, bool]:
    """(bytes, whether it is a pointer or handle) of a C parameter."""
    words = text.replace("const", " ").strip()
    if "*" in words:
        return ctypes.sizeof(ctypes.c_void_p), True
    kind = re.sub(r"\s*\b\w+$", "", words) if " " in words else words
    if kind in SCALARS:
        return ctypes.sizeof(SCALARS[kind]), False
    if kind.endswith(ENUMS) or kind == "CUstreamCaptureMode":
        return ctypes.sizeof(ctypes.c_int), False
    return ctypes.sizeof(ctypes.c_void_p), True


def is_pointer(kind: Any) -> bool:
    return kind in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(kind, "contents")


@pytest.mark.parametrize("name", [*SIGNATURES, *OPTIONAL])
def test_signatures_are_those_of_the_header(name: str, header: Path) -> None:
    text = header.read_text()
    base = re.sub(r"_v\d+$", "", name)
    current = re.search(rf"#define {base}\s+(?:__CUDA_API_PT\w+\()?(\w+)", text)
    assert (current.group(1) if current else base) == KEPT.get(name, name)
    if base == "cuGraphInstantiateWithFlags":
        base = "cuGraphInstantiate"
    found = re.search(rf"^CUresult CUDAAPI {base}\(([^)]*)\)", text, re.MULTILINE)
    assert found is not None
    parameters = [size_and_kind(parameter) for parameter in found.group(1).split(",")]
    types = {**SIGNATURES, **OPTIONAL}[name]
    assert [(ctypes.sizeof(kind), is_pointer(kind)) for kind in types] == parameters


def test_numbers_and_layouts_are_those_of_the_header(tmp_path: Path, header: Path) -> None:
    compiler = shutil.which("gcc")
    assert compiler is not None
    names = {
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": cuda_driver._MAX_DYNAMIC_SHARED,
        "CU_DEVICE_ATTRIBUTE_CLOCK_RATE": cuda_driver._CLOCK,
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": cuda_driver._PROCESSORS,
        "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE": cuda_driver._L2_BYTES,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": cuda_driver._MAJOR,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": cuda_driver._MINOR,
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": cuda_driver._SHARED_OPTIN,
        "CU_JIT_ERROR_LOG_BUFFER": cuda_driver._ERROR_LOG,
        "CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES": cuda_driver._ERROR_LOG_BYTES,
        "CU_STREAM_NON_BLOCKING": cuda_driver._NON_BLOCKING,
        "CU_EVENT_DISABLE_TIMING": cuda_driver._DISABLE_TIMING,
        "CU_STREAM_CAPTURE_MODE_RELAXED": cuda_driver._RELAXED,
        "(uintptr_t)CU_STREAM_LEGACY": cuda_dlpack.DEFAULT_STREAM,
        "CUDA_ERROR_OUT_OF_MEMORY": cuda_driver.OUT_OF_MEMORY,
        "CUDA_ERROR_NOT_READY": cuda_driver.NOT_READY,
        "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": 222,
        "CUDA_ERROR_NO_BINARY_FOR_GPU": 209,
        "CUDA_ERROR_STUB_LIBRARY": 34,
        "CUDA_ERROR_SYSTEM_NOT_READY": 802,
        "sizeof(CUDA_KERNEL_NODE_PARAMS)": ctypes.sizeof(KernelNode),
        "offsetof(CUDA_KERNEL_NODE_PARAMS, func)": KernelNode.function.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, gridDimX)": KernelNode.grid.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, blockDimX)": KernelNode.block.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, sharedMemBytes)": KernelNode.shared_bytes.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, kernelParams)": KernelNode.parameters.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, extra)": KernelNode.extra.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, kern)": KernelNode.kernel.offset,
        "offsetof(CUDA_KERNEL_NODE_PARAMS, ctx)": KernelNode.context.offset,
    }
    source = tmp_path / "numbers.c"
    prints = "".join(f'printf("%zu\\n", (size_t)({name}));' for name in names)
    source.write_text(
        f"#include <cuda.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\nint main(void) {{{prints}}}"
    )
    subprocess.run([compiler, f"-I{header.parent}", str(source), "-o", str(tmp_path / "numbers")], check=True)
    printed = subprocess.run([str(tmp_path / "numbers")], check=True, capture_output=True, text=True).stdout
    assert dict(zip(names, map(int, printed.split()), strict=True)) == names


def test_advice_is_for_errors_that_exist(header: Path) -> None:
    known = {int(number) for number in re.findall(r"CUDA_ERROR_\w+\s*=\s*(\d+)", header.read_text())}
    assert set(ADVICE) <= known


def test_advice_follows_the_drivers_words(network: SmallNetwork, driver: FakeDriver) -> None:
    opened = cuda_driver.Driver.open()
    driver.fail("cuDriverGetVersion", 803)
    with pytest.raises(DriverError, match=r"cuDriverGetVersion: .*error 803, some failure: .*reboot") as caught:
        opened.version()
    assert caught.value.status == 803 and not is_dead(caught.value)
    driver.fail("cuDriverGetVersion", 716)
    with pytest.raises(DriverError, match="restart the process") as caught:
        opened.version()
    assert is_dead(caught.value)
    assert not is_dead(ArtifactError("something else"))


def test_an_old_driver_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    compiler = shutil.which("gcc")
    assert compiler is not None
    source, library = tmp_path / "old.c", tmp_path / "libold.so"
    source.write_text("int cuInit(unsigned flags) { return 0; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library))
    with pytest.raises(ArtifactError, match=r"the CUDA driver is too old, 12\.0 is needed: .*cuDriverGetVersion"):
        cuda_driver.Driver.open()
