// Every memory access of a kernel that is compiled with -fsanitize=thread ends here: the compiler calls __tsan_*, which
// this file defines itself (the sanitizer's library is not linked). Found exactly, whatever the order of threads was:
// accesses outside the arrays, misaligned vectors, and races, which are two accesses to one byte by two threads, one of
// them a write, without a barrier between them.
#include <cstdio>
#include <cstring>

#include "state.hpp"

namespace emu {
namespace {

constexpr std::uint8_t kIsAtomic = 1, kIsPending = 2;

struct Stamp {
  std::int32_t block = -1;
  std::int16_t thread = 0;
  std::uint8_t flags = 0;
  std::uint32_t barrier = 0, warp = 0;
};

// `other_read` is the last read by another warp than that of `last_read`: with both, a conflict between warps is
// always seen.
struct Cell {
  Stamp write, last_read, other_read;
};

struct Region {
  const char* begin;
  const char* end;
  std::vector<Cell> cells;
};

std::vector<Region> regions;
std::vector<Cell> shared_cells;
bool checking = false, check_blocks = false;

extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

Stamp now(std::uint8_t flags) {
  const Fiber& f = *machine.current;
  return {machine.block, static_cast<std::int16_t>(f.thread), flags, machine.barrier_epoch, machine.warp_epoch[f.warp]};
}

bool in_order(const Stamp& earlier, bool shared) {
  if (earlier.block < 0) return true;
  if (earlier.block != machine.block) return shared || !check_blocks;
  const Fiber& f = *machine.current;
  if (earlier.thread == f.thread || earlier.barrier < machine.barrier_epoch) return true;
  return earlier.thread / kWarp == f.warp && earlier.warp < machine.warp_epoch[f.warp];
}

void describe_shared(char* out, std::size_t n, std::size_t offset) {
  const char* p = __start_emulated_shared + offset;
  const bool is_dynamic = p >= dynamic_arena && p < dynamic_arena + sizeof dynamic_arena;
  if (is_dynamic)
    std::snprintf(out, n, "dynamic shared memory, byte %zd", p - dynamic_arena);
  else
    std::snprintf(out, n, "static shared memory");
}

[[noreturn]] void race(const char* what, const Stamp& earlier, const char* verb, bool shared, std::size_t offset, int array) {
  char where[64];
  if (shared)
    describe_shared(where, sizeof where, offset);
  else
    std::snprintf(where, sizeof where, "array %d, byte %zu", array, offset);
  fail("race on %s: it %s what thread %d of block %d %s, and no barrier lies between", where, what, earlier.thread,
       earlier.block, verb);
}

void touch(Cell& cell, int kind, bool shared, std::size_t offset, int array) {
  Stamp& write = cell.write;
  const bool same_block = write.block == machine.block;
  if (same_block && (write.flags & kIsPending)) {
    char where[64];
    describe_shared(where, sizeof where, offset);
    fail("cp.async: %s is touched before the copy of thread %d was waited for", where, write.thread);
  }
  const bool both_atomic = kind == kAtomic && (write.flags & kIsAtomic);
  if (!both_atomic && !in_order(write, shared)) race(kind == kRead ? "reads" : "writes", write, "wrote", shared, offset, array);
  if (kind == kRead) {
    if (cell.last_read.block != machine.block || cell.last_read.thread / kWarp != machine.current->warp)
      cell.other_read = cell.last_read;
    cell.last_read = now(0);
    return;
  }
  if (!in_order(cell.last_read, shared)) race("writes", cell.last_read, "read", shared, offset, array);
  if (!in_order(cell.other_read, shared)) race("writes", cell.other_read, "read", shared, offset, array);
  write = now(kind == kAtomic ? kIsAtomic : 0);
}

[[noreturn]] void outside(const char* p, std::size_t bytes) {
  std::size_t best = 0;
  const auto distance = [p](const Region& r) { return p < r.begin ? r.begin - p : p - r.end; };
  for (std::size_t i = 1; i < regions.size(); ++i)
    if (distance(regions[i]) < distance(regions[best])) best = i;
  if (regions.empty()) fail("access of %zu bytes at %p: the kernel was given no arrays", bytes, p);
  fail("access of %zu bytes outside the arrays; the nearest is array %zu of %zd bytes, at offset %zd", bytes, best,
       regions[best].end - regions[best].begin, p - regions[best].begin);
}

void check_shared(const char* p, std::size_t bytes, int kind) {
  const char* used_end = dynamic_arena + machine.launch->dynamic_shared;
  if (p + bytes > used_end && p < dynamic_arena + sizeof dynamic_arena && p + bytes > dynamic_arena)
    fail("access of %zu bytes at offset %zd of %u bytes of dynamic shared memory", bytes, p - dynamic_arena,
         machine.launch->dynamic_shared);
  const std::size_t offset = p - __start_emulated_shared;
  for (std::size_t i = 0; i < bytes; ++i) touch(shared_cells[offset + i], kind, true, offset + i, -1);
}

Cell* shared_cell(const void* pointer) {
  return shared_cells.data() + (static_cast<const char*>(pointer) - __start_emulated_shared);
}

}  // namespace

void begin_shadow(const Launch& launch) {
  checking = launch.check_accesses != 0;
  check_blocks = launch.check_blocks != 0;
  regions.clear();
  if (!checking) return;
  shared_cells.assign(__stop_emulated_shared - __start_emulated_shared, Cell{});
  const auto* arrays = reinterpret_cast<const Array*>(launch.arrays);
  for (std::uint32_t i = 0; i < launch.array_count; ++i) {
    const char* begin = reinterpret_cast<const char*>(arrays[i].address);
    regions.push_back({begin, begin + arrays[i].bytes, std::vector<Cell>(arrays[i].bytes)});
  }
}

void access(const void* pointer, std::size_t bytes, int kind) {
  if (!checking || machine.current == nullptr) return;
  const char* p = static_cast<const char*>(pointer);
  const char* stack = machine.current->stack;
  if (p >= stack && p < stack + kStackBytes) return;
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && reinterpret_cast<std::uintptr_t>(p) % bytes != 0)
    fail("access of %zu bytes at %p: not aligned", bytes, pointer);
  if (p >= __start_emulated_shared && p < __stop_emulated_shared) return check_shared(p, bytes, kind);
  for (std::size_t r = 0; r < regions.size(); ++r) {
    Region& region = regions[r];
    if (p < region.begin || p + bytes > region.end) continue;
    const std::size_t offset = p - region.begin;
    for (std::size_t i = 0; i < bytes; ++i)
      touch(region.cells[offset + i], kind, false, offset + i, static_cast<int>(r));
    return;
  }
  if (p >= __ehdr_start && p + bytes <= _end) return;  // constants and __device__ variables
  outside(p, bytes);
}

