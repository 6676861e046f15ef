"""Layers that end in a table, by every kernel that makes layers: in emulation the same bytes as a lookup behind the
layer, and their machine code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import cuda_sass
import numpy as np
import pytest
from cuda_emulation import EmulationError
from cuda_kernels import run_kernel

from lpsn_tvm import quant
from lpsn_tvm.schedules.cuda import direct, intrinsics
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import conv2d_transpose
from lpsn_tvm.schedules.cuda.dense import dense
from lpsn_tvm.schedules.cuda.depthwise import depthwise, depthwise_transpose
from lpsn_tvm.schedules.cuda.depthwise_plan import DepthwiseTile
from lpsn_tvm.schedules.cuda.epilogue import Epilogue
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.rules import dispatch
from lpsn_tvm.schedules.template import canonical, remake
from lpsn_tvm.targets.cuda_compile import cuda_source
from lpsn_tvm.targets.cuda_rules import RULES

SLOW = pytest.mark.slow
SMALL = Tile(32, 32, 2, 1)
UP = {"strides": (2, 2), "padding": (1, 1, 1, 1)}


@dataclass(frozen=True)
class Case:
    """One layer with a table; `clamp` is the range of the integers that the table is read with."""

    kernel: str
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    op: str = "conv2d"
    attrs: tuple[tuple[str, Any], ...] = (("strides", (1, 1)), ("padding", (1, 1, 1, 1)))
    weight_bits: int = 8
    input_qmax: int = 255
    clamp: tuple[int, int] = (0, 255)
    zero_point: int = 60
    out_dtype: str = "uint8"
    has_residual: bool = False
    residual_dtype: str = ""
    gain: float = 1.0
    tile: Any = None
    arch: str = "sm_80"

    @property
    def channels(self) -> int:
        """Of the output."""
        if self.op == "conv2d":
            return self.weight_shape[0]
        return self.weight_shape[1] * dict(self.attrs).get("groups", 1)


DENSE: tuple[tuple[str, Any], ...] = ()
GROUPS = (("strides", (1, 1)), ("padding", (1, 1, 1, 1)), ("groups", 40))
UPWARDS = tuple(UP.items())
DILATED = (*UPWARDS, ("dilation", (2, 2)))
CASES = {
    "u8": Case("conv2d_mma", (1, 64, 6, 7), (64, 64, 3, 3), tile=SMALL),
    "odd channels, s8 table": Case("conv2d_mma", (2, 40, 5, 5), (50, 40, 3, 3), out_dtype="int8", tile=SMALL),
    "s8 integers": Case(
        "conv2d_mma", (1, 33, 5, 5), (33, 33, 3, 3), clamp=(-128, 127), zero_point=-7, tile=SMALL, arch="sm_75"
    ),
    "s8 integers, s8 table": Case(
        "conv2d_mma", (1, 33, 5, 5), (33, 33, 3, 3), clamp=(-128, 127), zero_point=9, out_dtype="int8"
    ),
    "residual": Case("conv2d_mma", (1, 64, 5, 6), (40, 64, 3, 3), has_residual=True, tile=SMALL),
    "clamped": Case("conv2d_mma", (1, 32, 6, 6), (32, 32, 3, 3), clamp=(40, 131), gain=4.0),
    "beyond the range": Case("conv2d_mma", (1, 32, 6, 6), (32, 32, 3, 3), gain=1e6),
    "4-bit activations": Case("conv2d_mma", (1, 32, 6, 6), (32, 32, 3, 3), clamp=(0, 15), zero_point=6),
    "W4A8": Case("conv2d_mma", (1, 64, 6, 6), (64, 64, 3, 3), weight_bits=4, has_residual=True, tile=SMALL),
    "s4": Case(
        "conv2d_mma", (1, 64, 6, 6), (40, 64, 3, 3), weight_bits=4, input_qmax=15, clamp=(0, 15), zero_point=5,
        has_residual=True, tile=SMALL,
    ),
    "slices": Case("conv2d_mma", (1, 64, 5, 5), (40, 64, 3, 3), tile=Tile(32, 32, 1, 1, 4, 3, 1, 2)),
    "split": Case("conv2d_mma", (1, 96, 5, 5), (40, 96, 3, 3), tile=Tile(32, 32, 2, 1, 2, 3, 3), has_residual=True),
    "split, without copies": Case(
        "conv2d_mma", (1, 96, 5, 5), (40, 96, 3, 3), out_dtype="int8", tile=Tile(32, 32, 2, 1, 1, 2, 3), arch="sm_75"
    ),
    "colours": Case("conv2d_mma", (2, 3, 9, 11), (40, 3, 3, 3), tile=SMALL),
    "dp4a": Case("conv2d_mma", (1, 40, 5, 6), (50, 40, 3, 3), tile=Tile(32, 32, 2, 1, 1, 2), arch="sm_61"),
    "dp4a, W4A8, residual": Case(
        "conv2d_mma", (1, 40, 5, 6), (40, 40, 3, 3), weight_bits=4, has_residual=True,
        tile=Tile(32, 32, 2, 1, 1, 2), arch="sm_70",
    ),
    "transposed": Case(
        "conv2d_transpose_mma", (1, 40, 5, 4), (40, 20, 4, 4), "conv2d_transpose", UPWARDS, out_dtype="int8", tile=SMALL
    ),
    "dense": Case("dense_mma", (19, 70), (70, 45), "dense", DENSE, tile=Tile(16, 32, 1, 1)),
    "dense, residual": Case("dense_mma", (17, 70), (70, 45), "dense", DENSE, has_residual=True),
    "few rows": Case("dense_dp4a", (3, 70), (70, 45), "dense", DENSE, has_residual=True),
    "few rows, 4 bits": Case(
        "dense_dp4a", (1, 600), (600, 45), "dense", DENSE, weight_bits=4, out_dtype="int8", arch="sm_61"
    ),
    "squeeze and excitation": Case(
        "dense_dp4a", (2, 24, 1, 1), (40, 24, 1, 1), attrs=(("strides", (1, 1)), ("padding", (0, 0, 0, 0)))
    ),
    "depthwise": Case("depthwise", (1, 40, 6, 7), (40, 1, 3, 3), attrs=GROUPS, has_residual=True),
    "depthwise, the whole range": Case(
        "depthwise", (2, 40, 6, 5), (40, 1, 3, 3), attrs=GROUPS, zero_point=0, out_dtype="int8",
        tile=DepthwiseTile(2, 2, 64),
    ),
    "depthwise, s8 integers": Case(
        "depthwise", (1, 40, 6, 5), (40, 1, 3, 3), attrs=GROUPS, clamp=(-128, 127), zero_point=0, arch="sm_61"
    ),
    "depthwise, transposed": Case(
        "depthwise", (1, 40, 4, 4), (40, 1, 4, 4), "conv2d_transpose", (*UPWARDS, ("groups", 40))
    ),
    "direct, residual of another type": Case(
        "conv2d_direct", (1, 40, 4, 5), (24, 40, 3, 3), out_dtype="int8", has_residual=True, residual_dtype="uint8"
    ),
    "direct, depthwise": Case(
        "depthwise", (1, 40, 4, 5), (40, 1, 3, 3), attrs=GROUPS, has_residual=True, residual_dtype="int8"
    ),
    "direct, transposed": Case(
        "conv2d_transpose", (1, 40, 3, 3), (40, 20, 3, 3), "conv2d_transpose", DILATED, clamp=(-128, 127), zero_point=3
    ),
    "direct, dense": Case(
        "dense_direct", (3, 40), (40, 24), "dense", DENSE, has_residual=True, residual_dtype="int8", clamp=(30, 200)
    ),
}  # fmt: skip
DIRECT = {"conv2d_direct", "dense_direct"}


def _problem(case: Case) -> tuple[list[np.ndarray], dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Inputs, constants, attributes without a table, and the table: no two neighbours of it are alike."""
    rng = np.random.default_rng(3)
    limit = 1 << case.weight_bits - 1
    x = rng.integers(0, case.input_qmax + 1, case.shape).astype(np.uint8)
    weight = rng.integers(-limit, limit, case.weight_shape).astype(np.int8)
    axes = (1, 2, 3) if case.op == "conv2d" else 0 if case.op == "dense" else (0, 2, 3)
    zero_point = case.input_qmax // 2
    attrs = {
        **dict(case.attrs), "x_zero_point": zero_point, "x_qmax": case.input_qmax, "out_zero_point": case.zero_point,
        "qmin": case.clamp[0], "qmax": case.clamp[1],
    }  # fmt: skip
    bias = rng.integers(-500, 500, case.channels).astype(np.int32)
    if case.op != "conv2d_transpose":
        # Transposed convolutions take the zero point off by themselves.
        bias -= weight.astype(np.int32).sum(axis=axes) * np.int32(zero_point)
    constants = {"weight": weight, "bias": bias, "scale": np.ones(case.channels, np.float32)}
    sums = _reference(case, [x], constants, {**attrs, "out_dtype": "float32"})
    scale = rng.uniform(0.4, 1.2, case.channels) * case.gain * (case.clamp[1] - case.clamp[0]) / (4 * np.std(sums))
    constants["scale"] = scale.astype(np.float32)
    info = np.iinfo(case.out_dtype)
    table = (rng.permutation(256)[: case.clamp[1] - case.clamp[0] + 1] + info.min).astype(case.out_dtype)
    arrays = [x]
    if case.has_residual:
        attrs |= {"residual_multiplier": 0.71, "residual_zero_point": 5}
        kind = case.residual_dtype or case.out_dtype
        arrays.append(rng.integers(0, 100, _reference(case, arrays, constants, attrs).shape).astype(kind))
    return arrays, constants, attrs, table


