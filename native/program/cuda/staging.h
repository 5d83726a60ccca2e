// Experts that stay in the host's memory: those of one layer are copied while the layers before it compute. Few tokens choose few of them: these are
// read where they lie, over the bus, each weight once.
#pragma once
#include <mutex>

#include "program/cuda/device.h"

namespace eac::cuda {

// One layer's experts: a block of pinned memory, and where each matrix lies in it.
struct HostExperts {
  size_t op = 0;  // its operation in the program
  std::shared_ptr<void> block;
  size_t bytes = 0;
  std::vector<Expert> experts;  // pointers into the block
};

// Two places on the device take turns. One copying run at a time: lock() first.
class Staging {
 public:
  Staging(Gpu& gpu, std::vector<HostExperts> layers);
  ~Staging();
  std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
  // Operations [from, to) are going to be queued on `s`: begins to copy.
  void start(const Stream& s, size_t from, size_t to);
  // The experts of `op`, for what is queued on `s` after this.
  const Expert* arrive(const Stream& s, size_t op);
  // What needed them has been queued: their place may be used again.
  void leave(const Stream& s, size_t op);
  // The experts of `op` in the host's memory, for any run.
  const Expert* on_host(size_t op) const { return host_lists_[layer_of(op)].get(); }

 private:
  struct Place {
    std::shared_ptr<void> memory;
    Event *copied = nullptr, *left = nullptr;
  };
  size_t layer_of(size_t op) const;
  void fetch();

  Gpu& gpu_;
  Stream copies_;
  std::mutex mutex_;
  std::vector<HostExperts> layers_;                // in the order of their operations
  std::vector<std::shared_ptr<Expert>> lists_[2];  // by layer, for each place
  std::vector<std::shared_ptr<Expert>> host_lists_;
  Place places_[2];
  size_t next_ = 0, end_ = 0;  // layers to copy
};

}  // namespace eac::cuda
