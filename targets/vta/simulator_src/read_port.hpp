// The memory read port: clients in order of priority, bursts in flight, one bus word after the other.
#pragma once

#include <algorithm>
#include <deque>
#include <limits>

#include "cycles.hpp"

namespace vta {

constexpr int64_t NEVER = std::numeric_limits<int64_t>::max() / 4;

// Bursts of one transfer: rows of DRAM, split where they would cross a multiple of the burst length.
class Bursts {
 public:
  Bursts() = default;
  Bursts(const CycleModel& model, int64_t addr, int64_t row_bytes, int64_t stride_bytes, int64_t rows)
      : model_(&model), row_(addr), at_(addr), row_bytes_(row_bytes), stride_(stride_bytes), rows_(rows) {}

  bool empty() const { return rows_ == 0; }

  // Words of the next burst, which is taken off.
  int64_t take() {
    int64_t end = std::min(row_ + row_bytes_, (at_ / model_->burst_bytes + 1) * model_->burst_bytes);
    int64_t words = (end + model_->word_bytes - 1) / model_->word_bytes - at_ / model_->word_bytes;
    at_ = end;
    if (at_ == row_ + row_bytes_) {
      --rows_;
      row_ += stride_;
      at_ = row_;
    }
    return words;
  }

 private:
  const CycleModel* model_ = nullptr;
  int64_t row_ = 0, at_ = 0, row_bytes_ = 0, stride_ = 0, rows_ = 0;
};

// What a client asks for, and what became of it.
struct Reader {
  Bursts bursts;
  int64_t request = NEVER;     // when the next burst may be accepted
  int64_t first_word = NEVER;  // arrival of the first and of the last word so far
  int64_t last_word = NEVER;
  int64_t words = 0;
  int64_t waited = 0;          // cycles lost to other clients

  void begin(const Bursts& wanted, int64_t when) {
    *this = Reader{};
    bursts = wanted;
    request = when;
  }
};

class ReadPort {
 public:
  explicit ReadPort(const CycleModel& model) : model_(model) {}

  // Earliest cycle in which a burst of any reader (in order of priority) is accepted.
  int64_t next(const Reader* const* readers, int count) const {
    int64_t when = NEVER;
    for (int r = 0; r < count; ++r) when = std::min(when, readers[r]->request);
    if (when == NEVER) return NEVER;
    when = std::max(when, free_);
    // Tags come back with the last word; in the cycle in which that is on the bus no burst is accepted.
    size_t oldest = flying_.size() >= size_t(model_.outstanding) ? flying_.size() - size_t(model_.outstanding) : 0;
    if (flying_.size() >= size_t(model_.outstanding)) when = std::max(when, flying_[oldest]);
    for (size_t f = oldest; f < flying_.size() && flying_[f] <= when + 1; ++f)
      if (flying_[f] == when + 1) ++when;
    return when;
  }

  // Accepts one burst at this cycle.
  void accept(Reader** readers, int count, int64_t now) {
    int chosen = 0;
    while (chosen < count && readers[chosen]->request > now) ++chosen;
    if (chosen == count) return;
    Reader& reader = *readers[chosen];
    int64_t words = reader.bursts.take();
    int64_t first = std::max(now + model_.read_latency, bus_);
    reader.waited += now - reader.request + (last_ != chosen ? first - (now + model_.read_latency) : 0);
    bus_ = first + words * model_.word_cycles;
    if (reader.words == 0) reader.first_word = first;
    reader.words += words;
    reader.last_word = first + (words - 1) * model_.word_cycles;
    reader.request = reader.bursts.empty() ? NEVER : now + model_.command_interval;
    last_ = chosen;
    free_ = now + 1;
    flying_.push_back(reader.last_word);
    while (flying_.front() <= now) flying_.pop_front();
  }

 private:
  const CycleModel& model_;
  int64_t free_ = 0;  // next cycle in which a burst can be accepted
  int64_t bus_ = 0;   // next cycle in which a word can arrive
  int last_ = -1;
  std::deque<int64_t> flying_;  // arrival of the last word of each burst in flight
};

}  // namespace vta
