"""The CUDA emulation runs right kernels right and finds what is wrong with wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulation import EmulationError, UnknownInstructionError, compile_kernel
from cuda_emulation.build import compiler
from cuda_samples import DOT, GEMM, GEMM_SHARED, gemm_problem

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is missing")


@pytest.mark.parametrize("checked", [True, False])
def test_gemm(checked: bool) -> None:
    a, b, c, want = gemm_problem(64, 96, 128)
    kernel = compile_kernel(GEMM, "gemm", checked=checked)
    kernel.run_all_orders((3, 2), 128, GEMM_SHARED, a, b, c, 96, 128)
    np.testing.assert_array_equal(c, want)


PLANTED = {
    "no barrier after the wait": ("__syncthreads();  // arrived", ""),
    "no barrier before the next copy": ("__syncthreads();  // consumed", ""),
    "waits for one group too few": ("cp.async.wait_group 1;", "cp.async.wait_group 2;"),
    "last wait forgotten": ('asm volatile("cp.async.wait_group 0;" ::: "memory");', ""),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("checked", [True, False])
def test_planted_synchronization_bugs_are_found(planted: str, checked: bool) -> None:
    assert GEMM.count(PLANTED[planted][0]) == 1
    a, b, c, want = gemm_problem(32, 32, 128)
    kernel = compile_kernel(GEMM.replace(*PLANTED[planted]), "gemm", checked=checked)
    if checked:
        # One run in the kindest order is enough: races are found whether or not they changed a result.
        with pytest.raises(EmulationError, match=r"race|waited for"):
            kernel(1, 128, GEMM_SHARED, a, b, c, 32, 128)
        return
    try:
        kernel.run_all_orders(1, 128, GEMM_SHARED, a, b, c, 32, 128)
    except EmulationError as error:
        assert "differs" in str(error)
    else:
        assert not np.array_equal(c, want)


def test_dot_product() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, 4 * 1000).astype(np.int8) for _ in range(2))
    out = np.zeros(1, np.int32)
    compile_kernel(DOT, "dot").run_all_orders(3, 64, 0, a.view(np.int32), b.view(np.int32), out, 1000)
    assert out[0] == a.astype(np.int64) @ b.astype(np.int64)


def test_split_sums_without_atomics_are_a_race_between_blocks() -> None:
    words = np.ones(1000, np.int32)
    kernel = compile_kernel(DOT.replace("atomicAdd(out, sum)", "*out += sum"), "dot")
    with pytest.raises(EmulationError, match="race on array 2"):
        kernel(3, 32, 0, words, words.copy(), np.zeros(1, np.int32), 1000)


def _run(body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 0, **options: bool) -> None:
    parameters = ", ".join(f"{_C_TYPES[array.dtype.name]}* {name}" for name, array in zip("abcd", arrays, strict=False))
    source = f'extern "C" __global__ void k({parameters}) {{ const int t = threadIdx.x; {body} }}'
    compile_kernel(source, "k", **options)(1, threads, shared, *arrays)


_C_TYPES = {"int8": "signed char", "int32": "int", "uint32": "unsigned", "float32": "float", "uint8": "unsigned char"}


COPY_LAMBDA = """auto cp = [](void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}; """


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a[t + 1] = 0;", "outside the arrays; the nearest is array 0 of 256 bytes, at offset 256"),
        ("a[t] = b[t - 1];", "outside the arrays; the nearest is array 1"),
        ("if (t == 0) *(int4*)(a + 1) = make_int4(0, 0, 0, 0);", "not aligned"),
        ("int r[4] = {}; r[b[t] + t] = 1; a[t] = r[b[t]];", "index 4 is outside of a local or shared array"),
        ("a[t] = (int)(b[t] + t * 1e9f);", "outside of the integer's range"),
        ("a[t / 2] = t;", "race on array 0"),
        ("__shared__ int s[8]; s[t % 8] = t; a[t] = s[0];", "race on static shared memory"),
        ("__shared__ int s[65]; s[t] = t; __syncthreads(); s[t] = s[t + 1]; a[t] = s[t];", "writes what thread 0 of"),
        ("extern __shared__ int s[]; s[t] = t;", "at offset 16 of 16 bytes of dynamic shared memory"),
        ("if (t < 7) __syncwarp(127); else if (t < 9) __syncwarp(); ", "deadlock|has exited"),
        ("if (t % 2) return; a[t] = __shfl_sync(0xffffffffu, t, 0);", "has exited"),
        ("a[t] = __shfl_sync(t % 2 ? 0xaaaaaaaau : 0x55555555u, t, 0);", "not in mask"),
        ("if (t < 32) __syncwarp(1u << 31);", "does not name the calling lane"),
        ("if (t < 48)\n__syncthreads();\nelse\n__syncthreads();", "thread 48 stand at different __syncthreads"),
        ("__shared__ int s[4]; cp(s, (char*)a + 4);", "aligned to 16"),
    ],
)
def test_broken_rules_are_named(body: str, message: str) -> None:
    body = body.replace("cp(", COPY_LAMBDA + "cp(")
    with pytest.raises(EmulationError, match=message):
        _run(body, np.zeros(64, np.int32), np.zeros(64, np.int32), threads=64, shared=16)


def test_warps_may_come_to_one_barrier_from_different_places() -> None:
    out, body = np.zeros(64, np.int32), "if (t < 32)\n__syncthreads();\nelse\n__syncthreads();\na[t] = s[63 - t];"
    _run(f"__shared__ int s[64]; s[t] = t;\n{body}", out, threads=64)
    np.testing.assert_array_equal(out, 63 - np.arange(64))


def test_views_keep_their_alignment() -> None:
    words = np.zeros(64, np.int32)
    body = "*(int4*)(a + 4 * t) = make_int4(t, t, t, t);"
    _run(body, words[4:20], threads=4)
    np.testing.assert_array_equal(words, np.repeat([0, 0, 1, 2, 3, 0], [4, 4, 4, 4, 4, 44]))
    with pytest.raises(EmulationError, match="not aligned"):
        _run(body, words[1:17], threads=4)


def test_unchecked_overrun_of_shared_memory_is_seen() -> None:
    with pytest.raises(EmulationError, match="behind its 128 bytes"):
        _run("extern __shared__ int s[]; s[t + 2] = t;", np.zeros(1, np.int32), threads=32, shared=128, checked=False)


def test_syncwarp_orders_a_warp_and_only_a_warp() -> None:
    body = "__shared__ int s[64]; s[t] = t; __syncwarp(); a[t] = s[t ^ {}];"
    out = np.zeros(64, np.int32)
    _run(body.format(3), out, threads=64)
    np.testing.assert_array_equal(out, np.arange(64) ^ 3)
    with pytest.raises(EmulationError, match="race"):
        _run(body.format(32), out, threads=64)


def test_unwritten_shared_memory_is_poison() -> None:
    source = 'extern "C" __global__ void k(int* a) { __shared__ int s[32]; a[threadIdx.x] = s[threadIdx.x]; }'
    with pytest.raises(EmulationError, match="differs"):
        compile_kernel(source, "k").run_all_orders(1, 32, 0, np.zeros(32, np.int32))


def test_shuffles() -> None:
    lanes, out = np.arange(32), np.zeros((5, 32), np.int32)
    _run(
        "a[t] = __shfl_sync(~0u, t, t + 1, 8); a[32 + t] = __shfl_up_sync(~0u, t, 3); a[64 + t] = __shfl_down_sync(~0u,"
        " t, 3, 16); a[96 + t] = __shfl_xor_sync(~0u, t, 5); a[128 + t] = __ballot_sync(~0u, t % 3 == 0);",
        out,
    )
    np.testing.assert_array_equal(out[0], lanes // 8 * 8 + (lanes + 1) % 8)
    np.testing.assert_array_equal(out[1], np.where(lanes < 3, lanes, lanes - 3))
    np.testing.assert_array_equal(out[2], np.where(lanes % 16 > 12, lanes, lanes + 3))
    np.testing.assert_array_equal(out[3], lanes ^ 5)
    np.testing.assert_array_equal(out[4].view(np.uint32), sum(1 << lane for lane in range(0, 32, 3)))


def test_dp4a_of_mixed_signs_and_bit_instructions() -> None:
    rng = np.random.default_rng(1)
    words, out = rng.integers(0, 1 << 32, (3, 32)).astype(np.uint32), np.zeros((6, 32), np.uint32)
    asm = 'asm("{} %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z)); b[{} * 32 + t] = r;'
    body = "unsigned r, x = a[t], y = a[32 + t], z = a[64 + t];" + "".join(
        asm.format(opcode, i)
        for i, opcode in enumerate(["dp4a.u32.s32", "dp4a.s32.u32", "bfe.u32", "bfe.s32", "cvt.pack.sat.s8.s32.b32"])
    )
    body = body.replace('"bfe', '"bfe').replace('"r"(y), "r"(z)); b[2', '"r"(y & 31), "r"(z & 31)); b[2')
    body = body.replace('"r"(y), "r"(z)); b[3', '"r"(y & 31), "r"(z & 31)); b[3')
    body += 'asm("lop3.b32 %0, %1, %2, %3, 0xE8;" : "=r"(r) : "r"(x), "r"(y), "r"(z)); b[160 + t] = r;'
    _run(body, words, out)
    x, y, z = words.astype(np.int64)
    unsigned, signed = (words.view(kind).reshape(3, 32, 4).astype(np.int64) for kind in (np.uint8, np.int8))
    wrap = (1 << 32) - 1
    np.testing.assert_array_equal(out[0], (unsigned[0] * signed[1]).sum(-1) + z & wrap)
    np.testing.assert_array_equal(out[1], (signed[0] * unsigned[1]).sum(-1) + z & wrap)
    field = (x >> (y & 31)) & (1 << (z & 31)) - 1
    np.testing.assert_array_equal(out[2], field)
    length = np.minimum(z & 31, 32 - (y & 31))
    negative = (length > 0) & (x >> np.minimum((y & 31) + (z & 31) - 1, 31) & 1 == 1)
    np.testing.assert_array_equal(out[3], np.where(negative, field | -1 << length, field) & wrap)
    packed = [np.clip(v.astype(np.uint32).view(np.int32), -128, 127).astype(np.int64) & 255 for v in (x, y)]
    np.testing.assert_array_equal(out[4], packed[1] | packed[0] << 8 | z << 16 & wrap)
    np.testing.assert_array_equal(out[5], x & y | y & z | x & z)


def test_conversions_round_and_saturate_as_on_the_device() -> None:
    values = np.float32([0.5, 1.5, -2.5, 3e9, -3e9, np.nan, -0.4, 7.0])
    out = np.zeros(8, np.int32)
    _run("b[t] = __float2int_rn(a[t]);", values, out, threads=8)
    np.testing.assert_array_equal(out, [0, 2, -2, 2**31 - 1, -(2**31), 0, 0, 7])


@pytest.mark.skipif("fma" not in open("/proc/cpuinfo").read(), reason="the processor has no fused multiply-add")
def test_contraction_can_be_switched_on() -> None:
    values = np.full(1, 1 + 2**-12, np.float32)
    results = []
    for contract in (False, True):
        out = np.zeros(1, np.float32)
        _run("b[t] = a[t] * a[t] - 1.0f;", values, out, threads=1, contract=contract)
        results.append(float(out[0]))
    assert results == [2**-11, 2**-11 + 2**-24]


def test_predicated_copies() -> None:
    """cp.async under a predicate, with zero fill by source size and by an ignored source, as TVM writes them."""
    source = r"""
