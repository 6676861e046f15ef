// The C interface that simulator.py calls through ctypes.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <numeric>

#include "cycles.hpp"
#include "program.hpp"

using namespace vta;

extern "C" {

struct VtaRequest {
  const Config* config;
  const uint8_t* instructions;
  int64_t instruction_count, instruction_addr;
  const Region* regions;
  int64_t region_count;
  const CycleModel* model;  // null: no timing
  int64_t functional, strict, interleaved, seed;
  int64_t* counters;       // COUNTERS of them
  int64_t* timeline;       // start and end of every instruction, null: not wanted
  int64_t failed_index;    // instruction that broke a rule, -1 if none in particular
  char* message;
  int64_t message_size;
};

int64_t vta_abi() { return (int64_t(sizeof(VtaRequest)) << 32) | (sizeof(CycleModel) << 16) | COUNTERS; }

// 0: done; 1: the program breaks a rule; 2: anything else. The message says what.
int vta_simulate(VtaRequest* request) {
  try {
    Program program;
    program.config = *request->config;
    program.regions.assign(request->regions, request->regions + request->region_count);
    std::sort(program.regions.begin(), program.regions.end(),
              [](const Region& a, const Region& b) { return a.addr < b.addr; });
    program.instructions = decode(program.config, request->instructions, request->instruction_count);
    if (request->strict) check(program);
    count(program, request->counters);
    std::vector<int64_t> order;
    if (request->model)
      order = cycles(program, *request->model, request->instruction_addr, request->counters, request->timeline);
    if (request->functional) {
      // A checked program has no races: program order gives what every order gives, with the fewest cache misses.
      if (request->interleaved) {
        order = token_order(program, true, uint64_t(request->seed));
      } else if (request->strict) {
        order.resize(program.instructions.size());
        std::iota(order.begin(), order.end(), int64_t(0));
      } else if (order.empty()) {
        order = token_order(program, false, 0);
      }
      execute(program, order, request->strict != 0);
    }
    return 0;
  } catch (const Violation& error) {
    request->failed_index = error.index;
    std::snprintf(request->message, size_t(request->message_size), "%s", error.what());
    return 1;
  } catch (const std::exception& error) {
    std::snprintf(request->message, size_t(request->message_size), "%s", error.what());
    return 2;
  }
}

}  // extern "C"
