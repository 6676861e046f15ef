"""Device functions of the integer kernels as CUDA source: each wraps one instruction, or says exact arithmetic where a
compiler could choose another rounding.

Inline assembly holds one PTX instruction per statement, operands in the order of the PTX manual.
"""

from __future__ import annotations

Function = tuple[str, str]


def _function(signature: str, body: str) -> Function:
    name = signature.split("(")[0].split()[-1].lstrip("*")
    return name, f"__device__ __forceinline__ {signature} {{\n{body}\n}}\n"


def mma(dtype: str, is_k32: bool) -> Function:
    """d[4] += a[4] . b[2] for a tile of 16 rows x 32 bytes (`dtype` x) and 32 bytes x 8 columns (int8).

    Lane l holds of A the rows l/4 (a[0], a[2]) and l/4 + 8 (a[1], a[3]), bytes l%4*4.. of the first (a[0], a[1]) and
    the second 16 (a[2], a[3]); of B column l/4, the same bytes (b[0], b[1]); of D columns l%4*2 and +1 of row l/4
    (d[0], d[1]) and row l/4 + 8 (d[2], d[3]). Without m16n8k32 the four quarters are mma.m8n8k16, whose fragments are
    the same registers. Sums wrap around at 32 bits, like any other addition.

    Source: PTX ISA, "Matrix Fragments for mma.m16n8k32" and "for mma.m8n8k16".
    """
    x = "u8" if dtype == "uint8" else "s8"
    name = f"lpsn_mma_{x}_{'k32' if is_k32 else 'k16'}"
    return _whole(name, f"m16n8k32.row.col.s32.{x}.s8") if is_k32 else _quarters(name, f"m8n8k16.row.col.s32.{x}.s8")


def mma_nibbles(is_k64: bool) -> Function:
    """d[4] += a[4] . b[2] for a tile of 16 rows x 64 unsigned nibbles and 64 signed nibbles x 8 columns.

    As `mma`, with eight nibbles in a register where there are four bytes: l%4*8.. of the first and the second 32.
    Without m16n8k64 (sm_75) the quarters are mma.m8n8k32.

    Source: PTX ISA, "Matrix Fragments for mma.m16n8k64" and "for mma.m8n8k32".
    """
    name = f"lpsn_mma_u4_{'k64' if is_k64 else 'k32'}"
    return _whole(name, "m16n8k64.row.col.s32.u4.s4") if is_k64 else _quarters(name, "m8n8k32.row.col.s32.u4.s4")


def _whole(name: str, kind: str) -> Function:
    """One instruction of 16 rows. Volatile: where sums are only used under a condition the compiler may not move it
    there, since all lanes have to execute it.
    """
    return _function(
        f"void {name}(int* d, const int* a, const int* b)",
        f'  asm volatile("mma.sync.aligned.{kind}.s32 '
        '{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"\n'
        '    : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])\n'
        '    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),\n'
        '      "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]));',
    )


def _quarters(name: str, kind: str) -> Function:
    """Four instructions of 8 rows and half of the inner dimension; as `_whole`."""
    quarters = [
        f'  asm volatile("mma.sync.aligned.{kind}.s32 {{%0,%1}}, {{%2}}, {{%3}}, {{%4,%5}};"\n'
        f'    : "=r"(d[{2 * m}]), "=r"(d[{2 * m + 1}])\n'
        f'    : "r"(a[{2 * k + m}]), "r"(b[{k}]), "r"(d[{2 * m}]), "r"(d[{2 * m + 1}]));'
        for k in range(2)
        for m in range(2)
    ]
    return _function(f"void {name}(int* d, const int* a, const int* b)", "\n".join(quarters))


LDMATRIX = _function(
    "void lpsn_ldmatrix_x4(int* d, const void* row)",
    "  unsigned int address = (unsigned int)__cvta_generic_to_shared(row);\n"
    '  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"\n'
    '    : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");',
)
"""Four 8 x 16 byte matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets bytes l%4*4.. of row l/4
of each.
"""


def copy_async(size: int) -> Function:
    """Start a copy of 4, 8 or 16 bytes to shared memory, from `pad` where the source lies outside of the image."""
    cache = "cg" if size == 16 else "ca"
    return _function(
        f"void lpsn_copy_async_{size}(void* to, const void* from, const void* pad, bool is_inside)",
        "  unsigned int address = (unsigned int)__cvta_generic_to_shared(to);\n"
        "  const void* source = is_inside ? from : pad;\n"
        f'  asm volatile("cp.async.{cache}.shared.global [%0], [%1], {size};"\n'
        '    :: "r"(address), "l"(source) : "memory");',
    )


