// The operations on the GPU: registers and weights become the arguments of the library's functions.
#include <algorithm>
#include <bit>
#include <map>

#include "core/thread_pool.h"
#include "program/cuda/backend.h"
#include "program/cuda/calibration.h"
#include "program/cuda/weights.h"

namespace eac::cuda {
namespace {

// Device memory that grows and is kept.
class Room {
 public:
  explicit Room(Gpu& gpu) : gpu_(gpu) {}
  // Room for n elements; contents are lost where it grows.
  template <class T> T* room(size_t n) {
    if (n * sizeof(T) > size_) {
      size_ = 2 * n * sizeof(T);
      memory_ = gpu_.room(size_);
    }
    return static_cast<T*>(memory_.get());
  }
  template <class T> T* put(const Stream& s, const std::vector<T>& v) {
    T* to = room<T>(v.size());
    if (!v.empty()) s.upload(to, v.data(), v.size() * sizeof(T));
    return to;
  }

 private:
  Gpu& gpu_;
  std::shared_ptr<void> memory_;
  size_t size_ = 0;
};

// A frame's batch as the library sees it.
struct DeviceBatch {
  Batch tokens{}, last{};  // rows of registers with one row a token, and with one a sequence
  const int32_t* ids = nullptr;
  const void* pointers = nullptr;           // of the caches
  std::vector<float* const*> keys, values;  // by layer: device arrays of a pointer a sequence; empty: no caches
};

cuda::Router router_of(const RouterSpec& r, const Prepared& p) {
  return {Scoring(int32_t(r.scoring)),
          r.experts,
          r.top_k,
          r.renormalize,
          r.scale,
          r.jitter,
          p.first,
          r.groups,
          r.top_groups,
          r.group_best};
}

class CudaExecutor : public Executor {
 public:
  CudaExecutor(Gpu& gpu, Weights& weights, Frame& frame)
      : gpu_(gpu), weights_(weights), frame_(frame), stream_(gpu.table()), rows_(gpu), caches_(gpu), mask_(gpu), uniforms_(gpu) {}

  ~CudaExecutor() override { forget(); }

  void run(size_t from, size_t to) override {
    if (!prepared_) prepared_ = weights_.prepare(frame_.program());
    std::unique_lock<std::mutex> alone;  // two runs would want the same places
    copies_ = !reads_host(from, to);
    if (copies_) alone = staging()->lock();
    try {
      if (seen_ != frame_.batch()) describe();
      for (size_t i = from; i < to; i++) std::visit([&](const auto& o) { check(o); }, frame_.program().ops[i]);
      submit(from, to);
    } catch (...) {
      // Nothing queued outlives the run: the registers and the staged experts' places may be another's next.
      t().synchronize(stream_.context());
      throw;
    }
    stream_.synchronize();
  }

 private:
  Staging* staging() const { return prepared_->staging.get(); }
  // Whether operations [from, to) read the experts that are staged, if there are any, where they lie: what their tokens choose is at most half of
  // all, so that copying all, though it is done ahead, takes longer.
  bool reads_host(size_t from, size_t to) const {
    for (size_t i = from; i < to; i++) {
      const auto* o = std::get_if<op::Experts>(&frame_.program().ops[i]);
      if (o && !prepared_->ops[i].list && 2 * rows(o->out) * width(o->weights) > int64_t(o->experts.count())) return false;
    }
    return true;
  }

  void submit(size_t from, size_t to) {
    if (copies_) staging()->start(stream_, from, to);
    // A decoded token is hundreds of short launches, the same ones every time: recorded once, they go out as one.
    const bool decode = batch_.tokens.longest == 1 && frame_.pruning.none() && !copies_;
    if (!decode)
      queue(from, to);
    else if (const std::vector<uint64_t> now = key(from, to); graph_ && now == captured_)
      stream_(t().launch(stream_.context(), graph_));
    else if (!(capturable_ && now == ran_ && capture(from, to)))
      queue(from, to), ran_ = key(from, to);  // scratch memory may have moved
  }

  void queue(size_t from, size_t to) {
    for (size_t i = from; i < to; i++) {
      throw_if_cancelled();
      op_ = i;
      std::visit([&](const auto& o) { (*this)(o); }, frame_.program().ops[i]);
    }
  }

