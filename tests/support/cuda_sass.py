"""Machine code of CUDA kernels: which instructions are in it, how many registers it uses, what it spills.

Needs nvcc, and nvdisasm from the CUDA toolkit or from the package `nvidia-cuda-nvdisasm`; no GPU. Tests call
`require_tools()`, which skips where one of them is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import cuda_flow
import pytest

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v")


@dataclass(frozen=True)
class KernelCode:
    """One kernel on one architecture.

    Parameters
    ----------
    opcodes : Counter of str
        How often each full opcode ("IMMA.16832.S8.S8", "IDP.4A.U8.S8") stands in the code; padding is not counted.
    registers : int
        32-bit registers per thread.
    stack_bytes, spill_bytes : int
        Local memory of a thread, and what was spilled to it for lack of registers (stores and loads).
    shared_bytes : int
        Static shared memory of a block.
    loop_order : tuple of str
        Opcodes of the main loop alone, in order: the innermost loop with the most matrix instructions.
    conditional : tuple of str
        Instructions of whole warps that some threads may skip (see `cuda_flow`).
    """

    opcodes: Mapping[str, int]
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    loop_order: tuple[str, ...] = ()
    conditional: tuple[str, ...] = ()

    @property
    def loop(self) -> Mapping[str, int]:
        """How often each opcode stands in the main loop."""
        return Counter(self.loop_order)

    def count(self, prefix: str) -> int:
        """Instructions whose opcode is `prefix` or begins with `prefix` and a dot."""
        return sum(n for opcode, n in self.opcodes.items() if opcode == prefix or opcode.startswith(f"{prefix}."))

    @property
    def tensor_core(self) -> int:
        """Integer matrix instructions: IMMA up to sm_90; their count does not see what a loop repeats."""
        return self.count("IMMA")

    @property
    def dot_products(self) -> int:
        """dp4a."""
        return self.count("IDP.4A")

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory: spilled registers, or arrays that were indexed by a variable."""
        return self.count("LDL") + self.count("STL")


@cache
def nvcc() -> str | None:
    """Path of nvcc."""
    return shutil.which("nvcc")


@cache
def nvdisasm() -> str | None:
    """Path of nvdisasm: on PATH, beside nvcc, or from the package index."""
    beside = [str(path.parent) for path in Path("/usr/local").glob("cuda*/bin/nvdisasm")]
    found = shutil.which("nvdisasm") or next((shutil.which("nvdisasm", path=folder) for folder in beside), None)
    if found is not None:
        return found
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "nvdisasm"), None)


def require_tools() -> None:
    """Skip the test where machine code cannot be made or read."""
    if nvcc() is None:
        pytest.skip("nvcc is missing")
    if nvdisasm() is None:
        pytest.skip("nvdisasm is missing; pip install nvidia-cuda-nvdisasm")


@cache
def kernel_code(source: str, arch: str, flags: tuple[str, ...] = FLAGS) -> dict[str, KernelCode]:
    """Compile a CUDA source for one architecture and read the machine code of every kernel.

    Raises
    ------
    RuntimeError
        nvcc refuses the source.
    """
    with tempfile.TemporaryDirectory(prefix="cuda_sass_") as folder:
        path, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        path.write_text(source)
        report = _run([str(nvcc()), f"-arch={arch}", "-cubin", *flags, "-o", str(cubin), str(path)]).stderr
        return _read(_run([str(nvdisasm()), "-ndf", "-c", str(cubin)]).stdout, report)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
    return done


_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)
# `/*0080*/  @!P0 BRA ...`: address, guard, opcode.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def _read(listing: str, report: str) -> dict[str, KernelCode]:
    pieces = _SECTION.split(listing)[1:]
    usage = re.split(r"Compiling entry function '", report)[1:]
    reports = {text.split("'", 1)[0]: text for text in usage}
    found = {}
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        opcodes = Counter(opcode for opcode in _INSTRUCTION.findall(text) if opcode != "NOP")
        numbers = reports[name]
        found[name] = KernelCode(
            opcodes,
            _number(r"Used (\d+) registers", numbers),
            _number(r"(\d+) bytes stack frame", numbers),
            _number(r"(\d+) bytes spill stores", numbers) + _number(r"(\d+) bytes spill loads", numbers),
            _number(r"(\d+) bytes smem", numbers),
            _main_loop(text),
            tuple(cuda_flow.conditional(text)),
        )
    return found


_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def _main_loop(text: str) -> tuple[str, ...]:
    """Opcodes between a backward branch and its target, of the smallest loop with the most matrix instructions."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops: list[tuple[str, ...]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _LINE.match(line):
            opcodes.append(instruction[2])
            target = re.search(r"\.L_x_\d+", instruction[3]) if instruction[2].startswith("BRA") else None
            if target is not None and target[0] in labels:
                body = opcodes[labels[target[0]] :]
                loops.append(tuple(opcode for opcode in body if opcode != "NOP"))

    def rank(loop: tuple[str, ...]) -> tuple[int, int]:
        return sum(opcode.startswith("IMMA") for opcode in loop), -len(loop)

    return max(loops, key=rank, default=())


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
