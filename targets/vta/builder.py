"""`ProgramBuilder`: instructions in the order an emitter wants them; micro-ops, tokens and the end are its business.

An emitter decides order and placement (which SRAM slot, which loop). The builder keeps micro-op sequences in their
buffer, works out which tiles each instruction touches, and inserts the dependence tokens (`dependences`). Double
buffering is using another slot: nothing then has to wait.

For example:

    builder.load("inp", 0, "x", 0, rows=8, columns=16)
    builder.load("wgt", 0, "weights", 0, columns=9)
    builder.gemm(uops, [(8, 16, 16, 0), (4, 128, 0, 9)])      # waits for both loads
    builder.alu("shr", uops[:, :2], [(8, 16, 16), (4, 128, 128)], immediate=8)
    builder.store(0, "y", 0, columns=512)                     # waits for the ALU
    program = builder.finish()
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.dependences import COMPUTE, LOAD, STORE, Dependences, Index, Touched, merge
from lpsn_tvm.targets.vta.isa import Alu, AluKind, Finish, Gemm, Instruction, Load, Memory, Store, encode_uops
from lpsn_tvm.targets.vta.program import Access, Program, Region
from lpsn_tvm.targets.vta.uop_buffer import UopBuffer

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

UOP_REGION = "uop"
MIN_DISTANCE = 3
Loop = tuple[int, ...]
Loops = Sequence[Loop]
IntArray = npt.NDArray[Any]


class ProgramBuilder:
    """Builds one program.

    Parameters
    ----------
    config : VtaConfig
    """

    def __init__(self, config: VtaConfig) -> None:
        self.config = config
        self._instructions: list[Instruction] = []
        self._targets: list[str | None] = []
        self._regions: dict[str, Region] = {}
        self._marks: list[tuple[int, str]] = []
        self._dependences = Dependences()
        self._uops = UopBuffer(config.uop_depth)
        self._sram = {
            "inp": Touched(config.inp_depth),
            "wgt": Touched(config.wgt_depth),
            "out": Touched(config.acc_depth),
        }
        self._dram: dict[str, Touched] = {}
        self._granule = min(config.inp_tile_bytes, config.out_tile_bytes)
        # Per buffer, where the last operator's slots end: an emitter puts the next ones behind them, so that its first
        # loads need not wait.
        self.cursors: dict[str, int] = {}

    def region(self, name: str, size: int, *, data: bytes | None = None, access: Access = "r") -> None:
        """Declare a memory region of `size` bytes; declaring it again must repeat the same size and access.

        Raises
        ------
        CompileError
            A second declaration differs, or `data` has another length.
        """
        if data is not None and len(data) != size:
            raise CompileError(f"has {len(data)} bytes of data, not {size}", where=f"region {name!r}")
        old = self._regions.get(name)
        if old is not None and (old.size, old.access) != (size, access):
            raise CompileError("was declared before with another size or access", where=f"region {name!r}")
        self._regions[name] = Region(name, size, data, access)
        if access != "r" and name not in self._dram:
            self._dram[name] = Touched(-(-size // self._granule))

    def mark(self, name: str) -> None:
        """The instructions from here on belong to operator `name`."""
        self._marks.append((len(self._instructions), name))

    def load(
        self,
        memory: Memory,
        sram: int,
        region: str,
        tile: int,
        *,
        columns: int,
        rows: int = 1,
        stride: int | None = None,
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        """DRAM -> INP, WGT or ACC: `rows` rows of `columns` tiles, `stride` tiles apart (default: no gaps).

        `sram` and `tile` are the first tile in the buffer and in the region; `pads` (top, bottom, left, right) are
        tiles of zeros around (inp only).
        """
        stride = columns if stride is None else stride
        top, bottom, left, right = pads
        instruction = Load(
            memory=memory, sram=sram, dram=tile, y_size=rows, x_size=columns, x_stride=stride,
            y_pad_0=top, y_pad_1=bottom, x_pad_0=left, x_pad_1=right,
        )  # fmt: skip
        self._check_region(region, tile, rows, columns, stride, self._bytes(memory))
        if memory == "acc":
            if region in self._dram:
                raise CompileError("accumulators are loaded from read-only regions", where=f"region {region!r}")
            # ACC is the compute unit's own; OUT, which STORE reads, is not touched.
            self._compute(instruction, {}, region)
            return
        count = (rows + top + bottom) * (columns + left + right)
        where, touched = slice(sram, sram + count), self._sram[memory]
        self._check_depth(memory, sram + count, touched.tiles)
        source = self._dram_range(region, tile, rows, columns, stride, self._bytes(memory))
        waits = touched.before_write(LOAD, where)
        if source is not None:
            waits = merge(waits, self._dram[region].before_read(LOAD, source))
        index = self._issue(LOAD, instruction, waits, region)
        touched.write(LOAD, where, index)
        if source is not None:
            self._dram[region].read(LOAD, source, index)

    def store(
        self, sram: int, region: str, tile: int, *, columns: int, rows: int = 1, stride: int | None = None
    ) -> None:
        """OUT -> DRAM: `rows` rows of `columns` tiles, `stride` tiles apart in DRAM, without gaps in OUT."""
        stride = columns if stride is None else stride
        instruction = Store(sram=sram, dram=tile, y_size=rows, x_size=columns, x_stride=stride)
        self._check_region(region, tile, rows, columns, stride, self.config.out_tile_bytes)
        where, out = slice(sram, sram + rows * columns), self._sram["out"]
        self._check_depth("out", sram + rows * columns, out.tiles)
        target = self._dram_range(region, tile, rows, columns, stride, self.config.out_tile_bytes)
        if target is None:
            raise CompileError("is read-only", where=f"region {region!r}")
        waits = merge(out.before_read(STORE, where), self._dram[region].before_write(STORE, target))
        index = self._issue(STORE, instruction, waits, region)
        out.read(STORE, where, index)
        self._dram[region].write(STORE, target, index)

    def gemm(self, uops: IntArray, loops: Loops = (), *, reset: bool = False) -> None:
        """acc[dst] += inp[src] x wgt[wgt]^T over the loops (outer first) and the micro-ops (innermost).

        Parameters
        ----------
        uops : int[n, 3]
            (dst, src, wgt).
        loops : up to two of (count, dst, src, wgt)
            Steps that each iteration adds.
        reset : bool
            acc[dst] = 0 instead.
        """
        uops = np.ascontiguousarray(uops, np.int64)
        outer, inner = _two(loops, 4)
        begin = self.uops_at(uops)
        instruction = Gemm(
            reset=reset, uop_begin=begin, uop_end=begin + len(uops), iter_out=outer[0], iter_in=inner[0],
            dst_out=outer[1], dst_in=inner[1], src_out=outer[2], src_in=inner[2], wgt_out=outer[3], wgt_in=inner[3],
        )  # fmt: skip
        dst, src, wgt = _footprint(uops, outer, inner)
        waits = self._sram["out"].before_write(COMPUTE, dst)
        if not reset:
            waits = merge(
                waits, self._sram["inp"].before_read(COMPUTE, src), self._sram["wgt"].before_read(COMPUTE, wgt)
            )
        index = self._compute(instruction, waits, None)
        self._sram["out"].write(COMPUTE, dst, index)
        if not reset:
            self._sram["inp"].read(COMPUTE, src, index)
            self._sram["wgt"].read(COMPUTE, wgt, index)

    def alu(self, kind: AluKind, uops: IntArray, loops: Loops = (), *, immediate: int | None = None) -> None:
        """acc[dst] = kind(acc[dst], immediate), or kind(acc[dst], acc[src]).

        `uops` is int[n, 2] (dst, src), src = dst with an immediate (signed 16 bits); `loops` up to two of (count, dst,
        src), outer first.
        """
        pairs = np.ascontiguousarray(uops, np.int64)
        triples = np.concatenate([pairs, np.zeros((len(pairs), 1), np.int64)], axis=1)
        outer, inner = _two(loops, 3)
        begin = self.uops_at(triples)
        instruction = Alu(
            op=kind, uop_begin=begin, uop_end=begin + len(pairs), iter_out=outer[0], iter_in=inner[0],
            dst_out=outer[1], dst_in=inner[1], src_out=outer[2], src_in=inner[2],
            use_imm=immediate is not None, imm=immediate or 0,
        )  # fmt: skip
        dst, _, _ = _footprint(triples, (*outer, 0), (*inner, 0))
        index = self._compute(instruction, self._sram["out"].before_write(COMPUTE, dst), None)
        self._sram["out"].write(COMPUTE, dst, index)

    def uops_at(self, uops: Index) -> int:
        """First buffer entry of a micro-op sequence, int64[n, 3]; loads it if it is not there."""
        found = self._uops.find(uops)
        if found is None:
            self.preload([uops])
            found = self._uops.find(uops)
        assert found is not None
        return found

    def preload(self, sequences: Sequence[IntArray]) -> None:
        """Bring those sequences that are not in the buffer with one transfer.

        A hint: an ALU sequence is int[n, 3], too, with wgt 0.
        """
        arrays = {a.tobytes(): a for a in (np.ascontiguousarray(s, np.int64) for s in sequences)}
        missing = [a for a in arrays.values() if self._uops.find(a) is None]
        if not missing:
            return
        sram, dram, count = self._uops.place(missing)
        self._compute(Load(memory="uop", sram=sram, dram=dram, y_size=1, x_size=count, x_stride=count), {}, UOP_REGION)

    def finish(self) -> Program:
        """The program: a NOP that waits for the last store, FINISH, and the micro-op region."""
        stores = self._dependences.next_index(STORE)
        waits = {STORE: stores - 1} if stores else {}
        self._issue(COMPUTE, Load(memory="uop"), waits, None)
        self._instructions.append(Finish())
        self._targets.append(None)
        if self._uops.stored:
            data = encode_uops(np.concatenate(self._uops.stored), self.config).tobytes()
            self._regions[UOP_REGION] = Region(UOP_REGION, len(data), data, "r")
        return Program(self.config, self._instructions, self._targets, dict(self._regions), tuple(self._marks))

    # --- inside ---
    def _compute(self, instruction: Instruction, waits: dict[int, int], region: str | None) -> int:
        return self._issue(COMPUTE, instruction, waits, region)

    def _issue(self, unit: int, instruction: Instruction, waits: dict[int, int], region: str | None) -> int:
        relayed = self._dependences.needs_relay(unit, waits)
        if relayed is not None:
            other = STORE if unit == LOAD else LOAD
            self._issue(COMPUTE, Load(memory="uop"), {other: relayed}, None)
        index = self._dependences.issue(unit, instruction, waits)
        self._instructions.append(instruction)
        self._targets.append(region)
        return index

    def _dram_range(
        self, region: str, tile: int, rows: int, columns: int, stride: int, size: int
    ) -> Index | slice | None:
        """Granules of a writable region that a transfer touches; None where nothing is ever written."""
        if region not in self._dram:
            return None
        scale = size // self._granule
        if rows == 1 or stride == columns:
            return slice(tile * scale, (tile + rows * columns) * scale)
        starts = (tile + np.arange(rows) * stride) * scale
        granules: Index = (starts[:, None] + np.arange(columns * scale)).reshape(-1)
        return granules

    def _bytes(self, memory: Memory) -> int:
        config = self.config
        return {"inp": config.inp_tile_bytes, "wgt": config.wgt_tile_bytes}.get(memory, config.acc_tile_bytes)

    def _check_region(self, region: str, tile: int, rows: int, columns: int, stride: int, size: int) -> None:
        if region not in self._regions:
            raise CompileError("is not declared", where=f"region {region!r}")
        end = (tile + (rows - 1) * stride + columns) * size
        if tile < 0 or end > self._regions[region].size:
            raise CompileError(
                f"a transfer of {rows} x {columns} tiles at tile {tile} leaves its {self._regions[region].size} bytes",
                where=f"region {region!r}",
            )

    def _check_depth(self, memory: str, end: int, depth: int) -> None:
        if end > depth:
            raise CompileError(f"a transfer ends at tile {end}; the buffer has {depth}", where=memory)


def _two(loops: Loops, width: int) -> tuple[Loop, Loop]:
    """(outer, inner), missing ones executed once."""
    if len(loops) > 2:
        raise CompileError(f"an instruction has two loops, not {len(loops)}", where="builder")
    once = (1,) + (0,) * (width - 1)
    padded = [once] * (2 - len(loops)) + [tuple(int(v) for v in loop) for loop in loops]
    return padded[0], padded[1]


def _footprint(uops: Index, outer: Loop, inner: Loop) -> tuple[Index | slice, ...]:
    """The tiles that the loops touch: accumulators, inputs, weights."""
    # Sequences of other slots differ in their bases only.
    first = uops[0]
    found = _relative_footprint((uops - first).tobytes(), outer, inner)
    return tuple(
        slice(tiles.start + base, tiles.stop + base) if isinstance(tiles, slice) else tiles + base
        for tiles, base in zip(found, first.tolist(), strict=True)
    )


@lru_cache(maxsize=4096)
def _relative_footprint(uops: bytes, outer: Loop, inner: Loop) -> tuple[Index | slice, ...]:
    """The same, counted from the first micro-op; a slice where the tiles are neighbours."""
    table = np.frombuffer(uops, np.int64).reshape(-1, 3)
    steps = _steps(outer[0], outer[1:])[:, None] + _steps(inner[0], inner[1:])[None]
    _check_distance((steps[..., :1] + table[:, 0]).reshape(-1))
    steps = steps.reshape(-1, 3)
    found = []
    for i in range(3):
        low = int(table[:, i].min())
        tiles = _distinct_sums(steps[:, i], table[:, i] - low) + low
        is_run = tiles[-1] - tiles[0] == len(tiles) - 1
        found.append(slice(int(tiles[0]), int(tiles[-1]) + 1) if is_run else tiles)
    return tuple(found)


def _steps(count: int, advance: Loop) -> Index:
    return np.arange(count)[:, None] * np.array(advance, np.int64)


def _distinct_sums(left: Index, right: Index) -> Index:
    """The distinct values of `left[i] + right[j]` >= 0, ascending. A table of flags is much faster than sorting."""
    flags = np.zeros(int(left.max()) + int(right.max()) + 1, np.bool_)
    flags[left[:, None] + right] = True
    found: Index = flags.nonzero()[0]
    return found


def _check_distance(accumulators: Index) -> None:
    """The pipeline must not meet an accumulator again within two micro-operations."""
    for distance in range(1, min(MIN_DISTANCE, len(accumulators))):
        if np.any(accumulators[distance:] == accumulators[:-distance]):
            raise CompileError(
                f"an accumulator tile recurs after {distance} micro-operations, at least {MIN_DISTANCE} are needed",
                where="builder",
            )
