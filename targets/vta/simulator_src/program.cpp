// Decoding of instructions and micro-operations, and lookup of memory regions.
#include "program.hpp"

#include <algorithm>
#include <cstring>

namespace vta {

int64_t Config::depth(int memory) const {
  switch (memory) {
    case UOP: return uop_depth;
    case WGT: return wgt_depth();
    case INP: return inp_depth();
    default: return acc_depth();
  }
}

int64_t Config::tile_bytes(int memory) const {
  switch (memory) {
    case UOP: return 4;
    case WGT: return block_out * block_in * wgt_bits / 8;
    case INP: return batch * block_in * inp_bits / 8;
    case ACC: return batch * block_out * 4;
    default: return batch * block_out * out_bits / 8;
  }
}

int Instruction::pop_queue(int which) const {
  if (which == 0) return unit == COMPUTE_UNIT ? L2C : unit == STORE_UNIT ? C2S : -1;
  return unit == COMPUTE_UNIT ? S2C : unit == LOAD_UNIT ? C2L : -1;
}

int Instruction::push_queue(int which) const {
  if (which == 0) return unit == COMPUTE_UNIT ? C2L : unit == STORE_UNIT ? S2C : -1;
  return unit == COMPUTE_UNIT ? C2S : unit == LOAD_UNIT ? L2C : -1;
}

namespace {

// Takes fields off a 64-bit word, low bits first.
struct Bits {
  uint64_t word;
  int64_t take(int64_t width) {
    uint64_t value = width >= 64 ? word : word & ((uint64_t(1) << width) - 1);
    word = width >= 64 ? 0 : word >> width;
    return int64_t(value);
  }
};

void decode_transfer(const Config& config, Bits low, Bits high, Instruction& out) {
  out.memory = int(low.take(config.isa_version == 1 ? 2 : 3));
  out.sram = low.take(16);
  out.dram = low.take(32);
  out.y_size = high.take(16);
  out.x_size = high.take(16);
  out.x_stride = high.take(16);
  out.y_pad_0 = high.take(4);
  out.y_pad_1 = high.take(4);
  out.x_pad_0 = high.take(4);
  out.x_pad_1 = high.take(4);
  out.reserved = low.word != 0;
  // The two-bit field of 0.0.1 cannot hold OUT (4): stores carry 0 there.
  if (out.opcode == STORE && config.isa_version == 1 && out.memory == 0) out.memory = OUT;
  if (out.opcode == STORE) {
    out.unit = STORE_UNIT;
  } else {
    out.unit = out.memory == INP || out.memory == WGT ? LOAD_UNIT : COMPUTE_UNIT;
  }
}

void decode_loops(const Config& config, Bits low, Bits high, Instruction& out) {
  out.unit = COMPUTE_UNIT;
  out.reset = low.take(1);
  out.uop_begin = low.take(config.log_uop_depth);
  out.uop_end = low.take(config.log_uop_depth + 1);
  out.iter_out = low.take(14);
  out.iter_in = low.take(14);
  out.dst_out = high.take(config.log_acc_depth);
  out.dst_in = high.take(config.log_acc_depth);
  int64_t src_bits = out.opcode == GEMM ? config.log_inp_depth : config.log_acc_depth;
  out.src_out = high.take(src_bits);
  out.src_in = high.take(src_bits);
  if (out.opcode == GEMM) {
    out.wgt_out = high.take(config.log_wgt_depth);
    out.wgt_in = high.take(config.log_wgt_depth);
  } else {
    out.op = int(high.take(config.isa_version == 1 ? 2 : 3));
    out.use_imm = high.take(1);
    out.imm = int16_t(uint16_t(high.take(16)));
  }
  out.reserved = low.word != 0 || high.word != 0;
}

}  // namespace

std::vector<Instruction> decode(const Config& config, const uint8_t* data, int64_t count) {
  std::vector<Instruction> out(count);
  for (int64_t i = 0; i < count; ++i) {
    Bits low, high;
    std::memcpy(&low.word, data + 16 * i, 8);
    std::memcpy(&high.word, data + 16 * i + 8, 8);
    Instruction& insn = out[i];
    insn = Instruction{};
    insn.opcode = int(low.take(3));
    insn.pop_prev = low.take(1);
    insn.pop_next = low.take(1);
    insn.push_prev = low.take(1);
    insn.push_next = low.take(1);
    insn.unit = COMPUTE_UNIT;
    switch (insn.opcode) {
      case LOAD:
      case STORE: decode_transfer(config, low, high, insn); break;
      case GEMM:
      case ALU: decode_loops(config, low, high, insn); break;
      case FINISH: insn.reserved = low.word != 0 || high.word != 0; break;
      default: throw Violation(i, "unknown opcode " + std::to_string(insn.opcode));
    }
  }
  return out;
}

MicroOp decode_uop(const Config& config, uint32_t word) {
  Bits bits{word};
  MicroOp uop;
  uop.dst = bits.take(config.log_acc_depth);
  uop.src = bits.take(std::max(config.log_acc_depth, config.log_inp_depth));
  uop.wgt = bits.take(config.log_wgt_depth);
  return uop;
}

Region* Program::find(int64_t addr) {
  if (last_ && addr >= last_->addr && addr < last_->addr + last_->size) return last_;
  auto after = std::upper_bound(regions.begin(), regions.end(), addr,
                                [](int64_t a, const Region& region) { return a < region.addr; });
  if (after == regions.begin()) return nullptr;
  Region& region = *(after - 1);
  if (addr >= region.addr + region.size) return nullptr;
  return last_ = &region;
}

Region* Program::row_region(int64_t index, int64_t addr, int64_t bytes, int64_t tile_bytes) {
  Region* region = find(addr);
  std::string row = "DRAM row [" + std::to_string(addr) + ", " + std::to_string(addr + bytes) + ")";
  if (!region) throw Violation(index, row + " lies in no memory region");
  if (addr + bytes > region->addr + region->size)
    throw Violation(index, row + " runs past the end of its memory region at " +
                               std::to_string(region->addr + region->size) + "; every row lies inside one region");
  if (region->addr % tile_bytes)
    throw Violation(index, row + " is not aligned: its region starts at " + std::to_string(region->addr) +
                               ", which is no multiple of the tile size " + std::to_string(tile_bytes));
  return region;
}

const char* unit_name(int unit) {
  static const char* const names[] = {"load", "compute", "store"};
  return names[unit];
}

const char* queue_name(int queue) {
  static const char* const names[] = {"load->compute", "compute->load", "compute->store", "store->compute"};
  return names[queue];
}

const char* memory_name(int memory) {
  static const char* const names[] = {"UOP", "WGT", "INP", "ACC", "OUT"};
  return memory >= 0 && memory < 5 ? names[memory] : "unknown";
}

std::string tile(int memory, int64_t index) {
  return std::string(memory_name(memory)) + " tile " + std::to_string(index);
}

}  // namespace vta
