// Functional execution: what the three units do to SRAM and DRAM, one instruction after the other.
#include <algorithm>
#include <cstring>
#include <memory>
#include <random>

#include "gemm.hpp"
#include "program.hpp"

namespace vta {

namespace {

// Values narrower than a byte lie low bits first.
int32_t unpack(const uint8_t* data, int64_t index, int64_t bits) {
  if (bits == 8) return int8_t(data[index]);
  int64_t per_byte = 8 / bits;
  int32_t value = (data[index / per_byte] >> ((index % per_byte) * bits)) & ((1 << bits) - 1);
  return value - ((value >> (bits - 1)) << bits);
}

void pack(uint8_t* data, int64_t index, int64_t bits, int32_t value) {
  if (bits == 8) {
    data[index] = uint8_t(value);
    return;
  }
  int64_t per_byte = 8 / bits;
  int64_t shift = (index % per_byte) * bits;
  uint8_t mask = uint8_t(((1 << bits) - 1) << shift);
  uint8_t& byte = data[index / per_byte];
  byte = uint8_t((byte & ~mask) | ((uint32_t(value) << shift) & mask));
}

class Machine {
 public:
  Machine(Program& program, bool strict)
      : program_(program),
        config_(program.config),
        strict_(strict),
        shape_{config_.batch, config_.block_out, (config_.block_in + 1) / 2},
        kernel_(gemm_kernel(shape_)),
        acc_values_(config_.batch * config_.block_out),
        inp_values_(config_.batch * shape_.pairs * 2),
        wgt_values_(config_.block_out * shape_.pairs * 2),
        inp_(config_.inp_depth() * inp_values_),
        wgt_(config_.wgt_depth() * wgt_values_),
        acc_(config_.acc_depth() * acc_values_),
        out_(config_.acc_depth() * config_.tile_bytes(OUT)),
        in_out_(config_.acc_depth()),
        uops_(config_.uop_depth) {}

  void run(int64_t i) {
    i_ = i;
    insn_ = &program_.instructions[i];
    switch (insn_->opcode) {
      case LOAD: load(); break;
      case STORE: store(); break;
      case GEMM: gemm(); break;
      case ALU: alu(); break;
      default: break;
    }
  }

 private:
  [[noreturn]] void fail(const std::string& rule) const { throw Violation(i_, rule); }

  void range(int memory, int64_t last) const {
    if (last >= config_.depth(memory))
      fail(tile(memory, last) + " is out of range: the buffer has " + std::to_string(config_.depth(memory)));
  }

  uint8_t* row(int64_t y, int64_t size) {
    int64_t addr = (insn_->dram + y * insn_->x_stride) * size;
    Region* region = program_.row_region(i_, addr, insn_->x_size * size, size);
    if (!region->data) fail("transfers a row of a memory region without data");
    return region->data + (addr - region->addr);
  }

  void load() {
    if (insn_->nop()) return;
    if (insn_->memory > ACC) fail("LOAD of an unknown memory");
    int64_t size = config_.tile_bytes(insn_->memory);
    range(insn_->memory, insn_->sram + insn_->sram_tiles() - 1);
    int64_t width = insn_->row_tiles();
    zero(insn_->sram, insn_->y_pad_0 * width);
    int64_t at = insn_->sram + insn_->y_pad_0 * width;
    for (int64_t y = 0; y < insn_->y_size; ++y, at += width) {
      zero(at, insn_->x_pad_0);
      const uint8_t* data = row(y, size);
      for (int64_t x = 0; x < insn_->x_size; ++x) load_tile(at + insn_->x_pad_0 + x, data + x * size);
      zero(at + insn_->x_pad_0 + insn_->x_size, insn_->x_pad_1);
    }
    zero(at, insn_->y_pad_1 * width);
  }

  // Padding writes zero tiles.
  void zero(int64_t first, int64_t count) {
    if (count == 0) return;
    if (insn_->memory == INP) std::fill_n(&inp_[first * inp_values_], count * inp_values_, int16_t(0));
    if (insn_->memory == WGT) std::fill_n(&wgt_[first * wgt_values_], count * wgt_values_, int16_t(0));
    if (insn_->memory == ACC) std::fill_n(&acc_[first * acc_values_], count * acc_values_, 0);
  }

  void load_tile(int64_t t, const uint8_t* data) {
    if (insn_->memory == INP) {
      int16_t* to = &inp_[t * inp_values_];
      for (int64_t b = 0; b < config_.batch; ++b)
        for (int64_t ic = 0; ic < config_.block_in; ++ic)
          to[b * shape_.pairs * 2 + ic] = int16_t(unpack(data, b * config_.block_in + ic, config_.inp_bits));
    } else if (insn_->memory == WGT) {
      int16_t* to = &wgt_[t * wgt_values_];
      for (int64_t oc = 0; oc < config_.block_out; ++oc)
        for (int64_t ic = 0; ic < config_.block_in; ++ic)
          to[(ic / 2 * config_.block_out + oc) * 2 + ic % 2] =
              int16_t(unpack(data, oc * config_.block_in + ic, config_.wgt_bits));
    } else if (insn_->memory == ACC) {
      // OUT is a buffer of its own: loading ACC leaves it as it was.
      if (in_out_[t] == 0) keep_out(t);
      std::memcpy(&acc_[t * acc_values_], data, acc_values_ * 4);
    } else {
      uint32_t word;
      std::memcpy(&word, data, 4);
      uops_[t] = decode_uop(config_, word);
    }
  }

