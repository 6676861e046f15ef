"""Calls with tensors that lie on a GPU: torch's, those with `__cuda_array_interface__`, those with DLPack; on streams
with work that is still to be done, of any batch size.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_modules import SHAPE, Caller, SmallNetwork, feed, on_gpu, plain, torch_with_gpu
from fake_driver import FakeDriver

from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.targets.cuda_graphs import KEPT_GRAPHS
from lpsn_tvm.targets.cuda_tensors import DeviceTensor, device_input, stream_number


@pytest.fixture
def gpu_torch(driver: FakeDriver, monkeypatch: Any) -> Any:
    with torch_with_gpu(monkeypatch, driver) as state:
        yield state


def test_torch_tensors_are_read_and_written_in_place(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    module = network.module()
    module.prepare()
    caller = Caller(module, driver)
    gpu_torch.stream = caller.stream()
    x = on_gpu(driver, torch.zeros(SHAPE))
    caller.write_later(plain(x), feed(1), gpu_torch.stream)
    before = len(driver.calls)
    result = module(x)
    calls = driver.calls[before:]
    assert not [name for name in calls if name.startswith("cuMem") or "Synchronize" in name], "no copies, no waiting"
    caller.finish(gpu_torch.stream)
    np.testing.assert_array_equal(plain(result), network.reference(feed(1)))
    assert isinstance(result, torch.Tensor) and result.is_cuda


@pytest.fixture(params=[False, True], ids=["at once", "interleaved"])
def in_any_order(request: Any, driver: FakeDriver) -> None:
    """Work of several streams is done stream by stream, or mixed."""
    if request.param:
        driver.interleave()


@pytest.mark.usefixtures("in_any_order")
def test_calls_on_several_streams_do_not_disturb_each_other(
    network: SmallNetwork, driver: FakeDriver, gpu_torch: Any
) -> None:
    module = network.module()
    caller = Caller(module, driver)
    streams = [0, caller.stream(), caller.stream()]
    results = []
    for index in range(7):
        gpu_torch.stream = streams[index % 3]
        x = on_gpu(driver, torch.zeros(SHAPE))
        caller.write_later(plain(x), feed(index), gpu_torch.stream)
        results.append(module(x))
    # The last one first: it has to bring along what it depends on, and nothing may run at once over one arena.
    for stream in reversed(streams):
        caller.finish(stream)
    for index, result in enumerate(results):
        np.testing.assert_array_equal(plain(result), network.reference(feed(index)))
    np.testing.assert_array_equal(module(feed(9)), network.reference(feed(9)))


def test_streams_that_may_be_others_by_now_wait(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    module, x = network.module(), on_gpu(driver, torch.from_numpy(feed(1)))
    for gpu_torch.stream, waits in ((0, 0), (Caller(module, driver).stream(), 2), (2, 2)):
        module(x)
        before = driver.calls.count("cuStreamWaitEvent")
        module(x), module(x)
        assert driver.calls.count("cuStreamWaitEvent") - before == waits


@pytest.mark.usefixtures("in_any_order")
def test_numpy_calls_wait_for_runs_in_the_same_memory(
    network: SmallNetwork, driver: FakeDriver, gpu_torch: Any
) -> None:
    module = network.module()
    caller = Caller(module, driver)
    gpu_torch.stream = caller.stream()
    x = on_gpu(driver, torch.from_numpy(feed(1, 3)))
    result = module(x)
    np.testing.assert_array_equal(module(feed(9)), network.reference(feed(9)))
    gpu_torch.stream = caller.stream()
    other = module(x)
    caller.finish(gpu_torch.stream)
    for made in (result, other):
        np.testing.assert_array_equal(plain(made), network.reference(feed(1, 3)))


def test_graphs_move_to_other_addresses(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    module = network.module()
    caller = Caller(module, driver)
    tensors = [on_gpu(driver, torch.from_numpy(feed(seed))) for seed in range(KEPT_GRAPHS + 4)]
    for x in (*tensors, *tensors):
        result = module(x)
        caller.finish(0)
        np.testing.assert_array_equal(plain(result), network.reference(plain(x)))
    assert driver.calls.count("cuGraphInstantiateWithFlags") == KEPT_GRAPHS
    moved = driver.calls.count("cuGraphExecKernelNodeSetParams_v2")
    assert moved == 2 * (2 * len(tensors) - KEPT_GRAPHS), "the first launch and the last one"


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_other_batch_sizes_run_on_the_device(
    batch: int, network: SmallNetwork, driver: FakeDriver, gpu_torch: Any
) -> None:
    module = network.module()
    caller = Caller(module, driver)
    x = on_gpu(driver, torch.zeros((batch, *SHAPE[1:])))
    caller.write_later(plain(x), feed(batch, batch), 0)
    before = len(driver.calls)
    result = module(x)
    assert not [name for name in driver.calls[before:] if "toH" in name or "Hto" in name], "nothing goes to the host"
    caller.finish(0)
    assert result.shape[0] == batch
    np.testing.assert_array_equal(plain(result), network.reference(feed(batch, batch)))


def test_tensors_that_begin_anywhere_are_copied_first(
    network: SmallNetwork, driver: FakeDriver, gpu_torch: Any
) -> None:
    memory = driver.register(np.zeros(feed().size + 1, np.float32))
    shifted = memory[1:] if memory.ctypes.data % 16 == 0 else memory[:-1]
    if shifted.ctypes.data % 16 == 0:
        pytest.skip("this allocation is aligned either way")
    shifted[:] = feed().reshape(-1)
    module = network.module()
    result = module(on_gpu(driver, torch.from_numpy(shifted).reshape(SHAPE)))
    Caller(module, driver).finish(0)
    np.testing.assert_array_equal(plain(result), network.reference(feed()))
    assert driver.calls.count("cuMemcpyDtoDAsync_v2") == 2


def test_torch_tensors_of_other_types_and_layouts(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    module = network.module()
    caller = Caller(module, driver)
    x = torch.from_numpy(feed())
    for other in (x.to(memory_format=torch.channels_last), x.double(), x.half().float().half()):
        result = module(on_gpu(driver, other))
        caller.finish(0)
        np.testing.assert_array_equal(plain(result), network.reference(np.ascontiguousarray(other.float().numpy())))
    with pytest.raises(LpsnError, match=r"input 'x': dtype torch\.complex64 is not a real number type"):
        module(on_gpu(driver, x.to(torch.complex64)))
    with pytest.raises(LpsnError, match=r"input 'x': shape \(2, 3, 10\) does not fit"):
        module(on_gpu(driver, x[..., 0]))
    with pytest.raises(LpsnError, match=r"shape \(0, 3, 10, 12\) does not fit"):
        module(on_gpu(driver, x[:0]))
    with pytest.raises(LpsnError, match="expected inputs"):
        module(wrong=on_gpu(driver, x))


def test_torch_tensors_on_the_host_are_taken_as_numpy_takes_them(network: SmallNetwork, driver: FakeDriver) -> None:
    result = network.module()(torch.from_numpy(feed()))
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, network.reference(feed()))
    with pytest.raises(LpsnError, match="for tensors on the GPU only"):
        network.module()(feed(), stream=1)


def test_a_stream_may_be_named(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    module = network.module()
    caller = Caller(module, driver)
    gpu_torch.stream, other = caller.stream(), caller.stream()
    x = on_gpu(driver, torch.zeros(SHAPE))
    caller.write_later(plain(x), feed(3), gpu_torch.stream)
    result = module(x, stream=SimpleNamespace(cuda_stream=other))
    caller.finish(other)
    np.testing.assert_array_equal(plain(result), network.reference(feed(3)))
    assert gpu_torch.entered == [("external", other)], "torch's memory comes from that stream"
    assert x.recorded == [("external", other)]


def begin_recording(driver: FakeDriver, stream: int) -> None:
    """As `torch.cuda.graph` does: what other threads may not do meanwhile is forbidden to this one, too."""
    assert driver.library.cuStreamBeginCapture_v2(ctypes.c_void_p(stream), 0) == 0


def end_recording(driver: FakeDriver, stream: int) -> int:
    graph = ctypes.c_void_p()
    assert driver.library.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)) == 0
    return int(graph.value or 0)


def test_a_call_is_recorded_into_the_callers_graph(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    module = network.module()
    caller = Caller(module, driver)
    gpu_torch.stream = caller.stream()
    x = on_gpu(driver, torch.from_numpy(feed(1)))
    opened, context = caller.runner.driver, caller.runner.context
    with opened.using(context):
        begin_recording(driver, gpu_torch.stream)
    result = module(x)
    with pytest.raises(ArtifactError, match="recorded for the compiled batch size"):
        module(on_gpu(driver, torch.from_numpy(feed(1, 3))))
    with opened.using(context):
        graph = end_recording(driver, gpu_torch.stream)
        executable = opened.instantiate(graph)
        for seed in (1, 2):
            plain(x)[...] = feed(seed)
            opened.launch_graph(executable, gpu_torch.stream)
            opened.synchronize(gpu_torch.stream)
            np.testing.assert_array_equal(plain(result), network.reference(feed(seed)))
        opened.call("cuGraphExecDestroy", executable)
        opened.call("cuGraphDestroy", graph)


def test_a_module_can_be_loaded_while_somebody_records(
    network: SmallNetwork, driver: FakeDriver, gpu_torch: Any
) -> None:
    first, second = network.module(), network.module()
    caller = Caller(first, driver)
    stream, opened = caller.stream(), caller.runner.driver
    with opened.using(caller.runner.context):
        begin_recording(driver, stream)
    np.testing.assert_array_equal(second(feed()), network.reference(feed()))
    np.testing.assert_array_equal(first(feed()), network.reference(feed()))
    result = first(on_gpu(driver, torch.from_numpy(feed(3))))
    with opened.using(caller.runner.context):
        opened.synchronize(0)
    np.testing.assert_array_equal(plain(result), network.reference(feed(3)))
    with opened.using(caller.runner.context):
        opened.call("cuGraphDestroy", end_recording(driver, stream))


class ArrayInterface:
    """A tensor as cupy and numba make them."""

    stream: int | None = None

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = self.array.__array_interface__
        found = {key: interface[key] for key in ("shape", "typestr", "strides", "data")}
        return {**found, "version": 3, "stream": self.stream}


def test_a_librarys_own_empty_makes_results(network: SmallNetwork, driver: FakeDriver, monkeypatch: Any) -> None:
    def empty(shape: tuple[int, ...], dtype: str) -> ArrayInterface:
        return ArrayInterface(driver.register(np.empty(shape, dtype)))

    monkeypatch.setitem(sys.modules, "some_gpu_library", SimpleNamespace(empty=empty))
    monkeypatch.setattr(ArrayInterface, "__module__", "some_gpu_library")
    module = network.module()
    caller = Caller(module, driver)
    x = ArrayInterface(driver.register(np.zeros(SHAPE, np.float32)))
    x.stream = caller.stream()
    caller.write_later(x.array, feed(5), x.stream)
    result = module(x)
    assert isinstance(result, ArrayInterface)
    caller.finish(x.stream)
    np.testing.assert_array_equal(result.array, network.reference(feed(5)))
    with pytest.raises(LpsnError, match="is not contiguous"):
        module(ArrayInterface(np.asfortranarray(feed())))
    with pytest.raises(LpsnError, match="is float64; on the GPU float32 is taken"):
        module(ArrayInterface(feed().astype(np.float64)))
    with pytest.raises(LpsnError, match="either all inputs are on the GPU or none"):
        module({"x": x, "y": feed()})


class BothInterfaces(ArrayInterface):
    """A tensor as jax makes them: only DLPack orders the work."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, **others: Any) -> Any:
        self.asked = stream
        return self.array.__dlpack__(**others)


