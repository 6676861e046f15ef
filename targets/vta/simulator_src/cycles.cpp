// Coarse timing: the units run side by side, each instruction takes its own time.
#include "cycles.hpp"

#include <algorithm>
#include <deque>

namespace vta {

namespace {

int64_t duration(const Program& program, const CycleModel& model, const Instruction& insn) {
  if (insn.opcode == FINISH || insn.nop()) return model.nop;
  if (insn.opcode == GEMM) return model.compute_overhead + insn.uops();
  if (insn.opcode == ALU) return model.compute_overhead + insn.uops() * (insn.use_imm ? model.alu_immediate : model.alu_tensor);
  int64_t words = insn.x_size * insn.y_size * program.config.tile_bytes(insn.memory) / model.word_bytes;
  if (insn.opcode == STORE) return insn.y_size * 10 + words * model.word_cycles;
  int64_t padding = insn.sram_tiles() - insn.x_size * insn.y_size;
  return model.load_start + model.load_end + model.read_latency + words * model.word_cycles + padding;
}

}  // namespace

std::vector<int64_t> cycles(const Program& program, const CycleModel& model, int64_t, int64_t* counters,
                            int64_t* timeline) {
  std::vector<int64_t> order = token_order(program, false, 0);
  std::vector<std::pair<int64_t, int64_t>> starts;
  std::deque<int64_t> tokens[4];
  int64_t free[3] = {0, 0, 0};
  for (int64_t i : order) {
    const Instruction& insn = program.instructions[i];
    int64_t start = free[insn.unit] + model.idle;
    for (int flag = 0; flag < 2; ++flag)
      if (flag ? insn.pop_next : insn.pop_prev) {
        auto& queue = tokens[insn.pop_queue(flag)];
        start = std::max(start, queue.front() + model.token_latency);
        queue.pop_front();
      }
    int64_t end = start + duration(program, model, insn);
    for (int flag = 0; flag < 2; ++flag)
      if (flag ? insn.push_next : insn.push_prev) tokens[insn.push_queue(flag)].push_back(end);
    free[insn.unit] = end;
    counters[BUSY_LOAD + insn.unit] += end - start;
    counters[CYCLES] = std::max(counters[CYCLES], end);
    starts.push_back({start, i});
    if (timeline) {
      timeline[2 * i] = start;
      timeline[2 * i + 1] = end;
    }
  }
  std::stable_sort(starts.begin(), starts.end());
  for (size_t k = 0; k < order.size(); ++k) order[k] = starts[k].second;
  return order;
}

}  // namespace vta
