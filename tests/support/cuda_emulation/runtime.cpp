// Fibers, barriers and the block scheduler.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "state.hpp"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Kernels see these as constants, so that they are never reloaded needlessly; here they are variables. Hence the C names.
extern "C" __attribute__((visibility("hidden"))) uint3 emu_thread_index __asm__("threadIdx");
extern "C" __attribute__((visibility("hidden"))) uint3 emu_block_index __asm__("blockIdx");
extern "C" __attribute__((visibility("hidden"))) dim3 emu_block_size __asm__("blockDim");
extern "C" __attribute__((visibility("hidden"))) dim3 emu_grid_size __asm__("gridDim");
uint3 emu_thread_index, emu_block_index;
dim3 emu_block_size, emu_grid_size;

namespace emu {

Machine machine;
__attribute__((section("emulated_shared"), aligned(1024))) char dynamic_arena[kMaxShared + kGuard] = {1};

namespace {

char error_text[1024];
Body kernel_body;
const void* kernel_context;

#if defined(__x86_64__)
void* scheduler_context;

// Saves the callee-saved registers on the old stack and takes them from the new one.
extern "C" void emu_switch(void** save, void* load);
__asm__(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

void to_scheduler(Fiber& fiber) { emu_switch(&fiber.stack_pointer, scheduler_context); }
void to_fiber(Fiber& fiber) { emu_switch(&scheduler_context, fiber.stack_pointer); }

void prepare(Fiber& fiber, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 8;
}
#else
ucontext_t scheduler_context;

void to_scheduler(Fiber& fiber) { swapcontext(static_cast<ucontext_t*>(fiber.stack_pointer), &scheduler_context); }
void to_fiber(Fiber& fiber) { swapcontext(&scheduler_context, static_cast<ucontext_t*>(fiber.stack_pointer)); }

void prepare(Fiber& fiber, void (*entry)()) {
  auto* context = static_cast<ucontext_t*>(fiber.stack_pointer);
  if (context == nullptr) context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.stack_pointer = context;
}
#endif

void thread_main() {
  kernel_body(kernel_context);
  Fiber& fiber = *machine.current;
  fiber.committed.push_back(std::move(fiber.open));
  finish_copies(fiber, 0);
  fiber.state = State::kDone;
  to_scheduler(fiber);
}

void report(const char* format, va_list list) {
  if (machine.failed) return;
  machine.failed = true;
  int used = 0;
  if (machine.current != nullptr) {
    const Fiber& f = *machine.current;
    used = std::snprintf(error_text, sizeof error_text, "block (%u, %u, %u) thread (%u, %u, %u): ", emu_block_index.x,
                         emu_block_index.y, emu_block_index.z, f.index.x, f.index.y, f.index.z);
  }
  std::vsnprintf(error_text + used, sizeof error_text - used, format, list);
}

void fail_in_scheduler(const char* format, ...) {
  va_list list;
  va_start(list, format);
  report(format, list);
  va_end(list);
}

void begin_block() {
  const Launch& launch = *machine.launch;
  machine.barrier_epoch = 0;
  machine.warp_epoch.assign((machine.threads + kWarp - 1) / kWarp, 0);
  // Everything but the unused part of the arena: static variables may lie on either side of it.
  char* used_end = dynamic_arena + launch.dynamic_shared + kGuard;
  std::memset(__start_emulated_shared, static_cast<int>(launch.poison), dynamic_arena - __start_emulated_shared);
  std::memset(dynamic_arena, static_cast<int>(launch.poison), used_end - dynamic_arena);
  char* arena_end = dynamic_arena + sizeof dynamic_arena;
  std::memset(arena_end, static_cast<int>(launch.poison), __stop_emulated_shared - arena_end);
  for (int t = 0; t < machine.threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    fiber.state = State::kReady;
    fiber.thread = t;
    fiber.warp = t / kWarp;
    fiber.lane = t % kWarp;
    const auto& size = launch.block;
    fiber.index = {t % size[0], t / size[0] % size[1], t / (size[0] * size[1])};
    fiber.open.clear();
    fiber.committed.clear();
    prepare(fiber, thread_main);
  }
}

void end_block() {
  for (std::size_t i = 0; i < kGuard; ++i) {
    const char byte = dynamic_arena[machine.launch->dynamic_shared + i];
    if (static_cast<unsigned char>(byte) != machine.launch->poison) {
      fail_in_scheduler("block (%u, %u, %u) wrote %zu bytes behind its %u bytes of dynamic shared memory",
                        emu_block_index.x, emu_block_index.y, emu_block_index.z, i, machine.launch->dynamic_shared);
      return;
    }
  }
}

// A warp executes a barrier as one: its lanes must not have come to different ones.
const Fiber* parted_lane() {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.state != State::kBarrier) continue;
    if (first == nullptr || first->warp != fiber.warp) first = &fiber;
    if (first->line != fiber.line) return &fiber;
  }
  return nullptr;
}

// Nobody can run: either all living threads stand at the barrier, or the block hangs.
void release_barrier() {
  const Fiber* stuck = nullptr;
  int waiting = 0;
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.state == State::kWarp) stuck = &fiber;
    waiting += fiber.state == State::kBarrier;
  }
  if (stuck != nullptr) {
    fail_in_scheduler("deadlock in block (%u, %u, %u): thread %d waits in %s (mask 0x%08x) for lanes that do not come; "
                      "%d threads wait at __syncthreads",
                      emu_block_index.x, emu_block_index.y, emu_block_index.z, stuck->thread, stuck->name, stuck->mask,
                      waiting);
    return;
  }
  if (const Fiber* parted = parted_lane()) {
    fail_in_scheduler("block (%u, %u, %u): lanes of the warp of thread %d stand at different __syncthreads",
                      emu_block_index.x, emu_block_index.y, emu_block_index.z, parted->thread);
    return;
  }
  ++machine.barrier_epoch;
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::kBarrier) fiber.state = State::kReady;
}

