"""Modules for GPUs without a GPU: files, choice of architecture, errors, and calls with numpy arrays, against a
stand-in for the driver whose launches run in the emulation.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_modules import SmallNetwork, feed
from fake_driver import FakeDriver

import lpsn_tvm
from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.targets import cuda_driver, cuda_staging
from lpsn_tvm.targets.cuda_artifact import CudaArtifact, measure
from lpsn_tvm.targets.cuda_graphs import caller_places, copied_outputs
from lpsn_tvm.targets.cuda_program import Place, Port, best_program, programs_from_files, programs_to_files


def test_a_call_equals_the_reference_and_launches_one_graph(network: SmallNetwork, driver: FakeDriver) -> None:
    module = network.module()
    for seed in (1, 2, 3):
        np.testing.assert_array_equal(module(feed(seed)), network.reference(feed(seed)))
    assert driver.calls.count("cuGraphLaunch") == 3
    assert driver.calls.count("cuGraphInstantiateWithFlags") == 1
    assert driver.calls.count("cuGraphAddKernelNode_v2") == len(network.program.launches)
    assert "cuLaunchKernel" not in driver.calls


def test_batches_of_other_sizes_run_in_pieces(network: SmallNetwork, driver: FakeDriver) -> None:
    x = feed(batch=5)
    np.testing.assert_array_equal(network.module()(x), network.reference(x))


def test_outputs_whose_first_axis_is_not_the_batch(network: SmallNetwork, driver: FakeDriver) -> None:
    (port,) = network.program.outputs
    joined = (1, port.shape[0] * port.shape[1], *port.shape[2:])
    program = dataclasses.replace(network.program, outputs=(dataclasses.replace(port, shape=joined),))
    module = dataclasses.replace(network.module(program), outputs=[TensorInfo("y", joined)])
    x = driver.register(feed(batch=4))
    expected = network.reference(x).reshape(2, *joined[1:])
    np.testing.assert_array_equal(module(x), expected)
    interface = {"shape": x.shape, "typestr": "<f4", "data": (x.ctypes.data, False), "version": 3, "stream": 1}
    result = module(SimpleNamespace(__cuda_array_interface__=interface))
    np.testing.assert_array_equal(np.asarray(result), expected)
    with pytest.raises(LpsnError, match="a multiple of 2"):
        module(SimpleNamespace(__cuda_array_interface__=interface | {"shape": (3, *x.shape[1:])}))


@pytest.mark.parametrize("piece", [512, 100])
def test_large_arrays_are_copied_piece_by_piece(
    piece: int, network: SmallNetwork, driver: FakeDriver, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cuda_staging, "PIECE_BYTES", piece)
    module = network.module()
    for seed in (1, 2):
        np.testing.assert_array_equal(module(feed(seed)), network.reference(feed(seed)))
    assert "cuEventSynchronize" in driver.calls, "pieces are used again"


def test_save_and_load_need_no_driver(network: SmallNetwork, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda_that_is_not_there.so.1")
    other = dataclasses.replace(network.program, arch="sm_90", has_ptx=True, toolkit="12.8")
    module = network.module(network.program, other)
    loaded = lpsn_tvm.load(module.save(tmp_path / "module.lpsn"))
    assert isinstance(loaded, CudaArtifact)
    assert tuple(loaded.programs) == tuple(module.programs)
    details = loaded.details()
    assert [program["arch"] for program in details["programs"]] == ["sm_86", "sm_90"]
    assert "no CUDA driver on this machine" in details["this_machine"]


def test_without_a_driver_a_call_says_so(network: SmallNetwork, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda_that_is_not_there.so.1")
    with pytest.raises(ArtifactError, match=r"no CUDA driver on this machine .*building, loading and inspecting do"):
        network.module()(feed())


def test_an_unfit_gpu_is_named(network: SmallNetwork, driver: FakeDriver) -> None:
    driver.reset(number=75)
    with pytest.raises(ArtifactError, match="compiled for sm_86; Test GPU is sm_75"):
        network.module()(feed())
    assert "compiled for sm_86; Test GPU is sm_75" in network.module().details()["this_machine"]
    driver.reset(devices=0)
    with pytest.raises(ArtifactError, match="there is no GPU 0; the driver sees 0"):
        network.module()(feed())


def test_a_translation_is_announced(network: SmallNetwork, driver: FakeDriver) -> None:
    driver.reset(number=120)
    module = network.module(dataclasses.replace(network.program, arch="sm_90", has_ptx=True))
    with pytest.warns(UserWarning, match=r"no machine code for sm_120 .*translates its PTX of sm_90"):
        result = module(feed())
    np.testing.assert_array_equal(result, network.reference(feed()))


def test_a_failed_translation_says_why(network: SmallNetwork, driver: FakeDriver) -> None:
    before = driver.live
    broken = dataclasses.replace(network.program, binary=b"broken ptx")
    with pytest.raises(ArtifactError, match=r"error 218.*supports CUDA 13\.0; it says: ptxas: line 3"):
        network.module(broken)(feed())
    assert driver.live == before, "what was taken before the failure is given back"


def test_a_driver_that_is_too_old_for_the_machine_code(network: SmallNetwork, driver: FakeDriver) -> None:
    """It refuses the file as damaged or foreign; only the version of the compiler tells why."""
    newer = network.module(dataclasses.replace(network.program, binary=b"broken", toolkit="14.1"))
    message = r"built with CUDA 14\.1, which needs a driver for CUDA 14\.0 or later; this one is for 13\.0: update it"
    with pytest.raises(ArtifactError, match=message):
        newer(feed())
    assert "runs the program for sm_86, but it was built with CUDA 14.1" in newer.details()["this_machine"]
    same = network.module(dataclasses.replace(network.program, binary=b"broken", toolkit="13.2"))
    with pytest.raises(ArtifactError) as caught:
        same(feed())
    assert "built with" not in str(caught.value), "drivers run what later toolkits of their major version made"
    assert same.details()["this_machine"].endswith("runs the program for sm_86")
    (record,), members = programs_to_files(newer.programs)
    assert programs_from_files([record], members)[0].toolkit == "14.1"
    with pytest.raises(ValueError, match="'new' is no version"):
        programs_from_files([record | {"toolkit": "new"}], members)


def test_too_little_memory_is_told_in_bytes(network: SmallNetwork, driver: FakeDriver) -> None:
    before = driver.live
    driver.set_memory(20_000)
    with pytest.raises(ArtifactError, match=r"of device memory are needed, [\d,]+ of 20,000 are free: build for a sma"):
        network.module()(feed())
    assert driver.live == before


def test_too_much_shared_memory_is_told_by_kernel(network: SmallNetwork, driver: FakeDriver) -> None:
    first, *others = network.program.launches
    greedy = dataclasses.replace(first, shared_bytes=150_000)
    program = dataclasses.replace(network.program, launches=(greedy, *others))
    with pytest.raises(ArtifactError, match=f"{first.kernel}: needs 150000 bytes of shared memory .* has 101376"):
        network.module(program)(feed())


def test_everything_is_given_back(network: SmallNetwork, driver: FakeDriver) -> None:
    before = driver.live
    module = network.module()
    module(feed())
    assert driver.live > before
    module.runner().close()
    assert driver.live == before
    other = network.module()
    other(feed())
    other.measure(repeats=2, warmup=1)
    del other
    gc.collect()
    assert driver.live == before
    assert driver.calls.count("cuDevicePrimaryCtxRetain") == driver.calls.count("cuDevicePrimaryCtxRelease_v2") == 2


def test_the_callers_context_stays_current(network: SmallNetwork, driver: FakeDriver) -> None:
    driver.reset(devices=2)
    first, second = network.module(), network.module()
    second.device = 1
    opened = cuda_driver.Driver.open()
    np.testing.assert_array_equal(first(feed()), network.reference(feed()))
    assert opened._handle("cuCtxGetCurrent") == 0
    with opened.using(first.runner().context):
        np.testing.assert_array_equal(second(feed()), network.reference(feed()))
        assert opened._handle("cuCtxGetCurrent") == first.runner().context
    assert first.runner().context != second.runner().context


def test_threads_take_turns(network: SmallNetwork, driver: FakeDriver) -> None:
    module = network.module()
    feeds = [feed(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(module, feeds))
    for x, result in zip(feeds, results, strict=True):
        np.testing.assert_array_equal(result, network.reference(x))
    assert driver.calls.count("cuModuleLoadDataEx") == 1, "the first calls, too"


def test_after_a_fault_the_module_says_that_the_process_is_lost(network: SmallNetwork, driver: FakeDriver) -> None:
    module = network.module()
    module(feed())
    driver.fail("cuStreamSynchronize", 700)
    with pytest.raises(ArtifactError, match=r"cuStreamSynchronize: .*error 700, an illegal .* restart the process"):
        module(feed())
    driver.fail("", 0)
    with pytest.raises(ArtifactError, match=r"cannot be used any more since: cuStreamSynchronize: .*error 700"):
        module(feed())


BARE = """
import ctypes, importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tvm", "tvm_ffi", "torch", "onnx", "scipy", "typer", "rich", "PIL"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy as np
import lpsn_tvm
from lpsn_tvm.targets import cuda_driver

