// Who runs the operations of a program, and where. A backend implements every operation of ops.h; program and frame know no other difference.
#pragma once
#include <cstddef>
#include <memory>

#include "core/device.h"

namespace eac {

class Calibration;
class Frame;
struct Program;

// Runs one frame's operations.
class Executor {
 public:
  virtual ~Executor() = default;
  // Operations [from, to), in order; returns when their results are in the registers. Polls for cancellation.
  virtual void run(size_t from, size_t to) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  // Where registers and caches lie; null: the host.
  virtual Device* memory() = 0;
  // Brings the weights into the form and the place that the operations want. Done by the first run otherwise. memory: bytes of the device's
  // memory that they may take, 0: what is free.
  virtual void prepare(const Program& program, size_t memory) = 0;
  virtual std::unique_ptr<Executor> executor(Frame& frame) = 0;
  virtual Calibration& calibration() = 0;
};

Backend& cpu_backend();

}  // namespace eac
