// Programs and frames: parsing the operation list of types/native.d.ts, and running it.
#include "addon/handles.h"

namespace eac::addon {
namespace {

#define GUARDED(expression) return guarded(info.Env(), [&]() -> Napi::Value { expression; })

struct Reader {
  const Napi::Object& o;

  op::Register reg(const char* key) const { return op::Register(number_from(o, key)); }
  int64_t integer(const char* key) const { return int64_t(number_from(o, key)); }
  float real(const char* key) const { return float(number_from(o, key)); }
  bool has(const char* key) const {
    const Napi::Value v = o.Get(key);
    return !v.IsUndefined() && !v.IsNull();
  }
  std::string text(const char* key) const { return o.Get(key).ToString(); }
  Tensor tensor(const char* key) const { return *float_matrix_from(o.Get(key), key); }
  std::vector<float> floats(const char* key) const { return elements(tensor(key)); }
  std::vector<Matrix> matrices(const char* key) const {
    return list<Matrix>(key, "matrices", [key](const Napi::Value& v) { return matrix_from(v, key); });
  }
  std::vector<Tensor> tensors(const char* key) const {
    return list<Tensor>(key, "tensors", [key](const Napi::Value& v) { return *float_matrix_from(v, key); });
  }
  template <class T, class F> std::vector<T> list(const char* key, const char* of, F from) const {
    if (!o.Get(key).IsArray()) throw_invalid(std::string("expected an array of ") + of + " for " + key);
    const Napi::Array a = o.Get(key).As<Napi::Array>();
    std::vector<T> items;
    for (uint32_t i = 0; i < a.Length(); i++) items.push_back(from(a.Get(i)));
    return items;
  }
  Activation activation() const {
    const std::string name = text("activation");
    if (name == "silu") return Activation::silu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu-tanh") return Activation::gelu_tanh;
    if (name == "relu") return Activation::relu;
    if (name == "clamped-swiglu") return Activation::clamped_swiglu;
    throw_invalid("unknown activation " + name);
  }
  RouterSpec router(int64_t experts) const {
    const Napi::Object r = o.Get("router").As<Napi::Object>();
    RouterSpec s;
    const std::string scoring = r.Get("scoring").ToString();
    if (scoring == "sigmoid")
      s.scoring = Scoring::sigmoid;
    else if (scoring == "sparse-mixer")
      s.scoring = Scoring::sparse_mixer;
    else if (scoring != "softmax")
      throw_invalid("unknown router scoring " + scoring);
    if (const Reader o{r}; o.has("correction")) s.correction = o.floats("correction");
    if (Reader{r}.has("groups")) {
      const Napi::Object g = r.Get("groups").As<Napi::Object>();
      s.groups = int64_t(number_from(g, "count"));
      s.top_groups = int64_t(number_from(g, "top"));
      s.group_best = int64_t(number_from(g, "best"));
    }
    s.experts = experts;
    s.top_k = int64_t(number_from(r, "topK"));
    s.renormalize = bool_from(r, "renormalize");
    s.scale = float(number_from(r, "scale"));
    s.jitter = float(number_from(r, "jitter"));
    return s;
  }
};

SharedExpert shared_expert_from(const Napi::Object& o) {
  SharedExpert s{matrix_from(o.Get("gate"), "shared.gate"), matrix_from(o.Get("up"), "shared.up"),
                 matrix_from(o.Get("down"), "shared.down"), std::nullopt};
  if (Reader{o}.has("outputGate")) s.output_gate = matrix_from(o.Get("outputGate"), "shared.outputGate");
  return s;
}

op::Op op_from(const Napi::Object& object, const std::vector<RegisterSpec>& registers) {
  const Reader r{object};
  const std::string name = r.text("op");
  const auto experts = [&] {
    const op::Register logits = r.reg("logits");
    return logits >= 0 && size_t(logits) < registers.size() ? registers[size_t(logits)].width : 0;
  };
  if (name == "embed") return op::Embed{r.reg("out"), r.tensor("table"), r.real("scale")};
  if (name == "rmsNorm") return op::RmsNorm{r.reg("x"), r.reg("out"), r.tensor("weight"), r.real("eps")};
  if (name == "layerNorm") return op::LayerNorm{r.reg("x"), r.reg("out"), r.tensor("weight"), r.tensor("bias"), r.real("eps")};
  if (name == "linear") {
    op::Linear l{r.reg("x"), r.reg("out"), matrix_from(object.Get("weight"), "weight"), std::nullopt, bool_from(object, "add")};
    if (r.has("bias")) l.bias = r.tensor("bias");
    return l;
  }
  if (name == "rope") {
    Rope rope;
    rope.head_dim = r.integer("headDim");
    if (r.has("offset")) rope.offset = r.integer("offset");
    rope.frequencies = r.floats("frequencies");
    rope.scale = r.real("scale");
    rope.interleaved = bool_from(object, "interleaved");
    if (r.has("longFrequencies")) {
      rope.long_frequencies = r.floats("longFrequencies");
      rope.long_scale = r.real("longScale");
      rope.long_from = r.integer("longFrom");
    }
    return op::Rope{r.reg("x"), std::move(rope)};
  }
  if (name == "attention") {
    Attention a;
    a.layer = r.integer("layer");
    a.heads = r.integer("heads");
    a.kv_heads = r.integer("kvHeads");
    a.head_dim = r.integer("headDim");
    if (r.has("valueDim")) a.value_dim = r.integer("valueDim");
    if (r.has("sinks")) a.sinks = r.floats("sinks");
    a.window = r.integer("window");
    a.scale = r.real("scale");
    return op::Attention{r.reg("q"), r.reg("k"), r.reg("v"), r.reg("out"), a};
  }
  if (name == "route")
    return op::Route{r.reg("logits"), r.reg("weights"), r.reg("indices"), r.reg("counts"), r.router(experts())};
  if (name == "reselect")
    return op::Reselect{r.reg("logits"), r.reg("weights"), r.reg("indices"), r.reg("counts"), r.router(experts())};
  if (name == "experts") {
    std::optional<SharedExpert> shared;
    if (r.has("shared")) shared = shared_expert_from(object.Get("shared").As<Napi::Object>());
    std::optional<ExpertBiases> biases;
    if (r.has("biases")) {
      const Napi::Object b = object.Get("biases").As<Napi::Object>();
      biases = ExpertBiases{Reader{b}.tensors("gate"), Reader{b}.tensors("up"), Reader{b}.tensors("down")};
    }
    Experts e(r.matrices("gate"), r.matrices("up"), r.matrices("down"), r.activation(), std::move(shared), std::move(biases));
    return op::Experts{r.reg("x"), r.reg("weights"), r.reg("indices"), r.reg("out"), std::move(e), bool_from(object, "add")};
  }
  if (name == "glu") return op::Glu{r.reg("gate"), r.reg("up"), r.activation()};
  if (name == "copy") return op::Copy{r.reg("x"), r.reg("out")};
  if (name == "scale") return op::Scale{r.reg("x"), r.real("scale")};
  if (name == "addScaled") return op::AddScaled{r.reg("x"), r.reg("out"), r.real("scale")};
  if (name == "columns")
    return op::Columns{r.reg("x"), r.reg("out"), r.integer("heads"), r.integer("from"), r.integer("to"), r.integer("count")};
  if (name == "headLinear")
    return op::HeadLinear{
        r.reg("x"), r.reg("out"),
        std::make_shared<const HeadWeights>(matrix_from(object.Get("weight"), "weight"), r.integer("heads"), r.integer("begin"),
                                            r.integer("count"), bool_from(object, "transposed"))};
  if (name == "lastRows") return op::LastRows{r.reg("x"), r.reg("out")};
  if (name == "sample") return op::Sample{r.reg("logits"), r.reg("out")};
  throw_invalid("unknown operation " + name);
}

std::vector<Sequence> sequences_from(const Napi::Value& v) {
  if (!v.IsArray()) throw_invalid("expected an array of sequences");
  Napi::Array a = v.As<Napi::Array>();
  std::vector<Sequence> sequences;
  for (uint32_t i = 0; i < a.Length(); i++) {
    const Napi::Object o = a.Get(i).As<Napi::Object>();
    Sequence s;
    s.length = int64_t(number_from(o, "length"));
    const Napi::Value cache = o.Get("cache");
    if (!cache.IsUndefined() && !cache.IsNull()) s.cache = KvCacheHandle::from(cache, "cache");
    sequences.push_back(std::move(s));
  }
  return sequences;
}

}  // namespace

std::shared_ptr<Program> program_from(const Napi::Value& registers, const Napi::Value& ops, Backend& backend) {
  if (!registers.IsArray() || !ops.IsArray()) throw_invalid("expected arrays of registers and operations");
  auto program = std::make_shared<Program>();
  Napi::Array rs = registers.As<Napi::Array>();
  for (uint32_t i = 0; i < rs.Length(); i++) {
    const Napi::Object o = rs.Get(i).As<Napi::Object>();
    program->registers.push_back(
        {int64_t(number_from(o, "width")), dtype_from(o.Get("dtype")), std::string(o.Get("rows").ToString()) == "sequences"});
  }
  Napi::Array os = ops.As<Napi::Array>();
  for (uint32_t i = 0; i < os.Length(); i++) {
    Napi::HandleScope scope(registers.Env());
    program->ops.push_back(op_from(os.Get(i).As<Napi::Object>(), program->registers));
  }
  program->backend = &backend;
  program->check();
  return program;
}

void ProgramHandle::define(Napi::Env env, Napi::Object exports) {
  Napi::Function f =
      DefineClass(env, class_name,
                  {InstanceAccessor<&ProgramHandle::length>("length"), InstanceMethod<&ProgramHandle::prepare>("prepare"),
                   InstanceMethod("dispose", &ProgramHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}
Napi::Value ProgramHandle::length(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(get()->ops.size())));
}

Napi::Value ProgramHandle::prepare(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto program = get();
    const double memory = info[1].IsNumber() ? info[1].As<Napi::Number>().DoubleValue() : 0;
    return Job<bool>::start(
        info.Env(), info[0],
        [program, memory] {
          program->backend->prepare(*program, size_t(memory));
          return true;
        },
        [](Napi::Env env, bool&) { return env.Undefined(); });
  });
}

