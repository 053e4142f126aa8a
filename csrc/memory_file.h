// Bodies in memory files, which both ends of the wire to a worker process reach with pread and pwrite: a file that the
// other end cuts short gives a short read, not a signal.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string_view>
#include <system_error>

namespace pyserve {

// A descriptor of our own. Throws std::system_error.
inline int duplicate(int fd) {
    const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (copy < 0) throw std::system_error(errno, std::generic_category(), "a worker's descriptor");
    return copy;
}

// A descriptor that is closed with its owner.
class Descriptor {
  public:
    explicit Descriptor(int of) : fd_(duplicate(of)) {}
    ~Descriptor() { close(fd_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    operator int() const noexcept { return fd_; }

  private:
    const int fd_;
};

// False if not all could be written.
inline bool write_at(int fd, std::string_view bytes, uint64_t offset) {
    while (!bytes.empty()) {
        const ssize_t written = pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return false;
        bytes.remove_prefix(static_cast<size_t>(written));
        offset += static_cast<uint64_t>(written);
    }
    return true;
}

// False if there are not as many bytes.
inline bool read_at(int fd, char* to, uint64_t size, uint64_t offset) {
    while (size > 0) {
        const ssize_t got = pread(fd, to, size, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        to += got;
        size -= static_cast<uint64_t>(got);
        offset += static_cast<uint64_t>(got);
    }
    return true;
}

// Gives back the pages from `kept` to `high`.
inline void punch(int fd, uint64_t high, uint64_t kept) {
    if (high > kept)
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(kept),
                  static_cast<off_t>(high - kept));
}

}  // namespace pyserve
