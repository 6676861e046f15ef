#include "cycles.hpp"

namespace vta {

void count(const Program& program, int64_t* counters) {
  for (const Instruction& insn : program.instructions) {
    counters[READ_INSN] += INSTRUCTION_BYTES;
    if (insn.opcode == FINISH) {
      ++counters[FINISHES];
    } else if (insn.nop()) {
      ++counters[NOPS];
    } else if (insn.opcode == GEMM) {
      ++counters[GEMMS];
      counters[insn.reset ? RESET_UOPS : GEMM_UOPS] += insn.uops();
    } else if (insn.opcode == ALU) {
      ++counters[ALUS];
      counters[ALU_UOPS] += insn.uops();
    } else {
      ++counters[insn.opcode == LOAD ? LOADS : STORES];
      static const int bytes[] = {READ_UOP, READ_WGT, READ_INP, READ_ACC, WRITTEN_OUT};
      if (insn.memory <= OUT)
        counters[bytes[insn.memory]] += insn.x_size * insn.y_size * program.config.tile_bytes(insn.memory);
    }
  }
}

}  // namespace vta
