"""Cycles, traffic and utilization of a network, operator by operator: what the report shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpsn_tvm.accelerator_report import AcceleratorReport, AcceleratorStep
from lpsn_tvm.targets.vta.isa import INSTRUCTION_BYTES, Load, Store
from lpsn_tvm.targets.vta.network import DeviceStep, HostStep, VtaNetwork
from lpsn_tvm.targets.vta.program import Program, tile_bytes
from lpsn_tvm.targets.vta.simulator import SimulationResult, Timeline, simulate

MODELS = ("rtl", "pynq")


def profile(network: VtaNetwork, models: Sequence[str] = MODELS) -> AcceleratorReport:
    """Simulate every program under each cycle model, without data: cycles do not depend on values.

    Raises
    ------
    VtaProgramError
        A program breaks a rule of the hardware.
    """
    steps: list[AcceleratorStep] = []
    cycles = dict.fromkeys(models, 0)
    for step in network.steps:
        if isinstance(step, HostStep):
            steps.append(AcceleratorStep(step.output, "host", reason=step.reason))
            continue
        results = {model: time_program(step, model) for model in models}
        for model, result in results.items():
            cycles[model] += result.cycles
        steps.extend(_operators(step, results))
    config = network.config
    return AcceleratorReport(
        config=config.name,
        isa_version=config.isa_version,
        clock_mhz=config.clock_mhz,
        macs_per_cycle=config.batch * config.block_in * config.block_out,
        programs=len(network.device_steps),
        peak_arena_bytes=network.peak_arena,
        cycles=cycles,
        steps=tuple(steps),
    )


def time_program(step: DeviceStep, model: str) -> SimulationResult:
    """Cycles and timeline of one program."""
    inputs = {tensor.region: bytes(tensor.layout.size) for tensor in step.inputs}
    return simulate(step.linked, inputs=inputs, model=model, functional=False, timeline=True)


def operator_cycles(timeline: Timeline, total: int) -> list[int]:
    """Cycles from the end of the operator before to its own end; the sum is `total`.

    Operators overlap, so this is what each one adds to the whole.
    """
    starts = [index for index, _ in timeline.marks]
    ends = [int(timeline.end[begin:end].max(initial=0)) for begin, end in zip(starts, [*starts[1:], None], strict=True)]
    ends = [int(end) for end in np.maximum.accumulate(ends)] if ends else []
    if ends:
        ends[-1] = total
    return [end - before for before, end in zip([0, *ends], ends, strict=False)]


def _operators(step: DeviceStep, results: dict[str, SimulationResult]) -> list[AcceleratorStep]:
    cycles = {
        model: operator_cycles(result.timeline, result.cycles) if result.timeline is not None else []
        for model, result in results.items()
    }
    traffic = operator_bytes(step.program)
    return [
        AcceleratorStep(
            op.name,
            "accelerator",
            {model: values[index] for model, values in cycles.items()},
            op.macs,
            traffic[index],
        )
        for index, op in enumerate(step.ops)
    ]


def operator_bytes(program: Program) -> list[int]:
    """Bytes that each operator's instructions move, themselves included."""
    sizes = np.full(len(program.instructions), INSTRUCTION_BYTES, np.int64)
    for index, instruction in enumerate(program.instructions):
        if isinstance(instruction, (Load, Store)):
            sizes[index] += instruction.y_size * instruction.x_size * tile_bytes(instruction, program.config)
    starts = [index for index, _ in program.marks]
    return [int(sizes[begin:end].sum()) for begin, end in zip(starts, [*starts[1:], None], strict=True)]
