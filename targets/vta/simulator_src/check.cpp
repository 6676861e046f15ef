// Strict rules that hold for the program as a whole: structure, regions, dependence tokens, queues.
#include "check.hpp"

#include <algorithm>

namespace vta {

Checker::Checker(Program& program)
    : program_(program),
      config_(program.config),
      inp_(config_.inp_depth()),
      wgt_(config_.wgt_depth()),
      acc_(config_.acc_depth()),
      uop_(config_.uop_depth),
      out_(config_.acc_depth()),
      uops_(config_.uop_depth),
      granule_(config_.tile_bytes(OUT)) {
  for (auto& pops : pops_before_) {
    pops[0].push_back(0);
    pops[1].push_back(0);
  }
}

void Checker::structure() {
  const auto& all = program_.instructions;
  int64_t n = int64_t(all.size());
  if (n == 0 || all[n - 1].opcode != FINISH) fail(n - 1, "FINISH is missing: it comes last, and only there");
  for (int64_t i = 0; i + 1 < n; ++i)
    if (all[i].opcode == FINISH) fail(i, "a FINISH before the end: it comes last, and only there");
  const Instruction& last = all[n - 1];
  if (last.pop_prev || last.pop_next || last.push_prev || last.push_next)
    fail(n - 1, "FINISH has no dependence flags");
  if (n < 2 || !all[n - 2].nop() || all[n - 2].unit != COMPUTE_UNIT || !all[n - 2].pop_next)
    fail(n - 1, "FINISH must follow a compute NOP that pops store->compute");
}

void Checker::regions() {
  const Region* before = nullptr;
  for (Region& region : program_.regions) {
    if (region.addr < 0 || region.addr + region.size > (int64_t(1) << 32))
      fail(-1, "the region at " + std::to_string(region.addr) + " does not lie below 2^32");
    if (before && before->addr + before->size > region.addr)
      fail(-1, "the regions at " + std::to_string(before->addr) + " and " + std::to_string(region.addr) + " overlap");
    if ((region.access & INSTRUCTIONS) && region.addr % 4096)
      fail(-1, "the instructions at " + std::to_string(region.addr) + " are not aligned to 4096 bytes");
    before = &region;
    if ((region.access & WRITE) || !region.defined) {
      Tiles tiles((region.size + granule_ - 1) / granule_);
      if (region.defined) std::fill(tiles.state.begin(), tiles.state.end(), LOADED);
      dram_.emplace(&region, std::move(tiles));
    }
  }
}

void Checker::run() {
  structure();
  regions();
  for (int64_t i = 0; i < int64_t(program_.instructions.size()); ++i) {
    const Instruction& insn = program_.instructions[i];
    fields(i);
    dependences(i);
    if (insn.opcode == LOAD) load(i);
    if (insn.opcode == STORE) store(i);
    if (insn.opcode == GEMM) gemm(i);
    if (insn.opcode == ALU) alu(i);
    if (insn.opcode == FINISH) final_wait();
    // What follows a push has happened after this instruction.
    now_.done[insn.unit] = self_ + 1;
    clock_[insn.unit] = now_;
    if (insn.push_prev) push(i, insn.push_queue(0));
    if (insn.push_next) push(i, insn.push_queue(1));
  }
  leftovers();
}

void Checker::dependences(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  int u = insn.unit;
  self_ = int32_t(of_unit_[u].size());
  of_unit_[u].push_back(i);
  now_ = clock_[u];
  if (insn.pop_prev) pop(i, insn.pop_queue(0));
  if (insn.pop_next) pop(i, insn.pop_queue(1));
  pops_before_[u][0].push_back(pops_before_[u][0].back() + insn.pop_prev);
  pops_before_[u][1].push_back(pops_before_[u][1].back() + insn.pop_next);
}

void Checker::pop(int64_t i, int queue) {
  auto& tokens = tokens_[queue];
  if (!tokens.empty()) {
    now_.merge(tokens.front().clock);
    tokens.pop_front();
    return;
  }
  const Instruction& insn = program_.instructions[i];
  std::string wait = std::string("the ") + unit_name(insn.unit) + " unit waits for a " + queue_name(queue) + " token ";
  for (int64_t j = i; j < int64_t(program_.instructions.size()); ++j) {
    const Instruction& later = program_.instructions[j];
    if ((later.push_prev && later.push_queue(0) == queue) || (later.push_next && later.push_queue(1) == queue))
      fail(i, wait + "that instruction " + std::to_string(j) +
                  " pushes later: fetch is in order, every pop must follow its push in program order");
  }
  fail(i, wait + "that no instruction pushes: deadlock");
}

void Checker::push(int64_t i, int queue) {
  tokens_[queue].push_back({clock_[program_.instructions[i].unit], i});
  ++pushed_[queue];
  // Fewest pops that must have happened by now: those known to have, and those that were fetched too long ago to wait.
  int consumer = queue == L2C || queue == S2C ? COMPUTE_UNIT : queue == C2L ? LOAD_UNIT : STORE_UNIT;
  int flag = queue == L2C || queue == C2S ? 0 : 1;
  const auto& pops = pops_before_[consumer][flag];
  int64_t fetched = int64_t(pops.size()) - 1;
  int64_t begun = std::max(now_.done[consumer], fetched - COMMAND_QUEUE_DEPTH - 1);
  int64_t waiting = pushed_[queue] - pops[std::min(std::max<int64_t>(begun, 0), fetched)];
  if (waiting > TOKEN_QUEUE_DEPTH)
    fail(i, std::string("up to ") + std::to_string(waiting) + " tokens can wait in the " + queue_name(queue) +
                " queue; it holds " + std::to_string(TOKEN_QUEUE_DEPTH));
}

void Checker::final_wait() {
  int64_t stores = int64_t(of_unit_[STORE_UNIT].size());
  if (now_.done[STORE_UNIT] < stores)
    fail(of_unit_[STORE_UNIT].back(), "FINISH does not wait for this instruction: no chain of tokens leads from it to "
                                      "the last compute NOP");
}

void Checker::leftovers() {
  for (int queue = 0; queue < 4; ++queue)
    if (!tokens_[queue].empty())
      fail(tokens_[queue].front().pusher, "a token is left in the " + std::string(queue_name(queue)) + " queue at the end (" +
                                              std::to_string(tokens_[queue].size()) +
                                              " in all, the oldest pushed here): nothing pops it");
}

void Checker::fields(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  if (insn.reserved) fail(i, "reserved bits are set; they must be 0");
  const bool flags[4] = {insn.pop_prev, insn.pop_next, insn.push_prev, insn.push_next};
  const int queues[4] = {insn.pop_queue(0), insn.pop_queue(1), insn.push_queue(0), insn.push_queue(1)};
  static const char* const names[4] = {"pop_prev", "pop_next", "push_prev", "push_next"};
  for (int f = 0; f < 4; ++f)
    if (flags[f] && queues[f] < 0)
      fail(i, std::string("the ") + unit_name(insn.unit) + " unit has no " + names[f] + " flag");
}

void Checker::ordered(int64_t i, int other_unit, int32_t other, const char* hazard, const std::string& what) {
  if (other < now_.done[other_unit]) return;
  fail(i, std::string("data race (") + hazard + ") on " + what + ": no token orders this instruction and instruction " +
              std::to_string(of_unit_[other_unit][other]) + " of the " + unit_name(other_unit) + " unit");
}

void Checker::range(int64_t i, int memory, int64_t first, int64_t last) {
  if (last < config_.depth(memory)) return;
  std::string which = first == last ? tile(memory, first) + " is"
                                    : std::string(memory_name(memory)) + " tiles " + std::to_string(first) + ".." +
                                          std::to_string(last) + " are";
  fail(i, which + " out of range: the buffer has " + std::to_string(config_.depth(memory)));
}

void check(Program& program) { Checker(program).run(); }

}  // namespace vta
