"""What a kernel kit is made of: layers of real networks at their size, and cases recorded from the tests of kernels."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernel_kit
from benchmarks.cuda_code import LAYERS
from lpsn_tvm import float_ops, quant
from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.cuda import convert
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES, BLOCK
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.rules import dispatch
from lpsn_tvm.targets.cuda_compile import compile_cubin, cuda_source
from lpsn_tvm.targets.cuda_rules import RULES

ROOT = Path(__file__).resolve().parents[1]
REFERENCE: dict[str, Any] = {**quant.OPERATORS, **float_ops.OPERATORS}
PERIOD = 251 * BLOCK
"""Elements after which large inputs repeat, so that files stay small: a prime number of pixels, so that neighbouring
tiles of a kernel see different numbers, and within the reach of zlib, also as floats.
"""
MOST_RANDOM_BYTES = 1 << 15
RESULT = {"out_zero_point": 120, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
TABLE = tuple(int(value) for value in np.random.default_rng(0).permutation(256))
"""What layers with a table put out: neighbours far from each other."""


@dataclass(frozen=True)
class Operator:
    """One operator at real size.

    Parameters
    ----------
    op : str
        "lpsn.conv2d", or "relayout": from the layout of the device to the plain one.
    shapes : tuple of tuple
        Of its inputs.
    dtype : str
        Of its inputs.
    weight : tuple of int
        Of layers.
    bits : int
        Of the weights.
    x_bits : int
        Of the inputs.
    isa : str
        Other than that of the kit.
    tile : Tile, optional
        Of convolutions, other than the default.
    is_plain : bool
        Inputs as users give them.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "uint8"
    weight: tuple[int, ...] = ()
    bits: int = 8
    x_bits: int = 8
    isa: str = ""
    tile: Tile | None = None
    is_plain: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether it has weights, and a second input is a residual."""
        return bool(self.weight)

    def specs(self) -> tuple[TensorSpec, ...]:
        """Inputs as lowering would offer them."""
        blocks = (0 if self.is_plain or len(s) < 2 or (self.is_layer and s[1] <= 16) else BLOCK for s in self.shapes)
        return tuple(TensorSpec(s, self.dtype, block) for s, block in zip(self.shapes, blocks, strict=True))

    def constants(self, rng: np.random.Generator) -> dict[str, Array]:
        """Weights, bias and scale for outputs all over the range; tables."""
        if self.op in ("lpsn.lookup", "lpsn.channel_lookup"):
            shape = (256,) if self.op == "lpsn.lookup" else (self.shapes[0][1], 256)
            return {"table": rng.integers(0, 256, shape).astype(np.uint8)}
        if self.op == "lpsn.float_instance_norm":
            channels = self.shapes[0][1]
            return {"scale": rng.random(channels).astype(np.float32), "shift": _normal(rng, (channels,))}
        if not self.is_layer:
            return {}
        axis = 0 if self.op.endswith("conv2d") else 1
        out = self.weight[axis] * (1 if axis == 0 or len(self.weight) == 2 else self.attrs.get("groups", 1))
        if self.dtype == "float32":
            return {"weight": _normal(rng, self.weight) * np.float32(0.05), "bias": _normal(rng, (out,))}
        limit = 1 << self.bits - 1
        weight = rng.integers(-limit, limit, self.weight).astype(np.int8)
        steps = float(limit * np.sqrt(weight.size / self.weight[axis])) * 2.0 ** (self.x_bits - 8)
        sums = np.moveaxis(weight, axis, 0).reshape(self.weight[axis], -1).sum(axis=1, dtype=np.int32)
        # Results lie around the middle of the range, whatever the weights' mean. Layers give sums of x * weight, which
        # the bias corrects for the zero point; transposed ones of (x - zero point) * weight.
        zero_point = self.attrs["x_zero_point"] if self.op == "lpsn.conv2d_transpose" else 0
        offset = np.resize(sums * ((1 << self.x_bits - 1) - zero_point), out)
        return {
            "weight": weight,
            "bias": (rng.integers(-500, 500, out) - offset).astype(np.int32),
            "scale": (rng.uniform(0.3, 1.0, out) / steps).astype(np.float32),
        }

    def inputs(self, rng: np.random.Generator, specs: Sequence[TensorSpec]) -> list[Array]:
        """Logical arrays; large ones repeat in memory."""
        found = []
        for spec in specs:
            size = int(np.prod(spec.memory_shape))
            count = size if size * np.dtype(spec.dtype).itemsize <= MOST_RANDOM_BYTES else PERIOD
            if spec.dtype == "float32":
                values = _normal(rng, (count,))
            else:
                values = rng.integers(0, 1 << self.x_bits, count).astype(spec.dtype)
            found.append(spec.unpack(np.resize(values, spec.memory_shape)))
        return found

    def kernel(self, constants: Mapping[str, Array], arch: str) -> Kernel:
        """What lowering takes."""
        isa, specs = ARCHITECTURES[arch], self.specs()
        if self.op == "relayout":
            return convert.relayout(specs[0], specs[0].with_block(0))
        if self.tile is not None:
            made = conv2d(specs, constants, self.attrs, isa, self.tile)
        else:
            made = dispatch(RULES, self.op, specs, constants, self.attrs, isa)
        assert made is not None, f"no kernel for {self}"
        return made if made.inputs else Kernel(made.build, made.constants, made.out, made.key, specs)

    def expected(self, arrays: Sequence[Array], constants: Mapping[str, Array]) -> Array:
        """By the reference."""
        if self.op == "relayout":
            return arrays[0]
        first, rest = (arrays[:1], arrays[1:]) if self.is_layer else (arrays, ())
        return np.asarray(REFERENCE[self.op](*first, *constants.values(), *rest, **self.attrs))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def conv(
    channels: int, size: int, out: int, kernel: int = 3, stride: int = 1, *, batch: int = 1, residual: bool = False,
    groups: int = 1, **options: Any,
) -> Operator:  # fmt: skip
    """A convolution as networks have it."""
    attrs = {
        "strides": (stride, stride),
        "padding": (kernel // 2,) * 4,
        "groups": groups,
        "x_zero_point": 120,
        **RESULT,
    }
    shapes: tuple[tuple[int, ...], ...] = ((batch, channels, size, size),)
    if options.get("x_bits", 8) == 4:
        attrs |= {"x_zero_point": 6, "x_qmax": 15}
    if residual:
        shapes += ((batch, out, -(-size // stride), -(-size // stride)),)
        attrs |= {"residual_multiplier": 0.71, "residual_zero_point": 5}
    return Operator("lpsn.conv2d", shapes, attrs, weight=(out, channels // groups, kernel, kernel), **options)


def layers() -> Iterator[Operator]:
    """Layers with weights."""
    for layer in LAYERS["resnet50"]:
        yield conv(layer.channels, layer.size, layer.out, layer.kernel, layer.stride, residual=layer.has_residual)
    for bits, x_bits in ((4, 8), (4, 4)):
        yield conv(64, 56, 64, bits=bits, x_bits=x_bits)
        yield conv(256, 14, 1024, 1, residual=bits == 4 and x_bits == 8, bits=bits, x_bits=x_bits)
        yield conv(512, 7, 512, bits=bits, x_bits=x_bits)
        yield conv(3, 224, 64, 7, 2, bits=bits, x_bits=x_bits)
    yield conv(128, 28, 128, batch=16, residual=True)
    yield conv(1, 112, 64, 5)
    yield conv(32, 224, 9)
    for channels, size, out in ((32, 112, 16), (96, 56, 24), (144, 28, 32), (576, 7, 160), (320, 7, 1280)):
        yield conv(channels, size, out, 1)
    yield conv(256, 14, 256, groups=8)
    # What newer GPUs run, but would not be given: 4-bit products, and kernels without matrix instructions.
    yield conv(128, 28, 128, bits=4, x_bits=4, isa="sm_80")
    yield conv(256, 14, 256, 1, bits=4, x_bits=4, residual=True, isa="sm_75")
    yield conv(64, 28, 64, isa="sm_61")
    yield conv(64, 28, 64, bits=4, isa="sm_61")
    # What only the sizes of tiles and grids bring: more than 48 KiB of shared memory, more than 65535 blocks, parts
    # that a second launch adds, slices.
    yield conv(256, 28, 256, residual=True, tile=Tile(128, 128, 4, 2, 4, 3))
    yield conv(32, 1025, 32, 1, tile=Tile(16, 32, 1, 1))
    yield conv(256, 14, 256, tile=Tile(32, 64, 2, 1, 2, 3, 4))
    yield conv(256, 14, 256, tile=Tile(32, 64, 2, 1, 4, 3, 1, 2))
    # Tables in the epilogue: in shared memory, and read by the second of two launches and by depthwise kernels.
    for layer in (
        conv(1, 112, 64, 5),
        conv(64, 112, 32, residual=True),
        conv(256, 14, 256, tile=Tile(32, 64, 2, 1, 2, 3, 4)),
        conv(240, 28, 240, 5, groups=240),
    ):
        yield replace(layer, attrs={**layer.attrs, "table": TABLE})
    for channels, size, kernel, stride in ((96, 112, 3, 2), (144, 56, 3, 1), (240, 28, 5, 1), (960, 7, 3, 1)):
        yield conv(channels, size, channels, kernel, stride, groups=channels)
    yield conv(128, 28, 128, groups=32)
    up = {"strides": (2, 2), "padding": (1, 1, 1, 1), "x_zero_point": 120, **RESULT}
    yield Operator("lpsn.conv2d_transpose", ((1, 256, 16, 16),), up, weight=(256, 128, 4, 4))
    yield Operator("lpsn.conv2d_transpose", ((1, 64, 28, 28),), up | {"groups": 64}, weight=(64, 1, 4, 4))
    yield Operator("lpsn.conv2d_transpose", ((1, 64, 28, 28),), up | {"groups": 2}, weight=(64, 32, 4, 4))
    for batch, features, bits in ((1, 1024, 8), (64, 512, 8), (1, 1024, 4)):
        attrs = {"x_zero_point": 0, **RESULT, "out_dtype": "float32"} if bits == 4 else {"x_zero_point": 0, **RESULT}
        yield Operator("lpsn.dense", ((batch, features),), attrs, weight=(features, 1000), bits=bits)
    same = {"strides": (1, 1), "padding": (1, 1, 1, 1)}
    yield Operator("lpsn.float_conv2d", ((1, 16, 56, 56),), same, "float32", (32, 16, 3, 3))
    up = {"strides": (2, 2), "padding": (1, 1, 1, 1)}
    yield Operator("lpsn.float_conv2d_transpose", ((1, 32, 28, 28),), up, "float32", (32, 16, 4, 4))
    yield Operator("lpsn.float_dense", ((1, 512),), {}, "float32", (512, 100))


def movements() -> Iterator[Operator]:
    """Operators without weights, of bytes and of floats."""
    for prefix, dtype in (("lpsn.", "uint8"), ("lpsn.float_", "float32")):
        make: Callable[..., Operator] = functools.partial(Operator, dtype=dtype)
        x = ((1, 64, 56, 56),) if dtype == "uint8" else ((1, 64, 28, 56),)
        window = {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}
        yield make(f"{prefix}max_pool2d", ((1, 64, 112, 112) if dtype == "uint8" else (1, 32, 112, 112),), window)
        yield make(f"{prefix}resize_nearest", x, _doubled(x[0][2]))
        yield make(f"{prefix}pad", x, {"pad_width": (3, 3, 3, 3), "value": 0, "mode": "reflect"})
        yield make(f"{prefix}pad", x, {"pad_width": (1, 1, 1, 1), "value": 9, "mode": "constant"})
        yield make(f"{prefix}strided_slice", x, {"axes": (1,), "begin": (32,), "end": (64,), "strides": (1,)})
        yield make(
            f"{prefix}strided_slice", x, {"axes": (2, 3), "begin": (0, 1), "end": (x[0][2], 56), "strides": (2, 2)}
        )
        yield make(f"{prefix}depth_to_space", ((1, 9, 224, 224),), {"block_size": 3, "mode": "CRD"})
        yield make(f"{prefix}transpose", x, {"axes": (0, 2, 3, 1)})
        yield make(f"{prefix}reshape", ((1, 256, 6, 6),), {"shape": (1, 9216)})


def _doubled(height: int) -> dict[str, tuple[int, ...]]:
    return {
        "rows": tuple(row // 2 for row in range(2 * height)),
        "columns": tuple(column // 2 for column in range(112)),
    }


def _linear(dtype: type) -> dict[str, Any]:
    places = np.clip((np.arange(112) + 0.5) / 2 - 0.5, 0, 55)
    low = np.floor(places).astype(int)
    pairs = np.stack([low, np.minimum(low + 1, 55)], axis=1)
    parts = np.stack([1 - (places - low), places - low], axis=1) * (1 if dtype is float else 128)
    rows, weights = tuple(map(int, pairs.ravel())), tuple(map(dtype, parts.ravel()))
    return {"rows": rows, "row_weights": weights, "columns": rows, "column_weights": weights}


def integer_arithmetic() -> Iterator[Operator]:
    """Operators on bytes."""
    x, wide = ((1, 64, 56, 56),), (8, 256, 56, 56)
    sums = {"a_multiplier": 0.5, "b_multiplier": 0.257, "a_zero_point": 3, "b_zero_point": 4, **RESULT}
    product = {"multiplier": 0.003, "a_zero_point": 3, "b_zero_point": 4, **RESULT}
    yield Operator("lpsn.add", ((1, 256, 56, 56),) * 2, sums)
    yield Operator("lpsn.add", (wide, wide), sums)
    yield Operator("lpsn.add", ((1, 960, 7, 7),) * 2, sums)
    yield Operator("lpsn.multiply", ((1, 240, 28, 28), (1, 240, 1, 1)), product)
    yield Operator("lpsn.requantize", x, {"multiplier": 0.7, "in_zero_point": 9, **RESULT})
    yield Operator("lpsn.lookup", x, {"qmin": 0})
    yield Operator("lpsn.channel_lookup", x, {"qmin": 0})
    mixed = {"axis": 1, "multipliers": (1.0, 0.5, 0.25), "zero_points": (7, 3, 1), **RESULT}
    yield Operator("lpsn.concat", ((1, 64, 28, 28), (1, 96, 28, 28), (1, 40, 28, 28)), mixed)
    window = {"kernel": (2, 2), "strides": (2, 2), "padding": (0, 0, 0, 0), "in_zero_point": 5, "multiplier": 0.9}
    yield Operator("lpsn.avg_pool2d", ((1, 128, 56, 56),), {**window, **RESULT})
    for shape in ((1, 2048, 7, 7), (8, 1280, 7, 7), (1, 64, 112, 112)):
        average = {"in_zero_point": 5, "multiplier": 0.9 / (shape[2] * shape[3]), **RESULT}
        yield Operator("lpsn.global_avg_pool2d", (shape,), average)
    yield Operator("lpsn.resize_linear", x, _linear(int) | {"qmin": 0, "qmax": 255})
    image = {"inv_scale": 40.0, "zero_point": 100, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
    for batch in (1, 8):
        yield Operator("lpsn.quantize", ((batch, 3, 224, 224),), image, "float32", is_plain=True)
    for shape in ((1, 1000), (1, 3, 224, 224), (1, 64, 56, 56)):
        yield Operator("lpsn.dequantize", (shape,), {"scale": 0.1, "zero_point": 4})
    yield Operator("relayout", x)
    yield Operator("relayout", ((2, 3, 224, 224),))


def float_arithmetic() -> Iterator[Operator]:
    """Operators on floats."""
    make: Callable[..., Operator] = functools.partial(Operator, dtype="float32")
    x = ((1, 64, 56, 56),)
    program = float_ops.encode_program([["multiply", 0, 1], ["sigmoid", 2], ["add", 3, 0]])
    yield make("lpsn.float_elementwise", x * 2, {"program": program})
    yield make("lpsn.float_concat", ((1, 64, 28, 28), (1, 40, 28, 28)), {"axis": 1})
    window = {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}
    yield make("lpsn.float_avg_pool2d", ((1, 64, 56, 56),), window)
    yield make("lpsn.float_global_avg_pool2d", ((1, 512, 7, 7),))
    yield make("lpsn.float_resize_linear", ((1, 32, 56, 56),), _linear(float))
    yield make("lpsn.float_instance_norm", ((1, 64, 128, 128),), {"epsilon": 1e-5})
    yield make("lpsn.float_softmax", ((8, 1000),), {"axis": 1}, is_plain=True)


def operators() -> list[Operator]:
    """All of real size."""
    return [*layers(), *movements(), *integer_arithmetic(), *float_arithmetic()]


def write_real(folder: Path, operator: Operator, arch: str, seed: int = 0) -> Path:
    """Put an operator into a kit; its expected output is the reference's."""
    rng = np.random.default_rng(seed)
    arch = operator.isa or arch
    constants = operator.constants(rng)
    arrays = operator.inputs(rng, operator.specs())
    kernel = operator.kernel(constants, arch)
    made = cuda_source({"kernel": kernel.build()}, arch)
    function = made.functions["kernel"]
    case = kernel_kit.case_of(kernel, made.source, function, arch, f"{kernel_kit.REAL} {operator.op}")
    packed = [spec.pack(array) for spec, array in zip(kernel.inputs, arrays, strict=True)]
    buffers = dict(zip(function.parameters, (*packed, *kernel.constants), strict=False))
    return kernel_kit.write_case(folder, case, made.source, buffers, operator.expected(arrays, constants))


