// A CUDA library whose GPU has the trouble that FAKE names: for what becomes of a device that cannot be used.
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "kernels/cuda/table.h"

namespace eac::cuda {

struct Context {
  const char* error;
};

namespace {

bool has(std::string_view trouble) {
  const char* fake = std::getenv("FAKE");
  return fake && trouble == fake;
}

int32_t probe(char* why, size_t size) {
  std::snprintf(why, size, "%s", has("none") ? "no CUDA device" : "CUDA driver version is insufficient");
  return has("none") ? 0 : has("driver") ? -1 : 1;
}
Status open(int32_t, Context** context) {
  *context = new Context{has("memory") ? "creating a stream: out of memory" : "choosing the GPU: all devices are busy"};
  return has("memory") ? Status::out_of_memory : Status::failed;
}
void close(Context* c) { delete c; }
const char* error(const Context* c) { return c->error; }

Table made() {
  Table t{};
  t.version = has("version") ? table_version + 1 : table_version;
  t.bytes = sizeof(Table);
  t.probe = probe, t.open = open, t.close = close, t.error = error;
  return t;
}

}  // namespace
}  // namespace eac::cuda

const eac::cuda::Table* eac_moe_cuda() {
  static const eac::cuda::Table table = eac::cuda::made();
  return &table;
}
