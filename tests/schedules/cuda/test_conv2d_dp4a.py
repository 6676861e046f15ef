"""Layers on GPUs without matrix instructions, in emulation against the reference; their machine code, as made for a
newer GPU that is treated like one of those.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_sass
import numpy as np
import pytest
from cuda_kernels import assert_exact
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.cuda import conv2d_dp4a
from lpsn_tvm.schedules.cuda.conv2d_dp4a import DOT_SHAPES
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.targets.cuda_compile import compile_cubin, cuda_source

ARCH = "sm_61"
RESULT = {"x_zero_point": 100, "out_zero_point": 60, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}


def _layer(
    shape: tuple[int, ...], weight: np.ndarray, attrs: dict[str, Any], dtype: str = "uint8", seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Input, constants and attributes whose results do not all saturate."""
    rng = np.random.default_rng(seed)
    info, out = np.iinfo(dtype), weight.shape[0]
    x = rng.integers(info.min, info.max + 1, shape).astype(dtype)
    zero_point = 100 if dtype == "uint8" else 3
    sums = weight.reshape(out, -1).sum(axis=1, dtype=np.int32)
    constants = {
        "weight": weight,
        "bias": rng.integers(-500, 500, out).astype(np.int32) - sums * zero_point,
        "scale": (rng.uniform(0.3, 1.0, out) / (np.abs(weight).max() * np.sqrt(weight[0].size))).astype(np.float32),
    }
    return x, constants, {**RESULT, **attrs, "x_zero_point": zero_point}


def _weights(*shape: int, bits: int = 8) -> np.ndarray:
    limit = 1 << bits - 1
    return np.random.default_rng(1).integers(-limit, limit, shape).astype(np.int8)


TILES = {
    "small": Tile(32, 32, 2, 1),
    "eight pixels per lane": Tile(64, 32, 1, 1, 1, 2),
    "two blocks per lane": Tile(16, 64, 1, 1),
    "divided": Tile(32, 64, 2, 2, 2, 2, 3),
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_tile_gives_the_same(tile: Tile, bits: int) -> None:
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1)}
    x, constants, attrs = _layer((1, 80, 5, 7), _weights(70, 80, 3, 3, bits=bits), attrs)
    residual = np.random.default_rng(2).integers(0, 256, (1, 70, 5, 7)).astype(np.uint8)
    attrs |= {"residual_multiplier": 0.71, "residual_zero_point": 5}
    kernel = assert_exact("conv2d", [x, residual], constants, attrs, ARCH, tile)
    geometry: Any = kernel.key[2]
    assert geometry.uses_dots
    assert geometry.weight_bits == bits


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_few_channels_and_groups(dtype: str) -> None:
    attrs = {"strides": (2, 2), "padding": (3, 3, 3, 3)}
    x, constants, attrs = _layer((1, 3, 15, 15), _weights(32, 3, 7, 7), attrs, dtype)
    assert_exact("conv2d", [x], constants, attrs, ARCH)
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "groups": 4}
    x, constants, attrs = _layer((2, 128, 5, 5), _weights(128, 32, 3, 3), attrs, dtype)
    assert_exact("conv2d", [x], constants, attrs, ARCH)


def test_dense_and_transposed() -> None:
    x, constants, attrs = _layer((6, 96), _weights(40, 96), {})
    assert_exact("dense", [x], {**constants, "weight": constants["weight"].T.copy()}, attrs, ARCH)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (1, 32, 4, 5)).astype(np.uint8)
    constants = {
        "weight": rng.integers(-128, 128, (32, 32, 4, 4)).astype(np.int8),
        "bias": rng.integers(-500, 500, 32).astype(np.int32),
        "scale": np.full(32, 1e-4, np.float32),
    }
    attrs = {**RESULT, "strides": (2, 2), "padding": (1, 1, 1, 1)}
    assert_exact("conv2d_transpose", [data], constants, attrs, ARCH)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group, out = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    size = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    attrs = {
        "strides": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "dilation": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "padding": tuple(draw(st.integers(0, 2)) for _ in range(4)),
        "groups": groups,
    }
    reach = [size[i] + attrs["padding"][i] + attrs["padding"][i + 2] for i in (0, 1)]
    assume(all(reach[i] > attrs["dilation"][i] * (kernel[i] - 1) for i in (0, 1)))
    assume(groups == 1 or per_group > 1)
    weight = _weights(groups * out, per_group, *kernel, bits=draw(st.sampled_from([2, 4, 8])))
    shape = (draw(st.integers(1, 3)), groups * per_group, *size)
    x, constants, attrs = _layer(
        shape, weight, attrs, draw(st.sampled_from(["uint8", "int8"])), draw(st.integers(0, 99))
    )
    assert_exact("conv2d", [x], constants, attrs, ARCH, draw(st.sampled_from([None, *TILES.values()])))


def test_a_wrong_channel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: a lane reads the weights of its neighbour."""
    monkeypatch.setattr(conv2d_dp4a, "OCTETS", 2)
    x, constants, attrs = _layer((1, 32, 5, 5), _weights(32, 32, 1, 1), {"strides": (1, 1), "padding": (0, 0, 0, 0)})
    with pytest.raises((AssertionError, ValueError)):
        assert_exact("conv2d", [x], constants, attrs, ARCH, Tile(32, 32, 2, 1, 1, 2))


def _wide(tile: Tile | None, bits: int) -> Kernel:
    isa = replace(ARCHITECTURES["sm_75"], has_mma_s8=False)
    constants = {
        "weight": _weights(256, 256, 3, 3, bits=bits),
        "bias": np.zeros(256, np.int32),
        "scale": np.ones(256, np.float32),
    }
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "x_zero_point": 3}
    specs = (TensorSpec((8, 256, 28, 28), "uint8", 32),) * 2
    made = conv2d(specs, constants, attrs, isa, tile)
    assert made is not None
    return made


def _check_code(tile: Tile, bits: int) -> None:
    cuda_sass.require_tools()
    source = cuda_source({"conv2d": _wide(tile, bits).build()}, "sm_75")
    (found,) = cuda_sass.kernel_code(source.source, "sm_75").values()
    assert found.tensor_core == 0
    assert found.dot_products == tile.m_tiles * tile.n_blocks * 16 * 8 * tile.ksteps
    assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0)
    # 16 bytes from shared memory for 16 of them.
    assert found.count("LDS") * 16 <= found.dot_products


def test_machine_code() -> None:
    _check_code(Tile(128, 128, 2, 4, 1, 2), 8)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [shape for shape in DOT_SHAPES if shape[0] // shape[2] == 64], ids=str)
def test_large_tiles_do_not_spill(shape: tuple[int, int, int, int], bits: int) -> None:
    _check_code(Tile(*shape, 2, 2), bits)


def test_a_compiler_that_is_too_new_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA 13 knows no sm_61."""
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho \"nvcc fatal   : Unsupported gpu architecture 'compute_61'\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(CompileError, match="older GPUs need nvcc of CUDA 12"):
        compile_cubin("", ARCH)
