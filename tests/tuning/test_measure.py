"""Building and timing candidates for CPUs: what MetaSchedule is given, what faulty candidates come to, comparisons."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_templates
import numpy as np
import pytest
from processes import gone, numbers_in

from lpsn_tvm.errors import TuningError
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_int8 import conv2d
from lpsn_tvm.schedules.template import Config, Template
from lpsn_tvm.targets.backend import Backend, get_backend
from lpsn_tvm.tuning.build import input_range
from lpsn_tvm.tuning.candidate_file import CandidateFile, random_input
from lpsn_tvm.tuning.measure import BUILD_SECONDS, RUN_SECONDS, KernelMeasurer, measurer_for
from lpsn_tvm.tuning.place import LocalPlace
from lpsn_tvm.tuning.space import annotate, placeholder


@pytest.fixture(scope="module")
def backend() -> Backend:
    return get_backend("llvm")


@pytest.fixture(scope="module")
def measurer(backend: Backend) -> Iterator[KernelMeasurer]:
    made = KernelMeasurer(backend, LocalPlace("llvm"), workers=1)
    yield made
    made.close()


def convolution(backend: Backend, seed: int = 0) -> Template:
    """A layer with scales of its own, whose output neither vanishes nor saturates."""
    generator = np.random.default_rng(seed)
    constants = {
        "weight": generator.integers(-127, 128, (40, 24, 3, 3)).astype(np.int8),
        "bias": generator.integers(-500, 500, 40).astype(np.int32),
        "scale": generator.uniform(0.5, 1.5, 40).astype(np.float32) * np.float32(2e-4),
    }
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "x_zero_point": 3, "out_zero_point": 128}
    kernel = conv2d((TensorSpec((1, 24, 13, 9), "uint8", 16),), constants, attrs, backend.geometry)
    assert kernel is not None and kernel.template is not None
    return kernel.template


def candidate(template: Template, config: Config, backend: Backend) -> Any:
    """The module that MetaSchedule hands to a builder."""
    from tvm import s_tir

    sch = s_tir.Schedule(placeholder(template, backend.device))
    annotate(sch, template, config)
    return sch.mod


def build(measurer: KernelMeasurer, template: Template, configs: list[Config]) -> list[Any]:
    from tvm.s_tir import meta_schedule as ms

    modules = [candidate(template, config, measurer.backend) for config in configs]
    return list(measurer.builder().build([ms.builder.BuilderInput(m, measurer.backend.target) for m in modules]))


def run(measurer: KernelMeasurer, paths: list[str]) -> list[Any]:
    from tvm.s_tir import meta_schedule as ms

    inputs = [ms.runner.RunnerInput(path, "llvm", []) for path in paths]
    return [future.result() for future in measurer.runner().run(inputs)]


def faulty(*modes: str) -> list[Config]:
    return [{"mode": mode} for mode in modes]


def test_candidates_are_built_and_timed_through_metaschedule(measurer: KernelMeasurer, backend: Backend) -> None:
    template = convolution(backend)
    configs = list(template.configs())[:3]
    built = build(measurer, template, configs)
    assert [result.error_msg for result in built] == [None] * 3
    assert len({Path(result.artifact_path).parent for result in built}) == 3, "MetaSchedule removes the folder"
    for result in run(measurer, [result.artifact_path for result in built]):
        assert result.error_msg is None
        (seconds,) = map(float, result.run_secs)
        assert 1e-7 < seconds < 1


def test_a_file_holds_the_real_kernel(measurer: KernelMeasurer, backend: Backend) -> None:
    template = convolution(backend)
    (built,) = build(measurer, template, [template.default])
    file = CandidateFile.read(Path(built.artifact_path))
    kernel = template.kernel()
    assert [array.shape for array in file.constants] == [array.shape for array in kernel.constants]
    assert [spec.memory_shape for spec in file.inputs] == [spec.memory_shape for spec in kernel.inputs]
    assert file.constants[0].any(), "weights are not zeros, which some devices multiply faster"
    assert file.library[:4] == b"\x7fELF"


def test_faulty_candidates_are_failed_trials(measurer: KernelMeasurer) -> None:
    modes = ("good", "raises", "ends_the_compiler", "crashes", "unlinked", "same")
    built = build(measurer, faulty_templates.template(), faulty(*modes))
    errors = dict(zip(modes, [result.error_msg for result in built], strict=True))
    assert errors["raises"] == "does not compile: ValueError: cannot be made"
    assert str(errors["ends_the_compiler"]).startswith("does not compile: crashed: SIGABRT")
    done = {mode: result.artifact_path for mode, result in zip(modes, built, strict=True) if not result.error_msg}
    assert list(done) == ["good", "crashes", "unlinked", "same"]
    results = dict(zip(done, run(measurer, list(done.values())), strict=True))
    assert str(results["crashes"].error_msg).startswith("crashed: SIGABRT")
    assert results["unlinked"].error_msg
    assert results["good"].run_secs and results["same"].run_secs


def test_hanging_candidates_are_failed_trials(backend: Backend) -> None:
    measurer = KernelMeasurer(backend, LocalPlace("llvm"), workers=1)
    template = faulty_templates.template()
    measurer.build_seconds = 0.5
    (stopped,) = build(measurer, template, faulty("stops_the_compiler"))
    assert stopped.error_msg == "does not compile: timed out after 0.5 s"
    measurer.build_seconds = BUILD_SECONDS
    hangs, good = build(measurer, template, faulty("hangs", "good"))
    measurer.run_seconds = 0.5
    assert run(measurer, [hangs.artifact_path])[0].error_msg == "timed out after 0.5 s"
    measurer.run_seconds = RUN_SECONDS
    assert run(measurer, [good.artifact_path])[0].run_secs
    measurer.close()


def test_configurations_of_a_layer_compute_the_same(measurer: KernelMeasurer, backend: Backend) -> None:
    template = convolution(backend)
    configs = [template.default, *list(template.configs())[::40]]
    compared = measurer.compare(template, configs, 3)
    assert compared.is_equal == (True,) * len(configs)
    assert compared.errors == ("",) * len(configs)
    assert [len(times) for times in compared.seconds] == [3] * len(configs)
    assert compared.ratio(0) == 1.0


def test_a_wrong_configuration_is_seen(measurer: KernelMeasurer) -> None:
    compared = measurer.compare(faulty_templates.template(), faulty("good", "wrong", "same"), 2)
    assert compared.is_equal == (True, False, True)


def test_comparisons_use_the_constants_of_the_network(
    measurer: KernelMeasurer, backend: Backend, monkeypatch: Any
) -> None:
    """A configuration that packs its weights wrongly is right on the weights of a template made again."""
    template = convolution(backend)
    other = convolution(backend, seed=1)
    second = next(config for config in template.configs() if config != template.default)

    def make(config: Config) -> Any:
        return (template if config == template.default else other).maker(config)

    mixed = dataclasses.replace(template, maker=make)
    assert measurer.compare(mixed, [template.default, second], 1).is_equal == (True, False)


def test_a_crash_in_a_comparison_costs_one_configuration(measurer: KernelMeasurer) -> None:
    modes = ("good", "crashes", "raises", "same")
    compared = measurer.compare(faulty_templates.template(), faulty(*modes), 2)
    assert compared.is_equal == (True, False, False, True)
    assert [bool(times) for times in compared.seconds] == [True, False, False, True]
    assert compared.errors[1].startswith("crashed: SIGABRT")
    assert compared.errors[2].startswith("does not compile")


def test_without_the_first_nothing_is_equal(measurer: KernelMeasurer) -> None:
    compared = measurer.compare(faulty_templates.template(), faulty("raises", "good"), 1)
    assert compared.is_equal == (False, False)


def test_other_constants_than_the_networks_are_refused(measurer: KernelMeasurer) -> None:
    template = faulty_templates.template()
    kernel = template.kernel()
    longer = dataclasses.replace(
        template, maker=lambda config: dataclasses.replace(kernel, constants=(np.zeros(2, np.int32),))
    )
    (error,) = measurer.compare(longer, faulty("good"), 1).errors
    assert "other constants" in error


def test_the_machine_is_named_and_checked(backend: Backend, measurer: KernelMeasurer) -> None:
    assert measurer.machine.startswith("CPU ")
    measurer.check_device()
    found = dict(measurer.describe(), features=["sse2"])
    stranger = KernelMeasurer(backend, LocalPlace("llvm"), workers=1)
    stranger._description = dict(found, machine="riscv64")
    with pytest.raises(TuningError, match="is of another architecture"):
        stranger.check_device()
    stranger._description = found
    with pytest.raises(TuningError, match=r"needs CPU features that CPU .* lacks: .*avx"):
        stranger.check_device()
    stranger.close()


def test_backends_without_templates_are_refused() -> None:
    with pytest.raises(TuningError, match="kernels of vta are not tuned; what can be: llvm, cuda"):
        measurer_for(get_backend("vta"))


def test_closing_removes_files(backend: Backend) -> None:
    measurer = KernelMeasurer(backend, LocalPlace("llvm"), workers=1)
    path = Path(measurer.job("conv2d_int8", {}, {})["path"])
    assert path.parent.is_dir()
    measurer.close()
    assert not path.parent.parent.exists()


def test_an_interrupt_goes_through_compiled_code(measurer: KernelMeasurer, monkeypatch: Any) -> None:
    """MetaSchedule calls builder and runner from C++."""
    template = faulty_templates.template()

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(measurer, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(measurer, template, faulty("good"))
    monkeypatch.setattr(measurer, "time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(measurer, ["file"])


PROGRAM = """
import os, sys, threading, time
import faulty_templates
from lpsn_tvm.targets.backend import get_backend
from lpsn_tvm.tuning.measure import KernelMeasurer
from lpsn_tvm.tuning.place import LocalPlace

