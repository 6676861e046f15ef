// CUDA's built-in vector types, with the alignment that CUDA gives them: a vector access that is not aligned is a fault
// on the device, so the checked mode must know the same alignments.
#pragma once

#define EMU_VECTORS(T, name, two, four)                                                      \
  struct name##1 {                                                                           \
    T x;                                                                                     \
  };                                                                                         \
  struct __attribute__((aligned(two))) name##2 {                                             \
    T x, y;                                                                                  \
  };                                                                                         \
  struct name##3 {                                                                           \
    T x, y, z;                                                                               \
  };                                                                                         \
  struct __attribute__((aligned(four))) name##4 {                                            \
    T x, y, z, w;                                                                            \
  };                                                                                         \
  inline name##1 make_##name##1(T x) { return {x}; }                                         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                 \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned int, uint, 8, 16)
EMU_VECTORS(long, long, 16, 16)
EMU_VECTORS(unsigned long, ulong, 16, 16)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
#undef EMU_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int a = 1, unsigned int b = 1, unsigned int c = 1) : x(a), y(b), z(c) {}
};
