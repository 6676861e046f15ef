"""The choices that a tensor-core layer offers: the shape of tiles and of warps, the depth of the pipeline, and how the
inner dimension is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.conv_launches import convolution
from lpsn_tvm.schedules.cuda.epilogue import is_small_residual, tables
from lpsn_tvm.schedules.cuda.geometry import TABLE, ConvGeometry, Tile, reduction
from lpsn_tvm.schedules.cuda.isa import BLOCK, WARP, CudaIsa
from lpsn_tvm.schedules.cuda.tiles import (
    KSTEPS,
    SLICES,
    SPLITS,
    choose_tile,
    estimate,
    fits,
    registers,
    resident,
    shapes,
    stage_cycles,
)
from lpsn_tvm.schedules.cuda.weights import pack_weight, parameters, per_channel
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.template import Config, Template, decode

HOPELESS = 4.0
"""Tiles that the estimate puts this far behind the default are not tried."""
STAGES = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class ConvLayer:
    """A layer whose tile is open.

    Parameters
    ----------
    name : str
        Of the template and of the compiled function.
    geometry : ConvGeometry
        Its tile does not count.
    isa : CudaIsa
    constants : mapping
        weight int8[O, C/groups, kh, kw] of the geometry's kernel, bias and scale.
    attrs : mapping
        Attributes of the operator.
    data, out : TensorSpec
    shift : int
        Weights are multiples of 2**shift.
    groups : int
    """

    name: str
    geometry: ConvGeometry
    isa: CudaIsa
    constants: Mapping[str, Array]
    attrs: Mapping[str, Any]
    data: TensorSpec
    out: TensorSpec
    shift: int
    groups: int = 1

    def with_tile(self, tile: Tile) -> ConvGeometry:
        """The geometry of a tile, which decides what input blocks of which groups a block of channels reads."""
        clamps = self.geometry.has_residual and not is_small_residual(self.attrs)
        geometry = replace(self.geometry, tile=tile, uses_dots=not self.isa.has_mma_s8, clamps_residual=clamps)
        if geometry.group is None:
            return geometry
        outputs, in_per_group = self.constants["weight"].shape[:2]
        blocks, group = reduction(outputs, self.groups, in_per_group, self.data.blocks, tile.columns)
        return replace(geometry, reduce_blocks=blocks, group=group)

    def kernel(self, tile: Tile) -> Kernel:
        """The kernel of a tile."""
        geometry, weight = self.with_tile(tile), self.constants["weight"]
        packed = (
            pack_weight(weight >> self.shift, geometry),
            per_channel(self.constants["bias"], "int32", weight.shape[0], geometry.packed_blocks),
            per_channel(self.constants["scale"], "float32", weight.shape[0], geometry.packed_blocks),
            *parameters(self.attrs, self.data.dtype, self.shift),
            *tables(self.attrs),
        )
        wanted = (self.data, self.out) if geometry.has_residual else (self.data,)
        key = (self.name, self.isa, geometry)
        return Kernel(lambda: convolution(geometry, self.isa), packed, self.out, key, wanted)

    def template(self) -> Template:
        """All tiles, the one of least estimated time as the default."""
        g, isa = self.geometry, self.isa
        default = choose_tile(g, isa)
        least = estimate(self.with_tile(default), isa)

        def is_valid(config: Config) -> bool:
            tile = tile_of(config)
            return fits(g, tile, isa) and estimate(self.with_tile(tile), isa) <= HOPELESS * least

        workload = {
            "kernel": self.name,
            "isa": asdict(isa),
            "geometry": {key: value for key, value in asdict(g).items() if key != "tile"},
            "weight": [int(extent) for extent in self.constants["weight"].shape],
            "groups": self.groups,
            "data": asdict(self.data),
            "out": asdict(self.out),
        }
        choices: dict[str, tuple[int | str, ...]] = {
            "shape": tuple(_text(shape) for shape in shapes(g, isa)),
            "ksteps": tuple(k for k in KSTEPS if k <= max(1, g.ksteps)),
            "stages": STAGES if isa.has_cp_async else (2,),
            "slices": SLICES if isa.has_cp_async else (1,),
            "splits": SPLITS if g.interleave is None else (1,),
        }
        return Template(
            self.name,
            workload,
            choices,
            config_of(default),
            lambda config: self.kernel(tile_of(config)),
            is_valid,
            lambda config: _features(self.with_tile(tile_of(config)), isa, least),
        )


def _text(shape: tuple[int, int, int, int]) -> str:
    rows, columns, warps_m, warps_n = shape
    return f"{rows}x{columns}/{warps_m}x{warps_n}"


def config_of(tile: Tile) -> dict[str, int | str]:
    """A tile as knobs; the shape is "rows x columns / warps along both"."""
    return {
        "shape": _text((tile.rows, tile.columns, tile.warps_m, tile.warps_n)),
        "ksteps": tile.ksteps,
        "stages": tile.stages,
        "slices": tile.slices,
        "splits": tile.splits,
    }


def tile_of(config: Config) -> Tile:
    """The tile of knobs."""
    size, warps = (tuple(map(int, part.split("x"))) for part in str(config["shape"]).split("/"))
    return Tile(*size, *warps, *(int(config[knob]) for knob in ("ksteps", "stages", "splits", "slices")))


def _features(g: ConvGeometry, isa: CudaIsa, least: float) -> tuple[float, ...]:
    """Tile, warps, cycles of every unit, waste at the edges, occupancy, rounds, and the estimate."""
    tile = g.tile
    blocks = g.row_tiles * g.column_tiles * tile.splits
    together = resident(g, isa)
    covered = g.row_tiles * tile.rows * g.column_tiles * tile.columns / (g.pixels * g.out_blocks * BLOCK)
    cycles = stage_cycles(g, isa)
    return (
        log2(tile.rows), log2(tile.columns), float(tile.warps_m), float(tile.warps_n),
        float(tile.ksteps), float(tile.stages), float(tile.slices), float(tile.splits),
        *(cycles[unit] / tile.ksteps for unit in sorted(cycles)),
        log2(g.iterations), g.packed_ksteps / g.ksteps, covered,
        float(registers(g)), float(together), float(together * tile.threads // WARP),
        blocks / isa.multiprocessors, blocks / isa.multiprocessors / together,
        estimate(g, isa) / least,
    )  # fmt: skip


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with seeded constants whose sums neither vanish nor all saturate."""
    geometry: ConvGeometry = decode(ConvGeometry, {**workload["geometry"], "tile": asdict(Tile(64, 32, 2, 1))})
    generator = np.random.default_rng(0)
    shape = tuple(int(extent) for extent in workload["weight"])
    limit = 1 << geometry.weight_bits - 1
    steps = float(np.sqrt(np.prod(shape[1:])))
    constants: dict[str, Array] = {
        "weight": generator.integers(-limit, limit, shape).astype(np.int8),
        "bias": generator.integers(-1000, 1000, shape[0]).astype(np.int32),
        "scale": (generator.uniform(0.3, 1.0, shape[0]) / (limit * steps)).astype(np.float32),
    }
    attrs: dict[str, Any] = {"out_zero_point": 128 if geometry.out_dtype == "uint8" else 0, "residual_multiplier": 0.5}
    if geometry.out_dtype == "int8":
        attrs |= {"qmin": -128, "qmax": 127}
    if geometry.has_table:
        low = int(attrs.get("qmin", 0))
        attrs |= {"out_dtype": geometry.out_dtype, "table": tuple(range(low, low + TABLE))}
    layer = ConvLayer(
        str(workload["kernel"]),
        geometry,
        decode(CudaIsa, workload["isa"]),
        constants,
        attrs,
        decode(TensorSpec, workload["data"]),
        decode(TensorSpec, workload["out"]),
        0,
        int(workload["groups"]),
    )
    return layer.template()
