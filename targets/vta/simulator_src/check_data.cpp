// Strict rules of single instructions: ranges, initialised data, hazards, data races.
#include <algorithm>
#include <cstring>

#include "check.hpp"

namespace vta {

namespace {

void transfer_shape(int64_t i, const Config& config, const Instruction& insn) {
  int64_t bytes = insn.x_size * insn.y_size * config.tile_bytes(insn.memory);
  if (bytes > MAX_TRANSFER_BYTES)
    throw Violation(i, "transfers " + std::to_string(bytes) + " bytes; one transfer has at most 32 MB");
  if (insn.y_size == 0) throw Violation(i, "y_size is 0: a NOP has x_size 0, a transfer at least one row");
}

}  // namespace

void Checker::load(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  if (insn.memory > ACC) fail(i, "LOAD has memory id " + std::to_string(insn.memory) + "; UOP, WGT, INP and ACC exist");
  if (insn.nop()) {
    if (insn.pads()) fail(i, "a NOP (x_size 0) has no padding");
    return;
  }
  if (insn.pads() && insn.memory != INP)
    fail(i, std::string("padding on a ") + memory_name(insn.memory) + " load: only INP loads may pad");
  transfer_shape(i, config_, insn);
  range(i, insn.memory, insn.sram, insn.sram + insn.sram_tiles() - 1);
  load_rows(i);
  Tiles& tiles = insn.memory == INP ? inp_ : insn.memory == WGT ? wgt_ : insn.memory == ACC ? acc_ : uop_;
  for (int64_t t = insn.sram; t < insn.sram + insn.sram_tiles(); ++t) {
    if (insn.unit == LOAD_UNIT && tiles.reader[0][t] >= now_.done[COMPUTE_UNIT])
      ordered(i, COMPUTE_UNIT, tiles.reader[0][t], "write after read", tile(insn.memory, t));
    tiles.state[t] = LOADED;
    tiles.writer[t] = self_;
  }
}

void Checker::load_rows(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  int64_t size = config_.tile_bytes(insn.memory);
  for (int64_t y = 0; y < insn.y_size; ++y) {
    int64_t addr = (insn.dram + y * insn.x_stride) * size;
    Region& region = *program_.row_region(i, addr, insn.x_size * size, size);
    if (region.access & INSTRUCTIONS) fail(i, "LOAD reads the instruction region");
    if (!(region.access & READ)) fail(i, "LOAD reads the write-only region at " + std::to_string(region.addr));
    read_dram(i, addr, insn.x_size * size, region);
    if (insn.memory != UOP) continue;
    if (!region.data) fail(i, "micro-operations are loaded from a region without data");
    for (int64_t x = 0; x < insn.x_size; ++x) {
      uint32_t word;
      std::memcpy(&word, region.data + (addr - region.addr) + 4 * x, 4);
      uops_[insn.sram + y * insn.x_size + x] = decode_uop(config_, word);
    }
  }
}

void Checker::read_dram(int64_t i, int64_t addr, int64_t bytes, Region& region) {
  auto found = dram_.find(&region);
  if (found == dram_.end()) return;
  Tiles& tiles = found->second;
  int unit = program_.instructions[i].unit;
  for (int64_t g = (addr - region.addr) / granule_; g <= (addr + bytes - 1 - region.addr) / granule_; ++g) {
    auto where = [&] { return "DRAM address " + std::to_string(region.addr + g * granule_); };
    if (tiles.state[g] == EMPTY) fail(i, "reads " + where() + ", which was never written");
    if (tiles.writer[g] >= now_.done[STORE_UNIT]) ordered(i, STORE_UNIT, tiles.writer[g], "read after write", where());
    tiles.reader[unit][g] = self_;
  }
}

void Checker::write_dram(int64_t i, int64_t addr, int64_t bytes, Region& region) {
  Tiles& tiles = dram_.at(&region);
  for (int64_t g = (addr - region.addr) / granule_; g <= (addr + bytes - 1 - region.addr) / granule_; ++g) {
    for (int unit : {LOAD_UNIT, COMPUTE_UNIT})
      if (tiles.reader[unit][g] >= now_.done[unit])
        ordered(i, unit, tiles.reader[unit][g], "write after read",
                "DRAM address " + std::to_string(region.addr + g * granule_));
    tiles.state[g] = COMPUTED;
    tiles.writer[g] = self_;
  }
}

void Checker::store(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  if (insn.memory != OUT) fail(i, "STORE has memory id " + std::to_string(insn.memory) + "; only OUT can be stored");
  if (insn.pads()) fail(i, "STORE has no padding");
  if (insn.nop()) return;
  transfer_shape(i, config_, insn);
  range(i, OUT, insn.sram, insn.sram + insn.sram_tiles() - 1);
  store_tiles(i);
  int64_t size = config_.tile_bytes(OUT);
  for (int64_t y = 0; y < insn.y_size; ++y) {
    int64_t addr = (insn.dram + y * insn.x_stride) * size;
    Region& region = *program_.row_region(i, addr, insn.x_size * size, size);
    if (region.access & INSTRUCTIONS) fail(i, "STORE writes into the instruction region");
    if (!(region.access & WRITE)) fail(i, "STORE writes into the read-only region at " + std::to_string(region.addr));
    write_dram(i, addr, insn.x_size * size, region);
  }
}

void Checker::store_tiles(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  for (int64_t t = insn.sram; t < insn.sram + insn.sram_tiles(); ++t) {
    switch (acc_.state[t]) {
      case COMPUTED: break;
      case RESET: fail(i, "stores " + tile(OUT, t) + ", which was only reset: a GEMM or an ALU must write it last");
      case LOADED: fail(i, "stores " + tile(OUT, t) + ", which was only loaded: a GEMM or an ALU must write it last");
      default: fail(i, "stores " + tile(OUT, t) + ", which was never written");
    }
    if (out_.writer[t] >= now_.done[COMPUTE_UNIT])
      ordered(i, COMPUTE_UNIT, out_.writer[t], "read after write", tile(OUT, t));
    out_.reader[0][t] = self_;
  }
}

void Checker::uop_range(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  if (insn.uops() == 0) fail(i, "no micro-operation: uop_end > uop_begin, iter_out >= 1 and iter_in >= 1 must hold");
  if (insn.uop_end > config_.uop_depth)
    fail(i, "micro-operations " + std::to_string(insn.uop_begin) + ".." + std::to_string(insn.uop_end - 1) +
                " are out of range: the buffer has " + std::to_string(config_.uop_depth));
  for (int64_t u = insn.uop_begin; u < insn.uop_end; ++u)
    if (uop_.state[u] == EMPTY) fail(i, "executes micro-operation " + std::to_string(u) + ", which was never loaded");
}

// A GEMM or ALU writes an accumulator tile, and the OUT tile with it.
void Checker::accumulate(int64_t i, int64_t dst, uint8_t state) {
  if (out_.reader[0][dst] >= now_.done[STORE_UNIT])
    ordered(i, STORE_UNIT, out_.reader[0][dst], "write after read", tile(OUT, dst));
  acc_.state[dst] = state;
  out_.writer[dst] = self_;
}

void Checker::gemm(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  uop_range(i);
  int64_t before[2] = {-1, -1};
  for (int64_t a = 0; a < insn.iter_out; ++a)
    for (int64_t b = 0; b < insn.iter_in; ++b)
      for (int64_t u = insn.uop_begin; u < insn.uop_end; ++u) {
        int64_t dst = uops_[u].dst + a * insn.dst_out + b * insn.dst_in;
        if (dst >= config_.acc_depth()) range(i, ACC, dst, dst);
        if (dst == before[0] || dst == before[1])
          fail(i, tile(ACC, dst) + " recurs within 2 preceding micro-operations: the pipeline needs 3 distinct tiles");
        before[0] = before[1];
        before[1] = dst;
        if (!insn.reset) {
          int64_t src = uops_[u].src + a * insn.src_out + b * insn.src_in;
          int64_t wgt = uops_[u].wgt + a * insn.wgt_out + b * insn.wgt_in;
          if (src >= config_.inp_depth()) range(i, INP, src, src);
          if (wgt >= config_.wgt_depth()) range(i, WGT, wgt, wgt);
          if (acc_.state[dst] == EMPTY) fail(i, "accumulates into " + tile(ACC, dst) + ", which was never written");
          if (inp_.state[src] == EMPTY) fail(i, "reads " + tile(INP, src) + ", which was never written");
          if (wgt_.state[wgt] == EMPTY) fail(i, "reads " + tile(WGT, wgt) + ", which was never written");
          if (inp_.writer[src] >= now_.done[LOAD_UNIT])
            ordered(i, LOAD_UNIT, inp_.writer[src], "read after write", tile(INP, src));
          if (wgt_.writer[wgt] >= now_.done[LOAD_UNIT])
            ordered(i, LOAD_UNIT, wgt_.writer[wgt], "read after write", tile(WGT, wgt));
          inp_.reader[0][src] = self_;
          wgt_.reader[0][wgt] = self_;
        }
        accumulate(i, dst, insn.reset ? RESET : COMPUTED);
      }
}

void Checker::alu(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  uop_range(i);
  if (insn.reset) fail(i, "ALU has no reset");
  if (insn.op > SHR) fail(i, "ALU operation " + std::to_string(insn.op) + " is unknown; MIN, MAX, ADD and SHR exist");
  if (insn.use_imm) {
    if (insn.op == SHR && (insn.imm < 0 || insn.imm > 15))
      fail(i, "SHR by " + std::to_string(insn.imm) + ": amounts are 0..15; split larger shifts");
    if (insn.dst_out != insn.src_out || insn.dst_in != insn.src_in)
      fail(i, "an immediate ALU operation needs equal dst and src factors");
    for (int64_t u = insn.uop_begin; u < insn.uop_end; ++u)
      if (uops_[u].dst != uops_[u].src)
        fail(i, "an immediate ALU operation needs src = dst in micro-operation " + std::to_string(u));
  }
  alu_pairs(i);
}

void Checker::alu_pairs(int64_t i) {
  const Instruction& insn = program_.instructions[i];
  int64_t before[2] = {-1, -1};
  for (int64_t a = 0; a < insn.iter_out; ++a)
    for (int64_t b = 0; b < insn.iter_in; ++b)
      for (int64_t u = insn.uop_begin; u < insn.uop_end; ++u) {
        int64_t dst = uops_[u].dst + a * insn.dst_out + b * insn.dst_in;
        int64_t src = uops_[u].src + a * insn.src_out + b * insn.src_in;
        if (dst >= config_.acc_depth()) range(i, ACC, dst, dst);
        if (src >= config_.acc_depth()) range(i, ACC, src, src);
        for (int64_t seen : before)
          if (seen == dst || seen == src)
            fail(i, tile(ACC, seen) + " recurs within 2 preceding micro-operations: the pipeline needs 3 distinct tiles");
        before[0] = before[1];
        before[1] = dst;
        for (int64_t t : {dst, src})
          if (acc_.state[t] == EMPTY) fail(i, "reads " + tile(ACC, t) + ", which was never written");
        accumulate(i, dst, COMPUTED);
      }
}

}  // namespace vta
