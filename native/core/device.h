// Memory that is not the host's. A Tensor names the device its data lie on; only code of that device follows the pointer.
#pragma once
#include <cstddef>
#include <memory>

namespace eac {

// One for each piece of hardware, for the life of the process. All functions wait until they are done and may be called from any thread.
class Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const = 0;
  // Zero-filled. Throws Error("OUT_OF_MEMORY") with the size.
  virtual std::shared_ptr<void> allocate(size_t bytes) = 0;
  virtual void to_host(void* host, const void* device, size_t bytes) = 0;
  virtual void from_host(void* device, const void* host, size_t bytes) = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;  // both on the device
};

}  // namespace eac
