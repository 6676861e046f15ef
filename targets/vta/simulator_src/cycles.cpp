// The cycle model: fetch, three units and the read port, from event to event.
//
// An instruction starts in cycle t, its last cycle is `end`; the unit's next one starts at end + idle or later. Tokens
// are posted in the last cycle and seen token_latency later.
#include "cycles.hpp"

#include <algorithm>
#include <deque>
#include <string>

#include "read_port.hpp"

namespace vta {

namespace {

struct UnitState {
  std::vector<int64_t> queue;  // instructions, in order
  size_t next = 0, dispatched = 0;
  int64_t free = 0;            // earliest start of the next instruction
  int64_t start = 0, end = NEVER;
  bool busy = false, reading = false;
  Reader reader;
};

class Timing {
 public:
  Timing(const Program& program, const CycleModel& model, int64_t instruction_addr, int64_t* counters,
         int64_t* timeline)
      : program_(program), model_(model), addr_(instruction_addr), counters_(counters), timeline_(timeline), port_(model) {
    for (size_t i = 0; i < program.instructions.size(); ++i)
      units_[program.instructions[i].unit].queue.push_back(int64_t(i));
    visible_.assign(program.instructions.size(), NEVER);
    fetch_chunk(1);
  }

  std::vector<int64_t> run() {
    size_t count = program_.instructions.size();
    order_.reserve(count);
    while (retired_ < count) step();
    return std::move(order_);
  }

 private:
  void step() {
    const Reader* wanted[] = {&fetch_, &units_[COMPUTE_UNIT].reader, &units_[LOAD_UNIT].reader};
    priority(wanted);
    int64_t port = port_.next(wanted, 3), now = std::min(port, dispatch_);
    int64_t times[3];
    for (int u = 0; u < 3; ++u) {
      times[u] = units_[u].busy ? units_[u].end : earliest_start(u);
      now = std::min(now, times[u]);
    }
    if (now == NEVER) deadlock();
    if (port == now) accept(now);
    if (dispatch_ == now) dispatch(now);
    for (int u = 0; u < 3; ++u)
      if (times[u] == now) units_[u].busy ? retire(u) : start(u, now);
  }

  // Port numbers: fetch, uop, inp, wgt, acc; only one of uop and acc, and one of inp and wgt is active at a time.
  template <typename R>
  void priority(R** readers) const {
    const UnitState& compute = units_[COMPUTE_UNIT];
    if (compute.busy && program_.instructions[compute.queue[compute.next]].memory == ACC)
      std::swap(readers[1], readers[2]);
  }

  void accept(int64_t now) {
    Reader* readers[] = {&fetch_, &units_[COMPUTE_UNIT].reader, &units_[LOAD_UNIT].reader};
    priority(readers);
    port_.accept(readers, 3, now);
    if (dispatch_ == NEVER && !fetch_done_ && fetch_.words && fetch_.bursts.empty() && !blocked_)
      dispatch_ = fetch_.last_word + 1;
    for (UnitState& unit : units_)
      if (unit.busy && unit.reading && unit.end == NEVER && unit.reader.bursts.empty()) unit.end = load_end(unit);
  }

  // Fetch reads a chunk, waits for all of it, then dispatches one instruction per cycle.
  void fetch_chunk(int64_t now) {
    int64_t count = std::min<int64_t>(model_.fetch_chunk, int64_t(visible_.size()) - next_);
    chunk_end_ = next_ + count;
    fetch_done_ = count == 0;
    if (fetch_done_) return;
    int64_t bytes = count * INSTRUCTION_BYTES;
    fetch_.begin(Bursts(model_, addr_ + next_ * INSTRUCTION_BYTES, bytes, bytes, 1), now + 1);
  }

  void dispatch(int64_t now) {
    UnitState& unit = units_[program_.instructions[next_].unit];
    if (int64_t(unit.dispatched - unit.next) >= model_.command_queue) {
      if (!blocked_) blocked_since_ = now;
      blocked_ = true;
      dispatch_ = NEVER;
      return;
    }
    if (blocked_) counters_[FETCH_BLOCKED] += now - blocked_since_;
    blocked_ = false;
    visible_[next_] = now + 1;
    ++unit.dispatched;
    ++next_;
    dispatch_ = now + 1;
    if (next_ < chunk_end_) return;
    dispatch_ = NEVER;
    fetch_.words = 0;
    fetch_chunk(now + 2);
  }

  int64_t earliest_start(int u) const {
    const UnitState& unit = units_[u];
    if (unit.next == unit.queue.size()) return NEVER;
    int64_t i = unit.queue[unit.next];
    int64_t when = std::max(unit.free, visible_[i]);
    for (int flag = 0; flag < 2; ++flag) {
      int queue = popped(i, flag);
      if (queue >= 0) when = std::max(when, tokens_[queue].empty() ? NEVER : tokens_[queue].front());
    }
    return when;
  }

  int popped(int64_t i, int flag) const {
    const Instruction& insn = program_.instructions[i];
    return (flag ? insn.pop_next : insn.pop_prev) ? insn.pop_queue(flag) : -1;
  }

  void start(int u, int64_t now) {
    UnitState& unit = units_[u];
    int64_t i = unit.queue[unit.next];
    const Instruction& insn = program_.instructions[i];
    stalls(u, i, now);
    for (int flag = 0; flag < 2; ++flag)
      if (int queue = popped(i, flag); queue >= 0) tokens_[queue].pop_front();
    unit.busy = true;
    unit.start = now;
    unit.reading = insn.opcode == LOAD && !insn.nop() && insn.y_size > 0;
    unit.end = NEVER;
    if (unit.reading) {
      int64_t size = program_.config.tile_bytes(insn.memory);
      Bursts bursts(model_, insn.dram * size, insn.x_size * size, insn.x_stride * size, insn.y_size);
      unit.reader.begin(bursts, now + model_.load_start + insn.y_pad_0);
    } else {
      unit.end = now + duration(insn);
    }
    order_.push_back(i);
  }

