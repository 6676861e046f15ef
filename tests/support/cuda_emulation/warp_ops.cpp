// mma.sync, ldmatrix and cp.async with the fragment layouts of the PTX ISA.
#include <algorithm>
#include <cstring>

#include "state.hpp"

namespace emu {
namespace {

struct Place {
  int row, column;
};

// Where element i of a lane's fragment lies in its matrix. `per` elements fill one 32-bit register.
// PTX ISA, "Matrix Fragments for mma.m8n8k16 / m16n8k16 / m16n8k32 / m8n8k32 / m16n8k64" (integer types): registers go
// down the rows first (a group of 8 rows each), then along k.
Place place_a(const Mma& s, int lane, int i) {
  const int per = 32 / s.bits, reg = i / per, row_groups = s.m / 8;
  return {lane / 4 + 8 * (reg % row_groups), lane % 4 * per + i % per + 4 * per * (reg / row_groups)};
}

Place place_b(const Mma& s, int lane, int i) {
  const int per = 32 / s.bits;
  return {lane % 4 * per + i % per + 4 * per * (i / per), lane / 4};
}

Place place_c(int lane, int i) { return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2}; }

int element(const std::uint32_t* registers, int i, int bits, bool is_signed) {
  const int per = 32 / bits;
  const std::uint32_t field = registers[i / per] >> (i % per * bits) & ((1u << bits) - 1);
  const int sign = 1 << (bits - 1);
  return is_signed ? static_cast<int>(field ^ sign) - sign : static_cast<int>(field);
}

// The instructions of this file are `.aligned`: all 32 lanes execute them.
void need_whole_warp(const char* name) {
  if (machine.threads < (machine.current->warp + 1) * kWarp) fail("%s in a warp of fewer than 32 threads", name);
}

struct MmaArguments {
  Mma shape;
  std::uint32_t* d;
  const std::uint32_t *a, *b, *c;
};

void multiply(void** lanes, std::uint32_t) {
  const Mma s = static_cast<MmaArguments*>(lanes[0])->shape;
  static int a[16][64], b[8][64];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& args = *static_cast<MmaArguments*>(lanes[lane]);
    for (int i = 0; i < s.m * s.k / kWarp; ++i) {
      const Place p = place_a(s, lane, i);
      a[p.row][p.column] = element(args.a, i, s.bits, s.a_signed);
    }
    for (int i = 0; i < s.k * s.n / kWarp; ++i) {
      const Place p = place_b(s, lane, i);
      b[p.column][p.row] = element(args.b, i, s.bits, s.b_signed);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& args = *static_cast<MmaArguments*>(lanes[lane]);
    for (int i = 0; i < s.m * s.n / kWarp; ++i) {
      const Place p = place_c(lane, i);
      int product = 0;  // at most 64 * 2^16: cannot overflow
      for (int k = 0; k < s.k; ++k) product += a[p.row][k] * b[p.column][k];
      const std::int64_t exact = std::int64_t{static_cast<std::int32_t>(args.c[i])} + product;
      const std::int64_t value = s.saturate ? std::clamp<std::int64_t>(exact, INT32_MIN, INT32_MAX) : exact;
      args.d[i] = static_cast<std::uint32_t>(value);
    }
  }
}

struct LdmatrixArguments {
  int count;
  bool transposed;
  std::uint32_t* d;
  const unsigned char* row;
};

void load_matrices(void** lanes, std::uint32_t) {
  Fiber* const caller = machine.current;
  const auto& first = *static_cast<LdmatrixArguments*>(lanes[0]);
  for (int lane = 0; lane < kWarp; ++lane) {
    // The lane that receives the data is the one that reads: its barrier must lie behind the write.
    machine.current = &machine.fibers[caller->warp * kWarp + lane];
    for (int matrix = 0; matrix < first.count; ++matrix) {
      unsigned char bytes[4];
      for (int half = 0; half < 2; ++half) {
        const int row = first.transposed ? lane % 4 * 2 + half : lane / 4;
        const int column = first.transposed ? lane / 4 : lane % 4 * 2 + half;
        const auto& source = *static_cast<LdmatrixArguments*>(lanes[matrix * 8 + row]);
        access(source.row + 2 * column, 2, kRead);
        std::memcpy(bytes + 2 * half, source.row + 2 * column, 2);
      }
      std::memcpy(static_cast<LdmatrixArguments*>(lanes[lane])->d + matrix, bytes, 4);
    }
  }
  machine.current = caller;
}

void complete(const Copy& copy) {
  std::memset(copy.shared, 0, copy.bytes);
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  mark_arrived(copy.shared, copy.bytes);
}

}  // namespace

void mma(const Mma& shape, std::uint32_t* d, const std::uint32_t* a, const std::uint32_t* b, const std::uint32_t* c) {
  need_whole_warp("mma.sync");
  MmaArguments arguments{shape, d, a, b, c};
  const std::intptr_t variant = shape.m << 16 | shape.k << 8 | shape.bits << 3 | shape.a_signed << 2 |
                                shape.b_signed << 1 | shape.saturate;
  collective("mma.sync", multiply, variant, 0xffffffffu, &arguments);
}

void ldmatrix(int count, bool transposed, std::uint32_t* d, const void* row) {
  // Only the first 8 * count lanes supply addresses.
  if (machine.current->lane < 8 * count) {
    if (!in_shared(row, 16)) fail("ldmatrix: row address %p is not in shared memory", row);
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row must be aligned to 16 bytes");
  }
  need_whole_warp("ldmatrix");
  LdmatrixArguments arguments{count, transposed, d, static_cast<const unsigned char*>(row)};
  collective("ldmatrix", load_matrices, count * 2 + transposed, 0xffffffffu, &arguments);
}

void cp_async(void* shared, const void* global, long bytes, long source_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async: %ld bytes; 4, 8 or 16 are allowed", bytes);
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async: source size %ld of %ld bytes", source_bytes, bytes);
  if (!in_shared(shared, bytes)) fail("cp.async: destination %p is not in shared memory", shared);
  if (in_shared(global, 0)) fail("cp.async: the source is in shared memory");
  if (reinterpret_cast<std::uintptr_t>(shared) % bytes != 0 || reinterpret_cast<std::uintptr_t>(global) % bytes != 0)
    fail("cp.async: addresses must be aligned to %ld bytes", bytes);
  access(shared, bytes, kWrite);
  if (source_bytes > 0) access(global, source_bytes, kRead);
  // Whoever reads before the wait gets this instead of the data.
  std::memset(shared, static_cast<int>(machine.launch->poison ^ 0xff), bytes);
  mark_pending(shared, bytes);
  machine.current->open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes});
}

void cp_async_commit() {
  Fiber& fiber = *machine.current;
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void finish_copies(Fiber& fiber, std::size_t keep) {
  for (; fiber.committed.size() > keep; fiber.committed.pop_front())
    for (const Copy& copy : fiber.committed.front()) complete(copy);
}

void cp_async_wait(long pending_groups) { finish_copies(*machine.current, static_cast<std::size_t>(pending_groups)); }

void cp_async_wait_all() {
  cp_async_commit();
  finish_copies(*machine.current, 0);
}

}  // namespace emu
