"""Machine code of the tensor-core kernels on every architecture: the instructions are there, nothing is spilled."""

from __future__ import annotations

from typing import Any

import cuda_sass
import numpy as np
import pytest

from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import conv2d_transpose
from lpsn_tvm.schedules.cuda.dense import dense
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES, CudaIsa
from lpsn_tvm.schedules.cuda.tiles import candidates
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.targets.cuda_compile import cuda_source

SHARED_LIMIT = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
}  # fmt: skip
"""KiB of a block, by what the compiler at hand makes code for."""


def _conv2d(
    isa: CudaIsa, tile: Tile | None, bits: int = 8, channels: int = 256, kernel: int = 3, *, has_table: bool = False
) -> Kernel:
    rng = np.random.default_rng(0)
    out, limit = 256, 1 << bits - 1
    stride = 1 if channels > 4 else 2
    constants = {
        "weight": rng.integers(-limit, limit, (out, channels, kernel, kernel)).astype(np.int8),
        "bias": np.zeros(out, np.int32),
        "scale": np.ones(out, np.float32),
    }
    data = TensorSpec((8, channels, 28, 28), "uint8", 32)
    residual = TensorSpec((8, out, -(-28 // stride), -(-28 // stride)), "uint8", 32)
    attrs: dict[str, Any] = {"strides": (stride, stride), "padding": (kernel // 2,) * 4, "x_zero_point": 3}
    if has_table:
        attrs |= {"table": tuple(range(256))}
    made = conv2d((data, residual), constants, attrs, isa, tile)
    assert made is not None
    return made


def _dense(isa: CudaIsa, batch: int) -> Kernel:
    rng = np.random.default_rng(0)
    constants = {
        "weight": rng.integers(-128, 128, (512, 1000)).astype(np.int8),
        "bias": np.zeros(1000, np.int32),
        "scale": np.ones(1000, np.float32),
    }
    made = dense((TensorSpec((batch, 512), "uint8"),), constants, {"out_dtype": "float32"}, isa)
    assert made is not None
    return made


def _conv2d_transpose(isa: CudaIsa) -> Kernel:
    rng = np.random.default_rng(0)
    constants = {
        "weight": rng.integers(-128, 128, (128, 64, 4, 4)).astype(np.int8),
        "bias": np.zeros(64, np.int32),
        "scale": np.ones(64, np.float32),
    }
    attrs = {"strides": (2, 2), "padding": (1, 1, 1, 1), "x_zero_point": 3}
    made = conv2d_transpose((TensorSpec((8, 128, 28, 28), "uint8", 32),), constants, attrs, isa)
    assert made is not None
    return made


def _check(kernels: dict[str, Kernel], arch: str) -> None:
    cuda_sass.require_tools()
    source = cuda_source({name: kernel.build() for name, kernel in kernels.items()}, arch)
    code = cuda_sass.kernel_code(source.source, arch)
    for name, function in source.functions.items():
        first, *rest = function.launches
        assert first.shared_bytes <= SHARED_LIMIT[arch] * 1024
        assert code[first.kernel].tensor_core > 0, name
        if arch != "sm_75":
            assert code[first.kernel].count("LDGSTS") > 0, name
        assert code[first.kernel].count("LDSM") > 0, name
        for launch in (first, *rest):
            found = code[launch.kernel]
            local = (found.spill_bytes, found.stack_bytes, found.local_memory)
            # Where six stages of eight k-steps begin, the compiler parks an address; the table's copy is one more.
            allowed = {(0, 0, 0), (8, 8, 2)} if "table" in name else {(0, 0, 0)}
            assert local in allowed, name
            assert not any(opcode.startswith(("LDL", "STL")) for opcode in found.loop), name
            assert found.registers * launch.block[0] <= 65536, name
            assert found.conditional == (), name


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_small_kernels(arch: str) -> None:
    _check({"conv2d_parts": _conv2d(ARCHITECTURES[arch], Tile(32, 32, 2, 1, 2, 2, 4), bits=4)}, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_default_kernels(arch: str) -> None:
    isa = ARCHITECTURES[arch]
    kernels = {
        "conv2d": _conv2d(isa, None),
        "conv2d_4bit": _conv2d(isa, None, bits=4),
        "conv2d_table": _conv2d(isa, None, has_table=True),
        "conv2d_colours": _conv2d(isa, None, channels=3, kernel=7),
        "conv2d_transpose": _conv2d_transpose(isa),
        "dense": _dense(isa, 8),
    }
    _check(kernels, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_tile(arch: str) -> None:
    isa = ARCHITECTURES[arch]
    kernels = {}
    layers: dict[str, dict[str, Any]] = {
        "conv": {},
        "conv_4bit": {"bits": 4},
        "colours": {"channels": 3, "kernel": 7},
        "conv_table": {"has_table": True},
    }
    for name, options in layers.items():
        geometry: Any = _conv2d(isa, None, **options).key[2]
        for tile in candidates(geometry, isa):
            # Of every shape the longest stage, without slices and with them.
            if tile.splits == 1:
                shape = f"{tile.rows}x{tile.columns}_{tile.warps_m}x{tile.warps_n}_{tile.slices}"
                kernels[f"{name}_{shape}"] = (tile, options)
    assert len(kernels) > 30
    _check({name: _conv2d(isa, tile, **options) for name, (tile, options) in kernels.items()}, arch)


# Other instructions per matrix instruction in the main loop, as read plus a tenth: what is above was made slower.
MOST_OTHERS = {
    "3x3, large warps": (Tile(128, 128, 2, 2, 2, 4), {}, 1.85),
    "3x3, eight warps": (Tile(256, 128, 4, 2, 4, 3), {}, 1.55),
    "3x3, smaller warps": (Tile(128, 64, 2, 2, 2, 4), {}, 3.35),
    "1x1, large warps": (Tile(128, 128, 2, 2, 2, 4), {"kernel": 1}, 1.2),
    "1x1, long stages": (Tile(256, 128, 4, 2, 4, 3), {"kernel": 1, "channels": 1024}, 0.85),
    "4 bits": (Tile(128, 128, 2, 2, 2, 4), {"bits": 4}, 2.5),
    "colours": (Tile(256, 64, 4, 1, 1, 4), {"channels": 3, "kernel": 7}, 3.0),
}


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_main_loop_is_mostly_products(arch: str) -> None:
    cuda_sass.require_tools()
    kernels = {name: _conv2d(ARCHITECTURES[arch], tile, **options) for name, (tile, options, _) in MOST_OTHERS.items()}
    symbols = {name: f"layer_{i}" for i, name in enumerate(kernels)}
    source = cuda_source({symbols[name]: kernel.build() for name, kernel in kernels.items()}, arch)
    code = cuda_sass.kernel_code(source.source, arch)
    others = {}
    for name, (tile, _, _) in MOST_OTHERS.items():
        found = code[source.functions[symbols[name]].launches[0].kernel]
        assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0), name
        products = sum(n for opcode, n in found.loop.items() if opcode.startswith("IMMA"))
        # One matrix instruction per 16 x 8 x 32 bytes of a warp's share of a stage.
        assert products == tile.m_tiles * tile.n_blocks * 4 * tile.ksteps, name
        others[name] = round((sum(found.loop.values()) - products) / products, 2)
    too_many = {name: n for name, n in others.items() if n > MOST_OTHERS[name][2]}
    assert not too_many, others


def test_fragments_are_read_ahead_of_products() -> None:
    """Between a barrier and the fragments behind it stand products that do not wait for them."""
    cuda_sass.require_tools()
    kernel = _conv2d(ARCHITECTURES["sm_90"], Tile(128, 128, 2, 2, 2, 4))
    source = cuda_source({"layer": kernel.build()}, "sm_90")
    found = cuda_sass.kernel_code(source.source, "sm_90")[source.functions["layer"].launches[0].kernel]
    order = [opcode.split(".")[0] for opcode in found.loop_order]
    behind = order[order.index("BAR") :]
    assert "LDSM" in behind
    assert behind.index("IMMA") < len(behind) - 1 - behind[::-1].index("LDSM")


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_few_samples(arch: str) -> None:
    """Dot products of four bytes instead of tensor cores."""
    cuda_sass.require_tools()
    source = cuda_source({"dense": _dense(ARCHITECTURES[arch], 1).build()}, arch)
    (found,) = cuda_sass.kernel_code(source.source, arch).values()
    assert found.dot_products >= 4
    assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0)


@pytest.mark.slow
def test_the_check_sees_spills() -> None:
    """A planted bug: 255 registers are not enough for 256 sums."""
    with pytest.raises(AssertionError):
        _check({"conv2d": _conv2d(ARCHITECTURES["sm_80"], Tile(32, 256, 1, 1, 1, 2))}, "sm_80")
