// The one exception of the native code. `code` is a stable identifier that TypeScript turns into EacMoeError.code.
#pragma once
#include <stdexcept>
#include <string>

namespace eac {

struct Error : std::runtime_error {
  std::string code;
  Error(std::string code_, const std::string& message) : std::runtime_error(message), code(std::move(code_)) {}
};

inline void require(bool ok, const char* message) {
  if (!ok) throw Error("INVALID_ARGUMENT", message);
}

}  // namespace eac
