"""4-bit inputs times 4-bit weights on 4-bit matrix instructions, in emulation, bit for bit against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cuda_kernels
import numpy as np
import pytest
from cuda_kernels import assert_exact
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from lpsn_tvm.schedules.cuda import conv_products, intrinsics
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import TensorSpec

LARGE, SMALL = "sm_80", "sm_75"
"""mma.m16n8k64 with asynchronous copies, and mma.m8n8k32 without."""
TILE = Tile(32, 32, 2, 1)


@dataclass(frozen=True)
class Case:
    """One layer of unsigned 4-bit inputs."""

    shape: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    groups: int = 1
    op: str = "conv2d"
    has_residual: bool = False
    out_dtype: str = "uint8"
    weight_bits: int = 4
    power: int = 0
    zero_point: int = 6

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """In the layout of the operator."""
        channels, out = self.shape[1], self.out_channels
        shapes = {
            "conv2d": (out, channels // self.groups, *self.kernel),
            "conv2d_transpose": (channels, out, *self.kernel),
            "dense": (channels, out),
        }
        return shapes[self.op]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of convolutions and dense layers."""
        if self.op == "dense":
            return self.shape[0], self.out_channels
        top, left, bottom, right = self.padding
        oh = (self.shape[2] + top + bottom - self.dilation * (self.kernel[0] - 1) - 1) // self.stride + 1
        ow = (self.shape[3] + left + right - self.dilation * (self.kernel[1] - 1) - 1) // self.stride + 1
        return self.shape[0], self.out_channels, oh, ow


def _check(case: Case, arch: str, tile: Tile | None = TILE, seed: int = 0) -> Any:
    """The geometry of the kernel, whose results equal the reference's."""
    rng = np.random.default_rng(seed)
    limit = 1 << case.weight_bits - 1
    weight = rng.integers(-limit, limit, case.weight_shape)
    products = weight.size // case.out_channels
    weight = (weight << case.power).astype(np.int8)
    axis = {"conv2d": 0, "conv2d_transpose": 1, "dense": 1}[case.op]
    sums = np.moveaxis(weight, axis, 0).reshape(case.out_channels, -1).sum(axis=1, dtype=np.int32)
    offset = 0 if case.op == "conv2d_transpose" else case.zero_point * sums
    constants = {
        "weight": weight,
        "bias": rng.integers(-99, 99, case.out_channels).astype(np.int32) - offset,
        "scale": (rng.uniform(1, 4, case.out_channels) / (4 << case.power) / np.sqrt(products)).astype(np.float32),
    }
    attrs: dict[str, Any] = {
        "x_zero_point": case.zero_point, "x_qmax": 15, "out_zero_point": 7, "qmin": 0, "qmax": 15,
        "out_dtype": case.out_dtype,
    }  # fmt: skip
    if case.op != "dense":
        attrs |= {"strides": (case.stride,) * 2, "padding": case.padding, "dilation": (case.dilation,) * 2}
        attrs |= {"groups": case.groups}
    arrays = [rng.integers(0, 16, case.shape).astype(np.uint8)]
    if case.has_residual:
        arrays.append(rng.integers(0, 16, case.out_shape).astype(np.uint8))
        attrs |= {"residual_multiplier": 0.71, "residual_zero_point": 5}
    return assert_exact(case.op, arrays, constants, attrs, arch, tile).key[2]


