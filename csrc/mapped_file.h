// A read-only memory map of a window of a file, as the reader that torch's archive format takes.
#pragma once

#include <caffe2/serialize/read_adapter_interface.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

namespace pyserve {

class MappedFile : public caffe2::serialize::ReadAdapterInterface {
  public:
    MappedFile(const std::string& path, int64_t offset, int64_t size) {
        const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
        struct stat status {};
        fstat(fd, &status);
        if (size < 0) size = status.st_size - offset;
        if (offset < 0 || size <= 0 || offset > status.st_size - size) {
            close(fd);
            throw std::invalid_argument(path + " is shorter than the weights it should hold");
        }
        map_size_ = static_cast<size_t>(offset + size);
        void* map = mmap(nullptr, map_size_, PROT_READ, MAP_PRIVATE, fd, 0);
        const int error = errno;
        close(fd);
        if (map == MAP_FAILED) throw std::system_error(error, std::generic_category(), "mmap " + path);
        map_ = static_cast<const char*>(map);
        window_ = map_ + offset;
        window_size_ = static_cast<size_t>(size);
    }
    ~MappedFile() override { munmap(const_cast<char*>(map_), map_size_); }
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    size_t size() const override { return window_size_; }

    size_t read(uint64_t position, void* buffer, size_t count, const char* = "") const override {
        if (position >= window_size_) return 0;
        count = std::min(count, window_size_ - static_cast<size_t>(position));
        std::memcpy(buffer, window_ + position, count);
        return count;
    }

  private:
    const char* map_ = nullptr;
    size_t map_size_ = 0;
    const char* window_ = nullptr;
    size_t window_size_ = 0;
};

}  // namespace pyserve