def prepare(folder: Path, archs: Sequence[str], recorded: Path | None, limit: int) -> None:
    """Make a kit for GPUs of the given architectures."""
    start = time.perf_counter()
    if recorded is None:
        recorded = folder / "recorded"
        _run_tests(recorded)
    for path in kernel_kit.selected(kernel_kit.paths(recorded), limit):
        source = kernel_kit.read_description(path).source
        for part in (f"cases/{path.name}", f"sources/{source}.cu.gz"):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recorded / part, folder / part)
    for arch in archs:
        for operator in operators():
            if operator.tile is None or operator.tile.threads * 96 < ARCHITECTURES[arch].shared_bytes:
                write_real(folder, operator, arch)
        print(f"{arch}: layers of real size after {time.perf_counter() - start:.0f} s", flush=True)
    refused = compile_all(folder, archs)
    (folder / "kit.json").write_text(json.dumps({"archs": list(archs), "refused": refused}, indent=1) + "\n")
    size = sum(path.stat().st_size for part in ("cases", "sources", "binaries") for path in (folder / part).iterdir())
    count = len(kernel_kit.paths(folder))
    print(f"{count} cases, {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s, {len(refused)} refused by nvcc")


def _run_tests(folder: Path) -> None:
    """The tests of kernels, recorded."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "not slow"]
    command += ["tests/schedules/cuda", "tests/test_cuda_fragments.py"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"LPSN_CUDA_KIT": str(folder.resolve())})


def compile_all(folder: Path, archs: Sequence[str]) -> dict[str, str]:
    """Machine code of every source for every architecture that is not older than it; what nvcc refused, and why."""
    oldest = {case.source: case.arch for case in map(kernel_kit.read_description, kernel_kit.paths(folder))}
    wanted = [
        (s, a) for s, old in oldest.items() for a in archs if ARCHITECTURES[old].number <= ARCHITECTURES[a].number
    ]
    refused: dict[str, str] = {}

    def one(job: tuple[str, str]) -> None:
        source, arch = job
        path = kernel_kit.binary_path(folder, source, arch)
        if path.exists():
            return
        try:
            kernel_kit.write_binary(path, compile_cubin(kernel_kit.read_source(folder, source), arch)[0])
        except CompileError as error:
            refused[f"{source}-{arch}"] = str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, wanted))
    return refused
