// The cycle model: constants as data, results as counters.
#pragma once

#include "program.hpp"

namespace vta {

// Mirrors CycleModel in cycle_model.py, field by field; what each one means is said there.
struct CycleModel {
  int64_t word_bytes, word_cycles, read_latency, burst_bytes, outstanding, command_interval;
  int64_t fetch_chunk, command_queue;
  int64_t load_start, load_end, padding_start;
  int64_t compute_overhead, alu_immediate, alu_tensor, nop;
  int64_t store_command, store_response, store_tile;
  int64_t token_latency, idle;
};

// Indices of the counters; simulator.py names them in the same order.
enum Counter {
  CYCLES,
  LOADS, STORES, GEMMS, ALUS, NOPS, FINISHES,
  GEMM_UOPS, RESET_UOPS, ALU_UOPS,
  READ_INSN, READ_UOP, READ_WGT, READ_INP, READ_ACC, WRITTEN_OUT,
  BUSY_LOAD, BUSY_COMPUTE, BUSY_STORE,  // executing, not waiting
  WAIT_L2C, WAIT_C2L, WAIT_C2S, WAIT_S2C,  // stalls: for a token of this queue
  WAIT_FETCH_LOAD, WAIT_FETCH_COMPUTE, WAIT_FETCH_STORE,  // stalls: for an instruction
  WAIT_MEMORY_LOAD, WAIT_MEMORY_COMPUTE,  // stalls: read port taken by others, of the busy cycles
  FETCH_BLOCKED,  // fetch waits for room in a command queue
  COUNTERS
};

// Counts instructions, micro-operations and bytes.
void count(const Program& program, int64_t* counters);

// Simulates the units; fills counters and, unless null, start and end of every instruction.
// Returns the instructions in the order in which they start. Throws a Violation on a deadlock.
std::vector<int64_t> cycles(const Program& program, const CycleModel& model, int64_t instruction_addr,
                            int64_t* counters, int64_t* timeline);

}  // namespace vta
