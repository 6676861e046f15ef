"""Host operations of a bundle: C equals the reference arithmetic, the numpy fallback is the same source."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpsn_tvm import float_ops, quant
from lpsn_tvm.targets.vta import board_sources, host_steps
from lpsn_tvm.targets.vta.board import host_library, host_ops
from lpsn_tvm.targets.vta.layout import GatherLayout, Lane, TileLayout
from lpsn_tvm.targets.vta.pynq import CROSS_COMPILERS, compile_host_ops

BOARD = Path(host_ops.__file__).parent
OPERATORS: dict[str, Any] = {**quant.OPERATORS, **float_ops.OPERATORS, **host_steps.OPERATORS}
INT8 = {"qmin": -128, "qmax": 127, "out_dtype": "int8"}
UINT8 = {"qmin": 0, "qmax": 255, "out_dtype": "uint8"}
FOUR = {"qmin": -8, "qmax": 7, "out_dtype": "int8"}
POINTS = {"in_zero_point": 0, "out_zero_point": 0}
HALF_UP = {"rounding": "half_up"}


@pytest.fixture(scope="module")
def compiled() -> host_ops.HostOps:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine")
    ops = host_ops.HostOps(OPERATORS, host_library.open_library(str(BOARD)), quant.integer_multiplier)
    assert ops.library is not None
    return ops


def _full(name: str) -> str:
    return name if name.startswith("vta.") else f"lpsn.{name}"


def _q(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "int8") -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def _layer(rng: np.random.Generator, outputs: int, shape: tuple[int, ...], half_up: bool) -> list[np.ndarray]:
    scale = np.exp2(-rng.integers(0, 12, outputs)) if half_up else rng.uniform(1e-4, 1e-2, outputs)
    bias = rng.integers(-5000, 5000, outputs, np.int32)
    return [_q(rng, shape), bias, scale.astype(np.float32)]


def _conv(rng: np.random.Generator, groups: int, **attrs: Any) -> tuple[str, list[np.ndarray], dict[str, Any]]:
    weight, bias, scale = _layer(rng, 6, (6, 4 // groups if groups < 4 else 1, 3, 3), attrs.get("rounding") is not None)
    channels = 4 if groups < 4 else 6
    geometry = {"strides": (2, 1), "padding": (1, 2, 0, 1), "dilation": (1, 2), "groups": groups}
    return "conv2d", [_q(rng, (2, channels, 9, 8)), weight, bias, scale], {**geometry, **attrs}


def _cases() -> list[Any]:
    """(operator, arrays, attributes) that C takes."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.normal(size=500) * 60, np.arange(-140, 140) / 2, [np.inf, -np.inf]]).astype(np.float32)
    q, u, image = _q(rng, (300,)), _q(rng, (300,), "uint8"), _q(rng, (2, 5, 7, 6))
    pool = {"kernel": (3, 2), "strides": (2, 2), "padding": (1, 0, 1, 1)}
    rows, weights = rng.integers(0, 6, 22).tolist(), rng.integers(0, 129, 11)
    mix = [value for w in weights.tolist() for value in (w, 128 - w)]
    resize = {"rows": rows, "row_weights": mix, "columns": rows, "column_weights": mix, "qmin": -128, "qmax": 127}
    product = {"a_zero_point": 3, "b_zero_point": -2, "out_zero_point": 5, "multiplier": 0.013}
    total = {"a_zero_point": 7, "b_zero_point": -3, "out_zero_point": 4, "a_multiplier": 0.7, "b_multiplier": 1.3}
    shifts = {"a_zero_point": 0, "b_zero_point": 0, "out_zero_point": 0, "a_multiplier": 0.125, "b_multiplier": 2.0}
    dense = [_q(rng, (3, 40)), *_layer(rng, 7, (40, 7), False)]
    dense_up = [_q(rng, (3, 40)), *_layer(rng, 7, (40, 7), True)]
    return [
        ("quantize", [x], {"inv_scale": 2.0, "zero_point": 0, **INT8}),
        ("quantize", [x], {"inv_scale": 1 / 3, "zero_point": 117, **UINT8}),
        ("quantize", [x], {"inv_scale": 0.25, "zero_point": 0, **FOUR}),
        ("dequantize", [q], {"scale": 0.1, "zero_point": 3}),
        ("dequantize", [u], {"scale": 0.1, "zero_point": 128}),
        ("dequantize", [rng.integers(-(2**31), 2**31 - 1, 99, np.int32)], {"scale": 2.0**-9, "zero_point": 0}),
        ("vta.scale", [rng.integers(-(2**31), 2**31 - 1, (2, 5, 3), np.int32), np.exp2(-np.arange(5))], {}),
        ("requantize", [u], {"multiplier": 0.37, "in_zero_point": 120, "out_zero_point": -3, **INT8}),
        ("requantize", [q], {"multiplier": 2.0**-3, **POINTS, **FOUR, **HALF_UP}),
        ("requantize", [q], {"multiplier": 4.0, **POINTS, **INT8, **HALF_UP}),
        ("lookup", [q, _q(rng, (256,), "uint8")], {"qmin": -128}),
        ("lookup", [u, rng.normal(size=256).astype(np.float32)], {"qmin": 0}),
        ("channel_lookup", [image, _q(rng, (5, 256))], {"qmin": -128}),
        ("add", [q, q[::-1].copy()], {**total, **INT8}),
        ("add", [q, q[::-1].copy()], {**shifts, **INT8, **HALF_UP}),
        ("multiply", [image, image[::-1].copy()], {**product, **INT8}),
        ("multiply", [image, _q(rng, (2, 5, 1, 1), "uint8")], {**product, **UINT8}),
        ("max_pool2d", [image], pool),
        ("max_pool2d", [image.view(np.uint8)], {**pool, "ceil_mode": True, "dilation": (1, 2)}),
        ("global_avg_pool2d", [image], {"multiplier": 0.03, "in_zero_point": 4, "out_zero_point": -7, **INT8}),
        ("global_avg_pool2d", [image], {"multiplier": 1 / 42, **POINTS, **INT8, **HALF_UP}),
        ("resize_linear", [image], resize),
        ("conv2d", *_conv(rng, 1, **INT8)[1:]),
        ("conv2d", *_conv(rng, 2, **INT8, **HALF_UP)[1:]),
        ("conv2d", *_conv(rng, 6, **FOUR, **HALF_UP)[1:]),
        ("conv2d", *_conv(rng, 1, out_dtype="float32")[1:]),
        ("dense", dense, {**UINT8, "out_zero_point": 9}),
        ("dense", dense_up, {**INT8, **HALF_UP}),
        ("dense", dense, {"out_dtype": "float32"}),
    ]


