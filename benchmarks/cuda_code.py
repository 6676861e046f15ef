"""Machine code of tensor-core layers: what stands in the main loop beside the matrix instructions, what a block needs,
and how the blocks fill the multiprocessors. Read from machine code and computed, not measured; needs nvcc, no GPU.

    python benchmarks/cuda_code.py [--networks resnet50 espcn] [--batches 1 64] [--archs sm_80 sm_90]

Per layer and for the tile of the default choice: matrix instructions per iteration of the main loop (IMMA), every
other instruction per matrix instruction by class, registers, dynamic shared memory, blocks that fit a multiprocessor
at once (`fit`), blocks, and how many rounds of resident blocks they make (`rounds`; the fraction behind the point is
how full the last one is). A tile reads "rows x columns / warps along both, k-steps, stages, / parts, * slices".
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import cuda_sass
import numpy as np

from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES, CudaIsa
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.targets.cuda_compile import cuda_source


@dataclass(frozen=True)
class Layer:
    """One convolution; `size` is the input's height and width."""

    channels: int
    size: int
    out: int
    kernel: int = 3
    stride: int = 1
    has_residual: bool = False

    @property
    def name(self) -> str:
        tail = " +res" if self.has_residual else ""
        return f"{self.channels}->{self.out} {self.kernel}x{self.kernel} s{self.stride} @{self.size}{tail}"


def _bottlenecks() -> Iterator[Layer]:
    yield Layer(3, 224, 64, 7, 2)
    previous, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        yield Layer(previous, size, width, 1)
        yield Layer(width, size, width, 3, stride)
        yield Layer(previous, size, width * 4, 1, stride)
        size //= stride
        yield Layer(width, size, width * 4, 1, has_residual=True)
        yield Layer(width * 4, size, width, 1)
        yield Layer(width, size, width, 3)
        previous = width * 4


LAYERS = {
    "resnet50": list(dict.fromkeys(_bottlenecks())),
    "resnet18": [
        Layer(64, 56, 64, has_residual=True),
        *(Layer(c, s, 2 * c, k, 2) for c, s in ((64, 56), (128, 28), (256, 14)) for k in (3, 1)),
        *(Layer(c, s, c, has_residual=True) for c, s in ((128, 28), (256, 14), (512, 7))),
    ],
    "mobilenet_v2": [
        Layer(c, s, o, 1)
        for c, s, o in (
            (32, 112, 16), (16, 112, 96), (96, 56, 24), (24, 56, 144), (144, 28, 32), (32, 28, 192), (192, 14, 64),
            (64, 14, 384), (384, 14, 96), (96, 14, 576), (576, 7, 160), (160, 7, 960), (960, 7, 320), (320, 7, 1280),
        )
    ],
    "espcn": [Layer(1, 224, 64, 5), Layer(64, 224, 32), Layer(32, 224, 9)],
}  # fmt: skip

CLASSES = {
    "address": ("IMAD", "IADD3", "LEA", "IADD", "UIADD3", "UIMAD", "ULEA", "SHF", "USHF", "IABS", "IMNMX", "VIADD"),
    "logic": ("LOP3", "ULOP3", "PLOP3", "SEL", "USEL", "PRMT", "P2R", "R2P", "UPLOP3", "LOP"),
    "compare": ("ISETP", "UISETP"),
    "move": ("MOV", "UMOV", "R2UR", "S2R", "CS2R", "MOVM"),
    "fragments": ("LDSM", "LDS"),
    "copies": ("LDGSTS", "LDG", "STS"),
    "sync": ("BAR", "LDGDEPBAR", "DEPBAR", "WARPSYNC", "BSYNC", "BSSY", "ARRIVES"),
    "branch": ("BRA", "EXIT", "BRX"),
}


def mix(loop: Mapping[str, int]) -> dict[str, int]:
    """Instructions of a loop by class; "IMMA" is one of them, "other" what no class names."""
    classes = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes} | {"IMMA": "IMMA"}
    counts: Counter[str] = Counter()
    for opcode, n in loop.items():
        # A 32-bit move is an IMAD.MOV as often as a MOV.
        kind = "move" if opcode.startswith("IMAD.MOV") else classes.get(opcode.split(".")[0], "other")
        counts[kind] += n
    return {name: counts[name] for name in ("IMMA", *CLASSES, "other")}


