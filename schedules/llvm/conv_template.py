"""The choices that an integer convolution kernel offers: register tile, how much one task does, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv_core import chunk_of, convolution, default_chunk
from lpsn_tvm.schedules.llvm.dot import BLOCK
from lpsn_tvm.schedules.llvm.geometry import Geometry
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tiles import TALLEST, WIDEST, Tile, choose_tile, estimate, fits, registers
from lpsn_tvm.schedules.llvm.tir import MAGIC_BITS
from lpsn_tvm.schedules.template import Config, Template, decode

HOPELESS = 2.5
"""Tiles that the analytic estimate puts this far behind the best one are not tried."""

CHUNKS = (1, 2, 4, 8, 16, 32, 64)


def convolution_template(
    name: str, geometry: Geometry, isa: Isa, packed: tuple[Array, ...], out: TensorSpec, wanted: tuple[TensorSpec, ...],
    max_blocks: int = 16,
) -> Template:  # fmt: skip
    """The template of a kernel that `conv_core.convolution` makes.

    Parameters
    ----------
    name : str
        Of the template and of the compiled function.
    geometry : Geometry
        Its tile, chunk and order are chosen here.
    isa : Isa
        Instruction set.
    packed : tuple of ndarray
        Constants; they are the same for all configurations.
    out, wanted : TensorSpec
        What the kernel writes and reads.
    max_blocks : int
        Most output channel blocks in a tile.
    """
    blocks = geometry.out_blocks // math.prod(geometry.phases.strides if geometry.phases else (1, 1))
    height, width = geometry.out_size
    default = choose_tile(isa, height, width, blocks, max_blocks=max_blocks)
    least = estimate(isa, height, width, blocks, default)

    def make(config: Config) -> Kernel:
        tile = _tile(config)
        chosen = replace(geometry, tile=tile, chunk=int(config.get("chunk", 0)), order=str(config["order"]))
        return Kernel(lambda: convolution(chosen, isa), packed, out, (name, isa, chosen), wanted)

    def is_valid(config: Config) -> bool:
        tile = _tile(config)
        if not fits(isa, tile) or estimate(isa, height, width, blocks, tile) > HOPELESS * least:
            return False
        if "chunk" not in config:
            return True
        # Of the values that mean the same chunk only the smallest is one more thing to try.
        tiles, chunk = -(-width // tile.columns), int(config["chunk"])
        return all(chunk_of(tiles, int(c)) < chunk_of(tiles, chunk) for c in choices["chunk"] if int(c) < chunk)

    choices = _choices(geometry, blocks, max_blocks, default)
    first: dict[str, int | str] = {"rows": default.rows, "columns": default.columns, "blocks": default.blocks}
    if "chunk" in choices:
        first["chunk"] = default_chunk(-(-width // default.columns))
    first["order"] = "blocks"
    workload = {
        "kernel": name,
        "isa": asdict(isa),
        "max_blocks": max_blocks,
        "geometry": {k: v for k, v in asdict(geometry).items() if k not in ("tile", "chunk", "order")},
    }
    return Template(
        name, workload, choices, first, make, is_valid, lambda config: _features(geometry, isa, blocks, least, config)
    )


def _tile(config: Config) -> Tile:
    return Tile(int(config["rows"]), int(config["columns"]), int(config["blocks"]))


def _choices(g: Geometry, blocks: int, max_blocks: int, default: Tile) -> dict[str, tuple[int | str, ...]]:
    height, width = g.out_size
    choices: dict[str, tuple[int | str, ...]] = {
        "rows": tuple(range(1, min(height, TALLEST) + 1)),
        "columns": tuple(range(1, min(width, WIDEST) + 1)),
        "blocks": tuple(b for b in range(1, min(blocks, max_blocks) + 1) if blocks % b == 0),
    }
    if height == 1:
        choices["chunk"] = tuple(sorted({*CHUNKS, default_chunk(-(-width // default.columns))}))
    choices["order"] = ("blocks", "pixels") if g.out_blocks > 1 and height * width > 1 else ("blocks",)
    return choices


def _features(g: Geometry, isa: Isa, blocks: int, least: float, config: Config) -> tuple[float, ...]:
    """Tile, registers, waste, the analytic estimate, tasks, and bytes that a task reads again."""
    tile, (height, width) = _tile(config), g.out_size
    row_tiles, column_tiles = -(-height // tile.rows), -(-width // tile.columns)
    chunk = chunk_of(column_tiles, int(config["chunk"])) if "chunk" in config else column_tiles
    steps = g.reduce_blocks * g.kernel[0] * g.kernel[1] * g.in_block
    covered = row_tiles * tile.rows * column_tiles * tile.columns / (height * width)
    per_step = tile.pixels + tile.blocks * max(1, 64 // isa.vector_bytes)
    return (
        float(tile.rows), float(tile.columns), float(tile.blocks), float(tile.pixels),
        registers(isa, tile) / isa.registers, covered,
        estimate(isa, height, width, blocks, tile) / least,
        per_step / (tile.pixels * tile.blocks),
        math.log2(g.batch * (g.out_blocks // tile.blocks) * row_tiles * (column_tiles // chunk)),
        math.log2(chunk), float(config["order"] == "pixels"),
        math.log2(steps), math.log2(steps * tile.blocks * BLOCK), math.log2(g.macs),
    )  # fmt: skip


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with made-up constants."""
    g = decode(Geometry, {**workload["geometry"], "tile": asdict(Tile(1, 1, 1))})
    steps = g.reduce_blocks * g.kernel[0] * g.kernel[1] * g.in_block
    packed = example_constants(g.weight_shape, g.weight_dtype, g.out_blocks, steps, g.out_dtype)
    data, out = spec_of_memory(g.in_shape, g.in_dtype), spec_of_memory(g.out_shape, g.out_dtype)
    wanted = (data, out) if g.has_residual else (data,)
    isa = Isa(**workload["isa"])
    return convolution_template(str(workload["kernel"]), g, isa, packed, out, wanted, int(workload["max_blocks"]))


def example_constants(
    weight_shape: tuple[int, ...], weight_dtype: str, blocks: int, steps: int, out_dtype: str
) -> tuple[Array, ...]:
    """Seeded weight, bias, scale and parameters of an integer layer whose outputs neither vanish nor all saturate;
    `steps` products make an output.
    """
    generator = np.random.default_rng(0)
    zero_point = 128 if out_dtype == "uint8" else 0
    return (
        generator.integers(-127, 128, weight_shape).astype(weight_dtype),
        generator.integers(-1000, 1000, (blocks, BLOCK)).astype(np.int32),
        generator.uniform(0.5, 1.5, (blocks, BLOCK)).astype(np.float32) / np.float32(127 * math.sqrt(steps)),
        np.array([-128, 127, 0.5, 0], np.float32),
        np.array([zero_point, zero_point - MAGIC_BITS, zero_point, 0], np.int32),
    )


def spec_of_memory(memory: tuple[int, ...], dtype: str) -> TensorSpec:
    """A spec of that memory shape: [N, C/b, H, W, b] and [N, K/b, b] are blocked, the others plain."""
    if len(memory) in (3, 5):
        return TensorSpec((memory[0], memory[1] * memory[-1], *memory[2:-1]), dtype, memory[-1])
    return TensorSpec(memory, dtype)
