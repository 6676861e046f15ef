"""The same promises as on the stand-in, on a real GPU where there is one; how its launches are compared with the
emulation is checked everywhere.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from cuda_modules import SHAPE, SmallNetwork, feed
from fake_driver import FakeDriver
from gpu_steps import first_difference

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_build import compile_cuda, generate
from lpsn_tvm.targets.cuda_driver import Driver
from lpsn_tvm.targets.cuda_graphs import KEPT_GRAPHS


def test_launches_are_compared_with_the_emulation(network: SmallNetwork, driver: FakeDriver) -> None:
    runner = network.module().runner()
    assert first_difference(runner, network.source, [feed()]) is None
    first, second, *others = network.program.launches
    wrong = [first, dataclasses.replace(second, grid=(1, 1, 1)), *others]
    told = first_difference(runner, network.source, [feed()], wrong)
    assert told is not None and f"layer {second.name!r}, kernel {second.kernel}" in told


@pytest.fixture(scope="module")
def real() -> SmallNetwork:
    """The network compiled for this machine's GPU."""
    from cuda_modules import small_network

    try:
        Driver.open().device(0)
    except ArtifactError as error:
        pytest.skip(str(error))
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    mod = small_network().mod
    backend = cuda_backend({"kind": "cuda"})
    return SmallNetwork(mod, generate(backend, mod)[0].source, compile_cuda(backend, mod)[0])


@pytest.fixture
def gpu_torch(real: SmallNetwork) -> Any:
    if not torch.cuda.is_available():
        pytest.skip("needs torch for GPUs")
    return torch


def test_every_launch_equals_the_emulation(real: SmallNetwork) -> None:
    assert first_difference(real.module().runner(), real.source, [feed()]) is None


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_numpy(real: SmallNetwork, batch: int) -> None:
    module = real.module()
    for seed in range(3):
        np.testing.assert_array_equal(module(feed(seed, batch)), real.reference(feed(seed, batch)))


def test_stepwise(real: SmallNetwork, monkeypatch: Any) -> None:
    monkeypatch.setenv("LPSN_TVM_STEPWISE", "1")
    np.testing.assert_array_equal(real.module()(feed()), real.reference(feed()))


def test_modules_come_and_go(real: SmallNetwork) -> None:
    for seed in range(5):
        module = real.module()
        np.testing.assert_array_equal(module(feed(seed)), real.reference(feed(seed)))
        module.runner().close()


def test_times(real: SmallNetwork) -> None:
    module = real.module()
    assert 0 < module.benchmark() < 100
    assert 0 < module.measure(is_cold=True).best < 100
    assert module.measure(with_copies=True).median > 0
    times = module.profile()
    assert len(times) == len(real.program.launches) and all(0 < time.milliseconds < 100 for time in times)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_torch(real: SmallNetwork, gpu_torch: Any, batch: int) -> None:
    module = real.module()
    for seed in range(KEPT_GRAPHS + 3):
        x = gpu_torch.from_numpy(feed(seed, batch)).cuda()
        result = module(x)
        assert result.is_cuda and result.shape[0] == batch
        np.testing.assert_array_equal(result.cpu().numpy(), real.reference(feed(seed, batch)))


def test_torch_of_other_layouts(real: SmallNetwork, gpu_torch: Any) -> None:
    module = real.module()
    x = gpu_torch.from_numpy(feed()).cuda()
    shifted = gpu_torch.zeros(x.numel() + 1, device="cuda")[1:].reshape(SHAPE).copy_(x)
    for other in (x, x.to(memory_format=gpu_torch.channels_last), x.double(), shifted):
        np.testing.assert_array_equal(module(other).cpu().numpy(), real.reference(feed()))


def test_torch_on_streams(real: SmallNetwork, gpu_torch: Any) -> None:
    module = real.module()
    streams = [gpu_torch.cuda.Stream() for _ in range(3)]
    results = []
    for index in range(30):
        with gpu_torch.cuda.stream(streams[index % 3]):
            x = gpu_torch.from_numpy(feed(index)).pin_memory().to("cuda", non_blocking=True)
            results.append(module(x))
            del x
    named = module(gpu_torch.from_numpy(feed(40)).cuda(), stream=streams[0])
    gpu_torch.cuda.synchronize()
    for index, result in enumerate(results):
        np.testing.assert_array_equal(result.cpu().numpy(), real.reference(feed(index)))
    np.testing.assert_array_equal(named.cpu().numpy(), real.reference(feed(40)))


def test_torch_records_a_graph(real: SmallNetwork, gpu_torch: Any) -> None:
    module = real.module()
    x = gpu_torch.from_numpy(feed(0)).cuda()
    module(x)
    graph = gpu_torch.cuda.CUDAGraph()
    with gpu_torch.cuda.graph(graph):
        result = module(x) + 1
    for seed in (1, 2):
        x.copy_(gpu_torch.from_numpy(feed(seed)))
        graph.replay()
        np.testing.assert_array_equal(result.cpu().numpy(), real.reference(feed(seed)) + 1)


@pytest.mark.parametrize("library", ["cupy", "jax"])
def test_other_libraries(real: SmallNetwork, library: str) -> None:
    names = pytest.importorskip("cupy" if library == "cupy" else "jax.numpy")
    module = real.module()
    for seed in range(3):
        result = module(names.asarray(feed(seed)))
        array = result.get() if library == "cupy" else np.asarray(result)
        np.testing.assert_array_equal(array, real.reference(feed(seed)))
        assert type(result) is type(names.asarray(feed(seed)))
