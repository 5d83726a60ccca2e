#include "program/program.h"

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
  void operator()(const op::Reselect& o) const {
    routing(o.router, o.logits, o.weights, o.indices);
    equal(width(o.counts, DType::i32), o.router.experts, "expert counts");
  }
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

}  // namespace

void Program::check() const {
  for (const RegisterSpec& r : registers)
    if (r.width < 1 || (r.dtype != DType::f32 && r.dtype != DType::i32))
      throw Error("INVALID_ARGUMENT", "a register needs a width and dtype f32 or i32");
  for (size_t i = 0; i < ops.size(); i++) std::visit(Checker{*this, i}, ops[i]);
}

}  // namespace eac