def make_kernel(layer: Layer, batch: int, isa: CudaIsa, tile: Tile | None = None, bits: int = 8) -> Kernel:
    """The layer's kernel with random weights."""
    rng = np.random.default_rng(0)
    limit = 1 << bits - 1
    constants = {
        "weight": rng.integers(-limit, limit, (layer.out, layer.channels, layer.kernel, layer.kernel)).astype(np.int8),
        "bias": np.zeros(layer.out, np.int32),
        "scale": np.ones(layer.out, np.float32),
    }
    out = -(-layer.size // layer.stride)
    block = 0 if layer.channels <= 16 else 32
    inputs = [TensorSpec((batch, layer.channels, layer.size, layer.size), "uint8", block)]
    if layer.has_residual:
        inputs.append(TensorSpec((batch, layer.out, out, out), "uint8", 32))
    attrs = {"strides": (layer.stride,) * 2, "padding": (layer.kernel // 2,) * 4, "x_zero_point": 3}
    kernel = conv2d(tuple(inputs), constants, attrs, isa, tile)
    assert kernel is not None
    return kernel


def resident(code: cuda_sass.KernelCode, threads: int, shared_bytes: int, isa: CudaIsa) -> int:
    """Blocks that fit a multiprocessor: registers are handed out by 8 per thread, 256 per warp."""
    per_warp = -(-code.registers // 8) * 8 * 32
    by_registers = isa.max_registers // per_warp // (threads // 32)
    by_shared = isa.shared_bytes_total // (shared_bytes + 1024)
    most_threads = {75: 1024, 86: 1536, 89: 1536}.get(isa.number, 2048)
    return min(by_registers, by_shared, most_threads // threads)


def row(layer: Layer, batch: int, arch: str, tile: Tile | None = None, bits: int = 8) -> str:
    """One line of the table."""
    isa = ARCHITECTURES[arch]
    kernel = make_kernel(layer, batch, isa, tile, bits)
    source = cuda_source({"kernel": kernel.build()}, arch)
    launch = source.functions["kernel"].launches[0]
    code = cuda_sass.kernel_code(source.source, arch)[launch.kernel]
    geometry: Any = kernel.key[2]
    tile, counts = geometry.tile, mix(code.loop)
    imma = max(1, counts.pop("IMMA"))
    fit = resident(code, launch.block[0], launch.shared_bytes, isa)
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    shape = f"{tile.rows}x{tile.columns}/{tile.warps_m}x{tile.warps_n}"
    per_imma = " ".join(f"{n / imma:9.2f}" for n in counts.values())
    name = f"{layer.name} b{batch} {arch}"
    choice = f"{shape} k{tile.ksteps} s{tile.stages} /{tile.splits} *{tile.slices}"
    return (
        f"{name:38} {choice:26} {imma:4} {sum(counts.values()) / imma:6.2f} {per_imma} {code.registers:4} "
        f"{launch.shared_bytes:7} {fit:3} {blocks:6} {blocks / max(1, fit) / isa.multiprocessors:6.2f}"
        + (f" SPILLS {code.spill_bytes}" if code.spill_bytes or code.local_memory else "")
    )


HEADER = (
    f"{'layer':38} {'tile':26} IMMA {'others':>6} {' '.join(f'{name:>9}' for name in (*CLASSES, 'other'))} regs"
    f"  shared fit blocks rounds"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--archs", nargs="*", default=["sm_80", "sm_86", "sm_90"], choices=list(ARCHITECTURES))
    options = parser.parse_args()
    print("Read from machine code and computed, not measured.", HEADER, sep="\n")
    for network in options.networks:
        for layer in LAYERS[network]:
            for batch in options.batches:
                for arch in options.archs:
                    print(row(layer, batch, arch), flush=True)


if __name__ == "__main__":
    main()
