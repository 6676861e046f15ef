// The strict checker's state: who touched each tile last, and what is known to have happened before.
#pragma once

#include <deque>
#include <unordered_map>

#include "program.hpp"

namespace vta {

// Vector clock: how many instructions of each unit are known to be complete.
struct Clock {
  int64_t done[3] = {0, 0, 0};
  void merge(const Clock& other) {
    for (int u = 0; u < 3; ++u)
      if (other.done[u] > done[u]) done[u] = other.done[u];
  }
};

// What an accumulator tile holds; any other memory knows only EMPTY and LOADED.
enum State : uint8_t { EMPTY, LOADED, RESET, COMPUTED };

// Last accesses of every tile, as the index of the instruction within its unit; -1: none.
struct Tiles {
  std::vector<uint8_t> state;
  std::vector<int32_t> writer;
  std::vector<int32_t> reader[2];
  explicit Tiles(int64_t depth = 0) : state(depth, EMPTY), writer(depth, -1) {
    reader[0].assign(depth, -1);
    reader[1].assign(depth, -1);
  }
};

class Checker {
 public:
  explicit Checker(Program& program);
  void run();

 private:
  void structure();
  void regions();
  void final_wait();
  void dependences(int64_t i);
  void pop(int64_t i, int queue);
  void push(int64_t i, int queue);
  void leftovers();
  void fields(int64_t i);
  void load(int64_t i);
  void load_rows(int64_t i);
  void store(int64_t i);
  void store_tiles(int64_t i);
  void gemm(int64_t i);
  void alu(int64_t i);
  void alu_pairs(int64_t i);
  void uop_range(int64_t i);
  void accumulate(int64_t i, int64_t dst, uint8_t state);
  void range(int64_t i, int memory, int64_t first, int64_t last);
  void read_dram(int64_t i, int64_t addr, int64_t bytes, Region& region);
  void write_dram(int64_t i, int64_t addr, int64_t bytes, Region& region);
  void ordered(int64_t i, int other_unit, int32_t other, const char* hazard, const std::string& what);
  [[noreturn]] void fail(int64_t i, const std::string& rule) const { throw Violation(i, rule); }

  struct Token {
    Clock clock;
    int64_t pusher;
  };

  Program& program_;
  const Config& config_;
  std::vector<int64_t> of_unit_[3];          // instruction index by position in its unit
  std::vector<int32_t> pops_before_[3][2];   // pops of flag 0 (prev) and 1 (next) before each position
  int64_t pushed_[4] = {0, 0, 0, 0};
  std::deque<Token> tokens_[4];
  Clock clock_[3];
  Clock now_;       // of the instruction being checked
  int32_t self_;    // its position in its unit
  Tiles inp_, wgt_, acc_, uop_;
  Tiles out_;       // the OUT buffer, written with ACC by GEMM and ALU
  std::vector<MicroOp> uops_;
  std::unordered_map<const Region*, Tiles> dram_;
  int64_t granule_;  // bytes that one DRAM state covers: what STORE writes
};

}  // namespace vta