extern "C" __global__ void k(const int4* from, int4* to) {
  __shared__ int4 s[32];
  const int t = threadIdx.x;
  unsigned address;
  asm volatile("{ .reg .u64 p; cvta.to.shared.u64 p, %1; cvt.u32.u64 %0, p; }" : "=r"(address) : "l"(&s[t]));
  if (t < 8) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                          :: "r"(address), "l"(from + t), "r"(t % 2 * 16));
  else if (t < 16) asm volatile("{ .reg .pred ps0; setp.ne.b32 ps0, %2, 0; "
                                "cp.async.cg.shared.global [%0], [%1], 16, ps0; }"
                                :: "r"(address), "l"(from + t), "r"(t % 2));
  else __asm__ __volatile__(
    "{\n"
    " .reg .pred p;\n"
    " setp.eq.u32 p, %3, 1;\n"
    " @p cp.async.cg.shared.global [%0], [%1], %2;\n"
    " @!p st.shared.v4.u32 [%0], {%4, %4, %4, %4};\n"
    "}\n" :: "r"(address), "l"(from + t), "n"(16), "r"(t % 2), "r"(0));
  asm volatile("cp.async.wait_all;" ::: "memory");
  to[t] = s[t];
}"""
    rows = np.arange(1, 129, dtype=np.int32).reshape(32, 4)
    out = np.full_like(rows, -1)
    compile_kernel(source, "k").run_all_orders(1, 32, 0, rows, out)
    lanes = np.arange(32)
    copied = np.where((lanes >= 8) & (lanes < 16), lanes % 2 == 0, lanes % 2 == 1)
    np.testing.assert_array_equal(out, rows * copied[:, None])


def test_wrong_calls_are_refused() -> None:
    kernel = compile_kernel(GEMM, "gemm")
    a, b, c, _ = gemm_problem(32, 32, 32)
    for grid, block, shared, arguments, message in [
        (1, 256, 0, (a, b, c, 32, 32), "256 threads per block, allowed are 128"),
        (1, 128, 1 << 20, (a, b, c, 32, 32), "dynamic shared memory"),
        (1, 128, 0, (a, b, c, 32), "takes 5 arguments"),
        (1, 128, 0, (a, 3, c, 32, 32), "argument 1 must be an array"),
        (1, 128, 0, (a.T, b, c, 32, 32), "contiguous"),
        (1, 128, 0, (a[:20], a[8:], c, 32, 32), "overlap in part"),
        (0, 128, 0, (a, b, c, 32, 32), "positive sizes"),
    ]:
        with pytest.raises(EmulationError, match=message):
            kernel(grid, block, shared, *arguments)
    with pytest.raises(EmulationError, match="no kernel 'nothing'"):
        compile_kernel(GEMM, "nothing")
    with pytest.raises(UnknownInstructionError, match=r"cp\.async\.bulk"):
        compile_kernel(GEMM.replace("cp.async.commit_group", "cp.async.bulk.commit_group"), "gemm")