  // Whatever a recorded launch holds that may be another the next time.
  std::vector<uint64_t> key(size_t from, size_t to) const {
    const Sampling& s = frame_.sampling;
    std::vector<uint64_t> k = {from,
                               to,
                               uint64_t(batch_.tokens.sequences),
                               uint64_t(batch_.tokens.deepest),
                               uint64_t(frame_.activations),
                               std::bit_cast<uint32_t>(s.temperature),
                               uint64_t(s.top_k),
                               std::bit_cast<uint64_t>(s.top_p),
                               uint64_t(uintptr_t(batch_.ids)),
                               uint64_t(uintptr_t(batch_.pointers)),
                               uint64_t(uintptr_t(uniform_)),
                               t().scratch_moves(stream_.context())};
    for (size_t r = 0; r < frame_.program().registers.size(); r++) k.push_back(uintptr_t(frame_.memory(op::Register(r)).data));
    return k;
  }

  // Records operations and runs them; false where the driver cannot.
  bool capture(size_t from, size_t to) {
    forget();
    if (t().begin_capture(stream_.context()) != Status::ok) return capturable_ = false;
    std::exception_ptr thrown;
    try {
      queue(from, to);
    } catch (...) { thrown = std::current_exception(); }
    const Status status = t().end_capture(stream_.context(), &graph_);
    // An operation that cannot be recorded throws and spoils the recording; queued, it may run.
    if (status != Status::ok) return capturable_ = false;
    if (thrown) {
      forget();
      std::rethrow_exception(thrown);
    }
    captured_ = key(from, to);
    stream_(t().launch(stream_.context(), graph_));
    return true;
  }
  void forget() {
    if (graph_) t().free_graph(graph_);
    graph_ = nullptr;
    captured_.clear();
  }

  // What must be known or copied before anything is queued.
  void check(const op::Embed& o) const { frame_.check_ids(o); }
  void check(const op::Attention& o) const { frame_.check_caches(o.attention); }
  void check(const op::Sample& o) {
    const Sampling& s = frame_.sampling;
    std::vector<double> uniform(size_t(rows(o.logits)), 0);
    std::copy_n(s.uniform.begin(), std::min(s.uniform.size(), uniform.size()), uniform.begin());
    uniform_ = uniforms_.put(stream_, uniform);
  }
  template <class Op> void check(const Op&) const {}

  // Copies what the kernels need to know of the batch.
  void describe() {
    const auto& sequences = frame_.sequences();
    const int64_t n = sequences.back().begin + sequences.back().length, count = int64_t(sequences.size());
    std::vector<int32_t> v(size_t(3 * n + 4 * count));
    int32_t *sequence = v.data(), *position = sequence + n, *ids = position + n, *begin = ids + n, *length = begin + count,
            *order = length + count, *ones = order + count;
    batch_ = {};
    for (int64_t s = 0; s < count; s++) {
      const Sequence& q = sequences[size_t(s)];
      for (int64_t i = 0; i < q.length; i++) {
        sequence[q.begin + i] = int32_t(s);
        position[q.begin + i] = int32_t(q.position + i);
      }
      begin[s] = int32_t(q.begin), length[s] = int32_t(q.length), order[s] = int32_t(s), ones[s] = 1;
      batch_.tokens.longest = std::max(batch_.tokens.longest, q.length);
      batch_.tokens.deepest = std::max(batch_.tokens.deepest, q.position + q.length);
    }
    std::copy(frame_.ids().begin(), frame_.ids().end(), ids);
    const int32_t* base = rows_.put(stream_, v);
    const auto on_device = [&](const int32_t* p) { return base + (p - v.data()); };
    const int64_t longest = batch_.tokens.longest;
    // Launch shapes of a recorded decode step follow from `deepest`: in steps, so that it lasts for many tokens.
    const int64_t deepest =
        longest > 1 ? batch_.tokens.deepest : std::max<int64_t>(std::bit_ceil(uint64_t(batch_.tokens.deepest)), 256);
    batch_.tokens = {n, count, longest, deepest, on_device(sequence), on_device(position), on_device(begin), on_device(length)};
    batch_.last = {count, count, 1, 1, on_device(order), on_device(order), on_device(order), on_device(ones)};
    batch_.ids = on_device(ids);
    describe_caches();
    seen_ = frame_.batch();
  }

