"""What a program must leave in memory, from the meaning of its operators in numpy: no instruction is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.vta.evaluate import evaluate
from lpsn_tvm.schedules.vta.ops import Gemm, Store, TileOp, Vector
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.layout import pack_integers, unpack_integers
from lpsn_tvm.targets.vta.program import Region

Array = npt.NDArray[Any]
Role = Literal["data", "weight", "vector"]


def roles(ops: Iterable[TileOp]) -> dict[str, Role]:
    """What each region of the operators holds."""
    found: dict[str, Role] = {}
    for op in ops:
        for step in op.steps:
            if isinstance(step, Gemm):
                found[step.source.region] = "data"
                found[step.weights] = "weight"
            elif isinstance(step, Vector):
                found[step.region] = "vector"
            elif isinstance(step, Store):
                found[step.plane.region] = "data"
    return found


@dataclass
class ReferenceMemory:
    """The regions of a program as arrays of tiles.

    Parameters
    ----------
    config : VtaConfig
    roles : mapping of region to {"data", "weight", "vector"}
    tiles : dict of region to int[tiles, ...]
        Data [BATCH][BLOCK], weights [BLOCK_OUT][BLOCK_IN], vectors int32 [BATCH][BLOCK]. What nothing has written is 0.
    """

    config: VtaConfig
    roles: Mapping[str, Role]
    tiles: dict[str, Array]

    @classmethod
    def of(
        cls, ops: Iterable[TileOp], regions: Mapping[str, Region], inputs: Mapping[str, bytes], config: VtaConfig
    ) -> ReferenceMemory:
        """The memory before the start."""
        kinds = roles(ops)
        tiles = {}
        for name, role in kinds.items():
            data = inputs.get(name, regions[name].data)
            tiles[name] = unpack_tiles(bytes(regions[name].size) if data is None else data, role, config)
        return cls(config, kinds, tiles)

    def run(self, op: TileOp) -> None:
        """One operator."""
        evaluate(op, self.tiles, self.config)

    def bytes_of(self, region: str) -> bytes:
        """Contents of a region."""
        return pack_tiles(self.tiles[region], self.roles[region], self.config)


def unpack_tiles(data: bytes, role: Role, config: VtaConfig) -> Array:
    """Bytes of a region -> array of tiles; half a tile at the end is left out."""
    if role == "vector":
        shape: tuple[int, ...] = (config.batch, config.block_out)
        values: Array = np.frombuffer(data, "<i4")
    else:
        weight = role == "weight"
        shape = (config.block_out, config.block_in) if weight else (config.batch, config.block_in)
        bits = config.wgt_bits if weight else config.inp_bits
        values = unpack_integers(data, len(data) * 8 // bits, bits)
    count = values.size // int(np.prod(shape))
    return values[: count * int(np.prod(shape))].reshape(count, *shape).copy()


def pack_tiles(tiles: Array, role: Role, config: VtaConfig) -> bytes:
    """Inverse of `unpack_tiles`."""
    if role == "vector":
        return np.ascontiguousarray(tiles, "<i4").tobytes()
    return pack_integers(tiles, config.wgt_bits if role == "weight" else config.inp_bits)


def expected_outputs(
    ops: Iterable[TileOp], regions: Mapping[str, Region], inputs: Mapping[str, bytes], config: VtaConfig
) -> dict[str, bytes]:
    """Contents of every region that the operators write, after all of them ran.

    Parameters
    ----------
    ops : sequence of TileOp
        On the program's regions, in order.
    regions : mapping of name to Region
        With weights and vectors.
    inputs : mapping of region to bytes
        Contents of input regions.
    config : VtaConfig
        Geometry.
    """
    ops = tuple(ops)
    memory = ReferenceMemory.of(ops, regions, inputs, config)
    for op in ops:
        memory.run(op)
    written = dict.fromkeys(step.plane.region for op in ops for step in op.steps if isinstance(step, Store))
    return {name: memory.bytes_of(name) for name in written}
