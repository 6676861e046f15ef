// Device intrinsics: rounding, integer, warp, atomic.
#pragma once

// The line is the caller's: it tells one barrier of the source from another.
inline void __syncthreads(int line = __builtin_LINE()) { emu::syncthreads(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::syncwarp(mask); }
inline unsigned __activemask() { return emu::active_mask(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline size_t __cvta_generic_to_shared(const void* pointer) { return emu::shared_address(pointer); }
inline void* __cvta_shared_to_generic(size_t address) { return emu::shared_pointer(static_cast<std::uint32_t>(address)); }
inline long long clock64() { return 0; }

// Floating point: the host is compiled without contraction and rounds to nearest even, so these are plain operators.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
template <class T>
inline T emu_convert(double value) {  // conversions on the device saturate, and NaN becomes 0
  if (std::isnan(value)) return 0;
  return static_cast<T>(std::clamp(value, static_cast<double>(std::numeric_limits<T>::min()),
                                   static_cast<double>(std::numeric_limits<T>::max())));
}
inline int __float2int_rn(float a) { return emu_convert<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return emu_convert<int>(std::trunc(a)); }
inline int __float2int_rd(float a) { return emu_convert<int>(std::floor(a)); }
inline int __float2int_ru(float a) { return emu_convert<int>(std::ceil(a)); }
inline unsigned __float2uint_rn(float a) { return emu_convert<unsigned>(std::nearbyint(a)); }
inline float __saturatef(float a) { return std::isnan(a) ? 0.0f : std::clamp(a, 0.0f, 1.0f); }
inline int __float_as_int(float a) { int b; std::memcpy(&b, &a, 4); return b; }
inline unsigned __float_as_uint(float a) { unsigned b; std::memcpy(&b, &a, 4); return b; }
inline float __int_as_float(int a) { float b; std::memcpy(&b, &a, 4); return b; }
inline float __uint_as_float(unsigned a) { float b; std::memcpy(&b, &a, 4); return b; }

// Approximate on the device; here as exact as the host's library. Never part of a bit-exact kernel.
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float __tanf(float a) { return std::tan(a); }

// Integers.
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<long long>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (static_cast<unsigned long long>(a) * b) >> 32; }
inline int __mul24(int a, int b) { return static_cast<int>(static_cast<unsigned>(a << 8 >> 8) * static_cast<unsigned>(b << 8 >> 8)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {  // PTX prmt: bit 3 of a nibble spreads the sign
  const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i;
    unsigned byte = both >> 8 * (s & 7) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return (static_cast<unsigned long long>(hi) << 32 | lo) >> (n & 31);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return (static_cast<unsigned long long>(hi) << 32 | lo) << (n & 31) >> 32;
}

namespace emu {
template <bool SignedA, bool SignedB>
inline std::uint32_t dp4a(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  for (int i = 0; i < 32; i += 8) {
    const int x = SignedA ? static_cast<std::int8_t>(a >> i) : static_cast<std::uint8_t>(a >> i);
    const int y = SignedB ? static_cast<std::int8_t>(b >> i) : static_cast<std::uint8_t>(b >> i);
    c += static_cast<std::uint32_t>(x * y);
  }
  return c;
}
template <class T>
inline std::uint32_t four(T v) { std::uint32_t bits; std::memcpy(&bits, &v, 4); return bits; }

inline std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c, unsigned table) {
  std::uint32_t result = 0;
  for (unsigned row = 0; row < 8; ++row)
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}
// PTX bfe: bits beyond bit 31 are zero (u32) or the sign (s32).
template <bool Signed>
inline std::uint32_t bfe(std::uint32_t a, std::uint32_t position, std::uint32_t length) {
  position &= 0xff, length &= 0xff;
  const int last = static_cast<int>(std::min(position + length - 1, 31u));
  const bool sign = Signed && length != 0 && (a >> last & 1);
  std::uint32_t result = 0;
  for (std::uint32_t i = 0; i < 32; ++i) {
    const bool inside = i < length && position + i < 32;
    if (inside ? a >> (position + i) & 1 : sign) result |= 1u << i;
  }
  return result;
}
// PTX cvt.pack.sat: two saturated values in the low half, the low half of c above them for 8-bit results.
template <class To>
inline std::uint32_t cvt_pack(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const auto narrow = [](std::uint32_t v) {
    const int clamped = std::clamp<int>(static_cast<int>(v), std::numeric_limits<To>::min(), std::numeric_limits<To>::max());
    return static_cast<std::uint32_t>(static_cast<std::make_unsigned_t<To>>(clamped));
  };
  constexpr int bits = 8 * sizeof(To);
  return narrow(b) | narrow(a) << bits | (bits == 8 ? c << 16 : 0);
}
}  // namespace emu

inline unsigned __vmaxu2(unsigned a, unsigned b) {
  unsigned low = (a & 0xFFFFu) > (b & 0xFFFFu) ? a & 0xFFFFu : b & 0xFFFFu;
  return (a >> 16 > b >> 16 ? a >> 16 : b >> 16) << 16 | low;
}
inline int __dp4a(int a, int b, int c) { return emu::dp4a<true, true>(a, b, c); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return emu::dp4a<false, false>(a, b, c); }
inline int __dp4a(char4 a, char4 b, int c) { return emu::dp4a<true, true>(emu::four(a), emu::four(b), c); }
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) { return emu::dp4a<false, false>(emu::four(a), emu::four(b), c); }

// Memory.
template <class T>
inline T __ldg(const T* p) { return *p; }

#define EMU_ATOMIC(name, expression)                                                             \
  template <class T>                                                                             \
  __attribute__((no_sanitize("thread"))) inline T name(T* p, std::common_type_t<T> value) {      \
    emu::access(p, sizeof(T), emu::kAtomic);                                                     \
    const T old = *p;                                                                            \
    *p = (expression);                                                                           \
    return old;                                                                                  \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicExch, value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicAnd, old & value)
#undef EMU_ATOMIC
template <class T>
__attribute__((no_sanitize("thread"))) inline T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  emu::access(p, sizeof(T), emu::kAtomic);
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

// Warp shuffles and votes. Source lanes follow the PTX pseudo code of shfl.sync for any power-of-two width.
namespace emu {
enum class Shuffle : int { kIndex, kUp, kDown, kXor };
template <class T>
struct ShuffleArguments {
  T value, result;
  int amount, width, lane;
};

template <class T, Shuffle kMode>
__attribute__((no_sanitize("thread"))) void exchange(void** lanes, std::uint32_t mask) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& mine = *static_cast<ShuffleArguments<T>*>(lanes[lane]);
    const int first = lane & ~(mine.width - 1), last = first + mine.width - 1;
    int source = kMode == Shuffle::kIndex ? first + (mine.amount & (mine.width - 1))
                 : kMode == Shuffle::kUp   ? lane - mine.amount
                 : kMode == Shuffle::kDown ? lane + mine.amount
                                           : lane ^ mine.amount;
    if ((kMode == Shuffle::kUp && source < first) || (kMode != Shuffle::kUp && source > last)) source = lane;
    if (lanes[source] == nullptr) fail("__shfl_sync: lane %d reads lane %d, which is not in mask 0x%08x", lane, source, mask);
    mine.result = static_cast<ShuffleArguments<T>*>(lanes[source])->value;
  }
}

template <Shuffle kMode, class T>
inline T shuffle(unsigned mask, T value, int amount, int width) {
  ShuffleArguments<T> arguments{value, value, amount, width, 0};
  collective("__shfl_sync", exchange<T, kMode>, 0, mask, &arguments);
  return arguments.result;
}

struct VoteArguments {
  bool predicate;
  unsigned result;
};
__attribute__((no_sanitize("thread"))) inline void vote(void** lanes, std::uint32_t mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) ballot |= static_cast<unsigned>(static_cast<VoteArguments*>(lanes[lane])->predicate) << lane;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) static_cast<VoteArguments*>(lanes[lane])->result = ballot;
}
}  // namespace emu

template <class T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32) { return emu::shuffle<emu::Shuffle::kIndex>(mask, v, lane, width); }
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) { return emu::shuffle<emu::Shuffle::kUp>(mask, v, by, width); }
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) { return emu::shuffle<emu::Shuffle::kDown>(mask, v, by, width); }
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) { return emu::shuffle<emu::Shuffle::kXor>(mask, v, by, width); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emu::VoteArguments arguments{predicate != 0, 0};
  emu::collective("__ballot_sync", emu::vote, 0, mask, &arguments);
  return arguments.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