void FrameHandle::define(Napi::Env env, Napi::Object exports) {
  Napi::Function f = DefineClass(
      env, class_name,
      {InstanceMethod<&FrameHandle::begin>("begin"), InstanceMethod<&FrameHandle::bind>("bind"),
       InstanceMethod<&FrameHandle::set_pruning>("setPruning"), InstanceMethod<&FrameHandle::set_activations>("setActivations"),
       InstanceMethod<&FrameHandle::set_sampling>("setSampling"), InstanceMethod<&FrameHandle::run>("run"),
       InstanceMethod<&FrameHandle::commit>("commit"), InstanceMethod<&FrameHandle::read>("read"),
       InstanceMethod<&FrameHandle::tensor>("tensor"), InstanceMethod("dispose", &FrameHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}

// The frame, which nothing may touch while it runs.
std::shared_ptr<Frame> FrameHandle::idle() const {
  auto frame = get();
  if (frame->busy.load()) throw_invalid("this frame is running");
  return frame;
}

Napi::Value FrameHandle::begin(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    std::vector<int32_t> ids;
    if (!info[0].IsNull() && !info[0].IsUndefined()) ids = i32_from(info[0], "ids");
    idle()->begin(std::move(ids), sequences_from(info[1]));
    return info.Env().Undefined();
  });
}
Napi::Value FrameHandle::bind(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    std::optional<Tensor> memory;
    if (!info[1].IsNull() && !info[1].IsUndefined()) memory = *TensorHandle::from(info[1], "tensor");
    idle()->bind(op::Register(info[0].ToNumber().Int32Value()), std::move(memory));
    return info.Env().Undefined();
  });
}
Napi::Value FrameHandle::set_activations(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    idle()->activations = activations_from(info[0]);
    return info.Env().Undefined();
  });
}
namespace {
PruneMode prune_mode_from(const Napi::Value& v) {
  const std::string mode = v.ToString();
  if (mode == "drop") return PruneMode::drop;
  if (mode == "renormalize") return PruneMode::renormalize;
  if (mode == "reselect") return PruneMode::reselect;
  throw_invalid("unknown pruning mode " + mode);
}
}  // namespace

