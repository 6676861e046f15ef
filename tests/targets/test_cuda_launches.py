"""What only a GPU would refuse or get wrong, read from the machine code and the launches of whole networks: too many
registers or threads, too much shared memory, addresses that wide accesses cannot have, memory that a kernel is told
nobody else points to, instructions of whole warps that some lanes skip.
"""

from __future__ import annotations

import re
from functools import cache
from math import ceil
from typing import Any

import cuda_sass
import numpy as np
import pytest
from cuda_programs import network

from benchmarks import models as zoo
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES, WARP
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.cuda_build import generate
from lpsn_tvm.targets.cuda_program import KernelLaunch, Place

STATIC_SHARED = 48 * 1024
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_THREADS = (1024, 1024, 64)
BANKS, BANK_REGISTERS = 4, 16384
"""A multiprocessor is four, each with a quarter of the registers; the warps of a block are dealt out to them."""
MOST_SPILLED = 8
"""Bytes: the compiler rather spills an address than hides less latency."""


@cache
def _network(name: str, bits: Any, batch: int | None, **sizes: int) -> Any:
    model = getattr(zoo, name)(**sizes)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(1).random((2, *shape[1:])).astype(np.float32)
    options = {"batch": batch} if batch else {}
    return network(model, bits=bits, calibration=data, **options)


def check(mod: Any, arch: str) -> None:
    cuda_sass.require_tools()
    source, plan = generate(get_backend(f"cuda -arch={arch}"), mod)
    code = cuda_sass.kernel_code(source.source, arch)
    assert len(plan.launches) >= 4
    for launch in plan.launches:
        check_size(launch, code[launch.kernel], arch)
        check_arguments(launch, _parameters(source.source, launch.kernel))
        assert code[launch.kernel].conditional == (), launch.kernel
        assert code[launch.kernel].spill_bytes <= 2 * MOST_SPILLED, launch.kernel
        assert code[launch.kernel].stack_bytes <= MOST_SPILLED, launch.kernel


def check_size(launch: KernelLaunch, code: cuda_sass.KernelCode, arch: str) -> None:
    isa, threads = ARCHITECTURES[arch], launch.block[0] * launch.block[1] * launch.block[2]
    assert threads <= 1024 and all(n <= most for n, most in zip(launch.block, MOST_THREADS, strict=True))
    assert all(1 <= n <= most for n, most in zip(launch.grid, MOST_BLOCKS, strict=True))
    assert code.shared_bytes <= STATIC_SHARED
    assert launch.shared_bytes + code.shared_bytes <= isa.shared_bytes, launch.kernel
    per_warp = ceil(code.registers / 8) * 8 * WARP
    assert ceil(ceil(threads / WARP) / BANKS) * per_warp <= BANK_REGISTERS, launch.kernel


def check_arguments(launch: KernelLaunch, parameters: list[str]) -> None:
    """All parameters are `__restrict__`: what a kernel writes must not be what it reads."""
    assert len(parameters) == len(launch.arguments)
    for name, place in zip(parameters, launch.arguments, strict=True):
        assert place.region == "input" or place.offset % 16 == 0, (launch.kernel, name)
        if re.match("out|workspace", name):
            others = [(n, p) for n, p in zip(parameters, launch.arguments, strict=True) if p is not place]
            assert not [n for n, other in others if _overlap(place, other)], (launch.kernel, name)


def _overlap(a: Place, b: Place) -> bool:
    return a.region == b.region and a.offset < b.offset + b.size and b.offset < a.offset + a.size


def _parameters(source: str, kernel: str) -> list[str]:
    match = re.search(rf"__launch_bounds__\(\d+\) {kernel}\(([^)]*)\)", source)
    assert match is not None, f"{kernel} has no launch bounds"
    assert match[1].count("__restrict__") == len(match[1].split(","))
    return [parameter.split()[-1] for parameter in match[1].split(",")]


def test_a_small_network() -> None:
    check(_network("espcn", 8, None, height=24, width=32), "sm_80")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "bits", "batch"),
    [
        ("resnet50", 8, None),
        ("resnet50", 8, 64),
        ("resnet50", (4, 8), None),
        ("resnet50", 4, None),
        ("mobilenet_v2", 8, None),
        ("mobilenet_v2", 8, 64),
        ("unet", 8, None),
        ("espcn", 8, None),
        ("cyclegan_generator", 8, None),
    ],
    ids=str,
)
def test_whole_networks(name: str, bits: Any, batch: int | None, arch: str) -> None:
    check(_network(name, bits, batch), arch)


PLANTED = """
extern "C" __global__ void early(int* d, int n) {
  int t = threadIdx.x;
  if (t >= n) return;
  d[t] = __shfl_xor_sync(0xFFFFFFFFu, d[t], 1);
}
extern "C" __global__ void branch(int* d, int n) {
  int t = threadIdx.x, x[4] = {0, 0, 0, 0};
  if (d[t + 64] > n) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
      : "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]), "r"(d[4]), "r"(d[5]));
    x[0] += d[t + n] / n;
  }
  d[t] = x[0];
}
extern "C" __global__ void barrier(int* d, int n) {
  __shared__ int s[64];
  int t = threadIdx.x;
  s[t] = d[t];
  if (d[t + 64] < n) { __syncthreads(); d[t] = s[63 - t] / n; }
}
extern "C" __global__ void good(int* d, int n) {
  __shared__ int s[65];
  int t = threadIdx.x;
  s[t] = d[t];
#pragma unroll 1
  for (int i = 0; i < 9; ++i) { __syncthreads(); if (t < 13) s[t] += s[t + 1] / n; __syncthreads(); }
  if (t < n) d[t] = s[t];
}
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_conditions_are_seen(arch: str) -> None:
    cuda_sass.require_tools()
    code = cuda_sass.kernel_code(PLANTED, arch)
    assert {name for name, kernel in code.items() if kernel.conditional} == {"early", "branch", "barrier"}


def test_launches_that_do_not_fit_are_seen() -> None:
    code = cuda_sass.KernelCode({}, 80, 0, 0, 0)
    launch = KernelLaunch("kernel", (1, 1, 1), (768, 1, 1), 64 * 1024, (Place("arena", 0, 32), Place("arena", 16, 16)))
    check_size(launch, code, "sm_80")
    with pytest.raises(AssertionError):
        check_size(launch, cuda_sass.KernelCode({}, 88, 0, 0, 0), "sm_80")
    with pytest.raises(AssertionError):
        check_size(launch, cuda_sass.KernelCode({}, 80, 0, 0, 16), "sm_75")
    with pytest.raises(AssertionError):
        check_arguments(launch, ["data", "out"])
    check_arguments(launch, ["data", "bias"])
