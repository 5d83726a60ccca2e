// The table of table.h: every function sets the device, and what it throws becomes a status and a message.
#include <cstdio>
#include <new>

#include "kernels/cuda/context.cuh"

namespace eac::cuda {
namespace {

template <class F> Status guarded(Context* c, F body) {
  try {
    check(cudaSetDevice(c->device), "choosing the GPU");
    body();
    return Status::ok;
  } catch (const Failure& f) {
    size_t free = 0, total = 0;
    // Some errors, as of an illegal memory access, stay as long as the process.
    const bool lost = f.status == Status::failed && c->stream && cudaMemGetInfo(&free, &total) != cudaSuccess;
    c->error = f.message + (lost ? "; this process cannot use the GPU any more" : "");
    return f.status;
  } catch (const std::bad_alloc&) {
    c->error = "out of memory";
    return Status::out_of_memory;
  } catch (const std::exception& e) {
    c->error = e.what();
    return Status::failed;
  }
}

template <class Arguments, void (*f)(Context&, const Arguments&)> Status run(Context* c, const Arguments* a) {
  return guarded(c, [&] { f(*c, *a); });
}

int32_t probe(char* why, size_t size) {
  int count = 0, driver = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  (void)cudaGetLastError();
  (void)cudaDriverGetVersion(&driver);  // 0: none is installed, which cudaGetDeviceCount takes for one that is too old
  const char* const error = status == cudaSuccess ? "no CUDA device" : cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver && driver > 0)
    std::snprintf(why, size, "%s (the driver is of CUDA %d.%d; update it)", error, driver / 1000, driver % 1000 / 10);
  else
    std::snprintf(why, size, "%s", driver == 0 ? "no NVIDIA driver" : error);
  return driver == 0 || status == cudaSuccess || status == cudaErrorNoDevice ? 0 : -1;
}

Status describe(int32_t device, DeviceInfo* info) {
  cudaDeviceProp p;
  size_t free = 0, total = 0;
  if (cudaGetDeviceProperties(&p, device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess ||
      cudaMemGetInfo(&free, &total) != cudaSuccess) {
    (void)cudaGetLastError();
    return Status::failed;
  }
  std::snprintf(info->name, sizeof info->name, "%s", p.name);
  info->major = p.major, info->minor = p.minor;
  info->multiprocessors = p.multiProcessorCount;
  info->total_memory = int64_t(total), info->free_memory = int64_t(free);
  return Status::ok;
}

Status open(int32_t device, Context** context) {
  *context = nullptr;
  Context* c = new (std::nothrow) Context;
  if (!c) return Status::out_of_memory;
  c->device = device;
  *context = c;  // also on failure: it holds the message
  return guarded(c, [&] {
    check(cudaDeviceGetAttribute(&c->multiprocessors, cudaDevAttrMultiProcessorCount, device), "opening the GPU");
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "opening the GPU");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "opening the GPU");
    if (major < 8)
      throw Failure{Status::failed, "it has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                                        "; 8.0 or newer is needed"};
    check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "creating a stream");
    find_features(*c);
  });
}

void close(Context* c) {
  if (cudaSetDevice(c->device) == cudaSuccess && c->stream) {
    cudaStreamSynchronize(c->stream);
    cudaStreamDestroy(c->stream);
  }
  delete c;
}

const char* error(const Context* c) { return c->error.c_str(); }

Status synchronize(Context* c) {
  return guarded(c, [&] { check(cudaStreamSynchronize(stream_of(*c)), "running on the GPU"); });
}

Status allocate(Context* c, size_t bytes, void** memory) {
  return guarded(c, [&] { check_allocation(cudaMalloc(memory, bytes), bytes, "on the GPU"); });
}
void free_memory(void* memory) { cudaFree(memory); }
Status allocate_host(Context* c, size_t bytes, void** memory) {
  return guarded(c, [&] { check_allocation(cudaMallocHost(memory, bytes), bytes, "of pinned memory"); });
}
void free_host(void* memory) { cudaFreeHost(memory); }
Status upload(Context* c, void* to, const void* from, size_t bytes) {
  return guarded(c,
                 [&] { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(*c)), "copying to the GPU"); });
}
Status download(Context* c, void* to, const void* from, size_t bytes) {
  return guarded(c, [&] {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(*c)), "copying from the GPU");
    check(cudaStreamSynchronize(stream_of(*c)), "running on the GPU");
  });
}
Status copy(Context* c, void* to, const void* from, size_t bytes) {
  return guarded(c,
                 [&] { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(*c)), "copying on the GPU"); });
}
Status zero(Context* c, void* memory, size_t bytes) {
  return guarded(c, [&] { check(cudaMemsetAsync(memory, 0, bytes, stream_of(*c)), "clearing memory of the GPU"); });
}