def test_the_interface_that_orders_the_work_is_taken(network: SmallNetwork, driver: FakeDriver) -> None:
    x = BothInterfaces(driver.register(feed()))
    found = device_input(x, 7)
    assert found is not None and found.stream == x.asked == 7
    x.stream = 9
    found = device_input(x, 7)
    assert found is not None and found.stream == 9


class Dlpack:
    """A tensor that offers DLPack only, as jax does; its capsule is numpy's."""

    is_old = False

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.streams = array, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, **others: Any) -> Any:
        if self.is_old and others:
            raise TypeError("no such argument")
        self.streams.append(stream)
        return self.array.__dlpack__(**others)


@pytest.mark.parametrize("is_old", [False, True])
def test_tensors_with_dlpack_only(is_old: bool, network: SmallNetwork, driver: FakeDriver) -> None:
    x = Dlpack(driver.register(feed()))
    x.is_old = is_old
    module = network.module()
    caller = Caller(module, driver)
    stream = caller.stream()
    before = driver.memory_used
    result = module(x, stream=stream)
    assert isinstance(result, DeviceTensor)
    assert x.streams[-1] == stream, "its maker orders its work before ours"
    assert sys.getrefcount(x) > 2, "held until the run is over"
    np.testing.assert_array_equal(np.asarray(result), network.reference(feed()))
    assert result.__dlpack_device__() == (2, 0)
    assert driver.memory_used == before + result.dtype.itemsize * np.prod(result.shape)
    del result
    assert driver.memory_used == before
    module(Dlpack(driver.register(feed(2))), stream=stream)
    assert sys.getrefcount(x) == 2, "the run is over"


