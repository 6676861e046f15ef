"""Candidates for GPUs: really compiled by nvcc in worker processes, timed against a stand-in for the driver, their
launches run in the emulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import gpu_templates
import numpy as np
import pytest
from cuda_modules import small_network
from fake_driver import FakeDriver

from lpsn_tvm import quant
from lpsn_tvm.errors import ArtifactError, TuningError
from lpsn_tvm.targets import cuda_compile, cuda_driver
from lpsn_tvm.targets.backend import Backend, get_backend
from lpsn_tvm.tuning import build as building
from lpsn_tvm.tuning import cuda_timing, network_timing, timing
from lpsn_tvm.tuning.candidate_file import CandidateFile, random_input
from lpsn_tvm.tuning.measure import KernelMeasurer
from lpsn_tvm.tuning.place import LocalPlace

EXECUTE = "fake_gpu:execute"
LAUNCH_SECONDS = 1e-5
"""By the stand-in's clock."""


@pytest.fixture(scope="module")
def backend() -> Backend:
    return get_backend(f"cuda -arch={gpu_templates.ARCH}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: Any) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def measurer(backend: Backend, library: FakeDriver, monkeypatch: Any) -> Iterator[KernelMeasurer]:
    """Its worker sees the stand-in."""
    monkeypatch.setenv(fake_gpu.LIBRARY, str(library.path))
    made = KernelMeasurer(backend, LocalPlace("cuda", execute=EXECUTE), workers=1)
    yield made
    made.close()


@pytest.fixture
def driver(library: FakeDriver, monkeypatch: Any) -> Iterator[FakeDriver]:
    """The stand-in in this process."""
    library.reset()
    library.forget_source()
    monkeypatch.setattr(cuda_timing, "LEAST_SWEEP_BYTES", 1 << 20)
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library.path))
    _forget()
    yield library
    _forget()


def _forget() -> None:
    cuda_timing._gpu.cache_clear()
    cuda_timing._sweep_area.cache_clear()


@pytest.fixture(scope="module")
def built(tmp_path_factory: Any) -> Any:
    """Files of three configurations in one source, with constants of a network, and that source."""
    folder = tmp_path_factory.mktemp("candidates")
    template = gpu_templates.template(seed=5)
    jobs = [_job(folder, template, name) for name in gpu_templates.TILES]
    sources: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        compiled = cuda_compile.compile_cubin
        patch.setattr(cuda_compile, "compile_cubin", lambda text, *a: sources.append(text) or compiled(text, *a))
        assert building.build(jobs, {"kind": "cuda", "arch": gpu_templates.ARCH}) == [""] * len(jobs)
    (source,) = sources
    files = [CandidateFile.read(Path(job["path"])) for job in jobs]
    launches = [launch for file in files if file.program for launch in file.program.launches]
    return SimpleNamespace(paths=[job["path"] for job in jobs], files=files, source=source, launches=launches)


def _job(folder: Path, template: Any, tile: str) -> dict[str, Any]:
    kernel = template.make({"tile": tile})
    constants = folder / f"{tile}.npz"
    np.savez(constants, *kernel.constants)
    return {
        "remaker": "gpu_templates:remake", "workload": {}, "config": {"tile": tile},
        "path": str(folder / f"{tile}.zip"), "constants": str(constants), "out": dataclasses.asdict(kernel.out),
    }  # fmt: skip


def jobs_of(measurer: KernelMeasurer, *tiles: str) -> list[dict[str, Any]]:
    template = gpu_templates.template()
    return [measurer.job(template.name, template.workload, {"tile": tile}) for tile in tiles]


def test_several_candidates_share_one_source(built: Any) -> None:
    programs = [file.program for file in built.files]
    assert [len(program.launches) for program in programs] == [1, 1, 2], "a second launch adds the sums of a split"
    assert len({program.binary for program in programs}) == 1
    names = {launch.kernel for launch in built.launches}
    assert all(f" {name}(" in built.source for name in names)
    assert len(names) == 4


def test_outputs_equal_the_reference(built: Any, driver: FakeDriver) -> None:
    """Arguments in the kernels' order, grids, workspaces and layouts."""
    driver.run_source(built.source, built.launches)
    x = random_input(built.files[0].inputs[0], None, timing.SEED)
    constants = gpu_templates.constants(5)
    logical = built.files[0].inputs[0].unpack(x)
    want = quant.conv2d(logical, constants["weight"], constants["bias"], constants["scale"], **gpu_templates.ATTRS)
    assert want.min() < 100 < 150 < want.max()
    for file in built.files:
        np.testing.assert_array_equal(timing.load_subject(file).output(), want)
    assert not driver.errors
    assert not driver.violations


