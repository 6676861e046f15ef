// What a translated kernel calls: threads of one block as fibers, the tensor-core instructions, asynchronous copies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.hpp"

#pragma GCC visibility push(hidden)

namespace emu {

constexpr int kWarp = 32;
constexpr std::size_t kMaxShared = 232448;  // 227 KiB, the most that any supported architecture gives one block

enum class Order : int { kForward = 0, kReversed = 1, kRandom = 2 };

struct Array {
  std::uint64_t address;
  std::uint64_t bytes;
};

// One launch, as Python describes it.
struct Launch {
  std::uint32_t grid[3];
  std::uint32_t block[3];
  std::uint32_t dynamic_shared;
  std::int32_t order;
  std::uint32_t seed;
  std::uint32_t poison;
  std::int32_t check_accesses;
  std::int32_t check_blocks;
  std::uint64_t arguments;  // void**: argument i is read from where entry i points to
  std::uint64_t arrays;     // Array*: everything in global memory that the kernel may touch
  std::uint32_t array_count;
};

using Body = void (*)(const void* context);
int run(const Launch& launch, Body body, const void* context, char* message, std::size_t message_bytes);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void syncthreads(int line);
void syncthreads_named(std::uint32_t barrier, std::uint32_t count);
void syncwarp(std::uint32_t mask);
std::uint32_t active_mask();
std::uint32_t lane_id();

// All lanes in `mask` meet; the last one to arrive calls `exec` once with every lane's `arguments`.
using Exec = void (*)(void** lanes, std::uint32_t mask);
void collective(const char* name, Exec exec, std::intptr_t variant, std::uint32_t mask, void* arguments);

void* dynamic_shared();
std::uint32_t shared_address(const void* pointer);
void* shared_pointer(std::uint32_t address);

enum Access : int { kRead = 0, kWrite = 1, kAtomic = 2 };
void access(const void* pointer, std::size_t bytes, int kind);

struct Mma {
  int m, n, k, bits;
  bool a_signed, b_signed, saturate;
};
// Source: PTX ISA, "Matrix multiply-accumulate operation using mma instruction", integer types.
void mma(const Mma& shape, std::uint32_t* d, const std::uint32_t* a, const std::uint32_t* b, const std::uint32_t* c);
void ldmatrix(int count, bool transposed, std::uint32_t* d, const void* row);

void cp_async(void* shared, const void* global, long bytes, long source_bytes);
void cp_async_commit();
void cp_async_wait(long pending_groups);
void cp_async_wait_all();

}  // namespace emu

extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;

#pragma GCC visibility pop