  void describe_caches() {
    own_.clear();
    size_t layers = 0;
    const KvCache* model = nullptr;
    for (const Sequence& s : frame_.sequences())
      if (s.cache) layers = s.cache->layers(), model = s.cache.get();
    if (!model) return;
    std::vector<float*> pointers;
    const auto each = [&](auto f) {
      for (size_t l = 0; l < layers; l++)
        for (const Sequence& s : frame_.sequences()) pointers.push_back((cache_of(s, *model).*f)(l));
    };
    for (const Sequence& s : frame_.sequences())
      if (s.cache && s.cache->layers() != layers)
        throw Error("INVALID_ARGUMENT", "the key-value cache was made for another model");
    each(&KvCache::keys);
    each(&KvCache::values);
    float* const* base = caches_.put(stream_, pointers);
    batch_.pointers = base;
    const size_t count = frame_.sequences().size();
    for (size_t l = 0; l < layers; l++) {
      batch_.keys.push_back(base + l * count);
      batch_.values.push_back(base + (layers + l) * count);
    }
  }
  // A sequence without a cache among others that have one gets one for this batch.
  const KvCache& cache_of(const Sequence& s, const KvCache& like) {
    if (s.cache) return *s.cache;
    auto& own = own_[&s];
    if (!own) {
      std::vector<KvCache::Widths> widths;
      for (size_t l = 0; l < like.layers(); l++) widths.push_back(like.widths(l));
      own = std::make_unique<KvCache>(std::move(widths), &gpu_);
      own->reserve(s.length);
    }
    return *own;
  }

  float* data(op::Register r) const { return frame_.memory(r).f32(); }
  int32_t* ints(op::Register r) const { return frame_.memory(r).i32(); }
  int64_t width(op::Register r) const { return frame_.width(r); }
  int64_t rows(op::Register r) const { return frame_.rows_of(r); }
  int64_t size(op::Register r) const { return rows(r) * width(r); }
  const Batch& batch_of(op::Register r) const {
    return frame_.program().registers[size_t(r)].per_sequence ? batch_.last : batch_.tokens;
  }
  // Products with weights that are not quantized are always exact, as on the CPU: routers depend on it.
  Precision precision(bool quantized) const {
    return quantized && frame_.activations == Activations::int8 ? Precision::fast : Precision::exact;
  }
  template <class Arguments> void call(Status (*f)(Context*, const Arguments*), const Arguments& a) const {
    stream_(f(stream_.context(), &a));
  }