def test_a_sample_sweeps_the_cache_writes_inputs_and_takes_events(built: Any, driver: FakeDriver) -> None:
    driver.run_source(built.source, built.launches)
    subject = timing.load_subject(built.files[2])
    subject.sample()
    before = len(driver.calls)
    assert subject.sample() == pytest.approx(2 * LAUNCH_SECONDS)
    assert driver.calls[before:] == [
        *["cuMemcpyDtoDAsync_v2"] * (cuda_timing.SWEEPS + 1), "cuEventRecord", "cuLaunchKernel", "cuLaunchKernel",
        "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime",
    ]  # fmt: skip
    assert not driver.violations


def test_what_a_candidate_took_is_given_back(built: Any, driver: FakeDriver) -> None:
    driver.run_source(built.source, built.launches)
    cuda_timing._sweep_area()
    before = driver.live
    subject = timing.load_subject(built.files[2])
    assert driver.live > before
    del subject
    assert driver.live == before


def test_comparisons_see_a_wrong_configuration(built: Any, driver: FakeDriver) -> None:
    driver.run_source(built.source, built.launches)
    first, second, third = built.files
    constants = bytearray(third.program.constants)
    constants[: len(constants) // 2] = bytes(len(constants) // 2)
    wrong = dataclasses.replace(third, program=dataclasses.replace(third.program, constants=bytes(constants)))
    compared = timing.compare([first, second, wrong], 2)
    assert compared["is_equal"] == [True, True, False]
    seconds = [pytest.approx(count * LAUNCH_SECONDS) for count in (1, 1, 2)]
    assert compared["seconds"] == [[value] * 2 for value in seconds]


def test_whole_networks_are_timed_in_turn(driver: FakeDriver, tmp_path: Path, monkeypatch: Any) -> None:
    network = small_network()
    driver.run_source(network.source, network.program.launches, {port.place for port in network.program.outputs})
    monkeypatch.setattr(network_timing, "MOST", network_timing.LEAST)
    path = str(network.module().save(tmp_path / "net.lpsn"))
    seconds = timing.execute("networks", "cuda", [path, path], 2)["seconds"]
    assert seconds == [[pytest.approx(LAUNCH_SECONDS * len(network.program.launches))] * 2] * 2
    assert not driver.errors


def test_failures_are_told_in_the_drivers_words(built: Any, driver: FakeDriver) -> None:
    driver.fail("cuMemAlloc_v2", 2)
    with pytest.raises(ArtifactError, match=r"out of memory|bytes of device memory are needed"):
        timing.load_subject(built.files[0])
    driver.reset(number=75)
    _forget()
    with pytest.raises(TuningError, match="was compiled for sm_86; Test GPU is sm_75"):
        timing.load_subject(built.files[0])


def test_workers_compile_and_time(measurer: KernelMeasurer) -> None:
    jobs = jobs_of(measurer, "small", "wide")
    assert measurer.build(jobs) == ["", ""]
    for job in jobs:
        program = CandidateFile.read(Path(job["path"])).program
        assert program is not None
        assert program.binary[:4] == b"\x7fELF"
        assert any(program.constants), "weights are not zeros, which a GPU multiplies with less power"
    outcomes = measurer.time([job["path"] for job in jobs])
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert outcomes[0].value == [pytest.approx(LAUNCH_SECONDS)] * len(outcomes[0].value)
    assert measurer.machine.startswith("GPU Test GPU")


def test_one_that_does_not_compile_does_not_cost_the_others(measurer: KernelMeasurer) -> None:
    tiles = ("small", "unknown_function", "unlinked", "wide")
    errors = dict(zip(tiles, measurer.build(jobs_of(measurer, *tiles)), strict=True))
    assert errors["small"] == errors["wide"] == ""
    assert errors["unlinked"] == "does not compile: ValueError: no such configuration"
    assert "nvcc could not compile the kernels" in errors["unknown_function"]
    assert "a_function_that_is_nowhere" in errors["unknown_function"]


def test_another_gpu_than_the_targets_is_refused(library: FakeDriver, monkeypatch: Any) -> None:
    monkeypatch.setenv(fake_gpu.LIBRARY, str(library.path))
    other = KernelMeasurer(get_backend("cuda -arch=sm_90"), LocalPlace("cuda", execute=EXECUTE), workers=1)
    with pytest.raises(TuningError, match=r"tuning for sm_90 needs such a GPU; GPU Test GPU.* is sm_86"):
        other.check_device()
    other.close()


def test_without_a_driver_tuning_says_so(backend: Backend, monkeypatch: Any) -> None:
    monkeypatch.setenv(fake_gpu.LIBRARY, "libcuda_that_is_not_there.so.1")
    lonely = KernelMeasurer(backend, LocalPlace("cuda", execute=EXECUTE), workers=1)
    with pytest.raises(TuningError, match=r"nothing to measure on: .*no CUDA driver on this machine"):
        lonely.check_device()
    lonely.close()
