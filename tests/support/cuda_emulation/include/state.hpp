// State shared by the parts of the emulation's runtime; kernels do not see it.
#pragma once

#include <deque>
#include <vector>

#include "runtime.hpp"

#pragma GCC visibility push(hidden)

namespace emu {

enum class State { kReady, kBarrier, kWarp, kDone };

struct Copy {
  char* shared;
  const char* global;
  long bytes, source_bytes;
};
using Group = std::vector<Copy>;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::kDone;
  int thread = 0, warp = 0, lane = 0;
  uint3 index{};
  // What the thread waits for when its state is kWarp.
  const char* name = nullptr;
  Exec exec = nullptr;
  std::intptr_t variant = 0;
  std::uint32_t mask = 0;
  void* arguments = nullptr;
  int line = 0;  // of the barrier, when its state is kBarrier
  // Asynchronous copies: the group being filled, and the committed groups, oldest first.
  Group open;
  std::deque<Group> committed;
};

struct Machine {
  const Launch* launch = nullptr;
  Fiber* current = nullptr;  // null while the scheduler runs
  std::vector<Fiber> fibers;
  int threads = 0;
  int block = 0;                         // linear index of the running block
  std::uint32_t barrier_epoch = 0;       // barriers that this block has passed
  std::vector<std::uint32_t> warp_epoch;  // __syncwarp of each warp
  bool failed = false;
};
extern Machine machine;

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kGuard = 1024;  // poisoned bytes behind the dynamic shared memory

// All __shared__ variables and the dynamic shared memory lie in one linker section.
extern "C" char __start_emulated_shared[], __stop_emulated_shared[];
extern char dynamic_arena[kMaxShared + kGuard];

void finish_copies(Fiber& fiber, std::size_t keep);
void begin_shadow(const Launch& launch);
// Asynchronous copies, for the race check: between issue and wait nobody may touch the destination.
void mark_pending(const void* shared, std::size_t bytes);
void mark_arrived(const void* shared, std::size_t bytes);
bool in_shared(const void* pointer, std::size_t bytes);

}  // namespace emu

#pragma GCC visibility pop
