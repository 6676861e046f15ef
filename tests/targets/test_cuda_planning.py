"""What the plan of a network says about its launches and its memory."""

from __future__ import annotations

from typing import Any

import pytest
from small_graphs import simple_plan

from benchmarks import models as zoo
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.statistics import count_macs
from lpsn_tvm.targets import cuda_planning
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_build import generate
from lpsn_tvm.targets.cuda_planning import Buffer, Plan

NETWORKS: dict[str, dict[str, int]] = {
    "resnet20": {"size": 16},
    "unet": {"size": 16, "base": 8},
    "espcn": {"height": 12, "width": 16},
}


def planned(name: str, batch: int = 1, weight_bits: int = 8) -> tuple[Plan, Any]:
    mod = canonicalize(import_model(load_model(getattr(zoo, name)(**NETWORKS[name]), batch=batch)).mod)
    lowered = fuse_float(lower_to_integer(mod, simple_plan(mod, weight_bits, 8)))
    return generate(cuda_backend({"kind": "cuda", "arch": "sm_80"}), lowered)[1], mod


@pytest.mark.parametrize(("name", "batch"), [("resnet20", 2), ("unet", 1), ("espcn", 1)])
def test_operations_are_those_of_the_network(name: str, batch: int) -> None:
    plan, mod = planned(name, batch)
    assert sum(launch.operations for launch in plan.launches) == 2 * count_macs(mod)


def test_bytes_count_every_buffer_of_a_launch_once() -> None:
    plan, _ = planned("resnet20")
    quantize = plan.launches[0]
    # 3 planes of float32 to 4 channels of uint8, and four numbers for the rounding.
    assert quantize.kernel.startswith("quantize")
    assert quantize.bytes == 16 * 16 * (3 * 4 + 4) + 16
    assert all(launch.bytes == sum(place.size for place in set(launch.arguments)) for launch in plan.launches)


@pytest.mark.parametrize(("name", "batch"), [("resnet20", 4), ("espcn", 1)])
def test_the_arena_is_as_small_as_what_lives_at_once(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[Buffer] = []
    original = cuda_planning.assign_offsets
    monkeypatch.setattr(cuda_planning, "assign_offsets", lambda found: buffers.extend(found) or original(buffers))
    plan, _ = planned(name, batch)
    steps = range(max(buffer.last for buffer in buffers) + 1)
    alive = [sum(-(-b.size // 256) * 256 for b in buffers if b.first <= step <= b.last) for step in steps]
    assert plan.arena_bytes == max(alive)


def test_weights_of_4_bits_occupy_half_the_bytes() -> None:
    eight, four = (weight_bytes(planned("resnet20", weight_bits=bits)[0]) for bits in (8, 4))
    assert abs(four / eight - 0.5) < 0.01


def weight_bytes(plan: Plan) -> int:
    """Of the constants of tensor-core layers, without the small ones beside the weight."""
    places = {place for launch in plan.launches for place in launch.arguments if place.region == "constants"}
    return sum(place.size for place in places if place.size >= 4096)
