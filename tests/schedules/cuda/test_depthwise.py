"""Depthwise convolutions in emulation, bit for bit against the reference, and their machine code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import cuda_sass
import numpy as np
import pytest
from cuda_kernels import run_kernel
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from lpsn_tvm import quant
from lpsn_tvm.schedules.cuda import depthwise_core
from lpsn_tvm.schedules.cuda.depthwise import depthwise, depthwise_transpose
from lpsn_tvm.schedules.cuda.depthwise_plan import DepthwiseTile, plan_words
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.template import remake
from lpsn_tvm.targets.cuda_compile import cuda_source

ARCH = "sm_80"


@dataclass(frozen=True)
class Case:
    """One depthwise convolution."""

    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    has_residual: bool = False
    dtype: str = "uint8"
    out_dtype: str = "uint8"
    block: int = 32
    tile: DepthwiseTile | None = None
    group: int = 1
    arch: str = ARCH
    out_zero_point: int = 61
    qmax: int | None = None
    gain: float = 1.0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        h, w = (
            (size + self.padding[i] + self.padding[i + 2] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.strides[i]
            + 1
            for i, size in enumerate(self.shape[2:])
        )
        return (*self.shape[:2], h, w)

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the operator."""
        low = 0 if self.out_dtype == "uint8" else -128
        return {
            "strides": self.strides, "padding": self.padding, "dilation": self.dilation,
            "groups": self.shape[1] // self.group,
            "x_zero_point": 77, "out_zero_point": self.out_zero_point, "qmin": low,
            "qmax": low + 255 if self.qmax is None else self.qmax, "out_dtype": self.out_dtype,
        }  # fmt: skip