std::uint64_t random_state;

std::uint32_t next_random() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<std::uint32_t>(random_state >> 33);
}

template <class T>
void shuffle(std::vector<T>& order) {
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

using Warps = std::vector<std::vector<int>>;

// The threads of every warp, in the order in which they run.
Warps order_threads() {
  const bool reversed = machine.launch->order == static_cast<int>(Order::kReversed);
  Warps warps;
  for (int first = 0; first < machine.threads; first += kWarp) {
    warps.emplace_back(std::min(kWarp, machine.threads - first));
    std::iota(warps.back().begin(), warps.back().end(), first);
    if (reversed) std::reverse(warps.back().begin(), warps.back().end());
  }
  if (reversed) std::reverse(warps.begin(), warps.end());
  return warps;
}

// Lets every ready thread of a warp run until it waits; true if there was one.
bool run_warp(const std::vector<int>& threads) {
  bool progress = false;
  for (int t : threads) {
    Fiber& fiber = machine.fibers[t];
    if (fiber.state != State::kReady) continue;
    progress = true;
    machine.current = &fiber;
    emu_thread_index = fiber.index;
    to_fiber(fiber);
    machine.current = nullptr;
    if (machine.failed) return false;
  }
  return progress;
}

// A warp runs as far as it can before the next one starts, so that warps are as far apart as barriers allow: this shows
// a missing barrier. In random order a warp may also be left early.
void run_block(Warps& warps) {
  const bool random = machine.launch->order == static_cast<int>(Order::kRandom);
  begin_block();
  while (!machine.failed) {
    bool progress = false;
    if (random) shuffle(warps);
    for (auto& threads : warps) {
      if (random) shuffle(threads);
      while (run_warp(threads)) {
        progress = true;
        if (random && next_random() % 4 == 0) break;
      }
      if (machine.failed) return;
    }
    if (progress) continue;
    const auto is_done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
    if (std::all_of(machine.fibers.begin(), machine.fibers.end(), is_done)) return end_block();
    release_barrier();
  }
}

std::vector<char*> stacks;

void make_fibers(int threads) {
  while (static_cast<int>(stacks.size()) < threads) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) {
      fail_in_scheduler("no memory for the stacks of %d threads", threads);
      return;
    }
    mprotect(memory, 4096, PROT_NONE);  // a stack that overflows must not reach the next thread's
    stacks.push_back(static_cast<char*>(memory));
  }
  machine.fibers.resize(threads);
  machine.threads = threads;
  for (int t = 0; t < threads; ++t) machine.fibers[t].stack = stacks[t];
}

// A process may hold only so many mappings, and every library of kernels has stacks of its own.
void free_stacks() {
  for (char* stack : stacks) munmap(stack, kStackBytes);
  stacks.clear();
}

}  // namespace

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  report(format, list);
  va_end(list);
  // The scheduler sees `failed` and never comes back to this fiber.
  while (true) to_scheduler(*machine.current);
}

