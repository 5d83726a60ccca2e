#include "program/program.h"

#include <cstring>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/gemm.h"
#include "kernels/nn/activation.h"
#include "kernels/nn/norm.h"

namespace eac {
namespace {

// Widths must agree before a single pointer is followed: this is where a wrong description becomes an error instead of a crash.
struct Checker {
  const Program& p;
  size_t index;

  [[noreturn]] void fail(const std::string& what) const {
    throw Error("INVALID_ARGUMENT", "operation " + std::to_string(index) + " of the program: " + what);
  }
  int64_t width(op::Register r, DType dtype = DType::f32) const {
    if (r < 0 || size_t(r) >= p.registers.size()) fail("register " + std::to_string(r) + " does not exist");
    if (p.registers[size_t(r)].dtype != dtype) fail("register " + std::to_string(r) + " has the wrong dtype");
    return p.registers[size_t(r)].width;
  }
  void equal(int64_t a, int64_t b, const char* what) const {
    if (a != b) fail(std::string(what) + ": " + std::to_string(a) + " against " + std::to_string(b));
  }
  void matrix(const Matrix& m, int64_t in, int64_t out) const {
    equal(in_features(m), in, "input width of a weight");
    equal(out_features(m), out, "output width of a weight");
  }
  void routing(const RouterSpec& r, op::Register logits, op::Register weights, op::Register indices) const {
    equal(width(logits), r.experts, "router logits");
    equal(width(weights), r.top_k, "routing weights");
    equal(width(indices, DType::i32), r.top_k, "chosen experts");
    if (r.top_k < 1 || r.top_k > r.experts) fail("top-k must be between 1 and the number of experts");
    if (!r.correction.empty()) equal(int64_t(r.correction.size()), r.experts, "correction of the router's scores");
    if (r.groups < 1 || r.experts % r.groups != 0 || r.top_groups < 1 || r.top_groups > r.groups)
      fail("groups must divide the experts, and their top-k be between 1 and their number");
    if (r.group_best != 1 && r.group_best != 2) fail("a group is judged by its best expert or its best two");
    if (r.scoring == Scoring::sparse_mixer && (r.groups > 1 || !r.correction.empty()))
      fail("the sparse mixer knows no groups and no correction");
  }

