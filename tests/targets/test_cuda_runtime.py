"""Modules for GPUs without a GPU: files, choice of architecture, errors, and the calls that a run makes, against a
stand-in for the driver whose launches run in the emulation.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver
from integer_network import Builder, residual_network

import lpsn_tvm
from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.reference import run_reference
from lpsn_tvm.report import Report
from lpsn_tvm.targets import cuda_driver
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_artifact import CudaArtifact
from lpsn_tvm.targets.cuda_build import generate
from lpsn_tvm.targets.cuda_program import CudaProgram, best_program
from lpsn_tvm.targets.cuda_tensors import device_input

SHAPE = (1, 3, 10, 12)


@pytest.fixture(scope="module")
def network() -> Any:
    """(integer module, CUDA source, program for sm_86 whose machine code is never looked at)."""
    mod = Builder(SHAPE).build(residual_network)
    source, plan = generate(cuda_backend({"kind": "cuda", "arch": "sm_86"}), mod)
    program = CudaProgram(
        "sm_86", plan.launches, plan.inputs, plan.outputs, plan.arena_bytes, plan.constants, source.source.encode()
    )
    return SimpleNamespace(mod=mod, source=source.source, program=program)


def artifact_of(*programs: CudaProgram) -> CudaArtifact:
    (output,) = programs[0].outputs
    return CudaArtifact(
        inputs=[TensorInfo("x", SHAPE)],
        outputs=[TensorInfo("y", output.shape)],
        recipe=Recipe(target="cuda"),
        report=Report(),
        target="cuda -arch=sm_86",
        programs=programs,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: Any) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(compiled: FakeDriver, network: Any, monkeypatch: Any) -> FakeDriver:
    compiled.reset()
    compiled.run_source(network.source, network.program.launches)
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(compiled.path))
    return compiled


def feed(seed: int = 1, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *SHAPE[1:])).astype(np.float32)


def reference(network: Any, x: np.ndarray) -> np.ndarray:
    (result,) = run_reference(network.mod, {"x": x}).values()
    return result


def test_a_call_equals_the_reference_and_replays_one_graph(network: Any, driver: FakeDriver) -> None:
    module = artifact_of(network.program)
    for seed in (1, 2, 3):
        np.testing.assert_array_equal(module(feed(seed)), reference(network, feed(seed)))
    assert not driver.errors
    assert driver.calls.count("cuGraphLaunch") == 3
    assert driver.calls.count("cuStreamBeginCapture_v2") == 1
    assert driver.calls.count("cuLaunchKernel") == len(network.program.launches)


def test_batches_of_other_sizes_run_in_pieces(network: Any, driver: FakeDriver) -> None:
    x = feed(batch=3)
    result = artifact_of(network.program)(x)
    np.testing.assert_array_equal(result, np.concatenate([reference(network, x[i : i + 1]) for i in range(3)]))


def test_save_and_load_need_no_driver(network: Any, tmp_path: Any) -> None:
    other = dataclasses.replace(network.program, arch="sm_90", has_ptx=True)
    module = artifact_of(network.program, other)
    loaded = lpsn_tvm.load(module.save(tmp_path / "module.lpsn"))
    assert isinstance(loaded, CudaArtifact)
    assert tuple(loaded.programs) == tuple(module.programs)
    assert [program["arch"] for program in loaded.details()["programs"]] == ["sm_86", "sm_90"]


def test_without_a_driver_a_call_says_so(network: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda_that_is_not_there.so.1")
    with pytest.raises(ArtifactError, match=r"no CUDA driver on this machine .*building and loading do not"):
        artifact_of(network.program)(feed())


def test_an_unfit_gpu_is_named(network: Any, driver: FakeDriver) -> None:
    driver.reset(number=75)
    with pytest.raises(ArtifactError, match="compiled for sm_86; Test GPU is sm_75"):
        artifact_of(network.program)(feed())
    driver.reset(devices=0)
    with pytest.raises(ArtifactError, match="there is no GPU 0; the driver sees 0"):
        artifact_of(network.program)(feed())


def test_failures_of_the_driver_are_told_in_its_words(network: Any, driver: FakeDriver) -> None:
    driver.fail("cuMemAlloc_v2", 2)
    with pytest.raises(ArtifactError, match="cuMemAlloc_v2: the CUDA driver reports error 2, out of memory"):
        artifact_of(network.program)(feed())


def test_memory_is_given_back(network: Any, driver: FakeDriver) -> None:
    before = driver.allocations
    module = artifact_of(network.program)
    module(feed())
    assert driver.allocations > before
    module.runner().close()
    assert driver.allocations == before
    released = {"cuGraphExecDestroy", "cuModuleUnload", "cuStreamDestroy_v2"}
    assert released <= set(driver.calls)


def test_threads_take_turns(network: Any, driver: FakeDriver) -> None:
    module = artifact_of(network.program)
    feeds = [feed(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(module, feeds))
    for x, result in zip(feeds, results, strict=True):
        np.testing.assert_array_equal(result, reference(network, x))
    assert driver.calls.count("cuModuleLoadData") == 1, "the first calls, too"


def test_benchmark_takes_time_from_events(network: Any, driver: FakeDriver) -> None:
    module = artifact_of(network.program)
    module.prepare()
    assert module.benchmark(repeats=3, warmup=1) == 0.25
    assert driver.calls.count("cuGraphLaunch") == driver.calls.count("cuEventElapsedTime") == 4


class DeviceArray:
    """A tensor as cupy makes them: host memory here, since the stand-in's device memory is that."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = self.array.__array_interface__
        return {**{key: interface[key] for key in ("shape", "typestr", "strides", "data")}, "version": 3}