  void operator()(const op::Embed& o) {
    call<Embed>(t().embed, {batch_.ids, p().storage, p().tensor, o.scale, rows(o.out), width(o.out), data(o.out)});
  }
  void operator()(const op::RmsNorm& o) {
    const int64_t d = o.weight.size();  // narrower than the register: one norm a head
    call<Norm>(t().norm, {data(o.x), size(o.x) / d, d, p().storage, p().tensor, nullptr, o.eps, data(o.out)});
  }
  void operator()(const op::LayerNorm& o) {
    call<Norm>(t().norm, {data(o.x), rows(o.x), width(o.x), p().storage, p().tensor, p().bias, o.eps, data(o.out)});
  }
  void operator()(const op::Linear& o) {
    call<Linear>(t().linear, {data(o.x), rows(o.x), p().weight, p().bias_storage, p().bias, o.add,
                              precision(std::holds_alternative<QuantMatrix>(o.weight)), data(o.out)});
  }
  void operator()(const op::Rope& o) {
    const auto& r = o.rope;
    call<Rope>(t().rope, {data(o.x), width(o.x), r.head_dim, r.offset, int64_t(r.frequencies.size()), p().first, p().second,
                          r.scale, r.long_scale, r.long_from, r.interleaved, batch_of(o.x)});
  }
  void operator()(const op::Attention& o) {
    const auto& a = o.attention;
    const bool cached = !batch_.keys.empty();
    call<Attention>(t().attention,
                    {data(o.q), data(o.k), data(o.v), data(o.out), batch_.tokens, cached ? batch_.keys[size_t(a.layer)] : nullptr,
                     cached ? batch_.values[size_t(a.layer)] : nullptr, a.heads, a.kv_heads, a.head_dim, a.value_channels(),
                     a.window, a.scale, p().first});
  }
  void operator()(const op::Route& o) {
    call<Route>(t().route, {data(o.logits), router_of(o.router, p()), batch_of(o.indices), data(o.weights), ints(o.indices),
                            ints(o.counts)});
  }
  void operator()(const op::Reselect& o) {
    const Pruning& r = frame_.pruning;
    if (r.none()) return;
    const Batch& batch = batch_of(o.logits);
    const uint8_t* keep = nullptr;
    if (r.alpha) {
      uint8_t* made = mask_.room<uint8_t>(size_t(batch.sequences * o.router.experts));
      // Single tokens are never pruned: their counts say nothing.
      call<PesfMask>(t().pesf_mask, {ints(o.counts), batch, o.router.experts, pesf_threshold(o.router, *r.alpha),
                                     std::max<int64_t>(r.min_tokens, 2), made});
      keep = made;
    } else {
      frame_.check_mask(o.router);
      keep = mask_.put(stream_, r.keep);
    }
    call<Prune>(t().prune, {data(o.logits), router_of(o.router, p()), batch, PruneMode(int32_t(r.mode)), keep, data(o.weights),
                            ints(o.indices)});
  }
  void operator()(const op::Experts& o) {
    const auto& e = o.experts;
    const bool staged = !p().list;
    const Expert* list = !staged ? p().list : copies_ ? staging()->arrive(stream_, op_) : staging()->on_host(op_);
    call<Experts>(t().experts,
                  {data(o.x), rows(o.x), width(o.x), data(o.weights), ints(o.indices), width(o.weights), int64_t(e.count()),
                   e.hidden_of(0), list, p().experts.data(), e.shared.has_value(), e.shared ? e.hidden_of(e.count()) : 0,
                   p().output_gate, Activation(int32_t(e.activation)), o.add, precision(e.int8.has_value()), data(o.out)});
    if (staged && copies_) staging()->leave(stream_, op_);
  }
  void operator()(const op::Glu& o) {
    call<Glu>(t().glu, {Activation(int32_t(o.activation)), data(o.gate), data(o.up), size(o.gate)});
  }
  void operator()(const op::Copy& o) {
    stream_(t().copy(stream_.context(), data(o.out), data(o.x), size_t(size(o.x)) * sizeof(float)));
  }
  void operator()(const op::Scale& o) { call<Scale>(t().scale, {data(o.x), o.scale, size(o.x)}); }
  void operator()(const op::AddScaled& o) { call<AddScaled>(t().add_scaled, {data(o.x), data(o.out), o.scale, size(o.x)}); }
  void operator()(const op::Columns& o) {
    call<Columns>(t().columns, {data(o.x), rows(o.x), o.heads, width(o.x) / o.heads, width(o.out) / o.heads, o.from, o.to,
                                o.count, data(o.out)});
  }
  void operator()(const op::HeadLinear& o) {
    const int64_t heads = o.weights->heads();
    call<HeadLinear>(t().head_linear,
                     {data(o.x), rows(o.x), heads, width(o.x) / heads, width(o.out) / heads, p().weight, data(o.out)});
  }
  void operator()(const op::LastRows& o) { call<LastRows>(t().last_rows, {data(o.x), width(o.x), batch_.tokens, data(o.out)}); }
  void operator()(const op::Sample& o) {
    const Sampling& s = frame_.sampling;
    call<Sample>(t().sample,
                 {data(o.logits), rows(o.logits), width(o.logits), s.temperature, s.top_k, s.top_p, uniform_, ints(o.out)});
  }

  const Table& t() const { return stream_.table(); }
  const Prepared& p() const { return prepared_->ops[op_]; }

  Gpu& gpu_;
  Weights& weights_;
  Frame& frame_;
  Stream stream_;
  Room rows_, caches_, mask_, uniforms_;
  const double* uniform_ = nullptr;
  DeviceBatch batch_;
  std::map<const Sequence*, std::unique_ptr<KvCache>> own_;
  std::shared_ptr<const PreparedProgram> prepared_;
  bool copies_ = false;  // staged experts, in the run under way
  size_t op_ = 0;
  uint64_t seen_ = 0;
  // Of the latest run that was queued, and of the one that is recorded.
  std::vector<uint64_t> ran_, captured_;
  Graph* graph_ = nullptr;
  bool capturable_ = true;
};

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(Gpu& gpu) : gpu_(gpu), weights_(gpu), calibration_(cuda::calibration(gpu)) {}
  Device* memory() override { return &gpu_; }
  void prepare(const Program& program, size_t memory) override { weights_.prepare(program, memory); }
  std::unique_ptr<Executor> executor(Frame& frame) override { return std::make_unique<CudaExecutor>(gpu_, weights_, frame); }
  Calibration& calibration() override { return *calibration_; }

 private:
  Gpu& gpu_;
  Weights weights_;
  std::unique_ptr<Calibration> calibration_;
};

}  // namespace

Backend& backend() {
  static CudaBackend& found = *new CudaBackend(gpu());
  return found;
}

}  // namespace eac::cuda
