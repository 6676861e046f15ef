"""Machine code of 4-bit products: the 4-bit matrix instruction of each architecture is there, and nothing slower."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import cuda_sass
import numpy as np
import pytest

from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES, CudaIsa
from lpsn_tvm.schedules.cuda.tiles import SHAPES
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.targets.cuda_compile import cuda_source

INSTRUCTIONS = {
    "sm_75": "IMMA.8832.U4.S4", "sm_80": "IMMA.16864.U4.S4", "sm_86": "IMMA.16864.U4.S4", "sm_89": "IMMA.16864.U4.S4",
}  # fmt: skip
NATIVE = ("sm_75", "sm_80", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_86", "sm_89")))
SMALL = Tile(32, 32, 2, 1, 2, 2)


@pytest.fixture(autouse=True)
def _tools() -> None:
    cuda_sass.require_tools()


def _conv2d(
    isa: CudaIsa, tile: Tile | None = SMALL, channels: int = 128, kernel: int = 3, out: int = 128, size: int = 28
) -> Kernel:
    weight = np.random.default_rng(0).integers(-8, 8, (out, channels, kernel, kernel)).astype(np.int8)
    constants = {"weight": weight, "bias": np.zeros(out, np.int32), "scale": np.ones(out, np.float32)}
    attrs = {"strides": (1, 1), "padding": (kernel // 2,) * 4, "x_zero_point": 3, "x_qmax": 15}
    data = TensorSpec((8, channels, size, size), "uint8", 32 if channels > 16 else 0)
    made = conv2d((data,), constants, attrs, isa, tile)
    assert made is not None
    return made


def _code(kernels: dict[str, Kernel], arch: str) -> dict[str, cuda_sass.KernelCode]:
    """Machine code of the first launch of every kernel."""
    source = cuda_source({name: kernel.build() for name, kernel in kernels.items()}, arch)
    code = cuda_sass.kernel_code(source.source, arch)
    return {name: code[function.launches[0].kernel] for name, function in source.functions.items()}


def _check(code: cuda_sass.KernelCode, arch: str, kernel: Kernel) -> None:
    """One instruction (four on sm_75) per 16 x 8 results and pair of k-steps; no other products, no local memory."""
    tile: Tile = kernel.key[2].tile
    ksteps = tile.ksteps // tile.slices
    per_stage = tile.m_tiles * tile.n_blocks * 4 * ksteps // 2 * (4 if arch == "sm_75" else 1)
    assert code.tensor_core == code.count(INSTRUCTIONS[arch]) == per_stage
    assert code.count("LDSM") >= tile.m_tiles * ksteps
    assert (code.spill_bytes, code.stack_bytes, code.local_memory) == (0, 0, 0)
    assert code.registers * tile.threads <= 65536


@pytest.mark.parametrize("arch", NATIVE)
def test_four_bit_instructions(arch: str) -> None:
    kernel = _conv2d(ARCHITECTURES[arch])
    _check(_code({"conv2d": kernel}, arch)["conv2d"], arch, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_default_kernels_and_every_shape(arch: str) -> None:
    isa = ARCHITECTURES[arch]
    tiles = {f"tile{rows}x{columns}_{m}x{n}": Tile(rows, columns, m, n, 2, 2) for rows, columns, m, n in SHAPES}
    kernels = {name: _conv2d(isa, tile) for name, tile in tiles.items()} if arch in ("sm_75", "sm_80") else {}
    kernels |= {"default": _conv2d(isa, None), "narrow": _conv2d(isa, None, 12)}
    for name, code in _code(kernels, arch).items():
        _check(code, arch, kernels[name])


def test_hopper_multiplies_bytes() -> None:
    kernel = _conv2d(ARCHITECTURES["sm_90"])
    assert not kernel.key[2].multiplies_nibbles and kernel.key[2].weight_bits == 4
    code = _code({"conv2d": kernel}, "sm_90")["conv2d"]
    assert code.tensor_core == code.count("IMMA.16832.U8.S8") > 0
    assert code.count("CALL") == 0


def test_the_check_sees_what_hopper_would_make_of_them() -> None:
    """A planted error: nvcc compiles 4-bit products for Hopper, into calls that unpack them again and again."""
    isa = replace(ARCHITECTURES["sm_90"], has_mma_s4=True)
    kernel = _conv2d(isa)
    code = _code({"conv2d": kernel}, "sm_90")["conv2d"]
    assert kernel.key[2].multiplies_nibbles
    assert code.count("IMMA.16832.U8.S8") > 0 and code.count("CALL") > 0
    with pytest.raises(AssertionError):
        _check(code, "sm_89", kernel)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_all_threads_execute_the_matrix_instructions(arch: str, tmp_path: Path) -> None:
    """Results of one stage are only used under conditions (pixels and channels that hang over): no branch may stand
    between the first and the last, as some threads would take it and others not.
    """
    kernel = _conv2d(ARCHITECTURES[arch], Tile(64, 64, 2, 2, 2, 2), 64, kernel=1, out=72, size=27)
    assert kernel.key[2].iterations == 1
    (tmp_path / "kernel.cu").write_text(cuda_source({"conv2d": kernel.build()}, arch).source)
    command = [str(cuda_sass.nvcc()), f"-arch={arch}", "-ptx", *cuda_sass.FLAGS[:3], "-o", "kernel.ptx", "kernel.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)
    text = (tmp_path / "kernel.ptx").read_text()
    products = text[text.index("mma.sync") : text.rindex("mma.sync")]
    assert products.count("mma.sync") >= 7
    assert re.search(r"@!?%p\d+\s+bra", products) is None
    assert re.search(r"@!?%p\d+\s+bra", text[text.rindex("mma.sync") :]) is not None