CASES = _cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_compiled_equals_reference(compiled: host_ops.HostOps, case: Any) -> None:
    name, arrays, attrs = case
    taken = host_ops._COMPILED[_full(name)](compiled, arrays, attrs)
    assert taken is not None, "C did not take it"
    expected = OPERATORS[_full(name)](*arrays, **attrs)
    assert taken.dtype == expected.dtype
    np.testing.assert_array_equal(taken, expected)


@pytest.mark.parametrize(
    ("name", "arrays", "attrs"),
    [
        ("lookup", [np.array([9], np.uint8), np.zeros(4, np.uint8)], {"qmin": 0}),
        ("requantize", [np.array([9], np.int8)], {"multiplier": 0.3, **POINTS, **INT8, **HALF_UP}),
        ("quantize", [np.zeros(3)], {"inv_scale": 1.0, "zero_point": 0, **INT8}),
        ("conv2d", [np.zeros((1, 1, 2, 2), np.int8)] * 5, {}),
    ],
)
def test_compiled_declines_what_it_cannot_do(compiled: host_ops.HostOps, name: str, arrays: Any, attrs: Any) -> None:
    assert host_ops._COMPILED[_full(name)](compiled, arrays, attrs) is None


def test_softmax_equals_reference_up_to_rounding(compiled: host_ops.HostOps) -> None:
    x = np.random.default_rng(0).normal(size=(3, 10, 4)).astype(np.float32) * 5
    for axis in (-1, 1):
        expected = float_ops.float_softmax(x, axis=axis)
        np.testing.assert_allclose(compiled.run("lpsn.float_softmax", [x], {"axis": axis}), expected, rtol=2e-7)


def _layouts() -> list[Any]:
    lanes = (Lane(0, -1, 0), None, Lane(2, 1, 2), Lane(1, 0, 1, "high"), Lane(1, 0, 1, "low"))
    return [
        TileLayout((3, 20, 4, 5), 1, 16),
        TileLayout((3, 20, 4, 5), 4, 8),
        TileLayout((2, 40), 1, 16),
        TileLayout((1, 20, 4, 5), 1, 16, bits=4),
        TileLayout((2, 10), 1, 16, planes=4),
        TileLayout((2, 10, 3, 3), 4, 8, bits=4, planes=5),
        GatherLayout((2, 3, 6, 7), 1, 16, lanes, 4, 4, (2, 2), low_bits=4),
        GatherLayout((3, 3, 6, 7), 4, 8, lanes * 3, 6, 7, low_bits=3),
        GatherLayout((1, 3, 6, 7), 1, 16, lanes[:3], 6, 7, bits=4),
    ]