Status begin_capture(Context* c) {
  return guarded(c, [&] {
    check(cudaStreamBeginCapture(stream_of(*c), cudaStreamCaptureModeThreadLocal), "capturing a sequence of launches");
  });
}
Status end_capture(Context* c, Graph** graph) {
  return guarded(c, [&] {
    cudaGraph_t captured;
    check(cudaStreamEndCapture(stream_of(*c), &captured), "capturing a sequence of launches");
    cudaGraphExec_t launches = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&launches, captured, 0);
    cudaGraphDestroy(captured);
    check(status, "instantiating a graph");
    *graph = new Graph{launches};
  });
}
Status launch_graph(Context* c, Graph* graph) {
  return guarded(c, [&] { check(cudaGraphLaunch(graph->launches, stream_of(*c)), "launching a graph"); });
}
void free_graph(Graph* graph) {
  cudaGraphExecDestroy(graph->launches);
  delete graph;
}

Status trim(Context* c) {
  return guarded(c, [&] {
    for (Scratch& s : c->scratch) s.release();
  });
}
uint64_t scratch_moves(const Context* c) {
  uint64_t moves = 0;
  for (const Scratch& s : c->scratch) moves += s.moves();
  return moves;
}

Status record(Context* c, Event** event) {
  return guarded(c, [&] {
    if (!*event) {
      cudaEvent_t made = nullptr;
      check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "creating an event");
      *event = new Event{made};
    }
    check(cudaEventRecord((*event)->event, stream_of(*c)), "recording an event");
  });
}
Status wait(Context* c, Event* event) {
  return guarded(c, [&] { check(cudaStreamWaitEvent(stream_of(*c), event->event, 0), "waiting for an event"); });
}
void free_event(Event* event) {
  cudaEventDestroy(event->event);
  delete event;
}

const Table table = {
    .version = table_version,
    .bytes = sizeof(Table),
    .probe = probe,
    .describe = describe,
    .open = open,
    .close = close,
    .error = error,
    .synchronize = synchronize,
    .allocate = allocate,
    .free = free_memory,
    .allocate_host = allocate_host,
    .free_host = free_host,
    .upload = upload,
    .download = download,
    .copy = copy,
    .zero = zero,
    .begin_capture = begin_capture,
    .end_capture = end_capture,
    .launch = launch_graph,
    .free_graph = free_graph,
    .trim = trim,
    .scratch_moves = scratch_moves,
    .record = record,
    .wait = wait,
    .free_event = free_event,
    .embed = run<Embed, embed>,
    .norm = run<Norm, norm>,
    .linear = run<Linear, linear>,
    .head_linear = run<HeadLinear, head_linear>,
    .rope = run<Rope, rope>,
    .attention = run<Attention, attention>,
    .route = run<Route, route>,
    .prune = run<Prune, prune>,
    .pesf_mask = run<PesfMask, pesf_mask>,
    .experts = run<Experts, experts>,
    .glu = run<Glu, glu>,
    .scale = run<Scale, scale>,
    .add_scaled = run<AddScaled, add_scaled>,
    .columns = run<Columns, columns>,
    .last_rows = run<LastRows, last_rows>,
    .gather_rows = run<GatherRows, gather_rows>,
    .sample = run<Sample, sample>,
    .weight_bytes = weight_bytes,
    .pack_weight = run<PackWeight, pack_weight>,
    .hessian = run<Hessian, hessian>,
    .cross = run<Cross, cross>,
    .factor = run<Factor, factor>,
    .two_stream = run<TwoStream, two_stream>,
    .quantize = run<Quantize, quantize>,
    .calibrate_router = run<CalibrateRouter, calibrate_router>,
};

}  // namespace
}  // namespace eac::cuda

extern "C" __attribute__((visibility("default"))) const eac::cuda::Table* eac_moe_cuda() { return &eac::cuda::table; }
