// Included in front of every translated kernel: CUDA's keywords, intrinsics and the launch of one kernel on the host.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "runtime.hpp"

#define __CUDACC_VER_MAJOR__ 13
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// alignas must stand first in a declaration; nvcc's front end is not so strict.
#define alignas(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))

constexpr int warpSize = emu::kWarp;

// CUDA's overloads take mixed types, and ignore a NaN beside a number.
template <class A, class B, class T = std::common_type_t<A, B>>
inline T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class T = std::common_type_t<A, B>>
inline T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

#include "intrinsics.hpp"

namespace emu {

// The raw bits of an inline-assembly operand, and back.
template <class Bits, class T>
inline Bits raw(const T& value) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<Bits>(reinterpret_cast<std::uintptr_t>(value));
  } else if constexpr (std::is_floating_point_v<T>) {
    static_assert(sizeof(Bits) == sizeof(T), "a float operand needs a register of its own size");
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  } else {
    return static_cast<Bits>(value);
  }
}

template <class T, class Bits>
inline void put(T& target, Bits bits) {
  if constexpr (std::is_floating_point_v<T>) {
    static_assert(sizeof(Bits) == sizeof(T), "a float operand needs a register of its own size");
    std::memcpy(&target, &bits, sizeof bits);
  } else if constexpr (std::is_pointer_v<T>) {
    target = reinterpret_cast<T>(bits);
  } else {
    target = static_cast<T>(bits);
  }
}

// One parameter of a kernel, as Python asks for it.
struct Parameter {
  std::int32_t bytes, is_pointer, is_float;
};

template <class... A>
__attribute__((no_sanitize("thread"))) int describe(void (*)(A...), Parameter* out) {
  const Parameter all[] = {{static_cast<std::int32_t>(sizeof(A)), std::is_pointer_v<A>, std::is_floating_point_v<A>}...,
                           {0, 0, 0}};
  for (std::size_t i = 0; i < sizeof...(A); ++i) out[i] = all[i];
  return static_cast<int>(sizeof...(A));
}

template <class... A>
struct Call {
  void (*kernel)(A...);
  void** arguments;

  template <std::size_t... I>
  __attribute__((no_sanitize("thread"))) void run(std::index_sequence<I...>) const {
    kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<A>>*>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread"))) static void body(const void* self) {
    static_cast<const Call*>(self)->run(std::index_sequence_for<A...>{});
  }
};

template <class... A>
__attribute__((no_sanitize("thread"))) int launch(void (*kernel)(A...), const Launch* what, char* message, std::size_t n) {
  const Call<A...> call{kernel, reinterpret_cast<void**>(what->arguments)};
  return run(*what, &Call<A...>::body, &call, message, n);
}

}  // namespace emu

#define EMU_EXPORT(name)                                                                                          \
  extern "C" __attribute__((visibility("default"))) int emu_describe_##name(emu::Parameter* out) {                 \
    return emu::describe(&name, out);                                                                             \
  }                                                                                                               \
  extern "C" __attribute__((visibility("default"))) int emu_launch_##name(const emu::Launch* what, char* message, \
                                                                         std::size_t n) {                         \
    return emu::launch(&name, what, message, n);                                                                  \
  }