@pytest.mark.parametrize("layout", _layouts(), ids=repr)
def test_layouts(compiled: host_ops.HostOps, layout: Any) -> None:
    """`pack` and `unpack` of the board are those of the build."""
    rng = np.random.default_rng(1)
    total = layout.bits * layout.planes
    limit = 1 << (total - 1)
    x = rng.integers(-limit, limit, layout.shape).astype(np.int8 if layout.planes == 1 else np.int32)
    packed = compiled.pack(layout, x)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == layout.pack(x)
    if isinstance(layout, TileLayout):
        unpacked = compiled.unpack(layout, packed)
        assert unpacked.dtype == x.dtype
        np.testing.assert_array_equal(unpacked, x)
        np.testing.assert_array_equal(unpacked, layout.unpack(packed.tobytes()))


def test_library_that_rounds_wrongly_is_not_used(compiled: host_ops.HostOps, tmp_path: Path) -> None:
    """The planted bug: round half away from zero."""
    source = (BOARD / "host_ops.c").read_text()
    (tmp_path / "host_ops.c").write_text(source.replace("rintf(value)", "roundf(value)"))
    wrong = host_library.open_library(str(tmp_path))
    assert wrong is not None
    assert host_ops.HostOps(OPERATORS, wrong, quant.integer_multiplier).library is None


def test_without_a_compiler_numpy_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_library.shutil, "which", lambda name: None)
    ops = host_ops.HostOps(OPERATORS, host_library.open_library(str(BOARD)), quant.integer_multiplier)
    assert ops.library is None
    for name, arrays, attrs in CASES:
        expected = OPERATORS[_full(name)](*arrays, **attrs)
        np.testing.assert_array_equal(ops.run(_full(name), arrays, attrs), expected)


def test_generated_modules_equal_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The board's `lpsn_quant`, `lpsn_float_ops` and `lpsn_layout` are valid 3.8 and mean the same."""
    for name, text in board_sources.board_modules().items():
        (tmp_path / name).write_text(text)
        assert "strict=" not in text
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("lpsn_quant", "lpsn_float_ops", "lpsn_host_steps", "lpsn_layout")
    *arithmetic, lpsn_layout = (__import__(name) for name in names)
    try:
        operators = {name: function for module in arithmetic for name, function in module.OPERATORS.items()}
        assert set(operators) == set(OPERATORS)
        lpsn_float = arithmetic[1]
        for name, arrays, attrs in CASES:
            expected = OPERATORS[_full(name)](*arrays, **attrs)
            np.testing.assert_array_equal(operators[_full(name)](*arrays, **attrs), expected)
        x = np.random.default_rng(0).integers(-8, 7, (2, 3, 4, 5)).astype(np.int8)
        ours, theirs = TileLayout(x.shape, 1, 16, bits=4), lpsn_layout.TileLayout(x.shape, 1, 16, bits=4)
        assert ours.pack(x) == theirs.pack(x)
        float_x = x.astype(np.float32)
        for program in ('[["gelu", 0]]', '[["silu", 0], ["multiply", 1, 2.0]]'):
            expected = float_ops.float_elementwise(float_x, program=program)
            np.testing.assert_allclose(lpsn_float.float_elementwise(float_x, program=program), expected, rtol=1e-6)
    finally:
        for name in names:
            sys.modules.pop(name, None)


# --- other processors


@dataclass
class Call:
    """One call of a C function: arguments before and after; arrays in place of pointers."""

    function: str
    before: list[Any]
    after: list[Any]


class Recorder(host_ops.HostOps):
    """Keeps every call."""

    calls: list[Call]

    def call(self, function: str, *arguments: Any) -> Any:
        before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        result = super().call(function, *arguments)
        self.calls.append(Call(function, before, [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]))
        return result


