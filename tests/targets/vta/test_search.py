"""Schedule search: never worse than the default, deterministic, remembered, and right about what it promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from vta_tile_ops import check, conv_op

from lpsn_tvm.errors import CompileError, TargetError
from lpsn_tvm.schedules.vta.emit import Schedule, default_schedule, fits
from lpsn_tvm.schedules.vta.ops import Gemm, Scalar, Step, Store, TileOp
from lpsn_tvm.targets.vta import search
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.cycle_model import cycle_model
from lpsn_tvm.targets.vta.neighbours import neighbours, normalized, seeds, useful_sizes
from lpsn_tvm.targets.vta.schedule_cache import ScheduleCache
from lpsn_tvm.targets.vta.search import find_schedule, time_schedule
from lpsn_tvm.targets.vta.search_key import canonical, search_key

CONFIG = PRESETS["pynq"]
LAYER = conv_op(inputs=4, outputs=4, size=(14, 14))


def moved(op: TileOp) -> TileOp:
    """The same operator with another name and clamp, in other regions, at other addresses."""
    steps: list[Step] = []
    for step in op.steps:
        if isinstance(step, Gemm):
            source = replace(step.source, region="arena", base=step.source.base + 64)
            steps.append(replace(step, source=source, weights="weights", weight_base=7))
        elif isinstance(step, Store):
            steps.append(replace(step, plane=replace(step.plane, region="arena", base=4096)))
        elif step == Scalar("min", 127):
            steps.append(Scalar("min", 6))
        else:
            steps.append(step)
    return replace(op, name="elsewhere", steps=tuple(steps), macs=5)


@pytest.mark.parametrize("model", ["pynq", "rtl"])
def test_search_is_no_worse_than_the_default_and_says_what_it_costs(model: str) -> None:
    result = find_schedule(LAYER, CONFIG, model=model, cache=False, budget_seconds=1.0)
    default = time_schedule(LAYER, default_schedule(LAYER, CONFIG), CONFIG, model).cycles
    assert result.default_cycles == default
    assert result.bound <= result.cycles <= default
    assert result.cycles == time_schedule(LAYER, result.schedule, CONFIG, model).cycles
    assert result.candidates_tried > 1


def test_the_found_program_computes_the_layer() -> None:
    result = find_schedule(LAYER, CONFIG, cache=False, budget_seconds=0.5)
    check(LAYER, result.schedule, CONFIG)


def test_without_time_it_is_the_default() -> None:
    result = find_schedule(LAYER, CONFIG, cache=False, budget_seconds=0.0)
    assert result.candidates_tried == 1
    assert result.cycles == result.default_cycles


def test_progress_only_gets_better() -> None:
    lines: list[str] = []
    find_schedule(LAYER, CONFIG, cache=False, budget_seconds=0.5, progress=lines.append)
    cycles = [int(line.split()[0]) for line in lines]
    assert cycles == sorted(cycles, reverse=True)


def test_the_cache_answers_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_schedule(LAYER, CONFIG, cache=tmp_path, budget_seconds=0.3)
    assert not first.is_cached
    again = find_schedule(moved(LAYER), CONFIG, cache=tmp_path, budget_seconds=0.3)
    assert again == replace(first, is_cached=True)
    (entry,) = tmp_path.iterdir()
    for damage in ("{", '{"format": 1}', entry.read_text().replace('"tile_h"', '"tile_x"')):
        entry.write_text(damage)
        found = find_schedule(LAYER, CONFIG, cache=tmp_path, budget_seconds=0.0)
        assert not found.is_cached
        assert found.schedule == normalized(default_schedule(LAYER, CONFIG), LAYER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    find_schedule(LAYER, CONFIG, budget_seconds=0.0)
    assert len(list((tmp_path / "home" / "lpsn_tvm" / "vta").iterdir())) == 1


def test_a_cached_schedule_that_does_not_fit_is_searched_again(tmp_path: Path) -> None:
    key = search_key(canonical(LAYER), CONFIG, cycle_model("pynq"))
    result = find_schedule(LAYER, CONFIG, cache=False, budget_seconds=0.0)
    huge = replace(result, schedule=Schedule(tile_co=4000, tile_h=4000, tile_w=4000, tile_b=4000, tile_ci=4000))
    large = conv_op(inputs=4, outputs=32, size=(28, 28))
    assert not fits(large, huge.schedule, CONFIG)
    ScheduleCache(tmp_path).write(search_key(canonical(large), CONFIG, cycle_model("pynq")), huge.to_json())
    assert not find_schedule(large, CONFIG, cache=tmp_path, budget_seconds=0.0).is_cached
    assert key != search_key(canonical(large), CONFIG, cycle_model("pynq"))


def test_the_key_knows_what_matters() -> None:
    key = search_key(canonical(LAYER), CONFIG, cycle_model("pynq"))
    assert key == search_key(canonical(moved(LAYER)), CONFIG, cycle_model("pynq"))
    assert key == search_key(canonical(LAYER), replace(CONFIG, clock_mhz=90.0), cycle_model("pynq"))
    assert key != search_key(canonical(LAYER), CONFIG, cycle_model("rtl"))
    assert key != search_key(canonical(LAYER), PRESETS["pynq-i4"], cycle_model("pynq"))
    assert key != search_key(canonical(conv_op(inputs=4, outputs=4, size=(14, 15))), CONFIG, cycle_model("pynq"))


def test_an_operator_in_one_region_keeps_its_operands_apart() -> None:
    """Residual input and convolution input in one arena are two regions of the canonical form."""
    steps = [step for step in canonical(moved(conv_op(residual=True))).steps if isinstance(step, Gemm)]
    assert steps[0].source.region == steps[1].source.region
    apart = replace(steps[1].source, region="arena", base=99)
    other = canonical(replace(LAYER, steps=(steps[0], replace(steps[1], source=apart), *LAYER.steps[1:])))
    sources = [step.source for step in other.steps if isinstance(step, Gemm)]
    assert sources[0].region != sources[1].region
    assert {source.base for source in sources} == {0}


@pytest.mark.parametrize(
    "op",
    [
        conv_op(batches=2, inputs=3, outputs=3, first_input=(0, 1, 2), fan_in=1, size=(9, 9)),
        conv_op(inputs=2, outputs=2, size=(7, 7), residual=True),
        conv_op(inputs=20, outputs=1, size=(1, 1), kernel=(1, 1), padding=(0, 0)),
        conv_op(inputs=1, outputs=2, size=(5, 5), kernel=(2, 2), strides=(2, 2), padding=(0, 0), transposed=True),
    ],
    ids=["depthwise", "residual", "dense", "transposed"],
)
@pytest.mark.parametrize("name", ["pynq", "pynq-4x8", "pynq-i4"])
def test_every_kind_of_operator(op: TileOp, name: str) -> None:
    config = PRESETS[name]
    result = find_schedule(op, config, cache=False, budget_seconds=0.15)
    assert result.bound <= result.cycles <= result.default_cycles
    check(op, result.schedule, config, interleavings=0)


def test_seeds_and_neighbours_are_in_range() -> None:
    found = list(seeds(canonical(LAYER), CONFIG))
    assert found
    assert all(fits(LAYER, schedule, CONFIG) for schedule in found)
    near = set(neighbours(found[0], LAYER))
    assert found[0] not in near
    assert all(1 <= schedule.tile_h <= 14 and 1 <= schedule.tile_co <= 4 for schedule in near)
    assert useful_sizes(7) == (1, 2, 3, 4, 7)


def test_normalized_schedules_mean_the_same_program() -> None:
    for schedule in (
        Schedule(tile_co=9, tile_h=5, tile_w=99, tile_ci=3, order="spatial"),
        Schedule(tile_co=2, tile_h=5, tile_w=14, threads=1, thread_axis="oc"),
        Schedule(tile_co=2, tile_h=14, tile_w=14, order="spatial", thread_axis="oc"),
    ):
        same = normalized(schedule, LAYER)
        programs = [search.program_of(canonical(LAYER), s, CONFIG).insn for s in (schedule, same)]
        assert programs[0] == programs[1]


def test_bad_input_is_named() -> None:
    with pytest.raises(TargetError, match="model"):
        find_schedule(LAYER, CONFIG, model="fpga", cache=False)
    kernel = conv_op(inputs=1, outputs=1, size=(40, 40), kernel=(40, 40), padding=(0, 0))
    with pytest.raises(CompileError, match=r"WGT|INP"):
        find_schedule(kernel, CONFIG, cache=False)
