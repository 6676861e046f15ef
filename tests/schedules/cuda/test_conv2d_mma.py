"""Tensor-core convolutions in emulation, bit for bit against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cuda_emulation import EmulationError
from cuda_kernels import assert_exact
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from lpsn_tvm.schedules.cuda import conv_core, direct, intrinsics
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.depthwise import depthwise
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import TensorSpec

PIPELINED, BUFFERED = "sm_80", "sm_75"
SMALL = Tile(32, 32, 2, 1)


@dataclass(frozen=True)
class Case:
    """One convolution."""

    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    groups: int = 1
    bits: int = 8
    has_residual: bool = False
    dtype: str = "uint8"
    out_dtype: str = "uint8"
    multiplier: float = 0.71
    gain: float = 1.0
    block_size: int = 1
    mode: str = "DCR"

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        n, _, h, w = self.shape
        top, left, bottom, right = self.padding
        oh = (h + top + bottom - self.dilation * (self.kernel[0] - 1) - 1) // self.stride + 1
        ow = (w + left + right - self.dilation * (self.kernel[1] - 1) - 1) // self.stride + 1
        return n, self.out_channels, oh, ow


def _check(case: Case, arch: str, tile: Tile | None = None, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    limit = 1 << case.bits - 1
    per_group = case.shape[1] // case.groups
    info = np.iinfo(case.dtype)
    x = rng.integers(info.min, info.max + 1, case.shape).astype(case.dtype)
    weight = rng.integers(-limit, limit, (case.out_channels, per_group, *case.kernel)).astype(np.int8)
    zero_point = int(rng.integers(info.min + 90, info.max - 90))
    offset = weight.reshape(case.out_channels, -1).sum(axis=1, dtype=np.int32) * zero_point
    constants = {
        "weight": weight,
        "bias": rng.integers(-500, 500, case.out_channels).astype(np.int32) - offset,
        "scale": (rng.uniform(0.3, 1.0, case.out_channels) * case.gain / (limit * np.sqrt(weight[0].size))).astype(
            np.float32
        ),
    }
    low = 0 if case.out_dtype == "uint8" else -128
    attrs: dict[str, Any] = {
        "strides": (case.stride, case.stride), "padding": case.padding, "dilation": (case.dilation, case.dilation),
        "groups": case.groups, "x_zero_point": zero_point, "out_zero_point": 60,
        "qmin": low, "qmax": low + 255, "out_dtype": case.out_dtype, "block_size": case.block_size, "mode": case.mode,
    }  # fmt: skip
    arrays = [x]
    if case.has_residual:
        arrays.append(rng.integers(low, low + 256, case.out_shape).astype(case.out_dtype))
        attrs |= {"residual_multiplier": case.multiplier, "residual_zero_point": 5}
    kernel = assert_exact("conv2d", arrays, constants, attrs, arch, tile)
    geometry: Any = kernel.key[2]
    return geometry


CASES = {
    "3x3": Case((1, 64, 6, 7), 64),
    "1x1": Case((2, 64, 5, 5), 40, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "1x1 stride 2": Case((1, 96, 7, 7), 32, kernel=(1, 1), stride=2, padding=(0, 0, 0, 0)),
    "odd channels, stride 2, residual": Case((2, 40, 7, 9), 50, stride=2, has_residual=True),
    "dilation": Case((1, 32, 9, 9), 32, dilation=2, padding=(2, 2, 2, 2)),
    "uneven kernel and padding": Case((1, 33, 6, 6), 33, kernel=(2, 5), padding=(1, 3, 0, 2)),
    "groups": Case((1, 128, 5, 5), 128, groups=4),
    "groups narrower than a block": Case((1, 48, 5, 5), 96, groups=12),
    "three channels": Case((1, 3, 17, 17), 32, kernel=(7, 7), stride=2, padding=(3, 3, 3, 3)),
    "eight channels": Case((1, 7, 6, 6), 32),
    "two channels, one k-step": Case((1, 2, 5, 5), 32, kernel=(4, 1), padding=(0, 1, 1, 1)),
    "colours, stride 2, odd width": Case((1, 3, 9, 15), 32, stride=2),
    "pairs of columns, padding of one": Case((2, 3, 9, 12), 32, stride=2, padding=(1, 1, 0, 2)),
    "four columns at once": Case((1, 4, 12, 16), 32, kernel=(5, 6), stride=4, padding=(2, 1, 2, 3)),
    "five columns of four channels": Case((1, 1, 9, 9), 32, kernel=(5, 5), padding=(2, 2, 2, 2)),
    "one column, dilated rows": Case((1, 6, 9, 9), 32, kernel=(3, 1), dilation=2, padding=(2, 0, 2, 0)),
    "more taps than a mask": Case((1, 40, 8, 7), 32, kernel=(7, 5), padding=(3, 2, 3, 2)),
    "one row": Case((1, 70, 5, 9), 32, kernel=(1, 4), padding=(0, 1, 0, 2)),
    "padded pixel": Case((1, 70, 5, 5), 32, kernel=(1, 1)),
    "sixteen channels": Case((1, 16, 6, 6), 32, kernel=(1, 3), padding=(0, 1, 0, 1)),
    "4 bits": Case((1, 64, 6, 6), 64, bits=4, has_residual=True),
    "2 bits": Case((1, 64, 6, 6), 33, bits=2),
    "signed": Case((1, 64, 6, 6), 32, dtype="int8", out_dtype="int8", has_residual=True),
    "halves": Case((1, 64, 6, 6), 32, has_residual=True, multiplier=0.5),
    "residual beyond the bound": Case((1, 64, 6, 6), 32, has_residual=True, multiplier=1e5),
    "sums beyond the bound": Case((1, 64, 6, 6), 32, has_residual=True, multiplier=-1e3, gain=3e5),
    "both beyond the bound": Case((1, 64, 6, 6), 32, has_residual=True, multiplier=4500.0, gain=1e6),
    "float output": Case((1, 64, 4, 4), 20, out_dtype="float32"),
    "few floats": Case((2, 64, 5, 7), 3, out_dtype="float32"),
    "sixteen floats": Case((1, 64, 4, 4), 16, out_dtype="float32"),
    "pixel shuffle": Case((2, 32, 5, 7), 9, out_dtype="float32", block_size=3, mode="CRD"),
    "pixel shuffle of colours": Case((1, 64, 4, 6), 12, out_dtype="float32", block_size=2, mode="CRD"),
    "depth to space, two blocks": Case((1, 64, 5, 4), 48, out_dtype="float32", block_size=4),
    "depth to space, one pixel": Case((2, 64, 1, 1), 64, (1, 1), padding=(0,) * 4, out_dtype="float32", block_size=2),
}


WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
ON_BOTH = ("3x3", "odd channels, stride 2, residual", "three channels", "4 bits", "two channels, one k-step")


@pytest.mark.parametrize(("name", "arch"), [*((n, PIPELINED) for n in CASES), *((n, BUFFERED) for n in ON_BOTH)])
def test_equals_reference(name: str, arch: str) -> None:
    geometry = _check(CASES[name], arch, SMALL)
    assert geometry.weight_bits == (8 if CASES[name].bits == 8 else 4)


TILES = {
    "one warp": Tile(16, 32, 1, 1),
    "two blocks of channels per warp": Tile(32, 64, 2, 1),
    "two warps along channels": Tile(16, 64, 1, 2),
    "four k-steps, two stages": Tile(32, 32, 2, 1, 4, 2),
    "three k-steps": Tile(32, 32, 2, 1, 3, 3),
    "eight k-steps": Tile(16, 32, 1, 1, 8, 2),
    "one k-step, five stages": Tile(32, 32, 2, 1, 1, 5),
    "three parts": Tile(32, 32, 2, 1, 2, 3, 3),
    "more threads than copies": Tile(16, 64, 1, 2, 1, 3, 2),
    "two slices": Tile(32, 32, 2, 1, 4, 3, 1, 2),
    "four slices, uneven shares": Tile(16, 32, 1, 1, 4, 2, 1, 4),
    "slices of parts": Tile(16, 64, 1, 2, 2, 3, 2, 2),
    "warps of 64 x 64": Tile(64, 64, 1, 1, 2, 3),
    "large": Tile(128, 64, 2, 2),
}
PLAIN_TILES = ("two blocks of channels per warp", "three parts", "four slices, uneven shares", "slices of parts")


@pytest.mark.parametrize("name", PLAIN_TILES)
def test_every_tile_writes_plain_memory(name: str) -> None:
    geometry = _check(CASES["pixel shuffle"], PIPELINED, TILES[name])
    assert geometry.plain.spec.shape == (2, 1, 15, 21)


@pytest.mark.parametrize("tile", [tile for name, tile in TILES.items() if name != "large"])
def test_every_tile_gives_the_same(tile: Tile) -> None:
    _check(Case((1, 80, 4, 5), 70, has_residual=True), PIPELINED, tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_every_tile_gives_the_same_without_pipeline(tile: Tile) -> None:
    _check(Case((1, 80, 4, 5), 70, has_residual=True), BUFFERED, tile)


@pytest.mark.slow
def test_large_tile() -> None:
    _check(Case((1, 80, 4, 5), 70, has_residual=True), PIPELINED, TILES["large"])


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    case = Case(
        shape=(
            draw(st.integers(1, 3)),
            groups * draw(st.integers(1, 70)),
            draw(st.integers(4, 9)),
            draw(st.integers(4, 9)),
        ),
        out_channels=groups * draw(st.integers(1, 40)),
        kernel=kernel,
        stride=draw(st.integers(1, 3)),
        dilation=draw(st.integers(1, 2)),
        padding=padding,  # type: ignore[arg-type]
        groups=groups,
        bits=draw(st.sampled_from([2, 4, 8])),
        has_residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(["uint8", "int8"])),
    )
    is_depthwise = groups > 1 and groups == case.shape[1]
    assume(min(case.out_shape) > 0 and not is_depthwise)
    tile = draw(st.sampled_from([None, *(tile for tile in TILES.values() if tile.threads <= 64)]))
    _check(case, draw(st.sampled_from([PIPELINED, BUFFERED])), tile, seed=draw(st.integers(0, 99)))


def test_the_emulation_sees_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: one group of copies too many may be under way."""
    right = intrinsics.copy_wait
    monkeypatch.setattr(conv_core.intrinsics, "copy_wait", lambda groups: right(groups + 1))
    with pytest.raises((AssertionError, EmulationError)):
        _check(Case((1, 64, 6, 8), 64), PIPELINED, Tile(32, 64, 2, 1))


