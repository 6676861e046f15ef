// What a program is: configuration, memory regions, decoded instructions, and the error that every pass throws.
//
// The ABI structs hold 64-bit fields only, so that ctypes mirrors them without padding rules.
// Source: public VTA hardware repository (include/vta/hw_spec.h, hardware/chisel, hardware/xilinx).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace vta {

enum Opcode { LOAD = 0, STORE = 1, GEMM = 2, FINISH = 3, ALU = 4 };
enum Memory { UOP = 0, WGT = 1, INP = 2, ACC = 3, OUT = 4 };
enum AluOp { MIN = 0, MAX = 1, ADD = 2, SHR = 3 };
enum Unit { LOAD_UNIT = 0, COMPUTE_UNIT = 1, STORE_UNIT = 2 };
// Token queues: load->compute, compute->load, compute->store, store->compute.
enum Queue { L2C = 0, C2L = 1, C2S = 2, S2C = 3 };
enum Access { READ = 1, WRITE = 2, INSTRUCTIONS = 4 };

constexpr int COMMAND_QUEUE_DEPTH = 512;
// The HLS design has 1024; the public Chisel semaphores are 8 bits wide and silently drop what goes beyond.
constexpr int TOKEN_QUEUE_DEPTH = 255;
constexpr int64_t MAX_TRANSFER_BYTES = int64_t(32) << 20;
// Fetch reads whole instructions of 16 bytes.
constexpr int64_t INSTRUCTION_BYTES = 16;

struct Config {
  int64_t isa_version;  // 1: "0.0.1", 2: "0.0.2"
  int64_t batch, block_in, block_out;
  int64_t inp_bits, wgt_bits, out_bits;  // accumulators have 32
  int64_t log_uop_depth, log_inp_depth, log_wgt_depth, log_acc_depth;  // widths of the instruction's fields
  int64_t uop_depth;  // usable micro-operations

  int64_t inp_depth() const { return int64_t(1) << log_inp_depth; }
  int64_t wgt_depth() const { return int64_t(1) << log_wgt_depth; }
  int64_t acc_depth() const { return int64_t(1) << log_acc_depth; }
  int64_t depth(int memory) const;
  int64_t tile_bytes(int memory) const;
};

struct Region {
  int64_t addr, size;
  int64_t access;   // bits of Access
  int64_t defined;  // 1: all bytes hold data from the start
  uint8_t* data;    // null in timing-only runs
};

struct Instruction {
  int opcode, unit;
  bool pop_prev, pop_next, push_prev, push_next;
  int memory;
  int64_t sram, dram, y_size, x_size, x_stride;
  int64_t y_pad_0, y_pad_1, x_pad_0, x_pad_1;
  bool reset, use_imm;
  int64_t uop_begin, uop_end, iter_out, iter_in;
  int64_t dst_out, dst_in, src_out, src_in, wgt_out, wgt_in;
  int op;
  int64_t imm;
  bool reserved;  // bits that no field owns are set

  bool transfers() const { return opcode == LOAD || opcode == STORE; }
  bool nop() const { return transfers() && x_size == 0; }
  bool pads() const { return y_pad_0 || y_pad_1 || x_pad_0 || x_pad_1; }
  int64_t row_tiles() const { return x_pad_0 + x_size + x_pad_1; }
  int64_t sram_tiles() const { return (y_pad_0 + y_size + y_pad_1) * row_tiles(); }
  int64_t uops() const { return uop_end > uop_begin ? (uop_end - uop_begin) * iter_out * iter_in : 0; }
  // Queue that each flag uses, -1 where the unit has no such neighbour.
  int pop_queue(int which) const;
  int push_queue(int which) const;
};

struct Violation : std::runtime_error {
  int64_t index;  // instruction, or -1
  Violation(int64_t index, const std::string& rule) : std::runtime_error(rule), index(index) {}
};

struct Program {
  Config config;
  std::vector<Instruction> instructions;
  std::vector<Region> regions;  // sorted by address

  Region* find(int64_t addr);  // the region that holds this byte, or null
  // The region that holds the whole row, tile-aligned; throws a Violation otherwise.
  Region* row_region(int64_t index, int64_t addr, int64_t bytes, int64_t tile);

 private:
  Region* last_ = nullptr;
};

struct MicroOp {
  int64_t dst, src, wgt;
};

std::vector<Instruction> decode(const Config& config, const uint8_t* data, int64_t count);
MicroOp decode_uop(const Config& config, uint32_t word);

const char* unit_name(int unit);
const char* queue_name(int queue);
const char* memory_name(int memory);

std::string tile(int memory, int64_t index);

// Every rule that does not depend on values; throws a Violation.
void check(Program& program);

// An order of instructions that the tokens permit; random with a seed, else round robin. Throws on a deadlock.
std::vector<int64_t> token_order(const Program& program, bool random, uint64_t seed);

// Executes in this order on the regions' data.
void execute(Program& program, const std::vector<int64_t>& order, bool strict);

}  // namespace vta
