"""Kernel tests on a GPU, without one: the way there is the same, its driver is the stand-in."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_executors
import fake_driver
import numpy as np
import pytest
from cuda_kernels import assert_exact
from cuda_modules import small_network
from cuda_programs import run_module
from fake_driver import FakeDriver
from stand_in_gpu import StandInDevice

from benchmarks import kernel_kit
from benchmarks.kernel_device import GuardError, KernelDevice, fitting_arch
from lpsn_tvm.reference import run_reference
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.targets import cuda_driver
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_errors import DriverError


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def fake(compiled: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    compiled.reset(number=90)
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(compiled.path))
    return compiled


@pytest.fixture
def gpu(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDevice]:
    """Tests run on "the GPU", an sm_90."""
    device = StandInDevice(fake)
    monkeypatch.setenv(cuda_executors.TESTS, "gpu")
    monkeypatch.setattr(cuda_executors, "_opened", lambda library: device)
    monkeypatch.setattr(cuda_executors, "_died_in", [])
    monkeypatch.setattr(cuda_executors, "machine_code", lambda source, arch: source.encode())
    yield device
    device.close()


def convolution(arch: str = "sm_80") -> Any:
    """A convolution of two launches with a workspace between them, and a residual."""
    rng = np.random.default_rng(0)
    constants = {
        "weight": rng.integers(-128, 128, (40, 64, 1, 1)).astype(np.int8),
        "bias": rng.integers(-500, 500, 40).astype(np.int32),
        "scale": rng.uniform(1e-3, 2e-3, 40).astype(np.float32),
    }
    attrs = {"strides": (1, 1), "padding": (0, 0, 0, 0), "out_zero_point": 90}
    attrs |= {"residual_multiplier": 0.71, "residual_zero_point": 5}
    arrays = [rng.integers(0, 256, (1, c, 4, 5)).astype(np.uint8) for c in (64, 40)]
    return assert_exact("conv2d", arrays, constants, attrs, arch, Tile(16, 32, 1, 1, 1, 2, 2))


def test_kernels_run_through_the_driver(gpu: StandInDevice) -> None:
    convolution()
    assert gpu.fake.calls.count("cuLaunchKernel") == 2


def test_networks_run_through_the_driver(gpu: StandInDevice) -> None:
    mod = small_network().mod
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 10, 12)).astype(np.float32)}
    (got,) = run_module(cuda_backend({"kind": "cuda", "arch": "sm_86"}), mod, feeds)
    np.testing.assert_array_equal(got, *run_reference(mod, feeds).values())
    assert "cuLaunchKernel" in gpu.fake.calls


DOUBLE = """
extern "C" __global__ void twice(const int* __restrict__ x, int* __restrict__ y) {
  y[threadIdx.x] = 2 * x[threadIdx.x];
}
"""


def test_written_kernels_run_through_the_driver(gpu: StandInDevice) -> None:
    x, y = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    cuda_executors.compile_kernel(DOUBLE, "twice").run_all_orders(1, 32, 0, x, y)
    np.testing.assert_array_equal(y, 2 * x)
    assert gpu.fake.calls.count("cuLaunchKernel") == 1


def test_written_kernels_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_executors.KIT, str(tmp_path))
    x, y = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    cuda_executors.compile_kernel(DOUBLE, "twice")(1, 32, 0, x, y)
    (path,) = kernel_kit.paths(tmp_path)
    case, buffers, expected = kernel_kit.read_case(path)
    assert (case.family, case.shapes) == (kernel_kit.INSTRUCTIONS, "twice")
    np.testing.assert_array_equal(expected, 2 * buffers["argument0"])
    assert (buffers[case.out_name] == kernel_kit.OUT_NUMBER).all(), "the output starts as garbage"


def test_what_a_gpu_cannot_run_is_skipped(gpu: StandInDevice) -> None:
    gpu.device = dataclasses.replace(gpu.device, number=75)
    with pytest.raises(pytest.skip.Exception, match="a kernel for sm_80; this GPU is sm_75"):
        convolution()
    gpu.device = dataclasses.replace(gpu.device, number=90, shared_bytes=1024)
    with pytest.raises(pytest.skip.Exception, match="bytes of shared memory; this GPU has 1024"):
        convolution()


def test_after_a_fault_tests_name_its_test(gpu: StandInDevice) -> None:
    gpu.fake.fail("cuStreamSynchronize", 700)
    with pytest.raises(DriverError, match="error 700"):
        convolution()
    gpu.fake.fail("", 0)
    with pytest.raises(pytest.skip.Exception, match=r"died in .*test_after_a_fault_tests_name_its_test"):
        convolution()


def test_planted_bugs_are_seen(gpu: StandInDevice) -> None:
    """By its name this test stays in the emulation."""
    convolution()
    assert "cuLaunchKernel" not in gpu.fake.calls


class Copier:
    """A GPU whose only kernel copies 64 bytes, `shift` bytes away from where it should."""

    def __init__(self, fake: FakeDriver, shift: int = 0, *, has_guards: bool = True) -> None:
        def launched(name: bytes, sizes: Any, shared: int, values: Any, count: int) -> None:
            ctypes.memmove(values[1] + shift, values[0], 64)

        self.kept = (ctypes.c_char_p * 2)(b"copy=2", None), fake_driver._LAUNCHER(launched)
        fake.library.fake_set_parameter_counts(self.kept[0])
        fake.library.fake_set_launcher(self.kept[1])
        self.device = KernelDevice(has_guards=has_guards)

    def __call__(self, data: np.ndarray) -> np.ndarray:
        out = np.zeros(70, np.uint8)[3:67]
        launch = kernel_kit.KitLaunch("copy", (2, 1, 1), (32, 1, 1), 0, ("from", "to"))
        self.device.run(b"code", [launch], {"from": data, "to": out})
        return out


@pytest.mark.parametrize("has_guards", [True, False])
def test_buffers_come_back(fake: FakeDriver, has_guards: bool) -> None:
    before = fake.live
    copy = Copier(fake, has_guards=has_guards)
    for data in (np.arange(64, dtype=np.uint8), np.arange(96, dtype=np.uint8)[5:69]):
        np.testing.assert_array_equal(copy(data), data)
    copy.device.close()
    assert fake.live == before
    assert not fake.violations


@pytest.mark.parametrize(("shift", "told"), [(1, "0 bytes behind 'to'"), (-3, "3 bytes before 'to'"), (5000, "behind")])
def test_bytes_written_outside_are_seen_and_named(shift: int, told: str, fake: FakeDriver) -> None:
    copy, before = Copier(fake, shift), fake.memory_used
    with pytest.raises(GuardError, match=told):
        copy(np.arange(64, dtype=np.uint8))
    assert fake.memory_used == before, "memory is given back all the same"
    copy.device.close()


def test_memory_is_given_back_after_a_refusal(fake: FakeDriver) -> None:
    copy, before = Copier(fake), fake.memory_used
    fake.fail("cuLaunchKernel", 1)
    with pytest.raises(DriverError, match="error 1"):
        copy(np.arange(64, dtype=np.uint8))
    fake.fail("", 0)
    assert fake.memory_used == before
    copy.device.close()


@pytest.mark.parametrize(
    ("number", "arch"), [(90, "sm_90"), (86, "sm_80"), (89, "sm_89"), (75, None), (100, None)]
)  # fmt: skip
def test_which_machine_code_fits(number: int, arch: str | None) -> None:
    assert fitting_arch(["sm_80", "sm_89", "sm_90"], number) == arch


def test_the_choice_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_executors.TESTS, "GPU")
    with pytest.raises(ValueError, match="'emulation' or 'gpu'"):
        cuda_executors.runs_on_gpu()


def test_recorded_cases_hold_what_the_test_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_executors.KIT, str(tmp_path))
    kernel = convolution()
    (path,) = kernel_kit.paths(tmp_path)
    case, buffers, expected = kernel_kit.read_case(path)
    assert (case.family, case.arch, len(case.launches)) == ("conv2d_mma split", "sm_80", 2)
    assert expected.shape == kernel.out.shape and expected.dtype == kernel.out.dtype
    assert "test_recorded_cases" in case.origin
    assert set(buffers) == {name for launch in case.launches for name in launch.arguments}
    assert kernel_kit.digest(kernel_kit.read_source(tmp_path, case.source)) == case.source