  void stalls(int u, int64_t i, int64_t now) {
    const UnitState& unit = units_[u];
    int64_t ready = std::max(unit.free, visible_[i]);
    counters_[WAIT_FETCH_LOAD + u] += ready - unit.free;
    int latest = -1;
    for (int flag = 0; flag < 2; ++flag) {
      int queue = popped(i, flag);
      if (queue >= 0 && (latest < 0 || tokens_[queue].front() > tokens_[latest].front())) latest = queue;
    }
    if (latest >= 0) counters_[WAIT_L2C + latest] += now - ready;
  }

  int64_t duration(const Instruction& insn) const {
    if (insn.opcode == GEMM) return model_.compute_overhead + insn.uops();
    if (insn.opcode == ALU)
      return model_.compute_overhead + insn.uops() * (insn.use_imm ? model_.alu_immediate : model_.alu_tensor);
    if (insn.opcode == STORE && !insn.nop()) return store_duration(insn);
    return model_.nop;
  }

  // Every burst: command, then per tile its words and a cycle to read the next tile, then the response.
  int64_t store_duration(const Instruction& insn) const {
    const Config& config = program_.config;
    int64_t size = config.tile_bytes(OUT), tile_words = std::max<int64_t>(1, size / model_.word_bytes);
    // The buffer is read row by row of a tile, and not faster than one bus word.
    int64_t words = std::max<int64_t>(1, tile_words / config.batch);
    int64_t tile = std::max(words + model_.store_tile, words * model_.word_cycles);
    int64_t total = 0;
    Bursts bursts(model_, insn.dram * size, insn.x_size * size, insn.x_stride * size, insn.y_size);
    while (!bursts.empty()) {
      int64_t reads = std::max<int64_t>(1, bursts.take() / words);
      total += model_.store_command + (reads - 1) * tile + words * model_.word_cycles + model_.store_response;
    }
    return total;
  }

  // Padding is written in cycles that bring no data.
  int64_t load_end(const UnitState& unit) const {
    const Instruction& insn = program_.instructions[unit.queue[unit.next]];
    const Reader& reader = unit.reader;
    int64_t end = reader.last_word + model_.load_end;
    int64_t padding = insn.sram_tiles() - insn.x_size * insn.y_size;
    if (padding == 0) return end;
    int64_t begin = unit.start + 1 + model_.padding_start;
    int64_t before = std::max<int64_t>(0, reader.first_word + 1 - begin);
    if (padding <= before) return std::max(end, begin + padding);
    int64_t gaps = reader.last_word - reader.first_word + 1 - reader.words;
    return end + std::max<int64_t>(0, padding - before - gaps);
  }

  void retire(int u) {
    UnitState& unit = units_[u];
    int64_t i = unit.queue[unit.next];
    const Instruction& insn = program_.instructions[i];
    for (int flag = 0; flag < 2; ++flag)
      if (flag ? insn.push_next : insn.push_prev) {
        int queue = insn.push_queue(flag);
        if (queue >= 0) tokens_[queue].push_back(unit.end + model_.token_latency);
      }
    counters_[BUSY_LOAD + u] += unit.end - unit.start;
    if (unit.reading) counters_[WAIT_MEMORY_LOAD + u] += unit.reader.waited;
    counters_[CYCLES] = insn.opcode == FINISH ? unit.end + 1 : std::max(counters_[CYCLES], unit.end + 1);
    if (timeline_) {
      timeline_[2 * i] = unit.start;
      timeline_[2 * i + 1] = unit.end;
    }
    unit.busy = unit.reading = false;
    unit.free = unit.end + model_.idle;
    ++unit.next;
    ++retired_;
    if (blocked_) dispatch_ = std::min(dispatch_, unit.end + 1);
  }

  [[noreturn]] void deadlock() const {
    std::string text = "deadlock:";
    int64_t first = -1;
    for (int u = 0; u < 3; ++u) {
      const UnitState& unit = units_[u];
      if (unit.next == unit.queue.size()) continue;
      int64_t i = unit.queue[unit.next];
      if (first < 0 || i < first) first = i;
      text += std::string(" the ") + unit_name(u) + " unit waits at instruction " + std::to_string(i);
      for (int flag = 0; flag < 2; ++flag)
        if (int queue = popped(i, flag); queue >= 0 && tokens_[queue].empty())
          text += std::string(" for a ") + queue_name(queue) + " token";
      if (visible_[i] == NEVER) text += ", which fetch cannot dispatch";
      text += ";";
    }
    text.back() = '.';
    throw Violation(first, text);
  }

  const Program& program_;
  const CycleModel& model_;
  int64_t addr_;
  int64_t* counters_;
  int64_t* timeline_;
  ReadPort port_;
  UnitState units_[3];
  Reader fetch_;
  std::vector<int64_t> visible_;  // when each instruction is at its unit
  std::vector<int64_t> order_;
  std::deque<int64_t> tokens_[4];  // when each token is seen
  int64_t next_ = 0, chunk_end_ = 0, dispatch_ = NEVER, blocked_since_ = 0;
  bool blocked_ = false, fetch_done_ = false;
  size_t retired_ = 0;
};

}  // namespace

std::vector<int64_t> cycles(const Program& program, const CycleModel& model, int64_t instruction_addr,
                            int64_t* counters, int64_t* timeline) {
  return Timing(program, model, instruction_addr, counters, timeline).run();
}

}  // namespace vta
