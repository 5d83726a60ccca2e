// A program is a recorded list of operations over registers; a frame runs it over one batch of sequences.
// JavaScript crosses into native code once a run, however many operations that is.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels/nn/output.h"
#include "kernels/nn/sequence.h"
#include "program/ops.h"

namespace eac {

struct RegisterSpec {
  int64_t width;
  DType dtype;        // f32 or i32
  bool per_sequence;  // one row a sequence instead of one a token
};

struct Program {
  std::vector<RegisterSpec> registers;
  std::vector<op::Op> ops;
  // Throws when an operation's registers and weights do not fit together.
  void check() const;
};

struct ExpertMask {
  std::vector<uint8_t> keep;  // (sequences × experts); empty: no pruning
  PruneMode mode = PruneMode::drop;
};

class Frame {
 public:
  explicit Frame(std::shared_ptr<const Program> program);

  void begin(std::vector<int32_t> ids, std::vector<Sequence> sequences);
  void bind(op::Register r, std::optional<Tensor> memory);
  void run(size_t from, size_t to);
  void commit();
  Tensor tensor(op::Register r) const;  // rows of the current batch

  const Program& program() const { return *program_; }
  const std::vector<Sequence>& sequences() const { return sequences_; }
  ExpertMask mask;
  Sampling sampling;
  Activations activations = Activations::f32;
  std::atomic<bool> busy{false};

 private:
  friend struct Executor;
  int64_t rows_of(op::Register r) const {
    return program_->registers[size_t(r)].per_sequence ? int64_t(sequences_.size()) : tokens_;
  }

  std::shared_ptr<const Program> program_;
  std::vector<Tensor> memory_;  // capacity rows × width, grow-only
  std::vector<bool> bound_;
  std::vector<int32_t> ids_;
  std::vector<Sequence> sequences_;
  std::vector<Sequence> last_rows_;  // one row each, for registers with a row a sequence
  int64_t tokens_ = 0;
  ExpertsScratch scratch_;
};

}  // namespace eac
