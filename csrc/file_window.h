// A window of a file, as the reader that torch's archive format takes. The file stays open: it may be read again later,
// as long as it is the one that it was.
#pragma once

#include <caffe2/serialize/read_adapter_interface.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>

namespace pyserve {

class FileWindow : public caffe2::serialize::ReadAdapterInterface {
  public:
    FileWindow(const std::string& path, int64_t offset, int64_t size) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), path);
        first_ = status();
        if (size < 0) size = first_.st_size - offset;
        if (offset < 0 || size <= 0 || offset > first_.st_size - size) {
            close(fd_);
            throw std::invalid_argument(path + " is shorter than the weights it should hold");
        }
        offset_ = offset;
        size_ = static_cast<size_t>(size);
    }
    ~FileWindow() override { close(fd_); }
    FileWindow(const FileWindow&) = delete;
    FileWindow& operator=(const FileWindow&) = delete;

    size_t size() const override { return size_; }

    // Not through a map: a file that is cut short meanwhile would end the process.
    size_t read(uint64_t position, void* buffer, size_t count, const char* = "") const override {
        if (position >= size_) return 0;
        count = std::min(count, size_ - static_cast<size_t>(position));
        size_t done = 0;
        while (done < count) {
            const auto at = offset_ + static_cast<int64_t>(position + done);
            const ssize_t got = pread(fd_, static_cast<char*>(buffer) + done, count - done, at);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) break;
            done += static_cast<size_t>(got);
        }
        return done;
    }

    // Throws if somebody has written to the file since it was opened: what is read now may not be what was.
    void check_unchanged() const {
        const struct stat now = status();
        if (now.st_size != first_.st_size || now.st_mtim.tv_sec != first_.st_mtim.tv_sec ||
            now.st_mtim.tv_nsec != first_.st_mtim.tv_nsec) {
            throw std::runtime_error(
                "the model has to be read from its file again, which was overwritten since it was loaded; register the "
                "model again");
        }
    }

  private:
    struct stat status() const {
        struct stat found{};
        if (fstat(fd_, &found) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
        return found;
    }

    const int fd_;
    struct stat first_{};
    int64_t offset_ = 0;
    size_t size_ = 0;
};

}  // namespace pyserve
