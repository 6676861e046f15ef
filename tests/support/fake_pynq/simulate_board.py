"""The fake board's accelerator: reads requests (JSON lines) from standard input, runs them in the simulator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lpsn_tvm.errors import VtaProgramError
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.program import LinkedProgram, LinkedRegion
from lpsn_tvm.targets.vta.simulator import simulate


def run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The memory after a program: files named by their address, as they were given."""
    config = VtaConfig.from_json(request["config"])
    memory = {int(address): (folder / address).read_bytes() for address in request["memory"]}
    start = request["address"]
    for address, data in memory.items():
        if address <= start < address + len(data):
            insn = data[start - address : start - address + 16 * request["count"]]
            holder = address
            break
    else:
        return {"error": f"instructions at {start:#x} lie in no allocated memory"}
    regions = {
        str(address): LinkedRegion(str(address), len(data), data, "rw", address)
        for address, data in memory.items()
        if address != holder
    }
    regions = {name: _aligned(region, config) for name, region in regions.items()}
    try:
        result = simulate(LinkedProgram(config, insn, start, regions), model=None, strict=True)
    except VtaProgramError as error:
        return {"error": str(error)}
    for name, region in regions.items():
        data = memory[int(name)]
        (folder / name).write_bytes(data[: len(data) - region.size] + result.memory[name])
    return {"written": list(regions)}


def _aligned(region: LinkedRegion, config: VtaConfig) -> LinkedRegion:
    """The part of an allocation from the first whole page on: regions start at multiples of tiles."""
    skip = -region.addr % 4096
    assert region.data is not None
    return LinkedRegion(region.name, region.size - skip, region.data[skip:], "rw", region.addr + skip)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), Path(sys.argv[1]))), flush=True)