def _reference(
    case: Case, arrays: list[np.ndarray], constants: dict[str, np.ndarray], attrs: dict[str, Any]
) -> np.ndarray:
    operator: Any = quant.OPERATORS[f"lpsn.{case.op}"]
    dtype = attrs.get("out_dtype", "int8" if case.clamp[0] < 0 else "uint8")
    result: np.ndarray = operator(arrays[0], *constants.values(), *arrays[1:], **{**attrs, "out_dtype": dtype})
    return result


def _made(
    case: Case, arrays: list[np.ndarray], constants: dict[str, np.ndarray], attrs: dict[str, Any], arch: str = ""
) -> Kernel:
    specs = tuple(TensorSpec(a.shape, str(a.dtype), 32) for a in arrays)
    isa = ARCHITECTURES[arch or case.arch]
    if case.tile is None:
        made = dispatch(RULES, f"lpsn.{case.op}", specs, constants, attrs, isa)
    elif isinstance(case.tile, DepthwiseTile):
        made = depthwise(specs, constants, attrs, isa, case.tile)
    else:
        builders: Any = {"conv2d": conv2d, "conv2d_transpose": conv2d_transpose, "dense": dense}
        made = builders[case.op](specs, constants, attrs, isa, case.tile)
    assert made is not None
    return made