def empty(shape: tuple[int, ...], dtype: str) -> DeviceArray:
    return DeviceArray(np.empty(shape, dtype))


def test_tensors_on_the_device_are_read_in_place(network: Any, driver: FakeDriver, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "some_gpu_library", SimpleNamespace(empty=empty))
    monkeypatch.setattr(DeviceArray, "__module__", "some_gpu_library")
    module = artifact_of(network.program)
    module.prepare()
    copies = driver.calls.count("cuMemcpyHtoDAsync_v2")
    x = DeviceArray(feed(5))
    for _ in range(2):
        result = module(x)
        np.testing.assert_array_equal(result.array, reference(network, x.array))
    assert not driver.errors
    assert driver.calls.count("cuMemcpyHtoDAsync_v2") == copies, "nothing came from the host"
    assert driver.calls.count("cuStreamBeginCapture_v2") == 2, "one graph for each set of addresses"
    with pytest.raises(LpsnError, match=r"input 'x': is float32\[2, 3, 10, 12\]; on the GPU exactly float32\[1"):
        module(DeviceArray(feed(batch=2)))
    with pytest.raises(LpsnError, match="is not contiguous"):
        module(DeviceArray(np.asfortranarray(feed())))


class DlpackArray:
    """A tensor that offers DLPack only; its capsule is numpy's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int | None = None) -> Any:
        assert stream == 1
        return self.array.__dlpack__()


def test_tensors_with_dlpack_only() -> None:
    array = feed()
    found = device_input(DlpackArray(array))
    assert found is not None
    assert (found.address, found.shape, found.dtype) == (array.ctypes.data, SHAPE, "float32")
    assert found.is_contiguous
    turned = device_input(DlpackArray(array.transpose(0, 2, 3, 1)))
    assert turned is not None and not turned.is_contiguous
    assert device_input(array) is None


@pytest.mark.parametrize(
    ("number", "arch"),
    [(75, None), (80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "sm_90"), (120, "sm_90")],
)
def test_the_best_program_is_chosen(network: Any, number: int, arch: str | None) -> None:
    programs = [
        dataclasses.replace(network.program, arch="sm_80"),
        dataclasses.replace(network.program, arch="sm_90", has_ptx=True),
    ]
    best = best_program(programs, number)
    assert (best and best.arch) == arch
