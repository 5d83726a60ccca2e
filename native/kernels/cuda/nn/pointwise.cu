// Operations whose bound is memory: each element is read and written once.
#include "kernels/cuda/nn/pointwise.cuh"

namespace eac::cuda {
namespace {

__global__ void embed_kernel(Embed e) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= e.rows * e.width) return;
  const int64_t row = e.ids[i / e.width];
  e.out[i] = load_float(e.storage, e.table, row * e.width + i % e.width) * e.scale;
}

__global__ void glu_kernel(Glu g) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < g.n) g.gate[i] = glu_value(g.activation, g.gate[i], g.up[i]);
}

__global__ void scale_kernel(Scale s) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < s.n) s.x[i] *= s.scale;
}

__global__ void add_scaled_kernel(AddScaled a) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < a.n) a.out[i] += a.scale * a.x[i];
}

__global__ void columns_kernel(Columns c) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= c.rows * c.heads * c.count) return;
  const int64_t head = i / c.count, column = i % c.count;  // head: of all rows
  c.out[head * c.out_width + c.to + column] = c.x[head * c.x_width + c.from + column];
}

__global__ void last_rows_kernel(LastRows l) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= l.batch.sequences * l.width) return;
  const int64_t s = i / l.width, row = l.batch.begin[s] + l.batch.length[s] - 1;
  l.out[i] = l.x[row * l.width + i % l.width];
}

__global__ void gather_rows_kernel(GatherRows g) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < g.rows * g.width) g.out[i] = g.x[int64_t(g.indices[i / g.width]) * g.width + i % g.width];
}

}  // namespace

void embed(Context& c, const Embed& e) { launch<embed_kernel>(c, per_element(e.rows * e.width), e); }
void glu(Context& c, const Glu& g) { launch<glu_kernel>(c, per_element(g.n), g); }
void scale(Context& c, const Scale& s) { launch<scale_kernel>(c, per_element(s.n), s); }
void add_scaled(Context& c, const AddScaled& a) { launch<add_scaled_kernel>(c, per_element(a.n), a); }
void columns(Context& c, const Columns& a) { launch<columns_kernel>(c, per_element(a.rows * a.heads * a.count), a); }
void last_rows(Context& c, const LastRows& l) { launch<last_rows_kernel>(c, per_element(l.batch.sequences * l.width), l); }
void gather_rows(Context& c, const GatherRows& g) { launch<gather_rows_kernel>(c, per_element(g.rows * g.width), g); }

}  // namespace eac::cuda
