"""The cuda backend: targets, errors, the memory plan, and modules that are built for GPUs that are not here."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_model

import lpsn_tvm
from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets import cuda_driver, get_backend
from lpsn_tvm.targets.cuda import isas_of
from lpsn_tvm.targets.cuda_nvcc import toolkit_version
from lpsn_tvm.targets.cuda_planning import Buffer, assign_offsets
from lpsn_tvm.targets.cuda_program import ALIGNMENT, Packer


def test_target_strings() -> None:
    backend = get_backend("cuda -arch=sm_90,sm_80")
    assert backend.tvm_target == "cuda -arch=sm_90,sm_80"
    assert backend.geometry.arch == "sm_80"
    assert [isa.arch for isa in isas_of(backend.tvm_target)] == ["sm_80", "sm_90"]
    assert get_backend({"kind": "cuda", "arch": "sm_75", "max_num_threads": 1024}).geometry.arch == "sm_75"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cuda -arch=sm_60", r"unknown architecture 'sm_60'; known: sm_61, sm_70"),
        ("cuda -arch=", "unknown architecture ''"),
        ("cuda -arch=sm_80 -threads=3", "unknown option threads; known: arch"),
    ],
)
def test_wrong_targets(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        get_backend(target)


def test_an_architecture_must_be_named_where_no_gpu_is(monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda_that_is_not_there.so.1")
    with pytest.raises(TargetError, match=r"no CUDA driver .*; name the GPU to compile for, as in cuda -arch=sm_86"):
        get_backend("cuda")


def test_a_missing_nvcc_is_said_before_any_work(monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match=r"needs nvcc, which is not installed: install the CUDA toolkit"):
        lpsn_tvm.build(b"never read", target="cuda -arch=sm_86")


def test_float_networks_are_refused() -> None:
    with pytest.raises(TargetError, match="quantized networks only"):
        lpsn_tvm.build(b"never read", target="cuda -arch=sm_86", bits=None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_module_for_two_architectures(tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = lpsn_tvm.build(random_model(3, max_blocks=3), target="cuda -arch=sm_80,sm_90", bits=4)
    loaded = lpsn_tvm.load(module.save(tmp_path / "module.lpsn"))
    programs = loaded.details()["programs"]
    assert [(program["arch"], program["has_ptx"]) for program in programs] == [("sm_80", False), ("sm_90", True)]
    assert all(program["launches"] >= 3 and program["binary_bytes"] > 1000 for program in programs)
    assert {program["toolkit"] for program in programs} == {toolkit_version(str(shutil.which("nvcc")))}
    assert int(programs[0]["toolkit"].split(".")[0]) >= 12
    assert loaded.target == "cuda -arch=sm_80,sm_90"


@st.composite
def lifetimes(draw: Any) -> list[Buffer]:
    count = draw(st.integers(1, 12))
    found = []
    for _ in range(count):
        first = draw(st.integers(0, 9))
        found.append(Buffer(draw(st.integers(1, 2000)), first, draw(st.integers(first, 10))))
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(buffers=lifetimes())
def test_buffers_of_one_time_do_not_overlap(buffers: list[Buffer]) -> None:
    total = assign_offsets(buffers)
    for i, one in enumerate(buffers):
        assert one.offset % ALIGNMENT == 0 and one.offset + one.size <= total
        for other in buffers[:i]:
            is_concurrent = one.first <= other.last and other.first <= one.last
            is_apart = one.offset + one.size <= other.offset or other.offset + other.size <= one.offset
            assert is_apart or not is_concurrent


def test_memory_is_used_again() -> None:
    chain = [Buffer(1000, step, step + 1) for step in range(10)]
    assert assign_offsets(chain) == 2 * 1024


def test_equal_constants_are_stored_once() -> None:
    packer = Packer()
    first = packer.add(np.arange(5, dtype=np.int32))
    second = packer.add(np.arange(6, dtype=np.int8))
    assert packer.add(np.arange(5, dtype=np.int32)) == first
    assert second % ALIGNMENT == 0
    assert packer.bytes()[second:] == bytes(range(6))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_an_architecture_that_nvcc_does_not_know_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from lpsn_tvm.targets import cuda as module

    backend = get_backend("cuda -arch=sm_75,sm_80")
    assert backend.for_bits((8, 8)) == backend
    monkeypatch.setattr(module, "known_architectures", lambda compiler: frozenset({"sm_80"}))
    with pytest.raises(TargetError, match=r"does not compile for sm_75: .* CUDA 12"):
        backend.for_bits((8, 8))
