#include "program/program.h"

namespace eac {

Frame::Frame(std::shared_ptr<const Program> program)
    : program_(std::move(program)),
      memory_(program_->registers.size()),
      bound_(program_->registers.size(), false),
      executor_(program_->backend->executor(*this)) {}

void Frame::release_caches() {
  for (Sequence& s : sequences_)
    if (s.cache && s.cache->frame == this) s.cache->frame = nullptr;
}

void Frame::begin(std::vector<int32_t> ids, std::vector<Sequence> sequences) {
  release_caches();
  int64_t row = 0;
  for (size_t i = 0; i < sequences.size(); i++) {
    Sequence& s = sequences[i];
    require(s.length > 0, "a sequence of the batch is empty");
    s.begin = row;
    s.position = s.cache ? s.cache->length : 0;
    row += s.length;
    for (size_t j = 0; s.cache && j < i; j++)
      require(sequences[j].cache != s.cache, "two sequences of a batch share a key-value cache");
  }
  require(row > 0, "the batch has no tokens");
  require(ids.empty() || int64_t(ids.size()) == row, "the number of token ids differs from the lengths of the sequences");
  for (Sequence& s : sequences) {
    if (!s.cache) continue;
    // It would begin at the wrong position, and memory that grows would move under the other one.
    require(!s.cache->frame, "the key-value cache is in use by another run");
    require(s.cache->device == program_->backend->memory(), "the key-value cache lies on another device than the program");
    s.cache->reserve(s.position + s.length);
  }
  ids_ = std::move(ids);
  sequences_ = std::move(sequences);
  for (Sequence& s : sequences_)
    if (s.cache) s.cache->frame = this;
  last_rows_.resize(sequences_.size());
  for (size_t i = 0; i < last_rows_.size(); i++) last_rows_[i].begin = int64_t(i), last_rows_[i].length = 1;
  tokens_ = row;
  for (size_t r = 0; r < memory_.size(); r++) {
    if (bound_[r]) continue;
    const RegisterSpec& spec = program_->registers[r];
    const int64_t rows = rows_of(op::Register(r));
    if (memory_[r].rows() < rows || !memory_[r].data) memory_[r] = fresh(spec, rows);
  }
  batch_++;
}

void Frame::bind(op::Register r, std::optional<Tensor> memory) {
  require(r >= 0 && size_t(r) < memory_.size(), "no such register");
  bound_[size_t(r)] = memory.has_value();
  if (memory) {
    const RegisterSpec& spec = program_->registers[size_t(r)];
    require(memory->dtype == spec.dtype && memory->cols() == spec.width, "the tensor does not fit the register");
    require(memory->device == program_->backend->memory(), "the tensor lies on another device than the program");
  }
  memory_[size_t(r)] = memory ? std::move(*memory) : Tensor{};
}

void Frame::run(size_t from, size_t to) {
  require(from <= to && to <= program_->ops.size(), "no such range of operations");
  require(tokens_ > 0, "begin() must come before run()");
  for (size_t r = 0; r < memory_.size(); r++) {
    if (!memory_[r].data && !bound_[r]) memory_[r] = fresh(program_->registers[r], rows_of(op::Register(r)));
    require(memory_[r].rows() >= rows_of(op::Register(r)), "a bound tensor has fewer rows than the batch");
  }
  executor_->run(from, to);
}

void Frame::check_ids(const op::Embed& o) const {
  if (int64_t(ids_.size()) != rows_of(o.out))
    throw Error("INVALID_ARGUMENT", "the program embeds token ids, but the batch has none");
  for (int32_t id : ids_)
    if (id < 0 || id >= o.table.rows())
      throw Error("INVALID_ARGUMENT",
                  "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(o.table.rows()));
}

void Frame::check_caches(const Attention& a) const {
  const auto fits = [&](const KvCache& c) {
    return size_t(a.layer) < c.layers() && c.widths(size_t(a.layer)).key == a.kv_heads * a.head_dim &&
           c.widths(size_t(a.layer)).value == a.kv_heads * a.value_channels();
  };
  for (const Sequence& s : sequences_)
    if (s.cache && !fits(*s.cache)) throw Error("INVALID_ARGUMENT", "the key-value cache was made for another model");
}

void Frame::check_mask(const RouterSpec& r) const {
  if (int64_t(pruning.keep.size()) != int64_t(sequences_.size()) * r.experts)
    throw Error("INVALID_ARGUMENT", "the expert mask needs one row of experts for each sequence");
}

Tensor Frame::fresh(const RegisterSpec& spec, int64_t rows) const {
  return Tensor::zeros(spec.dtype, {rows, spec.width}, program_->backend->memory());
}

void Frame::commit() {
  for (Sequence& s : sequences_)
    if (s.cache) s.cache->length = s.position + s.length;
  release_caches();
}

Tensor Frame::tensor(op::Register r) const {
  require(r >= 0 && size_t(r) < memory_.size() && memory_[size_t(r)].data, "no such register, or begin() has not been called");
  return memory_[size_t(r)].row_range(0, rows_of(r));
}

}  // namespace eac
