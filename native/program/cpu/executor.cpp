// The operations on the CPU.
#include <cstring>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/gemm.h"
#include "kernels/nn/activation.h"
#include "kernels/nn/norm.h"
#include "program/calibration.h"
#include "program/program.h"

namespace eac {
namespace {

void embed(const Tensor& table, float scale, const int32_t* ids, int64_t n, float* out) {
  const int64_t d = table.cols();
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < d; j++) out[i * d + j] = float(element(table, ids[i] * d + j)) * scale;
}

// Resolves registers to memory and calls the kernel.
struct Run {
  Frame& f;
  ExpertsScratch& scratch;
  std::vector<uint8_t>& mask;

  float* data(op::Register r) const { return f.memory(r).f32(); }
  int32_t* ints(op::Register r) const { return f.memory(r).i32(); }
  int64_t width(op::Register r) const { return f.width(r); }
  int64_t rows(op::Register r) const { return f.rows_of(r); }

  void operator()(const op::Embed& o) const {
    f.check_ids(o);
    embed(o.table, o.scale, f.ids().data(), rows(o.out), data(o.out));
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
  void operator()(const op::Rope& o) const { rope(data(o.x), width(o.x), f.sequences(), o.rope); }
  void operator()(const op::Attention& o) const {
    f.check_caches(o.attention);
    attention(data(o.q), data(o.k), data(o.v), f.sequences(), o.attention, data(o.out));
  }
  void operator()(const op::Route& o) const {
    select_experts(data(o.logits), rows(o.logits), o.router, data(o.weights), ints(o.indices));
    count_selections(ints(o.indices), f.sequences_of(o.indices), o.router, ints(o.counts));
  }
  void operator()(const op::Reselect& o) const {
    Pruning& p = f.pruning;
    if (p.none()) return;
    const auto& sequences = f.sequences_of(o.logits);
    if (p.alpha) {
      mask.resize(sequences.size() * size_t(o.router.experts));
      if (!pesf_mask(ints(o.counts), sequences, o.router, *p.alpha, p.min_tokens, mask.data())) return;
    } else {
      f.check_mask(o.router);
    }
    apply_expert_mask(data(o.logits), p.alpha ? mask.data() : p.keep.data(), p.mode, sequences, o.router, data(o.weights),
                      ints(o.indices));
  }
  void operator()(const op::Experts& o) const {
    run_experts(data(o.x), rows(o.x), width(o.x), data(o.weights), ints(o.indices), width(o.weights), o.experts,
                o.add ? 1.f : 0.f, data(o.out), scratch, f.activations);
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
    for (size_t s = 0; s < f.sequences().size(); s++) {
      const int64_t last = f.sequences()[s].begin + f.sequences()[s].length - 1;
      std::memcpy(data(o.out) + int64_t(s) * width(o.x), data(o.x) + last * width(o.x), bytes);
    }
  }
  void operator()(const op::Sample& o) const { sample(data(o.logits), rows(o.logits), width(o.logits), f.sampling, ints(o.out)); }
};

class CpuExecutor : public Executor {
 public:
  explicit CpuExecutor(Frame& frame) : frame_(frame) {}
  void run(size_t from, size_t to) override {
    for (size_t i = from; i < to; i++) {
      throw_if_cancelled();
      std::visit(Run{frame_, scratch_, mask_}, frame_.program().ops[i]);
    }
  }

 private:
  Frame& frame_;
  ExpertsScratch scratch_;
  std::vector<uint8_t> mask_;
};

class CpuBackend : public Backend {
 public:
  Device* memory() override { return nullptr; }
  void prepare(const Program&, size_t) override {}
  std::unique_ptr<Executor> executor(Frame& frame) override { return std::make_unique<CpuExecutor>(frame); }
  Calibration& calibration() override { return cpu_calibration(); }
};

}  // namespace

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace eac
