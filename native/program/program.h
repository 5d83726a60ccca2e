// A program is a recorded list of operations over registers; a frame runs it over one batch of sequences.
// JavaScript crosses into native code once a run, however many operations that is.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels/nn/output.h"
#include "kernels/nn/sequence.h"
#include "program/backend.h"
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
  Backend* backend = &cpu_backend();
  mutable std::shared_ptr<const void> prepared;  // the backend's, which guards it
  // Throws when an operation's registers and weights do not fit together.
  void check() const;
};

// What `reselect` prunes by: a mask, or PESF's rule on the counts that `route` took (kernels/router/select.h). Neither: nothing.
struct Pruning {
  std::vector<uint8_t> keep;  // (sequences × experts)
  std::optional<double> alpha;
  int64_t min_tokens = 1;
  PruneMode mode = PruneMode::drop;
  bool none() const { return keep.empty() && !alpha; }
};

class Frame {
 public:
  explicit Frame(std::shared_ptr<const Program> program);
  ~Frame() { release_caches(); }

  void begin(std::vector<int32_t> ids, std::vector<Sequence> sequences);
  void bind(op::Register r, std::optional<Tensor> memory);
  void run(size_t from, size_t to);
  void commit();
  Tensor tensor(op::Register r) const;  // rows of the current batch

  const Program& program() const { return *program_; }
  Pruning pruning;
  Sampling sampling;
  Activations activations = Activations::f32;
  std::atomic<bool> busy{false};

  // For executors.
  const std::vector<int32_t>& ids() const { return ids_; }
  const std::vector<Sequence>& sequences() const { return sequences_; }
  // The sequences as the rows of a register hold them: with one row each, or one for every token.
  const std::vector<Sequence>& sequences_of(op::Register r) const {
    return program_->registers[size_t(r)].per_sequence ? last_rows_ : sequences_;
  }
  int64_t rows_of(op::Register r) const {
    return program_->registers[size_t(r)].per_sequence ? int64_t(sequences_.size()) : tokens_;
  }
  int64_t width(op::Register r) const { return program_->registers[size_t(r)].width; }
  const Tensor& memory(op::Register r) const { return memory_[size_t(r)]; }
  // Counts the calls of begin().
  uint64_t batch() const { return batch_; }
  // Throw Error("INVALID_ARGUMENT").
  void check_ids(const op::Embed& o) const;
  void check_caches(const Attention& a) const;
  void check_mask(const RouterSpec& r) const;

 private:
  Tensor fresh(const RegisterSpec& spec, int64_t rows) const;
  void release_caches();

  std::shared_ptr<const Program> program_;
  std::vector<Tensor> memory_;  // capacity rows × width, grow-only
  std::vector<bool> bound_;
  std::vector<int32_t> ids_;
  std::vector<Sequence> sequences_;
  std::vector<Sequence> last_rows_;  // one row each, for registers with a row a sequence
  int64_t tokens_ = 0;
  uint64_t batch_ = 0;
  std::unique_ptr<Executor> executor_;
};

}  // namespace eac
