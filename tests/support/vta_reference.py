"""A tiny model of the accelerator in numpy: one instruction after the other, one micro-operation after the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from vta_programs import pack, unpack

from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.isa import Alu, Gemm, Instruction, Load, Store, decode, decode_uops
from lpsn_tvm.targets.vta.program import LinkedProgram


class ReferenceMachine:
    """Executes a linked program in program order on a flat memory."""

    def __init__(self, linked: LinkedProgram, inputs: Mapping[str, bytes]) -> None:
        self.linked, self.config = linked, linked.config
        config = linked.config
        size = max(region.addr + region.size for region in linked.regions.values())
        self.dram = np.zeros(size, np.uint8)
        for name, region in linked.regions.items():
            data = inputs.get(name, region.data)
            if data is not None:
                self.dram[region.addr : region.addr + region.size] = np.frombuffer(data, np.uint8)
        self.inp = np.zeros((config.inp_depth, config.batch, config.block_in), np.int64)
        self.wgt = np.zeros((config.wgt_depth, config.block_out, config.block_in), np.int64)
        self.acc = np.zeros((config.acc_depth, config.batch, config.block_out), np.int64)
        self.uop = np.zeros((config.uop_depth, 3), np.int64)

    def run(self) -> dict[str, bytes]:
        for instruction in decode(self.linked.insn, self.config):
            self.step(instruction)
        regions = self.linked.regions.values()
        return {r.name: self.dram[r.addr : r.addr + r.size].tobytes() for r in regions if "w" in r.access}

    def step(self, instruction: Instruction) -> None:
        if isinstance(instruction, Load):
            self.load(instruction)
        elif isinstance(instruction, Store):
            self.store(instruction)
        elif isinstance(instruction, (Gemm, Alu)):
            self.compute(instruction)

    def load(self, i: Load) -> None:
        if i.x_size == 0:
            return
        buffer = {"inp": self.inp, "wgt": self.wgt, "acc": self.acc, "uop": self.uop}[i.memory]
        width = i.x_pad_0 + i.x_size + i.x_pad_1
        rows = i.y_pad_0 + i.y_size + i.y_pad_1
        tiles = np.zeros((rows, width, *buffer.shape[1:]), np.int64)
        for y in range(i.y_size):
            for x in range(i.x_size):
                tiles[i.y_pad_0 + y, i.x_pad_0 + x] = self.tile(i.memory, i.dram + y * i.x_stride + x)
        buffer[i.sram : i.sram + rows * width] = tiles.reshape(rows * width, *buffer.shape[1:])

    def tile(self, memory: str, index: int) -> np.ndarray:
        config: VtaConfig = self.config
        size = getattr(config, f"{memory}_tile_bytes")
        raw = self.dram[index * size : (index + 1) * size].tobytes()
        if memory == "uop":
            return decode_uops(np.frombuffer(raw, np.uint32), config)[0]
        if memory == "acc":
            return np.frombuffer(raw, np.int32).reshape(config.batch, config.block_out)
        shape = (config.batch, config.block_in) if memory == "inp" else (config.block_out, config.block_in)
        return unpack(raw, getattr(config, f"{memory}_bits")).reshape(shape)

    def store(self, i: Store) -> None:
        size = self.config.out_tile_bytes
        for y in range(i.y_size):
            for x in range(i.x_size):
                data = pack(self.acc[i.sram + y * i.x_size + x], self.config.out_bits)
                at = (i.dram + y * i.x_stride + x) * size
                self.dram[at : at + size] = np.frombuffer(data, np.uint8)

    def compute(self, i: Gemm | Alu) -> None:
        for a in range(i.iter_out):
            for b in range(i.iter_in):
                for dst, src, wgt in self.uop[i.uop_begin : i.uop_end]:
                    d, s = dst + a * i.dst_out + b * i.dst_in, src + a * i.src_out + b * i.src_in
                    if isinstance(i, Alu):
                        self.acc[d] = self.alu(i, self.acc[d], np.int64(i.imm) if i.use_imm else self.acc[s])
                    elif i.reset:
                        self.acc[d] = 0
                    else:
                        self.acc[d] += self.inp[s] @ self.wgt[wgt + a * i.wgt_out + b * i.wgt_in].T

    def alu(self, i: Alu, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if i.op == "add":
            return x + y
        if i.op == "shr":
            return x >> y
        return np.minimum(x, y) if i.op == "min" else np.maximum(x, y)