COMMIT = _function("void lpsn_copy_commit()", '  asm volatile("cp.async.commit_group;" ::: "memory");')
"""Close the group of copies that this thread started."""


def copy_wait(groups: int) -> Function:
    """Wait until at most `groups` groups of this thread are under way."""
    return _function(
        f"void lpsn_copy_wait_{groups}()", f'  asm volatile("cp.async.wait_group {groups};" ::: "memory");'
    )


_VECTORS = {4: "int", 8: "int2", 16: "int4"}


def load(size: int) -> Function:
    """Load 4, 8 or 16 bytes into registers, from `pad` where the source lies outside of the image."""
    vector = _VECTORS[size]
    return _function(
        f"void lpsn_load_{size}(int* to, const void* from, const void* pad, bool is_inside)",
        f"  *({vector}*)to = *(const {vector}*)(is_inside ? from : pad);",
    )


def copy(size: int) -> Function:
    """Copy 4, 8 or 16 bytes."""
    vector = _VECTORS[size]
    return _function(
        f"void lpsn_copy_{size}(void* to, const void* from)", f"  *({vector}*)to = *(const {vector}*)from;"
    )


def _unpack(name: str, words: int) -> Function:
    return _function(
        f"void {name}(int* to, const int* from)",
        "#pragma unroll\n"
        f"  for (int i = 0; i < {words}; ++i) {{\n"
        "    to[2 * i] = (int)(((unsigned int)from[i] << 4) & 0xF0F0F0F0u);\n"
        "    to[2 * i + 1] = (int)((unsigned int)from[i] & 0xF0F0F0F0u);\n"
        "  }",
    )


UNPACK_NIBBLES = _unpack("lpsn_unpack_nibbles", 4)
"""32 signed nibbles -> 32 bytes that hold them times 16."""
UNPACK_PAIR = _unpack("lpsn_unpack_pair", 2)
"""16 signed nibbles -> 16 bytes that hold them times 16."""

PACK_NIBBLES = _function(
    "void lpsn_pack_nibbles(int* to, const int* low, const int* high)",
    "#pragma unroll\n"
    "  for (int i = 0; i < 4; ++i)\n"
    '    asm("lop3.b32 %0, %1, %2, 0x0F0F0F0F, 0xE4;" : "=r"(to[i]) : "r"(low[i]), "r"((unsigned int)high[i] << 4));',
)
"""Two times 16 bytes -> 32 nibbles: byte k of `low` in the low nibble of byte k, that of `high` in the high one. What
a byte holds beyond 15 (where channels end) is cut off, so that it does not reach its neighbour.

One selection of bits per word, `low & mask | high & ~mask`, which the compiler does not find by itself.
"""

SCALED = _function("float lpsn_scaled(int total, float scale)", "  return __fmul_rn(__int2float_rn(total), scale);")
"""float32(total) * scale, rounded once."""


def residual(is_signed: bool) -> Function:
    """Eight bytes as float32, less their zero point.

    A byte below the exponent of 2**23 is that number plus the byte: one selection and one exact subtraction each.
    """
    flip, top = (" ^ 0x80808080u", "8388736.0f") if is_signed else ("", "8388608.0f")
    return _function(
        f"void lpsn_residual_{'s8' if is_signed else 'u8'}(float* to, const int* from, int zero_point)",
        f"  float zero = {top} + __int2float_rn(zero_point);\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 8; ++i) {\n"
        f"    unsigned int word = (unsigned int)from[i / 4]{flip};\n"
        "    unsigned int bits = __byte_perm(word, 0x4B000000u, 0x7650u + (unsigned int)(i % 4));\n"
        "    to[i] = __fsub_rn(__uint_as_float(bits), zero);\n"
        "  }",
    )


def with_residual(clamps: bool) -> Function:
    """Sum of two products, each clamped first (`quant._finish`). Where no residual reaches 2**20, not clamping them is
    the same after the output's own clamp: a sum that it would change lies beyond every output.
    """
    if not clamps:
        return _function(
            "float lpsn_plus_residual(float value, float other, float multiplier)",
            "  return __fadd_rn(value, __fmul_rn(other, multiplier));",
        )
    return _function(
        "float lpsn_with_residual(float value, float other, float multiplier)",
        "  other = __fmul_rn(other, multiplier);\n"
        "  value = fminf(fmaxf(value, -1048576.0f), 1048576.0f);\n"
        "  return __fadd_rn(value, fminf(fmaxf(other, -1048576.0f), 1048576.0f));",
    )


ROUNDED = _function(
    "int lpsn_rounded(float value, float low, float high)",
    "  return __float_as_int(__fadd_rn(fminf(fmaxf(value, low), high), 12582912.0f));",
)
"""Clamp and round half to even (`quant.to_integer` without the zero point): the bits of 1.5 * 2**23 plus the integer.
An addition is cheaper than a conversion; `store_bytes` takes the rest off.
"""