  // OUT takes the low bits of ACC; it is written out only where ACC is about to move on.
  void keep_out(int64_t t) {
    for (int64_t v = 0; v < acc_values_; ++v)
      pack(&out_[t * config_.tile_bytes(OUT)], v, config_.out_bits, acc_[t * acc_values_ + v]);
    in_out_[t] = 1;
  }

  void store() {
    if (insn_->nop()) return;
    int64_t size = config_.tile_bytes(OUT);
    range(OUT, insn_->sram + insn_->y_size * insn_->x_size - 1);
    for (int64_t y = 0; y < insn_->y_size; ++y) {
      uint8_t* data = row(y, size);
      for (int64_t x = 0; x < insn_->x_size; ++x) {
        int64_t t = insn_->sram + y * insn_->x_size + x;
        if (in_out_[t] == 0) keep_out(t);
        std::memcpy(data + x * size, &out_[t * size], size);
      }
    }
  }

  // Largest index that the loops reach, so that the inner loop need not check.
  void loop_range(int memory, int64_t MicroOp::*field, int64_t outer, int64_t inner) const {
    int64_t largest = 0;
    for (int64_t u = insn_->uop_begin; u < insn_->uop_end; ++u) largest = std::max(largest, uops_[u].*field);
    range(memory, largest + (insn_->iter_out - 1) * outer + (insn_->iter_in - 1) * inner);
  }

  void gemm() {
    if (insn_->uops() == 0) return;
    range(UOP, insn_->uop_end - 1);
    loop_range(ACC, &MicroOp::dst, insn_->dst_out, insn_->dst_in);
    if (!insn_->reset) {
      loop_range(INP, &MicroOp::src, insn_->src_out, insn_->src_in);
      loop_range(WGT, &MicroOp::wgt, insn_->wgt_out, insn_->wgt_in);
    }
    int32_t overflow = 0;
    for (int64_t a = 0; a < insn_->iter_out; ++a)
      for (int64_t b = 0; b < insn_->iter_in; ++b)
        for (int64_t u = insn_->uop_begin; u < insn_->uop_end; ++u) {
          int64_t dst = uops_[u].dst + a * insn_->dst_out + b * insn_->dst_in;
          int64_t src = uops_[u].src + a * insn_->src_out + b * insn_->src_in;
          int64_t wgt = uops_[u].wgt + a * insn_->wgt_out + b * insn_->wgt_in;
          int32_t* acc = &acc_[dst * acc_values_];
          in_out_[dst] = 0;
          if (insn_->reset)
            std::memset(acc, 0, acc_values_ * 4);
          else
            overflow |= kernel_(shape_, acc, &inp_[src * inp_values_], &wgt_[wgt * wgt_values_]);
        }
    if (strict_ && overflow < 0) fail("an accumulator leaves the range of int32");
  }

  void alu() {
    if (insn_->uops() == 0) return;
    range(UOP, insn_->uop_end - 1);
    loop_range(ACC, &MicroOp::dst, insn_->dst_out, insn_->dst_in);
    loop_range(ACC, &MicroOp::src, insn_->src_out, insn_->src_in);
    for (int64_t a = 0; a < insn_->iter_out; ++a)
      for (int64_t b = 0; b < insn_->iter_in; ++b)
        for (int64_t u = insn_->uop_begin; u < insn_->uop_end; ++u) {
          int64_t dst = uops_[u].dst + a * insn_->dst_out + b * insn_->dst_in;
          int64_t src = uops_[u].src + a * insn_->src_out + b * insn_->src_in;
          in_out_[dst] = 0;
          if (insn_->use_imm)
            alu_tile(dst, nullptr);
          else
            alu_tile(dst, &acc_[src * acc_values_]);
        }
  }

  void alu_tile(int64_t t, const int32_t* operand) {
    int32_t* acc = &acc_[t * acc_values_];
    int32_t imm = int32_t(insn_->imm);
    for (int64_t v = 0; v < acc_values_; ++v) {
      int32_t x = acc[v], y = operand ? operand[v] : imm;
      switch (insn_->op) {
        case MIN: acc[v] = std::min(x, y); break;
        case MAX: acc[v] = std::max(x, y); break;
        case ADD: acc[v] = add(t, x, y); break;
        default: acc[v] = shift_right(t, x, y);
      }
    }
  }

  int32_t add(int64_t t, int32_t x, int32_t y) const {
    int32_t sum;
    if (__builtin_add_overflow(x, y, &sum) && strict_)
      fail(tile(ACC, t) + " leaves the range of int32: " + std::to_string(x) + " + " + std::to_string(y));
    return sum;
  }

  // Negative amounts shift left on the functional simulator; strict programs have none.
  int32_t shift_right(int64_t t, int32_t x, int32_t amount) const {
    if (amount >= 0 && amount <= 15) return x >> amount;
    if (strict_)
      fail("SHR by " + std::to_string(amount) + " in " + tile(ACC, t) + ": amounts are 0..15; split larger shifts");
    if (amount > 15) return x >> std::min(amount, 31);
    return int32_t(uint32_t(x) << (-amount & 31));
  }

  Program& program_;
  const Config& config_;
  bool strict_;
  GemmShape shape_;
  GemmKernel kernel_;
  int64_t acc_values_, inp_values_, wgt_values_;
  std::vector<int16_t> inp_, wgt_;
  std::vector<int32_t> acc_;
  std::vector<uint8_t> out_, in_out_;  // in_out_: the OUT tile has been written out of ACC
  std::vector<MicroOp> uops_;
  int64_t i_ = 0;
  const Instruction* insn_ = nullptr;
};

}  // namespace

void execute(Program& program, const std::vector<int64_t>& order, bool strict) {
  auto machine = std::make_unique<Machine>(program, strict);
  for (int64_t i : order) machine->run(i);
}

}  // namespace vta
