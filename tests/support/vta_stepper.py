"""The cycle model once more, cycle by cycle in plain Python: slow, and nothing like the event-driven one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lpsn_tvm.targets.vta.cycle_model import CycleModel
from lpsn_tvm.targets.vta.isa import Alu, Gemm, Instruction, Load, Store, decode
from lpsn_tvm.targets.vta.program import LinkedProgram

LOAD, COMPUTE, STORE = range(3)
# (unit, flag) -> (from, to) of the token queue.
QUEUES = {
    **{(LOAD, "next"): (LOAD, COMPUTE), (COMPUTE, "prev"): (COMPUTE, LOAD), (COMPUTE, "next"): (COMPUTE, STORE)},
    (STORE, "prev"): (STORE, COMPUTE),
}


def unit_of(instruction: Instruction) -> int:
    if isinstance(instruction, Store):
        return STORE
    return LOAD if isinstance(instruction, Load) and instruction.memory in ("inp", "wgt") else COMPUTE


@dataclass
class Unit:
    todo: deque[int] = field(default_factory=deque)
    dispatched: int = 0
    ends: list[int] = field(default_factory=list)
    busy: bool = False
    free: int = 0
    start: int = 0
    end: int | None = None
    bursts: deque[int] = field(default_factory=deque)
    request: int = 0
    words: int = 0
    arrivals: deque[int] = field(default_factory=lambda: deque([-2], 2))
    pads: int = 0
    padded: int = 0


class Stepper:
    """Start and end of every instruction of a program."""

    def __init__(self, linked: LinkedProgram, model: CycleModel) -> None:
        self.linked, self.model, self.config = linked, model, linked.config
        self.code = decode(linked.insn, linked.config)
        self.word = (1 << linked.config.log_bus_width) // 8
        self.units = [Unit() for _ in range(3)]
        for index, instruction in enumerate(self.code):
            self.units[unit_of(instruction)].todo.append(index)
        self.visible: dict[int, int] = {}
        self.tokens: dict[tuple[int, int], deque[int]] = {queue: deque() for queue in QUEUES.values()}
        # Bursts on the bus: owner (-1 fetch, else unit), accepted, words left. Fetch: next chunk, when to dispatch.
        self.bus: deque[list[int]] = deque()
        self.bus_word = -(10**9)
        self.next, self.chunk = 0, 0
        self.fetch_request: int | None = 2
        self.fetch_bursts = self.chunk_bursts()
        self.dispatch: int | None = None
        self.times: dict[int, tuple[int, int]] = {}

    def run(self) -> list[tuple[int, int]]:
        cycle = 0
        while len(self.times) < len(self.code):
            self.finish(cycle)
            self.begin(cycle)
            self.feed(cycle)
            was_last = self.deliver(cycle)
            self.accept(cycle, was_last)
            cycle += 1
        return [self.times[index] for index in range(len(self.code))]

    def pieces(self, addr: int, size: int) -> list[int]:
        """Words of each burst of one row."""
        result, at = [], addr
        while at < addr + size:
            end = min(addr + size, at - at % self.model.burst_bytes + self.model.burst_bytes)
            result.append(-(-end // self.word) - at // self.word)
            at = end
        return result

    def rows(self, i: Load | Store, size: int) -> deque[int]:
        every = [self.pieces((i.dram + y * i.x_stride) * size, i.x_size * size) for y in range(i.y_size)]
        return deque(words for row in every for words in row)

    def chunk_bursts(self) -> deque[int]:
        self.chunk = min(len(self.code), self.next + self.model.fetch_chunk)
        return deque(self.pieces(self.linked.insn_addr + 16 * self.next, 16 * (self.chunk - self.next)))

    def finish(self, cycle: int) -> None:
        for number, unit in enumerate(self.units):
            if not unit.busy or unit.end != cycle:
                continue
            index = unit.todo.popleft()
            for side in ("prev", "next"):
                if getattr(self.code[index], f"push_{side}"):
                    self.tokens[QUEUES[number, side]].append(cycle + self.model.token_latency)
            self.times[index] = (unit.start, cycle)
            unit.ends.append(cycle)
            unit.busy, unit.free = False, cycle + self.model.idle

    def begin(self, cycle: int) -> None:
        for number, unit in enumerate(self.units):
            if unit.busy or not unit.todo or cycle < unit.free or self.visible.get(unit.todo[0], cycle + 1) > cycle:
                continue
            code: Any = self.code[unit.todo[0]]
            sides = [side for side in ("prev", "next") if getattr(code, f"pop_{side}")]
            waits = [self.tokens[QUEUES[number, side][::-1]] for side in sides]
            if any(not queue or queue[0] > cycle for queue in waits):
                continue
            for queue in waits:
                queue.popleft()
            unit.busy, unit.start, unit.end = True, cycle, self.fixed_end(code, cycle)
            if unit.end is None:
                unit.bursts = self.rows(code, getattr(self.config, f"{code.memory}_tile_bytes"))
                unit.request, unit.words = cycle + self.model.load_start + code.y_pad_0, sum(unit.bursts)
                height = code.y_pad_0 + code.y_size + code.y_pad_1
                unit.pads = height * (code.x_pad_0 + code.x_size + code.x_pad_1) - code.y_size * code.x_size
                unit.padded, unit.arrivals = 0, deque([-2], 2)

    def fixed_end(self, code: Any, cycle: int) -> int | None:
        model = self.model
        if isinstance(code, (Gemm, Alu)):
            count = (code.uop_end - code.uop_begin) * code.iter_out * code.iter_in
            slow = 1 if isinstance(code, Gemm) else model.alu_immediate if code.use_imm else model.alu_tensor
            return cycle + model.compute_overhead + count * slow
        if isinstance(code, Store) and code.x_size:
            line = max(1, self.config.out_tile_bytes // self.word // self.config.batch)
            bursts = [max(1, words // line) for words in self.rows(code, self.config.out_tile_bytes)]
            beat = max(line + model.store_tile, line * model.word_cycles)
            around = model.store_command + model.store_response + line * model.word_cycles
            return cycle + sum(around + (lines - 1) * beat for lines in bursts)
        return None if isinstance(code, Load) and code.x_size else cycle + model.nop

    def feed(self, cycle: int) -> None:
        """Fetch hands one instruction per cycle to its unit."""
        if self.dispatch is None or cycle < self.dispatch:
            return
        unit = self.units[unit_of(self.code[self.next])]
        # The queue gives an instruction's place free one cycle after its last one.
        retired = len(unit.ends) - (cycle in unit.ends[-1:])
        if unit.dispatched - retired >= self.model.command_queue:
            return
        unit.dispatched += 1
        self.visible[self.next] = cycle + 1
        self.next += 1
        if self.next == self.chunk:
            self.dispatch = None
            self.fetch_bursts = self.chunk_bursts()
            self.fetch_request = cycle + 3 if self.fetch_bursts else None

    def deliver(self, cycle: int) -> bool:
        """One word may cross the bus; its client has it a cycle later. True: it was the last one of a burst."""
        for unit in self.units:
            if unit.busy and unit.end is None:
                self.pad(unit, cycle)
        if not self.bus:
            return False
        head = self.bus[0]
        if cycle < head[1] + self.model.read_latency - 1 or cycle - self.bus_word < self.model.word_cycles:
            return False
        self.bus_word = cycle
        head[2] -= 1
        if head[0] < 0:
            waiting = self.fetch_bursts or any(burst[0] < 0 for burst in list(self.bus)[1:])
            if head[2] == 0 and not waiting:
                self.dispatch = cycle + 2
        else:
            unit = self.units[head[0]]
            unit.words -= 1
            unit.arrivals.append(cycle + 1)
            self.pad(unit, -1)
        if head[2] == 0:
            self.bus.popleft()
            return True
        return False

    def pad(self, unit: Unit, cycle: int) -> None:
        """Padding takes the cycles in which no word is written; the load ends after both."""
        if unit.pads and cycle > unit.start + self.model.padding_start and cycle - 1 not in unit.arrivals:
            unit.pads, unit.padded = unit.pads - 1, cycle + 1
        if unit.words == 0 and unit.pads == 0:
            unit.end = max(unit.arrivals[-1] + self.model.load_end, unit.padded)

    def accept(self, cycle: int, was_last: bool) -> None:
        if was_last or len(self.bus) >= self.model.outstanding:
            return
        if self.fetch_bursts and self.fetch_request is not None and self.fetch_request <= cycle:
            self.bus.append([-1, cycle, self.fetch_bursts.popleft()])
            self.fetch_request = cycle + self.model.command_interval
            return
        compute = self.units[COMPUTE]
        uop_first = compute.busy and getattr(self.code[compute.todo[0]], "memory", "") == "uop"
        for number in (COMPUTE, LOAD) if uop_first else (LOAD, COMPUTE):
            unit = self.units[number]
            if unit.busy and unit.bursts and unit.request <= cycle:
                self.bus.append([number, cycle, unit.bursts.popleft()])
                unit.request = cycle + self.model.command_interval
                return