def store_bytes(is_signed: bool) -> Function:
    """Eight integers, as `ROUNDED` makes them, as eight bytes, a zero point added to each; every sum fits its byte.

    Sums of four shifted integers instead of a mask and an addition for each: as sums are 0 .. 255 (signed ones are
    made so by 128, which is the top bit of a byte), nothing is carried into a neighbour, and what intermediate results
    lose beyond 32 bits is not missed. The bits of 1.5 * 2**23 add up to 0x8B400000.
    """
    offset, top = ("+ 128", " ^ 0x80808080u") if is_signed else ("", "")
    return _function(
        f"void lpsn_store_{'s8' if is_signed else 'u8'}(void* to, const int* values, int zero_point)",
        "  const unsigned int* v = (const unsigned int*)values;\n"
        f"  unsigned int four = (unsigned int)(zero_point {offset}) * 0x01010101u - 0x8B400000u;\n"
        "  unsigned int low = (v[0] + (v[1] << 8)) + ((v[2] + (v[3] << 8)) << 16) + four;\n"
        "  unsigned int high = (v[4] + (v[5] << 8)) + ((v[6] + (v[7] << 8)) << 16) + four;\n"
        f"  *(uint2*)to = make_uint2(low{top}, high{top});",
    )


TO_INTEGER = _function("int lpsn_to_integer(float value)", "  return __float2int_rn(value);")
"""Round half to even."""
TO_BITS = _function("int lpsn_to_bits(float value)", "  return __float_as_int(__fadd_rn(value, 12582912.0f));")
"""Round half to even, below 2**22: the bits of 1.5 * 2**23 plus the integer, which `store_saturated` takes off together
with adding the zero point.
"""


def store_saturated(is_signed: bool, has_zero_point: bool) -> Function:
    """Eight integers as eight bytes that saturate (sm_72 and later); with a zero point, integers as `TO_BITS` makes
    them and the zero point added.

    Source: PTX ISA, "cvt.pack": the second operand becomes the lowest byte, the third moves up by two (CUTLASS'
    cutlass/numeric_conversion.h relies on the same order).
    """
    x = "s8" if is_signed else "u8"
    added = " + (zero_point - 0x4B400000)" if has_zero_point else ""
    pack = f"cvt.pack.sat.{x}.s32.b32"
    lines = [
        f"  v = values + {4 * i};\n"
        f'  asm("{pack} %0, %1, %2, %3;" : "=r"(words[{i}]) : "r"(v[3]{added}), "r"(v[2]{added}), "r"(0));\n'
        f'  asm("{pack} %0, %1, %2, %3;" : "=r"(words[{i}]) : "r"(v[1]{added}), "r"(v[0]{added}), "r"(words[{i}]));\n'
        for i in range(2)
    ]
    return _function(
        f"void lpsn_store_{x}_sat{'_zp' if has_zero_point else ''}(void* to, const int* values, int zero_point)",
        f"  unsigned int words[2];\n  const int* v;\n{''.join(lines)}  *(uint2*)to = make_uint2(words[0], words[1]);",
    )


STORE_LOOKED_UP = _function(
    "void lpsn_store_looked_up(void* to, const int* values, const void* table)",
    "  const unsigned char* bytes = (const unsigned char*)table;\n"
    "  unsigned int b[8];\n"
    "#pragma unroll\n"
    "  for (int i = 0; i < 8; ++i) b[i] = bytes[values[i] & 255];\n"
    "#pragma unroll\n"
    "  for (int i = 0; i < 8; i += 2) b[i] = __byte_perm(b[i], b[i + 1], 0x0040);\n"
    "  *(uint2*)to = make_uint2(__byte_perm(b[0], b[2], 0x5410), __byte_perm(b[4], b[6], 0x5410));",
)
"""Eight integers, as `ROUNDED` makes them, as the bytes that stand for them in a table of 256: their low bytes are the
integers' own (two's complement), as those of 1.5 * 2**23 are zero.
"""


def dot(dtype: str) -> Function:
    """A sum and four products of bytes: `dtype` x int8."""
    x = "u32" if dtype == "uint8" else "s32"
    return _function(
        f"int lpsn_dot_{x}(int a, int b, int total)",
        "  int result;\n"
        f'  asm volatile("dp4a.{x}.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(total));\n'
        "  return result;",
    )


WARP_SUM = _function(
    "int lpsn_warp_sum(int value)",
    "#pragma unroll\n"
    "  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);\n"
    "  return value;",
)
"""Sum over the lanes of a warp, in every lane."""