def _recorded() -> list[Call]:
    """Every function of the library on the operands of the tests above."""
    recorder = Recorder.__new__(Recorder)
    recorder.calls = []
    recorder.__init__(OPERATORS, host_library.open_library(str(BOARD)), quant.integer_multiplier)  # type: ignore[misc]
    for name, arrays, attrs in CASES:
        host_ops._COMPILED[_full(name)](recorder, [np.ascontiguousarray(a) for a in arrays], attrs)
    for layout in _layouts():
        x = np.zeros(layout.shape, np.int8) + np.arange(layout.shape[-1], dtype=np.int8)
        data = recorder.pack(layout, x) if layout.planes == 1 else np.arange(layout.size, dtype=np.uint8)
        if isinstance(layout, TileLayout):
            recorder.unpack(layout, data)
    assert {call.function for call in recorder.calls} == set(host_library.SIGNATURES) - {"float_softmax"}
    return recorder.calls


def _program(calls: list[Call]) -> str:
    """A C program that makes the calls and writes every array afterwards."""
    declarations, body = [], []
    for index, call in enumerate(calls):
        arguments = []
        for position, (value, code) in enumerate(zip(call.before, host_library.SIGNATURES[call.function], strict=True)):
            if isinstance(value, np.ndarray):
                name, data = f"a{index}_{position}", ",".join(map(str, value.tobytes()))
                declarations.append(f"static __attribute__((aligned(16))) unsigned char {name}[] = {{{data}}};")
                arguments.append(f"(void *){name}")
                body.append(f"fwrite({name}, 1, sizeof {name}, stdout);")
            else:
                arguments.append(f"{float(np.float32(value)).hex()}f" if code == "f" else str(int(value)))
        written = len(arguments) - sum(code != "p" for code in host_library.SIGNATURES[call.function])
        body.insert(len(body) - written, f"{call.function}({', '.join(arguments)});")
    return "\n".join(["#include <stdio.h>", '#include "host_ops.c"', *declarations, "int main(void) {", *body, "}"])


def _need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize(
    ("compiler", "emulator"),
    [
        pytest.param("arm-linux-gnueabihf-gcc", "qemu-arm", id="armv7"),
        pytest.param("aarch64-linux-gnu-gcc", "qemu-aarch64", id="aarch64", marks=pytest.mark.slow),
    ],
)
def test_other_processors_compute_the_same(compiler: str, emulator: str, tmp_path: Path) -> None:
    """All functions, bit for bit, as the board's processor executes them."""
    _need("cc", compiler, emulator)
    calls = _recorded()
    (tmp_path / "main.c").write_text(_program(calls))
    shutil.copy(BOARD / "host_ops.c", tmp_path)
    flags = [flag for flag in host_library.CFLAGS if flag not in ("-fPIC", "-shared")]
    machine = next(command[1:] for command in CROSS_COMPILERS.values() if command[0] == compiler)
    subprocess.run([compiler, *flags, *machine, "-static", "main.c", "-o", "main", "-lm"], cwd=tmp_path, check=True)
    output = subprocess.run([emulator, str(tmp_path / "main")], stdout=subprocess.PIPE, check=True).stdout
    for call in calls:
        for value in call.after:
            if isinstance(value, np.ndarray):
                assert output[: value.nbytes] == value.tobytes(), call.function
                output = output[value.nbytes :]
    assert not output


LOADER = r"""
#include <dlfcn.h>
#include <stdio.h>
int main(void)
{
    void *library = dlopen("./host_ops.so", RTLD_NOW);
    int (*version)(void) = library ? (int (*)(void))dlsym(library, "host_ops_version") : 0;
    printf("%d", version ? version() : -1);
    return 0;
}
"""


@pytest.mark.parametrize(
    ("machine", "emulator", "system"),
    [
        ("armv7", "qemu-arm", "arm-linux-gnueabihf"),
        pytest.param("aarch64", "qemu-aarch64", "aarch64-linux-gnu", marks=pytest.mark.slow),
    ],
)
def test_libraries_of_a_bundle_load_on_their_processor(
    machine: str, emulator: str, system: str, tmp_path: Path
) -> None:
    command = CROSS_COMPILERS[machine]
    _need(command[0], emulator)
    library = compile_host_ops(command, (BOARD / "host_ops.c").read_bytes())
    assert library is not None
    (tmp_path / "host_ops.so").write_bytes(library)
    (tmp_path / "main.c").write_text(LOADER)
    subprocess.run([*command, "main.c", "-o", "main", "-ldl"], cwd=tmp_path, check=True)
    run = subprocess.run([emulator, "-L", f"/usr/{system}", "./main"], cwd=tmp_path, capture_output=True, check=True)
    assert run.stdout.decode() == str(host_library.VERSION)


def test_missing_or_failing_compiler_is_no_error() -> None:
    assert compile_host_ops(("no-such-compiler",), b"") is None
    _need("cc")
    assert compile_host_ops(("cc",), b"this is not C") is None
