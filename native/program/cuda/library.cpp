#include "program/cuda/library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>

#include "core/error.h"

namespace eac::cuda {
namespace {

constexpr const char* file_name = "eac_moe_cuda.so";

const char* named() {
  const char* name = std::getenv("EAC_MOE_CUDA");
  return name && *name ? name : nullptr;
}

// Beside the addon, wherever that is (build/Release, build-cmake/Release, prebuilds/<platform>), or where `npm run build:cuda` puts it.
std::string find() {
  if (named()) return named();
  static const char here = 0;
  Dl_info info;
  std::string directory = dladdr(&here, &info) && info.dli_fname ? info.dli_fname : "";
  directory.resize(directory.rfind('/') == std::string::npos ? 0 : directory.rfind('/') + 1);
  const std::string built = directory + "../../build/Release/" + file_name;
  return access((directory + file_name).c_str(), R_OK) != 0 && access(built.c_str(), R_OK) == 0 ? built : directory + file_name;
}

const Table& open() {
  const std::string path = find();
  if (access(path.c_str(), R_OK) != 0)
    throw Error(named() ? "FILE_NOT_FOUND" : "INVALID_ARGUMENT",
                "there is no CUDA library at " + path +
                    (named() ? ", which EAC_MOE_CUDA names" : " (npm run build:cuda makes it where nvcc is)"));
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* error = dlerror();
    throw Error("DEVICE", std::string("the CUDA library does not open: ") + (error ? error : path.c_str()));
  }
  const auto entry = reinterpret_cast<const Table* (*)()>(dlsym(handle, "eac_moe_cuda"));
  if (!entry) throw Error("DEVICE", path + " is not the CUDA library of eac-moe");
  const Table* table = entry();
  if (table->version != table_version || table->bytes != sizeof(Table))
    throw Error("DEVICE", path + " is of another version of eac-moe; build it again (npm run build:cuda)");
  char why[256] = "";
  const int32_t devices = table->probe(why, sizeof why);
  if (devices == 0) throw Error("INVALID_ARGUMENT", std::string("there is no GPU: ") + why);
  if (devices < 0) throw Error("DEVICE", std::string("no GPU answers: ") + why);
  return *table;
}

}  // namespace

const Table& library() {
  static const Table& found = open();
  return found;
}

void check(const Table& table, const Context* context, Status status) {
  if (status == Status::ok) return;
  const char* code = "DEVICE";
  switch (status) {
    case Status::out_of_memory: code = "OUT_OF_MEMORY"; break;
    case Status::not_positive_definite: code = "NOT_POSITIVE_DEFINITE"; break;
    case Status::non_finite: code = "NON_FINITE"; break;
    case Status::invalid_argument: code = "INVALID_ARGUMENT"; break;
    case Status::ok:
    case Status::failed: break;
  }
  throw Error(code, context ? table.error(context) : "the GPU does not answer");
}

}  // namespace eac::cuda
