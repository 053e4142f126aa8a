// Names for requests that have none. Standard library and Linux only; no Python.
#pragma once

#include <sys/random.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <stdexcept>

namespace pyserve {

// Random texts as UUIDs of version 4, as `request.ids` makes them.
class RequestIds {
  public:
    static constexpr size_t size = 36;

    void put(char* to) {
        if (next_ + bytes_each > random_.size()) fill();
        unsigned char* bytes = random_.data() + next_;
        next_ += bytes_each;
        bytes[6] = static_cast<unsigned char>((bytes[6] & 0x0f) | 0x40);
        bytes[8] = static_cast<unsigned char>((bytes[8] & 0x3f) | 0x80);
        constexpr char digits[] = "0123456789abcdef";
        for (size_t i = 0; i < bytes_each; ++i) {
            if (i == 4 || i == 6 || i == 8 || i == 10) *to++ = '-';
            *to++ = digits[bytes[i] >> 4];
            *to++ = digits[bytes[i] & 15];
        }
    }
    // A forked child must not repeat its parent's ids.
    void forget() { next_ = random_.size(); }

  private:
    static constexpr size_t bytes_each = 16;

    void fill() {
        for (size_t at = 0; at < random_.size();) {
            const ssize_t got = getrandom(random_.data() + at, random_.size() - at, 0);
            if (got < 0 && errno != EINTR) throw std::runtime_error("the system gives no random bytes");
            if (got > 0) at += static_cast<size_t>(got);
        }
        next_ = 0;
    }

    std::array<unsigned char, 256 * bytes_each> random_;
    size_t next_ = sizeof random_;
};

}  // namespace pyserve
