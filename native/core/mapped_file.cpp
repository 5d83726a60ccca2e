#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace eac {

std::shared_ptr<MappedFile> MappedFile::open(const std::string& path) {
  const auto fail = [&](const char* what) -> Error {
    return Error("FILE_NOT_FOUND", std::string(what) + " " + path + ": " + std::strerror(errno));
  };
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw fail("cannot open");
  struct stat st;
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    if (S_ISDIR(st.st_mode)) errno = EISDIR;
    const Error e = fail("cannot read");
    ::close(fd);
    throw e;
  }
  char* data = nullptr;
  if (st.st_size > 0) {
    void* p = mmap(nullptr, size_t(st.st_size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED) {
      const Error e = fail("cannot map");
      ::close(fd);
      throw e;
    }
    data = static_cast<char*>(p);
  }
  ::close(fd);
  return std::shared_ptr<MappedFile>(new MappedFile(data, size_t(st.st_size)));
}

MappedFile::~MappedFile() {
  if (data_) munmap(data_, size_);
}

void MappedFile::release(size_t begin, size_t end) const {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  begin = (begin + page - 1) / page * page;  // whole pages inside the range only
  end = (end < size_ ? end : size_) / page * page;
  if (data_ && begin < end) madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace eac