int run(const Launch& launch, Body body, const void* context, char* message, std::size_t message_bytes) {
  machine.launch = &launch;
  machine.failed = false;
  machine.current = nullptr;
  kernel_body = body;
  kernel_context = context;
  random_state = launch.seed;
  make_fibers(static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]));
  begin_shadow(launch);
  emu_block_size = dim3(launch.block[0], launch.block[1], launch.block[2]);
  emu_grid_size = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);

  Warps warps = order_threads();
  std::vector<int> blocks(launch.grid[0] * launch.grid[1] * launch.grid[2]);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (launch.order == static_cast<int>(Order::kReversed)) std::reverse(blocks.begin(), blocks.end());
  if (launch.order == static_cast<int>(Order::kRandom)) shuffle(blocks);
  for (int b : blocks) {
    if (machine.failed) break;
    machine.block = b;
    const unsigned x = launch.grid[0], y = launch.grid[1], u = static_cast<unsigned>(b);
    emu_block_index = {u % x, u / x % y, u / (x * y)};
    run_block(warps);
  }
  machine.launch = nullptr;
  free_stacks();
  if (machine.failed) std::snprintf(message, message_bytes, "%s", error_text);
  return machine.failed ? 1 : 0;
}

void syncthreads(int line) {
  Fiber& fiber = *machine.current;
  fiber.line = line;
  fiber.state = State::kBarrier;
  to_scheduler(fiber);
}

void syncthreads_named(std::uint32_t barrier, std::uint32_t count) {
  if (barrier != 0 || (count != 0 && static_cast<int>(count) != machine.threads))
    fail("bar.sync %u, %u: only barrier 0 with all threads is emulated", barrier, count);
  syncthreads(0);
}

void collective(const char* name, Exec exec, std::intptr_t variant, std::uint32_t mask, void* arguments) {
  Fiber& self = *machine.current;
  Fiber* warp = &machine.fibers[self.warp * kWarp];
  const int lanes = std::min(kWarp, machine.threads - self.warp * kWarp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> self.lane & 1)) fail("%s: mask 0x%08x does not name the calling lane %d", name, mask, self.lane);
  self.name = name, self.exec = exec, self.variant = variant, self.mask = mask, self.arguments = arguments;
  self.state = State::kWarp;
  void* all[kWarp] = {};
  bool complete = true;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Fiber& other = warp[lane];
    if (other.state == State::kDone) fail("%s: lane %d, named in mask 0x%08x, has exited", name, lane, mask);
    complete &= other.state == State::kWarp && other.exec == exec && other.variant == variant && other.mask == mask;
    all[lane] = other.arguments;
  }
  if (!complete) return to_scheduler(self);
  exec(all, mask);
  for (int lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) warp[lane].state = State::kReady;
}

void syncwarp(std::uint32_t mask) {
  collective("__syncwarp", [](void**, std::uint32_t met) {
    // A partial mask orders nothing for the race check: it may then report too much, never too little.
    if ((active_mask() & ~met) == 0) ++machine.warp_epoch[machine.current->warp];
  }, 0, mask, nullptr);
}

std::uint32_t active_mask() {
  std::uint32_t mask = 0;
  const int first = machine.current->warp * kWarp;
  for (int t = first; t < std::min(first + kWarp, machine.threads); ++t)
    if (machine.fibers[t].state != State::kDone) mask |= 1u << (t - first);
  return mask;
}

std::uint32_t lane_id() { return static_cast<std::uint32_t>(machine.current->lane); }

void* dynamic_shared() { return dynamic_arena; }

bool in_shared(const void* pointer, std::size_t bytes) {
  const auto* p = static_cast<const char*>(pointer);
  return p >= __start_emulated_shared && p + bytes <= __stop_emulated_shared;
}

// Shared addresses are 32 bit; 1024 is added so that null is not a valid one.
std::uint32_t shared_address(const void* pointer) {
  if (!in_shared(pointer, 0)) fail("cvta.to.shared: %p does not point to shared memory", pointer);
  return static_cast<std::uint32_t>(static_cast<const char*>(pointer) - __start_emulated_shared) + 1024;
}

void* shared_pointer(std::uint32_t address) { return __start_emulated_shared + address - 1024; }

}  // namespace emu