  void operator()(const op::Embed& o) const { equal(o.table.cols(), width(o.out), "embedding width"); }
  void operator()(const op::RmsNorm& o) const {
    equal(width(o.x), width(o.out), "norm output");
    if (o.weight.size() < 1 || width(o.x) % o.weight.size() != 0) fail("norm weight does not divide its input");
  }
  void operator()(const op::LayerNorm& o) const {
    equal(width(o.x), width(o.out), "norm output");
    equal(o.weight.size(), width(o.x), "norm weight");
    equal(o.bias.size(), width(o.x), "norm bias");
  }
  void operator()(const op::Linear& o) const {
    matrix(o.weight, width(o.x), width(o.out));
    if (o.bias) equal(o.bias->size(), width(o.out), "bias");
  }
  void operator()(const op::Rope& o) const {
    if (o.rope.head_dim < 1 || width(o.x) % o.rope.head_dim != 0) fail("head width does not divide the register");
    if (o.rope.offset < 0 || o.rope.offset + 2 * int64_t(o.rope.frequencies.size()) > o.rope.head_dim)
      fail("more rotary frequencies than channels");
    if (o.rope.long_from > 0)
      equal(int64_t(o.rope.long_frequencies.size()), int64_t(o.rope.frequencies.size()), "long frequencies");
  }
  void operator()(const op::Attention& o) const {
    const auto& a = o.attention;
    if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads != 0) fail("heads must be a multiple of kv heads");
    equal(width(o.q), a.heads * a.head_dim, "queries");
    equal(width(o.out), a.heads * a.value_channels(), "attention output");
    equal(width(o.k), a.kv_heads * a.head_dim, "keys");
    equal(width(o.v), a.kv_heads * a.value_channels(), "values");
    if (!a.sinks.empty()) equal(int64_t(a.sinks.size()), a.heads, "attention sinks");
  }
  void operator()(const op::Route& o) const {
    routing(o.router, o.logits, o.weights, o.indices);
    equal(width(o.counts, DType::i32), o.router.experts, "expert counts");
    if (!p.registers[size_t(o.counts)].per_sequence) fail("expert counts need one row a sequence");
  }
  void operator()(const op::Reselect& o) const { routing(o.router, o.logits, o.weights, o.indices); }
  void operator()(const op::Experts& o) const {
    const auto& e = o.experts;
    if (e.gate.empty() || e.up.size() != e.gate.size() || e.down.size() != e.gate.size())
      fail("gate, up and down need one matrix an expert");
    equal(width(o.weights), width(o.indices, DType::i32), "chosen experts");
    equal(width(o.x), width(o.out), "experts' output");
    const int64_t hidden = out_features(e.gate[0]);
    for (size_t i = 0; i < e.gate.size(); i++) {
      matrix(e.gate[i], width(o.x), hidden);
      matrix(e.up[i], width(o.x), hidden);
      matrix(e.down[i], hidden, width(o.out));
    }
    if (e.biases) {
      equal(int64_t(e.biases->gate.size()), int64_t(e.gate.size()), "biases of gate");
      equal(int64_t(e.biases->up.size()), int64_t(e.gate.size()), "biases of up");
      equal(int64_t(e.biases->down.size()), int64_t(e.gate.size()), "biases of down");
      for (size_t i = 0; i < e.gate.size(); i++) {
        equal(e.biases->gate[i].size(), hidden, "bias of gate");
        equal(e.biases->up[i].size(), hidden, "bias of up");
        equal(e.biases->down[i].size(), width(o.out), "bias of down");
      }
    }
    if (!e.shared) return;
    const int64_t shared = out_features(e.shared->gate);
    matrix(e.shared->gate, width(o.x), shared);
    matrix(e.shared->up, width(o.x), shared);
    matrix(e.shared->down, shared, width(o.out));
    if (e.shared->output_gate) matrix(*e.shared->output_gate, width(o.x), 1);
  }
  void operator()(const op::Glu& o) const { equal(width(o.gate), width(o.up), "gate and up"); }
  void operator()(const op::Copy& o) const { equal(width(o.x), width(o.out), "copy"); }
  void operator()(const op::Scale& o) const { width(o.x); }
  void operator()(const op::AddScaled& o) const { equal(width(o.x), width(o.out), "sum"); }
  void operator()(const op::Columns& o) const {
    if (o.heads < 1 || o.count < 1 || o.from < 0 || o.to < 0) fail("columns need heads and a range");
    if (width(o.x) % o.heads != 0 || o.from + o.count > width(o.x) / o.heads) fail("columns beyond the register that is read");
    if (width(o.out) % o.heads != 0 || o.to + o.count > width(o.out) / o.heads)
      fail("columns beyond the register that is written");
  }
  void operator()(const op::HeadLinear& o) const {
    const int64_t heads = o.weights->heads();
    if (width(o.x) % heads != 0 || width(o.x) / heads < o.weights->in()) fail("input of a head is too narrow");
    if (width(o.out) % heads != 0 || width(o.out) / heads < o.weights->out()) fail("output of a head is too narrow");
  }
  void operator()(const op::LastRows& o) const {
    equal(width(o.x), width(o.out), "last rows");
    if (!p.registers[size_t(o.out)].per_sequence) fail("last rows need one row a sequence");
  }
  void operator()(const op::Sample& o) const {
    width(o.logits);
    equal(width(o.out, DType::i32), 1, "sampled ids");
  }
};

void embed(const Tensor& table, float scale, const int32_t* ids, int64_t n, float* out) {
  const int64_t d = table.cols();
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < d; j++) out[i * d + j] = float(element(table, ids[i] * d + j)) * scale;
}

}  // namespace

// Runs one operation: resolves registers to memory and calls the kernel.
struct Executor {
  Frame& f;

  float* data(op::Register r) const { return f.memory_[size_t(r)].f32(); }
  int32_t* ints(op::Register r) const { return f.memory_[size_t(r)].i32(); }
  int64_t width(op::Register r) const { return f.program_->registers[size_t(r)].width; }
  int64_t rows(op::Register r) const { return f.rows_of(r); }
  // The sequences as the rows of a register hold them: with one row each, or one for every token.
  const std::vector<Sequence>& sequences_of(op::Register r) const {
    return f.program_->registers[size_t(r)].per_sequence ? f.last_rows_ : f.sequences_;
  }

