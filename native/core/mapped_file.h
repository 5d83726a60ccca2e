// A read-only file in memory. Private and writable, so that a stray write through a JavaScript view cannot fault nor reach the file.
#pragma once
#include <memory>
#include <string>

#include "core/tensor.h"

namespace eac {

class MappedFile {
 public:
  static std::shared_ptr<MappedFile> open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;

  size_t size() const { return size_; }
  char* data() const { return data_; }
  // Drops the pages of [begin, end) from resident memory; the next access reads them again.
  void release(size_t begin, size_t end) const;

 private:
  MappedFile(char* data, size_t size) : data_(data), size_(size) {}
  char* data_;
  size_t size_;
};

}  // namespace eac