Napi::Value FrameHandle::set_pruning(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    Pruning pruning;
    if (!info[0].IsNull() && !info[0].IsUndefined()) {
      const Napi::Object o = info[0].As<Napi::Object>();
      pruning.mode = prune_mode_from(o.Get("mode"));
      if (Reader{o}.has("alpha")) {
        pruning.alpha = number_from(o, "alpha");
        pruning.min_tokens = int64_t(number_from(o, "minTokens"));
      } else {
        const Napi::Value mask = o.Get("mask");
        if (!mask.IsTypedArray() || mask.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
          throw_invalid("expected a Uint8Array for mask");
        const auto a = mask.As<Napi::Uint8Array>();
        pruning.keep.assign(a.Data(), a.Data() + a.ElementLength());
      }
    }
    idle()->pruning = std::move(pruning);
    return info.Env().Undefined();
  });
}
Napi::Value FrameHandle::set_sampling(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Object o = info[0].As<Napi::Object>();
    Sampling s{float(number_from(o, "temperature")), int64_t(number_from(o, "topK")), number_from(o, "topP"), {}};
    const auto u = o.Get("uniform").As<Napi::Float64Array>();
    s.uniform.assign(u.Data(), u.Data() + u.ElementLength());
    idle()->sampling = std::move(s);
    return info.Env().Undefined();
  });
}
Napi::Value FrameHandle::run(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    auto frame = idle();
    const size_t from = size_t(info[0].ToNumber().Int64Value()), to = size_t(info[1].ToNumber().Int64Value());
    frame->busy.store(true);
    return Job<bool>::start(
        info.Env(), info[2],
        [frame, from, to] {
          struct Idle {
            Frame& f;
            ~Idle() { f.busy.store(false); }
          } idle{*frame};
          frame->run(from, to);
          return true;
        },
        [frame](Napi::Env env, bool&) { return env.Undefined(); });
  });
}
Napi::Value FrameHandle::commit(const Napi::CallbackInfo& info) { GUARDED(idle()->commit(); return info.Env().Undefined()); }
Napi::Value FrameHandle::read(const Napi::CallbackInfo& info) {
  GUARDED(return to_js_array(info.Env(), idle()->tensor(op::Register(info[0].ToNumber().Int32Value()))));
}
Napi::Value FrameHandle::tensor(const Napi::CallbackInfo& info) {
  GUARDED(return wrap_tensor(info.Env(), idle()->tensor(op::Register(info[0].ToNumber().Int32Value()))));
}

}  // namespace eac::addon