  void operator()(const op::Embed& o) const {
    if (int64_t(f.ids_.size()) != rows(o.out))
      throw Error("INVALID_ARGUMENT", "the program embeds token ids, but the batch has none");
    for (int32_t id : f.ids_)
      if (id < 0 || id >= o.table.rows())
        throw Error("INVALID_ARGUMENT",
                    "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(o.table.rows()));
    embed(o.table, o.scale, f.ids_.data(), rows(o.out), data(o.out));
  }
  void operator()(const op::RmsNorm& o) const {
    const int64_t d = o.weight.size();  // narrower than the register: one norm a head
    rms_norm(data(o.x), rows(o.x) * width(o.x) / d, d, o.weight, o.eps, data(o.out));
  }
  void operator()(const op::LayerNorm& o) const {
    layer_norm(data(o.x), rows(o.x), width(o.x), o.weight, o.bias, o.eps, data(o.out));
  }
  void operator()(const op::Linear& o) const {
    linear(data(o.x), width(o.x), rows(o.x), o.weight, o.bias ? &*o.bias : nullptr, o.add ? 1.f : 0.f, data(o.out), width(o.out),
           f.activations);
  }
  void operator()(const op::Rope& o) const { rope(data(o.x), width(o.x), f.sequences_, o.rope); }
  void operator()(const op::Attention& o) const {
    const auto& a = o.attention;
    for (const Sequence& s : f.sequences_)
      if (s.cache && (size_t(a.layer) >= s.cache->layers() || s.cache->widths(size_t(a.layer)).key != a.kv_heads * a.head_dim ||
                      s.cache->widths(size_t(a.layer)).value != a.kv_heads * a.value_channels()))
        throw Error("INVALID_ARGUMENT", "the key-value cache was made for another model");
    attention(data(o.q), data(o.k), data(o.v), f.sequences_, o.attention, data(o.out));
  }
  void operator()(const op::Route& o) const {
    select_experts(data(o.logits), rows(o.logits), o.router, data(o.weights), ints(o.indices));
    count_selections(ints(o.indices), sequences_of(o.indices), o.router, ints(o.counts));
  }
  void operator()(const op::Reselect& o) const {
    if (f.mask.keep.empty()) return;
    if (int64_t(f.mask.keep.size()) != int64_t(f.sequences_.size()) * o.router.experts)
      throw Error("INVALID_ARGUMENT", "the expert mask needs one row of experts for each sequence");
    apply_expert_mask(data(o.logits), f.mask.keep.data(), f.mask.mode, sequences_of(o.logits), o.router, data(o.weights),
                      ints(o.indices));
  }
  void operator()(const op::Experts& o) const {
    run_experts(data(o.x), rows(o.x), width(o.x), data(o.weights), ints(o.indices), width(o.weights), o.experts,
                o.add ? 1.f : 0.f, data(o.out), f.scratch_, f.activations);
  }
  void operator()(const op::Glu& o) const {
    float *gate = data(o.gate), *up = data(o.up);
    const int64_t n = rows(o.gate) * width(o.gate), block = 4096;
    parallel_for((n + block - 1) / block,
                 [&](int64_t i) { glu(o.activation, gate + i * block, up + i * block, std::min(block, n - i * block)); });
  }
  void operator()(const op::Copy& o) const {
    std::memcpy(data(o.out), data(o.x), size_t(rows(o.x) * width(o.x)) * sizeof(float));
  }
  void operator()(const op::Scale& o) const {
    parallel_rows(rows(o.x), 16, [&](int64_t i) { isa().scale_f32(o.scale, data(o.x) + i * width(o.x), width(o.x)); });
  }
  void operator()(const op::AddScaled& o) const {
    parallel_rows(rows(o.x), 16, [&](int64_t i) {
      isa().axpy_f32(o.scale, data(o.x) + i * width(o.x), data(o.out) + i * width(o.out), width(o.x));
    });
  }
  void operator()(const op::Columns& o) const {
    const int64_t from = width(o.x) / o.heads, to = width(o.out) / o.heads;
    parallel_rows(rows(o.x), 16, [&](int64_t i) {
      for (int64_t h = 0; h < o.heads; h++)
        std::memcpy(data(o.out) + (i * o.heads + h) * to + o.to, data(o.x) + (i * o.heads + h) * from + o.from,
                    size_t(o.count) * sizeof(float));
    });
  }
  void operator()(const op::HeadLinear& o) const {
    const int64_t heads = o.weights->heads();
    head_linear(data(o.x), width(o.x) / heads, rows(o.x), *o.weights, data(o.out), width(o.out) / heads);
  }
  void operator()(const op::LastRows& o) const {
    const size_t bytes = size_t(width(o.x)) * sizeof(float);
    for (size_t s = 0; s < f.sequences_.size(); s++) {
      const int64_t last = f.sequences_[s].begin + f.sequences_[s].length - 1;
      std::memcpy(data(o.out) + int64_t(s) * width(o.x), data(o.x) + last * width(o.x), bytes);
    }
  }
  void operator()(const op::Sample& o) const { sample(data(o.logits), rows(o.logits), width(o.logits), f.sampling, ints(o.out)); }
};

void Program::check() const {
  for (const RegisterSpec& r : registers)
    if (r.width < 1 || (r.dtype != DType::f32 && r.dtype != DType::i32))
      throw Error("INVALID_ARGUMENT", "a register needs a width and dtype f32 or i32");
  for (size_t i = 0; i < ops.size(); i++) std::visit(Checker{*this, i}, ops[i]);
}

Frame::Frame(std::shared_ptr<const Program> program)
    : program_(std::move(program)), memory_(program_->registers.size()), bound_(program_->registers.size(), false) {}

void Frame::begin(std::vector<int32_t> ids, std::vector<Sequence> sequences) {
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
  for (Sequence& s : sequences)
    if (s.cache) s.cache->reserve(s.position + s.length);
  ids_ = std::move(ids);
  sequences_ = std::move(sequences);
  last_rows_.resize(sequences_.size());
  for (size_t i = 0; i < last_rows_.size(); i++) last_rows_[i].begin = int64_t(i), last_rows_[i].length = 1;
  tokens_ = row;
  for (size_t r = 0; r < memory_.size(); r++) {
    if (bound_[r]) continue;
    const RegisterSpec& spec = program_->registers[r];
    const int64_t rows = rows_of(op::Register(r));
    if (memory_[r].rows() < rows || !memory_[r].data) memory_[r] = Tensor::zeros(spec.dtype, {rows, spec.width});
  }
}

void Frame::bind(op::Register r, std::optional<Tensor> memory) {
  require(r >= 0 && size_t(r) < memory_.size(), "no such register");
  bound_[size_t(r)] = memory.has_value();
  if (memory) {
    const RegisterSpec& spec = program_->registers[size_t(r)];
    require(memory->dtype == spec.dtype && memory->cols() == spec.width, "the tensor does not fit the register");
  }
  memory_[size_t(r)] = memory ? std::move(*memory) : Tensor{};
}

void Frame::run(size_t from, size_t to) {
  require(from <= to && to <= program_->ops.size(), "no such range of operations");
  require(tokens_ > 0, "begin() must come before run()");
  for (size_t r = 0; r < memory_.size(); r++) {
    if (!memory_[r].data && !bound_[r])
      memory_[r] = Tensor::zeros(program_->registers[r].dtype, {rows_of(op::Register(r)), program_->registers[r].width});
    require(memory_[r].rows() >= rows_of(op::Register(r)), "a bound tensor has fewer rows than the batch");
  }
  for (size_t i = from; i < to; i++) {
    throw_if_cancelled();
    std::visit(Executor{*this}, program_->ops[i]);
  }
}

void Frame::commit() {
  for (Sequence& s : sequences_)
    if (s.cache) s.cache->length = s.position + s.length;
}

Tensor Frame::tensor(op::Register r) const {
  require(r >= 0 && size_t(r) < memory_.size() && memory_[size_t(r)].data, "no such register, or begin() has not been called");
  return memory_[size_t(r)].row_range(0, rows_of(r));
}

}  // namespace eac