def test_residuals_are_clamped_only_where_that_matters() -> None:
    assert not _check(CASES["sums beyond the bound"], PIPELINED, SMALL).clamps_residual
    assert _check(CASES["both beyond the bound"], PIPELINED, SMALL).clamps_residual


def _offer(weight: np.ndarray, groups: int = 1, dtype: str = "uint8") -> Any:
    channels = weight.shape[1] * groups
    constants = {"weight": weight, "bias": np.zeros(len(weight), np.int32), "scale": np.ones(1, np.float32)}
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "groups": groups}
    return conv2d((TensorSpec((1, channels, 8, 8), dtype, 32),), constants, attrs, ARCHITECTURES[PIPELINED])


def test_one_pixel_is_a_dense_layer() -> None:
    """Squeeze and excitation."""
    _check(Case((2, 70, 1, 1), 40, kernel=(1, 1), padding=(0, 0, 0, 0), bits=4), PIPELINED)


def test_leaves_to_others() -> None:
    assert _offer(np.ones((32, 1, 3, 3), np.int8), groups=32) is None
    assert _offer(np.ones((32, 32, 3, 3), np.int8), dtype="float32") is None


def test_rearranged_pixels_are_for_tensor_cores_only() -> None:
    """Four channels from four would be a group for the depthwise kernel."""
    constants = {
        "weight": np.ones((4, 4, 3, 3), np.int8),
        "bias": np.zeros(4, np.int32),
        "scale": np.ones(1, np.float32),
    }
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "out_dtype": "float32"}
    offer = ((TensorSpec((1, 4, 8, 8), "uint8", 4),), constants)
    isa, shuffled = ARCHITECTURES[PIPELINED], {**attrs, "block_size": 2}
    for builder in (depthwise, direct.conv2d):
        assert builder(*offer, attrs, isa) is not None
        assert builder(*offer, shuffled, isa) is None
    assert conv2d(*offer, shuffled, isa).out == TensorSpec((1, 1, 16, 16), "float32")


def test_equal_layers_share_code() -> None:
    rng = np.random.default_rng(0)
    first, second = (_offer(rng.integers(-128, 128, (64, 64, 3, 3)).astype(np.int8)) for _ in range(2))
    assert first.key == second.key
    assert first.constants[0].tobytes() != second.constants[0].tobytes()


def test_small_weights_take_half_the_bytes() -> None:
    """4-bit integers times a power of two are stored as nibbles."""
    rng = np.random.default_rng(0)
    wide = rng.integers(-128, 128, (64, 64, 3, 3)).astype(np.int8)
    small = (rng.integers(-8, 8, (64, 64, 3, 3)) * 4).astype(np.int8)
    assert _offer(small).constants[0].nbytes * 2 == _offer(wide).constants[0].nbytes