def test_results_are_handed_over_by_dlpack(network: SmallNetwork, driver: FakeDriver, monkeypatch: Any) -> None:
    taken: list[Any] = []
    results: list[DeviceTensor] = []

    def from_dlpack(tensor: Any) -> Any:
        results.append(tensor)
        taken.append(tensor.__dlpack__(stream=stream, max_version=(1, 1)))
        return "a tensor of that library"

    monkeypatch.setattr(
        Dlpack, "__array_namespace__", lambda self: SimpleNamespace(from_dlpack=from_dlpack), raising=False
    )
    module = network.module()
    caller = Caller(module, driver)
    stream = caller.stream()
    assert module(Dlpack(driver.register(feed()))) == "a tensor of that library"
    assert "dltensor_versioned" in repr(taken[0])
    (result,) = results
    copy = driver.register(np.zeros(result.shape, np.float32))
    with caller.runner.driver.using(caller.runner.context):
        caller.runner.driver.on_device(copy.ctypes.data, result.address, copy.nbytes, stream)
    caller.finish(stream)
    np.testing.assert_array_equal(copy, network.reference(feed()), err_msg="the taker's stream waits for the run")


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_capsules_of_our_own_are_read_by_others(
    version: tuple[int, int] | None, network: SmallNetwork, driver: FakeDriver, monkeypatch: Any
) -> None:
    module = network.module()
    result = module(Dlpack(driver.register(feed())))
    Caller(module, driver).finish(0)
    used = driver.memory_used
    found = device_input(result)
    assert found is not None and (found.address, found.shape, found.dtype) == (result.address, result.shape, "float32")
    # Torch takes capsules; that the memory is on a GPU is all that keeps it from this one.
    monkeypatch.setattr("lpsn_tvm.targets.cuda_dlpack.CUDA", 1)
    capsule = result.__dlpack__(stream=-1, max_version=version)
    tensor = torch.utils.dlpack.from_dlpack(capsule)
    want = network.reference(feed())
    unused = result.__dlpack__(stream=-1, max_version=version)
    del result, capsule, found, unused
    np.testing.assert_array_equal(tensor.numpy(), want)
    assert driver.memory_used == used
    del tensor
    assert driver.memory_used == used - want.nbytes


def test_streams_of_several_libraries() -> None:
    import ctypes

    assert (
        stream_number(7) == stream_number(SimpleNamespace(ptr=7)) == stream_number(SimpleNamespace(cuda_stream=7)) == 7
    )
    assert stream_number(SimpleNamespace(handle=ctypes.c_void_p(7))) == 7
    assert stream_number(SimpleNamespace(__cuda_stream__=lambda: (0, 7))) == 7
    assert stream_number(1) == stream_number(SimpleNamespace(handle=ctypes.c_void_p())) == 0
    with pytest.raises(LpsnError, match="str is no CUDA stream"):
        stream_number("main")


def test_the_device_of_a_tensor_is_the_one_that_runs(network: SmallNetwork, driver: FakeDriver, gpu_torch: Any) -> None:
    driver.reset(devices=2)
    module = network.module()
    caller = Caller(module, driver, device=1)
    result = module(on_gpu(driver, torch.from_numpy(feed()), device=1))
    caller.finish(0)
    np.testing.assert_array_equal(plain(result), network.reference(feed()))
    assert list(module._runners) == [1]