void mark_pending(const void* shared, std::size_t bytes) {
  if (!checking) return;
  for (std::size_t i = 0; i < bytes; ++i) shared_cell(shared)[i].write.flags |= kIsPending;
}

void mark_arrived(const void* shared, std::size_t bytes) {
  if (!checking) return;
  for (std::size_t i = 0; i < bytes; ++i) shared_cell(shared)[i].write = now(0);
}

}  // namespace emu

// Handlers of -fsanitize=alignment,bounds,float-cast-overflow: what a device would trap on, do to other memory, or (the
// conversions) do otherwise than the host.
extern "C" {
struct TypeMismatch {
  const char* file;
  std::uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(TypeMismatch* where, std::uintptr_t p) {
  emu::fail("access at %p: not aligned to %d bytes", reinterpret_cast<void*>(p), 1 << where->log_alignment);
}
__attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(void*, std::uintptr_t index) {
  emu::fail("index %zd is outside of a local or shared array", static_cast<std::ptrdiff_t>(index));
}
__attribute__((visibility("hidden"))) void __ubsan_handle_float_cast_overflow(void*, void*) {
  emu::fail("a float outside of the integer's range is cast; use a conversion intrinsic, or clamp first");
}
}

#define EMU_HOOK __attribute__((visibility("hidden")))
#define EMU_HOOKS(size)                                                                                     \
  EMU_HOOK void __tsan_read##size(void* p) { emu::access(p, size, emu::kRead); }                            \
  EMU_HOOK void __tsan_write##size(void* p) { emu::access(p, size, emu::kWrite); }                          \
  EMU_HOOK void __tsan_unaligned_read##size(void* p) { emu::access(p, size, emu::kRead); }                  \
  EMU_HOOK void __tsan_unaligned_write##size(void* p) { emu::access(p, size, emu::kWrite); }                \
  EMU_HOOK void __tsan_volatile_read##size(void* p) { emu::access(p, size, emu::kRead); }                   \
  EMU_HOOK void __tsan_volatile_write##size(void* p) { emu::access(p, size, emu::kWrite); }
extern "C" {
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
EMU_HOOK void __tsan_read_range(void* p, unsigned long n) { emu::access(p, n, emu::kRead); }
EMU_HOOK void __tsan_write_range(void* p, unsigned long n) { emu::access(p, n, emu::kWrite); }
EMU_HOOK void __tsan_init() {}
EMU_HOOK void __tsan_func_entry(void*) {}
EMU_HOOK void __tsan_func_exit() {}
EMU_HOOK void __tsan_vptr_update(void**, void*) {}
}