def _constants(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    channels = case.shape[1]
    weight = rng.integers(-128, 128, (channels, case.group, *case.kernel)).astype(np.int8)
    offset = weight.reshape(channels, -1).sum(axis=1, dtype=np.int32) * 77
    return {
        "weight": weight,
        "bias": rng.integers(-500, 500, channels).astype(np.int32) - offset,
        "scale": (case.gain * rng.uniform(0.3, 1.0, channels) / (128 * np.sqrt(weight[0].size))).astype(np.float32),
    }


def _kernel(case: Case, constants: dict[str, np.ndarray], attrs: dict[str, Any], arch: str = "") -> Kernel:
    specs = [TensorSpec(case.shape, case.dtype, case.block)]
    if case.has_residual:
        specs.append(TensorSpec(case.out_shape, case.out_dtype, case.block))
    kernel = depthwise(tuple(specs), constants, attrs, ARCHITECTURES[arch or case.arch], case.tile)
    assert kernel is not None
    return kernel


def check(case: Case, seed: int = 0, order: str = "random") -> None:
    rng = np.random.default_rng(seed)
    info, out_info = np.iinfo(case.dtype), np.iinfo("uint8" if case.out_dtype == "float32" else case.out_dtype)
    arrays = [rng.integers(info.min, info.max + 1, case.shape).astype(case.dtype)]
    constants, attrs = _constants(case, rng), case.attrs
    if case.has_residual:
        arrays.append(rng.integers(out_info.min, out_info.max + 1, case.out_shape).astype(case.out_dtype))
        attrs |= {"residual_multiplier": 0.71, "residual_zero_point": 5}
    got = run_kernel(_kernel(case, constants, attrs), arrays, case.arch, order=order)
    want = quant.conv2d(arrays[0], *constants.values(), *arrays[1:], **attrs)
    assert got.dtype == want.dtype
    assert want.size < 64 or want.min() < want.max()
    np.testing.assert_array_equal(got, want)


def tile(columns: int, rows: int, threads: int = 64) -> DepthwiseTile:
    return DepthwiseTile(columns, rows, threads)


CASES = {
    "3x3": Case((1, 64, 9, 10), tile=tile(4, 2)),
    "one output per thread": Case((1, 32, 7, 7), tile=tile(1, 1)),
    "stride 2, ragged": Case((1, 40, 9, 11), strides=(2, 2), tile=tile(3, 2)),
    "5x5, batch": Case((2, 48, 7, 6), (5, 5), padding=(2, 2, 2, 2), tile=tile(2, 2)),
    "7x7": Case((1, 33, 8, 7), (7, 7), padding=(3, 3, 3, 3), tile=tile(2, 1)),
    "dilation": Case((1, 32, 9, 9), dilation=(2, 3), padding=(2, 3, 2, 3), tile=tile(2, 3)),
    "uneven": Case((1, 32, 9, 8), (2, 4), (3, 1), padding=(1, 3, 0, 2), tile=tile(3, 2)),
    "1x1": Case((2, 32, 4, 5), (1, 1), padding=(0, 0, 0, 0)),
    "few channels": Case((2, 3, 8, 9), block=0, tile=tile(4, 2)),
    "one channel": Case((1, 1, 8, 9), block=0),
    "twelve channels": Case((1, 12, 8, 9), block=0),
    "signed, residual": Case((2, 40, 7, 9), dtype="int8", out_dtype="int8", has_residual=True, tile=tile(4, 2)),
    "residual": Case((1, 40, 7, 9), has_residual=True),
    "float output": Case((1, 40, 5, 5), out_dtype="float32"),
    "groups of 4": Case((1, 40, 7, 6), group=4, tile=tile(2, 2)),
    "groups of 2, stride 2": Case((2, 36, 8, 7), strides=(2, 2), group=2, tile=tile(2, 2)),
    "groups of 8": Case((1, 40, 7, 6), group=8, tile=tile(2, 1), arch="sm_61", has_residual=True),
    "clamped": Case((1, 32, 6, 7), qmax=90),
    "clamped, signed": Case((1, 32, 6, 7), out_dtype="int8", qmax=100, out_zero_point=-20, dtype="int8"),
    "zero point 0": Case((1, 32, 6, 7), out_zero_point=0),
    "zero point 0, signed": Case((1, 32, 6, 7), out_zero_point=0, out_dtype="int8", has_residual=True),
    "beyond the range": Case((1, 32, 6, 7), gain=2e3),
    "beyond what bytes are packed from": Case((1, 32, 6, 7), gain=1e5),
    "window larger than the input": Case((1, 32, 2, 3), (5, 5), padding=(2, 2, 2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str) -> None:
    check(CASES[name])


def test_what_packs_bytes() -> None:
    """Saturation instead of clamps, where it means the same and the GPU can."""
    ways = {name: _kernel(case, _constants(case, np.random.default_rng(0)), case.attrs) for name, case in CASES.items()}
    found: dict[str, Any] = {name: kernel.key[1] for name, kernel in ways.items()}
    assert found["3x3"].saturation == found["signed, residual"].saturation == "full"
    assert found["zero point 0"].saturation == found["zero point 0, signed"].saturation == "zero"
    clamped = ("clamped", "clamped, signed", "groups of 8", "float output", "beyond what bytes are packed from")
    assert [found[name].saturation for name in clamped] == [""] * len(clamped)


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_order_of_threads_does_not_matter(order: str) -> None:
    check(CASES["stride 2, ragged"], order=order)


def check_transposed(
    shape: tuple[int, ...], kernel: tuple[int, int], group: int, shape_attrs: dict[str, Any], tile: Any = None
) -> Kernel:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    constants = {
        "weight": rng.integers(-128, 128, (shape[1], group, *kernel)).astype(np.int8),
        "bias": rng.integers(-500, 500, shape[1]).astype(np.int32),
        "scale": rng.uniform(1e-3, 3e-3, shape[1]).astype(np.float32),
    }
    attrs = {"groups": shape[1] // group, "x_zero_point": 120, "out_zero_point": 61, "qmin": 0, "qmax": 255}
    attrs |= {"out_dtype": "uint8", **shape_attrs}
    made = depthwise_transpose((TensorSpec(shape, "uint8", 32),), constants, attrs, ARCHITECTURES[ARCH], tile)
    assert made is not None
    want = quant.conv2d_transpose(x, *constants.values(), **attrs)
    assert want.min() < want.max()
    np.testing.assert_array_equal(run_kernel(made, [x], ARCH), want)
    return made


TRANSPOSED: dict[str, Any] = {
    "doubled": ((2, 40, 5, 6), (4, 4), 1, {"strides": (2, 2), "padding": (1, 1, 1, 1)}, tile(2, 2)),
    "uneven": (
        (1, 33, 4, 5),
        (3, 2),
        1,
        {"strides": (2, 3), "padding": (1, 0, 0, 1), "output_padding": (1, 0)},
        tile(2, 1),
    ),
    "not strided": ((1, 32, 5, 5), (3, 3), 1, {"strides": (1, 1), "padding": (1, 1, 1, 1)}),
    "groups of 4": ((1, 24, 5, 4), (2, 2), 4, {"strides": (2, 2), "padding": (0, 0, 0, 0)}),
    "fourfold": ((1, 32, 3, 3), (8, 8), 1, {"strides": (4, 4), "padding": (2, 2, 2, 2)}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name: str) -> None:
    made = check_transposed(*TRANSPOSED[name])
    template = made.template
    assert template is not None
    again = remake("depthwise", json.loads(json.dumps(template.workload)))
    assert again.kernel().key == template.kernel().key


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    draw = data.draw
    group = draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    case = Case(
        shape=(draw(st.integers(1, 3)), group * draw(st.integers(1, 70 // group)), *pair(1, 12)),
        kernel=pair(1, 7),
        strides=pair(1, 3),
        dilation=pair(1, 3),
        padding=(*pair(0, 3), *pair(0, 3)),
        has_residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(["uint8", "int8"])),
        out_dtype=draw(st.sampled_from(["uint8", "int8"])),
        block=draw(st.sampled_from([0, 32])),
        group=group,
        arch="sm_61" if group == 8 else draw(st.sampled_from(["sm_61", ARCH])),
        out_zero_point=draw(st.sampled_from([0, 61])),
        qmax=draw(st.sampled_from([None, 99])),
        gain=draw(st.sampled_from([1.0, 1.0, 100.0])),
        tile=draw(st.sampled_from([None, tile(1, 3), tile(2, 2), tile(4, 1, 128), tile(3, 4)])),
    )
    assume(min(case.out_shape) > 0)
    check(case, seed=draw(st.integers(0, 99)))


@pytest.mark.parametrize(
    ("rows", "kernel", "stride", "dilation"),
    [(1, 3, 1, 1), (2, 3, 1, 1), (4, 3, 1, 1), (2, 5, 1, 1), (2, 3, 2, 1), (3, 7, 1, 1), (2, 3, 1, 2), (2, 1, 3, 1)],
)
def test_every_tap_has_one_place(rows: int, kernel: int, stride: int, dilation: int) -> None:
    plan = plan_words(rows, (6, 12), kernel, stride, dilation)
    for row in range(rows):
        uses = [use for use in plan.uses if use.row == row]
        taps = [(plan.words[use.word][i], tap) for use in uses for i, tap in enumerate(use.taps) if tap is not None]
        assert sorted(taps) == [(row * stride + tap * dilation, tap) for tap in range(kernel)]


def test_weights_are_read_once_for_both_rows_of_stride_2() -> None:
    plan = plan_words(2, (9, 12), 3, 2, 1)
    assert plan.words == ((0, 1, 2), (2, 3, 4))
    assert (len(plan.uses), len(plan.factors)) == (2, 1)


def test_two_rows_of_a_3x3_filter_share_their_words() -> None:
    plan = plan_words(2, (6, 12), 3, 1, 1)
    assert plan.words == ((0, 1, 2, 3),)
    assert [use.taps for use in plan.uses] == [(0, 1, 2, None), (None, 0, 1, 2)]


def test_a_wrong_byte_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: two bytes of a transposed word change places."""
    right = depthwise_core._permute
    monkeypatch.setattr(depthwise_core, "_permute", lambda a, b, selector: right(a, b, selector.replace("54", "45")))
    with pytest.raises(AssertionError):
        check(Case((1, 32, 6, 11), tile=tile(4, 2)))


def test_leaves_to_others() -> None:
    case = Case((1, 32, 8, 8))
    constants = _constants(case, np.random.default_rng(0))
    isa = ARCHITECTURES[ARCH]
    float_input = (TensorSpec(case.shape, "float32", 32),)
    assert depthwise(float_input, constants, case.attrs, isa) is None
    data = (TensorSpec(case.shape, "uint8", 32),)
    assert depthwise(data, constants, case.attrs | {"groups": 16}, isa) is None
    eight = {**constants, "weight": np.zeros((32, 8, 3, 3), np.int8)}
    assert depthwise(data, eight, case.attrs | {"groups": 4}, isa) is None
    twice = {**constants, "weight": np.concatenate([constants["weight"]] * 2)}
    assert depthwise(data, twice, case.attrs, isa) is None


def test_template_is_made_again_from_json() -> None:
    case = Case((1, 40, 12, 12))
    kernel = _kernel(case, _constants(case, np.random.default_rng(0)), case.attrs)
    template = kernel.template
    assert template is not None
    again = remake("depthwise", json.loads(json.dumps(template.workload)))
    assert (again.key, again.choices, dict(again.default)) == (template.key, template.choices, dict(template.default))
    assert again.kernel().key == kernel.key
    assert template.is_valid(template.default)
    configs = list(template.configs())
    assert len(configs) > 20
    assert len({template.make(config).key for config in configs}) == len(configs)
    assert len({len(template.features(config)) for config in configs}) == 1


def _counted(case: Case, arch: str) -> tuple[cuda_sass.KernelCode, float]:
    """Machine code, and outputs of a thread."""
    cuda_sass.require_tools()
    kernel = _kernel(case, _constants(case, np.random.default_rng(0)), case.attrs, arch)
    (found,) = cuda_sass.kernel_code(cuda_source({"depthwise": kernel.build()}, arch).source, arch).values()
    chosen: Any = kernel.key[1]
    return found, chosen.tile.columns * chosen.tile.rows * 8.0


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_machine_code(arch: str) -> None:
    """Three dot products for nine taps, and little else: the emitter without words took 64 instructions per output."""
    found, outputs = _counted(Case((8, 96, 112, 112), tile=DepthwiseTile(8, 2), out_zero_point=0), arch)
    assert found.dot_products == 3 * outputs
    assert sum(found.opcodes.values()) < 10 * outputs
    assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_machine_code_of_transposed(arch: str) -> None:
    cuda_sass.require_tools()
    constants = {
        "weight": np.ones((64, 1, 4, 4), np.int8),
        "bias": np.zeros(64, np.int32),
        "scale": np.ones(64, np.float32),
    }
    attrs = {"strides": (2, 2), "padding": (1, 1, 1, 1), "groups": 64}
    made = depthwise_transpose((TensorSpec((8, 64, 56, 56), "uint8", 32),), constants, attrs, ARCHITECTURES[arch])
    assert made is not None
    (found,) = cuda_sass.kernel_code(cuda_source({"transposed": made.build()}, arch).source, arch).values()
    assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0)


@pytest.mark.slow
def test_machine_code_of_groups() -> None:
    """Four input channels are one dot product."""
    found, outputs = _counted(Case((8, 128, 56, 56), group=4, tile=DepthwiseTile(4, 2)), "sm_86")
    assert found.dot_products == 9 * outputs
    assert found.count("PRMT") < outputs
    assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90"])
@pytest.mark.parametrize(
    "case",
    [
        Case((8, 96, 112, 112), strides=(2, 2)),
        Case((1, 960, 14, 14)),
        Case((8, 576, 14, 14), dtype="int8", has_residual=True),
        Case((8, 240, 28, 28), (5, 5), padding=(2, 2, 2, 2)),
        Case((8, 96, 56, 56), (7, 7), padding=(3, 3, 3, 3)),
        Case((8, 96, 57, 57), (3, 3), dilation=(2, 2), padding=(2, 2, 2, 2)),
    ],
    ids=lambda case: f"{case.kernel[0]}x{case.kernel[1]}_{prod(case.shape)}",
)
def test_default_tiles_do_not_spill(case: Case, arch: str) -> None:
    found, _ = _counted(case, arch)
    assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0)


@pytest.mark.slow
def test_no_offered_tile_spills() -> None:
    case = Case((8, 64, 56, 56))
    for kernel, strides in (((3, 3), (1, 1)), ((3, 3), (2, 2)), ((5, 5), (1, 1))):
        window = replace(case, kernel=kernel, strides=strides)
        template = _kernel(window, _constants(window, np.random.default_rng(0)), window.attrs, "sm_90").template
        assert template is not None
        functions = {
            f"depthwise_{config['columns']}_{config['rows']}": template.make(config).build()
            for config in template.configs()
            if config["threads"] == 128
        }
        cuda_sass.require_tools()
        for name, found in cuda_sass.kernel_code(cuda_source(functions, "sm_90").source, "sm_90").items():
            assert (found.spill_bytes, found.local_memory) == (0, 0), (name, kernel)