def _with_table(case: Case, arch: str = "") -> tuple[Kernel, list[np.ndarray], np.ndarray]:
    """Kernel, inputs, and what the table makes of the integers of the layer alone."""
    arrays, constants, attrs, table = _problem(case)
    fused = {**attrs, "out_dtype": case.out_dtype, "table": tuple(table.tolist())}
    want = quant.lookup(_reference(case, arrays, constants, attrs), table, qmin=case.clamp[0])
    np.testing.assert_array_equal(_reference(case, arrays, constants, fused), want)
    return _made(case, arrays, constants, fused, arch), arrays, want


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_a_lookup(name: str) -> None:
    case = CASES[name]
    kernel, arrays, want = _with_table(case)
    assert kernel.key[0] == case.kernel
    got = run_kernel(kernel, arrays, case.arch)
    assert got.dtype == want.dtype == case.out_dtype
    assert np.unique(want).size > (7 if case.gain < 100 else 1), "the check would not notice an error"
    np.testing.assert_array_equal(got, want)


def test_cases_reach_every_builder() -> None:
    keys = {_with_table(case)[0].key[0] for case in CASES.values()}
    assert keys >= {"conv2d_mma", "conv2d_transpose_mma", "dense_mma", "dense_dp4a", "depthwise", *DIRECT}
    geometries: list[Any] = [_with_table(CASES[name])[0].key[2] for name in ("s4", "W4A8", "dp4a")]
    assert [(g.multiplies_nibbles, g.weight_bits, g.uses_dots) for g in geometries] == [
        (True, 4, False), (False, 4, False), (False, 8, True),
    ]  # fmt: skip
    assert depthwise_transpose in RULES["lpsn.conv2d_transpose"]
    assert direct.depthwise in RULES["lpsn.conv2d"]