cuda_driver.LIBRARY, path, *entries = sys.argv[1:]
table = (ctypes.c_char_p * (len(entries) + 1))(*(entry.encode() for entry in entries), None)
ctypes.CDLL(cuda_driver.LIBRARY).fake_set_parameter_counts(table)
module = lpsn_tvm.load(path)
result = module(np.zeros(module.inputs[0].shape, np.float32))
print(list(result.shape), len(module.profile()), module.benchmark() > 0, module.details()["this_machine"])
"""


def test_modules_run_where_only_numpy_is(network: SmallNetwork, driver: FakeDriver, tmp_path: Any) -> None:
    path = network.module().save(tmp_path / "module.lpsn")
    entries = {f"{launch.kernel}={len(launch.arguments)}" for launch in network.program.launches}
    command = [sys.executable, "-c", BARE, str(driver.path), str(path), *entries]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shape, count = list(network.program.outputs[0].shape), len(network.program.launches)
    assert printed.strip() == f"{shape} {count} True Test GPU (sm_86) runs the program for sm_86"


def test_stepwise_an_error_names_the_layer(network: SmallNetwork, driver: FakeDriver, monkeypatch: Any) -> None:
    monkeypatch.setenv("LPSN_TVM_STEPWISE", "1")
    module = network.module()
    np.testing.assert_array_equal(module(feed()), network.reference(feed()))
    assert "cuGraphLaunch" not in driver.calls
    assert driver.calls.count("cuLaunchKernel") == len(network.program.launches)
    first = network.program.launches[0]
    driver.fail("cuLaunchKernel", 716)
    with pytest.raises(ArtifactError, match=f"layer '{first.name}', kernel {first.kernel}: .*error 716"):
        module(feed())


def ports_of(network: SmallNetwork) -> dict[str, Any]:
    (output,), (source,) = network.program.outputs, network.program.inputs
    constant = dataclasses.replace(output, place=Place("constants", 0, 16), shape=(2, 2), dtype="float32")
    early = network.program.launches[1].arguments[4]
    return {
        "twice": (output, output),
        "an input": (output, source),
        "a constant": (constant, output),
        "working memory": (output, Port((2, early.size // 2), "int8", early)),
    }


@pytest.mark.parametrize("kind", ["twice", "an input", "a constant", "working memory"])
def test_outputs_that_no_kernel_writes_in_place(kind: str, network: SmallNetwork, driver: FakeDriver) -> None:
    outputs = ports_of(network)[kind]
    module = network.module(dataclasses.replace(network.program, outputs=outputs))
    module.outputs = [TensorInfo(name, port.shape, port.dtype) for name, port in zip("yz", outputs, strict=True)]
    result = module(feed())
    want = network.reference(feed())
    (own,) = network.program.outputs
    assert all(name in "yz" for name in result)
    for name, port in zip("yz", outputs, strict=True):
        if port == own:
            np.testing.assert_array_equal(result[name], want)
    if kind == "an input":
        np.testing.assert_array_equal(result["z"], feed())
    if kind == "a constant":
        np.testing.assert_array_equal(result["y"].reshape(-1).view(np.uint8), list(network.program.constants[:16]))


def test_only_outputs_with_memory_of_their_own_may_lie_elsewhere(network: SmallNetwork) -> None:
    (output,) = network.program.outputs
    assert caller_places(network.program)[output.place] == 1
    assert copied_outputs(network.program) == ()
    first, *others = network.program.launches
    across = Place("arena", output.place.offset + 4, 4)
    sharing = dataclasses.replace(first, arguments=(across, *first.arguments[1:]))
    program = dataclasses.replace(network.program, launches=(sharing, *others))
    assert output.place not in caller_places(program)
    assert copied_outputs(program) == (0,)


def _call_in_child(module: CudaArtifact, answers: Any) -> None:
    try:
        module(feed())
        answers.put("no error")
    except ArtifactError as error:
        answers.put(str(error))
    finally:
        answers.close()
        answers.join_thread()
        os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_says_what_to_do(network: SmallNetwork, driver: FakeDriver) -> None:
    module = network.module()
    module(feed())
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_call_in_child, args=(module, answers))
    child.start()
    assert 'multiprocessing.get_context("spawn")' in answers.get(timeout=120)
    child.join()
    np.testing.assert_array_equal(module(feed()), network.reference(feed()))


@pytest.mark.parametrize(
    ("number", "arch"),
    [(75, None), (80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "sm_90"), (120, "sm_90")],
)
def test_the_best_program_is_chosen(network: SmallNetwork, number: int, arch: str | None) -> None:
    programs = [
        dataclasses.replace(network.program, arch="sm_80"),
        dataclasses.replace(network.program, arch="sm_90", has_ptx=True),
    ]
    best = best_program(programs, number)
    assert (best and best.arch) == arch


def test_code_for_one_architecture_alone_runs_nowhere_else(network: SmallNetwork) -> None:
    programs = [dataclasses.replace(network.program, arch="sm_90a", has_ptx=True)]
    assert best_program(programs, 90) is programs[0]
    assert best_program(programs, 100) is None


def test_code_for_embedded_modules_and_cards_is_not_mixed(network: SmallNetwork) -> None:
    module, card = (dataclasses.replace(network.program, arch=arch) for arch in ("sm_87", "sm_86"))
    assert best_program([card, module], 89) is card
    assert best_program([card, module], 87) is module
    assert best_program([card], 87) is None
    assert best_program([dataclasses.replace(card, has_ptx=True)], 87) is not None


def test_a_build_measures_where_it_can(network: SmallNetwork, driver: FakeDriver, monkeypatch: Any) -> None:
    module = network.module()
    measure(None, module, None)  # type: ignore[arg-type]
    assert module.report.milliseconds["module"] == pytest.approx(0.01 * len(network.program.launches))
    assert "Test GPU" in module.report.notes[-1]
    assert f"{0.01 * len(network.program.launches):.3f}" in str(module.report)
    driver.reset(number=75)
    other = network.module()
    measure(None, other, None)  # type: ignore[arg-type]
    assert not other.report.milliseconds and "sm_75" in other.report.notes[-1]
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda_that_is_not_there.so.1")
    measure(None, other, None)  # type: ignore[arg-type]
    assert other.report.notes[-1] == "latency not measured: no GPU on this machine"