def children():
    return [int(n) for n in os.listdir("/proc") if n.isdigit() and parent(n) == os.getpid()]

def parent(number):
    try:
        return int(open(f"/proc/{number}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return 0

def tell():
    while len(children()) < 2:
        time.sleep(0.02)
    time.sleep(0.5)
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(" ".join(map(str, children())) + "\\n")
    os.rename(sys.argv[1] + ".new", sys.argv[1])

measurer = KernelMeasurer(get_backend("llvm"), LocalPlace("llvm"), workers=1)
template = faulty_templates.template()
jobs = [measurer.job(template.name, template.workload, {"mode": mode}) for mode in ("hangs", "stops_the_compiler")]
measurer.build(jobs[:1])
threading.Thread(target=tell, daemon=True).start()
threading.Thread(target=measurer.time, args=([jobs[0]["path"]],), daemon=True).start()
measurer.build(jobs[1:])
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["SIGINT", "SIGKILL"]
)
def test_no_process_is_left_after_an_interrupted_run(tmp_path: Path, number: signal.Signals) -> None:
    """While a compiler and a kernel hang."""
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "numbers")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "support")]),
            "TMPDIR": str(tmp_path),
        },
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    numbers = numbers_in(tmp_path / "numbers")
    assert len(numbers) == 2
    parent.send_signal(number)
    parent.wait(60)
    assert gone(numbers)


def test_workloads_are_plain_json(backend: Backend) -> None:
    """They travel to workers and servers."""
    workload = convolution(backend).workload
    assert json.loads(json.dumps(workload)) is not None


@pytest.mark.parametrize(
    ("workload", "limits"),
    [
        ({}, None),
        ({"input_range": [-3, 5]}, (-3, 5)),
        ({"geometry": {"in_bits": 4}}, (0, 15)),
        ({"geometry": {"in_bits": 8}}, None),
    ],
    ids=["all", "range", "bits", "bytes"],
)
def test_inputs_are_what_the_kernel_is_made_for(workload: dict[str, Any], limits: tuple[int, int] | None) -> None:
    found = input_range({"workload": workload})
    assert found == limits
    x = random_input(TensorSpec((1, 5, 40, 40), "uint8" if not limits or limits[0] >= 0 else "int8", 16), found, 0)
    assert (int(x.min()), int(x.max())) == (limits or (0, 255))
    assert len(np.unique(x[..., 5:])) > 5, "lanes beyond the channels are not zeros"