@pytest.mark.parametrize("name", ["u8", "transposed", "dense", "few rows", "depthwise", "direct, depthwise"])
def test_kernels_with_and_without_a_table_differ(name: str) -> None:
    case = CASES[name]
    arrays, constants, attrs, table = _problem(case)
    plain = _made(case, arrays, constants, {**attrs, "out_dtype": case.out_dtype})
    first, second = (
        _made(case, arrays, constants, {**attrs, "out_dtype": case.out_dtype, "table": tuple(values)})
        for values in (table.tolist(), table[::-1].tolist())
    )
    assert plain.key != first.key == second.key
    assert len(first.constants) == len(plain.constants) + 1
    assert not np.array_equal(first.constants[-1], second.constants[-1])
    if plain.template is not None and first.template is not None and second.template is not None:
        assert plain.template.key != first.template.key == second.template.key


@pytest.mark.parametrize("name", ["u8", "odd channels, s8 table", "transposed", "dense", "depthwise", "split"])
def test_templates_are_made_again_elsewhere(name: str) -> None:
    kernel = _made_by_default(CASES[name])
    template = kernel.template
    assert template is not None
    again = remake(template.name, json.loads(canonical(template.workload)))
    assert (again.key, again.choices, again.default) == (template.key, template.choices, template.default)
    mine, other = template.kernel(), again.kernel()
    assert mine.key == other.key
    assert [(c.shape, c.dtype) for c in mine.constants] == [(c.shape, c.dtype) for c in other.constants]


def _made_by_default(case: Case) -> Kernel:
    arrays, constants, attrs, table = _problem(case)
    fused = {**attrs, "out_dtype": case.out_dtype, "table": tuple(table.tolist())}
    specs = tuple(TensorSpec(a.shape, str(a.dtype), 32) for a in arrays)
    made = dispatch(RULES, f"lpsn.{case.op}", specs, constants, fused, ARCHITECTURES[case.arch])
    assert made is not None
    return made


PLANTED = {
    "neighbours change places": ("0x5410", "0x1054"),
    "bytes change places": ("0x0040", "0x0004"),
    "signed index": ("values[i] & 255", "(values[i] & 127)"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, source = intrinsics.STORE_LOOKED_UP
    right, wrong = PLANTED[bug]
    assert right in source
    monkeypatch.setattr(
        intrinsics, "STORE_LOOKED_UP", (f"{name}_bug", source.replace(name, f"{name}_bug").replace(right, wrong))
    )
    kernel, arrays, want = _with_table(CASES["few rows"])
    got = run_kernel(kernel, arrays, "sm_86")
    assert not np.array_equal(got, want)


def test_tables_that_nobody_waited_for_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    staged = Epilogue.with_shared_table

    def unwaited(self: Epilogue, memory: Any, at: int, thread: Any, **_: Any) -> Epilogue:
        return staged(self, memory, at, thread, is_asynchronous=True)

    monkeypatch.setattr(Epilogue, "with_shared_table", unwaited)
    kernel, arrays, _ = _with_table(CASES["few rows"])
    with pytest.raises(EmulationError):
        run_kernel(kernel, arrays, "sm_89")


SHARED = ("u8", "residual", "W4A8", "s4", "slices", "transposed", "dense", "few rows")
"""Kernels that keep the table in shared memory; others read it through the caches."""


@pytest.mark.parametrize("arch", [pytest.param("sm_75", marks=SLOW), "sm_80", pytest.param("sm_90", marks=SLOW)])
def test_machine_code(arch: str) -> None:
    cuda_sass.require_tools()
    names = [*SHARED, "split, without copies", "depthwise", "depthwise, transposed"]
    made = {f"layer_{i}": _with_table(CASES[name], arch)[0] for i, name in enumerate(names)}
    source = cuda_source({symbol: kernel.build() for symbol, kernel in made.items()}, arch)
    code = cuda_sass.kernel_code(source.source, arch)
    for name, symbol in zip(names, made, strict=True):
        *others, last = source.functions[symbol].launches
        for launch in (*others, last):
            found = code[launch.kernel]
            assert (found.spill_bytes, found.stack_bytes, found.local_memory) == (0, 0, 0), name
            assert found.conditional == (), name
        shared = code[last.kernel].count("LDS.U8") + code[last.kernel].count("LDS.U.U8")
        cached = code[last.kernel].count("LDG.E.U8")
        assert (shared >= 8, cached >= 8) == (name in SHARED, name not in SHARED), (name, shared, cached)