CASES = {
    "3x3": Case((1, 64, 6, 7), 64),
    "1x1": Case((2, 128, 5, 5), 40, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "an odd number of k-steps": Case((2, 96, 4, 4), 33, kernel=(1, 1), padding=(0, 0, 0, 0), zero_point=15),
    "one k-step": Case((1, 20, 6, 6), 32, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "channels end within a block, stride 2, residual": Case((2, 41, 7, 9), 50, stride=2, has_residual=True),
    "dilation": Case((1, 32, 9, 9), 32, dilation=2, padding=(2, 2, 2, 2)),
    "uneven kernel and padding": Case((1, 33, 6, 6), 33, kernel=(2, 5), padding=(1, 3, 0, 2)),
    "groups": Case((1, 128, 5, 5), 128, groups=4),
    "groups narrower than a block": Case((1, 48, 5, 5), 96, groups=12),
    "three channels": Case((1, 3, 17, 17), 32, kernel=(7, 7), stride=2, padding=(3, 3, 3, 3)),
    "seven channels": Case((1, 7, 6, 6), 32),
    "fifteen channels": Case((1, 15, 6, 6), 32, kernel=(1, 3), padding=(0, 1, 0, 1)),
    "weights times a power of two": Case((1, 64, 6, 6), 64, power=3, has_residual=True),
    "2-bit weights": Case((1, 64, 6, 6), 33, weight_bits=2, power=5),
    "float output": Case((1, 64, 4, 4), 20, out_dtype="float32"),
    "zero point 0": Case((1, 64, 5, 5), 32, zero_point=0),
    "dense": Case((9, 200), 70, op="dense", has_residual=True),
    "transposed": Case((1, 40, 5, 6), 33, kernel=(4, 4), stride=2, op="conv2d_transpose"),
    "transposed, few channels": Case((1, 6, 5, 6), 33, kernel=(3, 3), stride=2, op="conv2d_transpose"),
}


ON_BOTH = ("3x3", "an odd number of k-steps", "three channels", "weights times a power of two", "dense", "transposed")


def _on(name: str, arch: str) -> Any:
    """The order of products differs between architectures, what surrounds them does not."""
    return pytest.param(name, arch, marks=() if arch == LARGE or name in ON_BOTH else pytest.mark.slow)


@pytest.mark.parametrize(("name", "arch"), [_on(name, arch) for arch in (LARGE, SMALL) for name in CASES])
def test_equals_reference(name: str, arch: str) -> None:
    geometry = _check(CASES[name], arch)
    assert geometry.multiplies_nibbles


@pytest.mark.parametrize("arch", ["sm_86", "sm_89"])
def test_later_architectures_do_as_sm_80(arch: str) -> None:
    assert _check(Case((1, 72, 5, 6), 40, has_residual=True), arch, None).multiplies_nibbles


TILES = {
    "one warp": Tile(16, 32, 1, 1),
    "two blocks of channels per warp": Tile(32, 64, 2, 1),
    "two warps along channels": Tile(16, 64, 1, 2),
    "four k-steps, two stages": Tile(32, 32, 2, 1, 4, 2),
    "three parts": Tile(32, 32, 2, 1, 2, 3, 3),
    "more threads than copies": Tile(16, 64, 1, 2, 2, 3, 2),
    "two slices": Tile(32, 32, 2, 1, 4, 2, slices=2),
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_every_tile_gives_the_same(tile: Tile) -> None:
    assert _check(Case((1, 80, 4, 5), 70, has_residual=True, power=2), LARGE, tile).multiplies_nibbles


@pytest.mark.parametrize("tile", [Tile(32, 32, 2, 1, 1), Tile(32, 32, 2, 1, 2, slices=2)], ids=["stages", "slices"])
@pytest.mark.parametrize("arch", [LARGE, SMALL])
def test_an_odd_number_of_ksteps_at_a_time_multiplies_bytes(arch: str, tile: Tile) -> None:
    """k-steps are multiplied in pairs."""
    geometry = _check(Case((1, 80, 4, 5), 70, has_residual=True), arch, tile)
    assert geometry.weight_bits == 4 and not geometry.multiplies_nibbles


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    case = Case(
        shape=(
            draw(st.integers(1, 3)), groups * draw(st.integers(1, 70)), draw(st.integers(4, 9)), draw(st.integers(4, 9))
        ),
        out_channels=groups * draw(st.integers(1, 40)),
        kernel=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        stride=draw(st.integers(1, 3)),
        dilation=draw(st.integers(1, 2)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(4)),  # type: ignore[arg-type]
        groups=groups,
        has_residual=draw(st.booleans()),
        weight_bits=draw(st.sampled_from([2, 4])),
        power=draw(st.integers(0, 4)),
        zero_point=draw(st.integers(0, 15)),
    )  # fmt: skip
    assume(min(case.out_shape) > 0 and not groups == case.shape[1] > 1)
    tile = draw(st.sampled_from([None, *TILES.values()]))
    _check(case, draw(st.sampled_from([LARGE, SMALL])), tile, seed=draw(st.integers(0, 99)))


PLANTED = {
    "what exceeds a nibble reaches its neighbour": ("0x0F0F0F0F, 0xE4", "0xFFFFFFFF, 0xFE"),
    "the second k-step of a pair twice": ("(low[i]), ", "(high[i]), "),
}


@pytest.mark.parametrize(("right", "wrong"), PLANTED.values(), ids=PLANTED)
def test_packing_errors_are_seen(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs. The last of 37 channels share a k-step with lanes that hold anything; the ninth tap of the first
    block shares a pair with the first tap of the second.
    """
    name, source = intrinsics.PACK_NIBBLES
    assert right in source
    monkeypatch.setattr(conv_products.intrinsics, "PACK_NIBBLES", (name, source.replace(right, wrong)))
    cuda_kernels._generated.cache_clear()
    try:
        with pytest.raises(AssertionError):
            _check(Case((1, 37, 5, 5), 35), LARGE)
    finally:
        cuda_kernels._generated.cache_clear()


def _offer(arch: str, dtype: str = "uint8", **attrs: Any) -> Any:
    """The geometry for 4-bit weights."""
    weight = np.random.default_rng(0).integers(-8, 8, (64, 64, 3, 3)).astype(np.int8)
    constants = {"weight": weight, "bias": np.zeros(64, np.int32), "scale": np.ones(1, np.float32)}
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), **attrs}
    kernel = conv2d((TensorSpec((1, 64, 8, 8), dtype, 32),), constants, attrs, ARCHITECTURES[arch])
    assert kernel is not None
    return kernel.key[2]


def test_only_where_it_is_known_to_be_right() -> None:
    assert _offer("sm_80", x_qmax=15).in_bits == 4
    assert _offer("sm_80", x_qmax=7, x_zero_point=3).in_bits == 4
    assert _offer("sm_80").in_bits == _offer("sm_80", x_qmax=16).in_bits == 8
    assert _offer("sm_80", dtype="int8", x_qmax=7).in_bits == 8
    # Hopper has no such instructions: weights are unpacked to bytes there.
    geometry = _offer("sm_90", x_qmax=15)
    assert (geometry.in_bits, geometry.weight_bits) == (8, 4)
