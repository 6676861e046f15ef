// Orders of execution that the dependence tokens permit.
#include <random>

#include "program.hpp"

namespace vta {

namespace {

struct Units {
  const Program& program;
  std::vector<int64_t> queue[3];
  size_t next[3] = {0, 0, 0};
  int64_t tokens[4] = {0, 0, 0, 0};

  explicit Units(const Program& p) : program(p) {
    for (size_t i = 0; i < p.instructions.size(); ++i) queue[p.instructions[i].unit].push_back(int64_t(i));
  }

  bool done(int u) const { return next[u] == queue[u].size(); }
  const Instruction& head(int u) const { return program.instructions[queue[u][next[u]]]; }

  // Queue whose token the unit waits for, -1 if it can go on.
  int waits_for(int u) const {
    const Instruction& insn = head(u);
    for (int flag = 0; flag < 2; ++flag) {
      int q = insn.pop_queue(flag);
      if ((flag ? insn.pop_next : insn.pop_prev) && q >= 0 && tokens[q] == 0) return q;
    }
    return -1;
  }

  int64_t step(int u) {
    const Instruction& insn = head(u);
    for (int flag = 0; flag < 2; ++flag) {
      int from = insn.pop_queue(flag), to = insn.push_queue(flag);
      if ((flag ? insn.pop_next : insn.pop_prev) && from >= 0) --tokens[from];
      if ((flag ? insn.push_next : insn.push_prev) && to >= 0) ++tokens[to];
    }
    return queue[u][next[u]++];
  }

  [[noreturn]] void deadlock() const {
    std::string text = "deadlock:";
    int64_t first = -1;
    for (int u = 0; u < 3; ++u) {
      if (done(u)) continue;
      int64_t i = queue[u][next[u]];
      if (first < 0 || i < first) first = i;
      text += std::string(" the ") + unit_name(u) + " unit waits at instruction " + std::to_string(i) + " for a " +
              queue_name(waits_for(u)) + " token;";
    }
    text.back() = '.';
    throw Violation(first, text);
  }
};

}  // namespace

std::vector<int64_t> token_order(const Program& program, bool random, uint64_t seed) {
  Units units(program);
  std::mt19937_64 rng(seed);
  std::vector<int64_t> order;
  order.reserve(program.instructions.size());
  unsigned weight[3] = {1, 1, 1};
  while (order.size() < program.instructions.size()) {
    // Weights change now and then, so that units also run far ahead of each other.
    if (random && rng() % 32 == 0)
      for (unsigned& w : weight) w = 1u << (3 * (rng() % 4));
    unsigned total = 0, ready[3];
    for (int u = 0; u < 3; ++u) {
      ready[u] = !units.done(u) && units.waits_for(u) < 0 ? weight[u] : 0;
      total += ready[u];
    }
    if (total == 0) units.deadlock();
    unsigned pick = random ? unsigned(rng() % total) : 0;
    int u = 0;
    while (pick >= ready[u]) pick -= ready[u++];
    order.push_back(units.step(u));
  }
  return order;
}

}  // namespace vta
