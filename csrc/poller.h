// The descriptors that the loop waits for, behind one: an epoll instance, which the event loop of Python polls as if it
// were a socket.
//
// Threads: loop thread only.
#pragma once

#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

namespace pyserve {

// Something that a descriptor belongs to.
class Watched {
  public:
    virtual ~Watched() = default;
    // `events` as of epoll. Must not destroy a Watched.
    virtual void on_ready(uint32_t events) noexcept = 0;
};

class Poller {
  public:
    Poller() : fd_(epoll_create1(EPOLL_CLOEXEC)) {
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "epoll");
    }
    ~Poller() { close(fd_); }
    Poller(const Poller&) = delete;
    Poller& operator=(const Poller&) = delete;

    // Readable whenever run_ready() has something to do.
    int fd() const noexcept { return fd_; }
    // Whether run_ready() is under way: what is completed now is drained right after it.
    bool is_running() const noexcept { return is_running_; }

    void add(int fd, Watched& watched) {
        if (set(EPOLL_CTL_ADD, fd, &watched, EPOLLIN) != 0)
            throw std::system_error(errno, std::generic_category(), "epoll_ctl");
    }
    // REQUIRES: it was added.
    void change(int fd, Watched& watched, uint32_t events) noexcept { set(EPOLL_CTL_MOD, fd, &watched, events); }
    void remove(int fd) noexcept { set(EPOLL_CTL_DEL, fd, nullptr, 0); }

    // Calls on_ready of what is ready; what is left over makes fd() readable again.
    void run_ready() noexcept {
        epoll_event events[events_max];
        const int count = epoll_wait(fd_, events, events_max, 0);
        is_running_ = true;
        for (int i = 0; i < count; ++i) static_cast<Watched*>(events[i].data.ptr)->on_ready(events[i].events);
        is_running_ = false;
    }

  private:
    static constexpr int events_max = 64;

    int set(int operation, int fd, Watched* watched, uint32_t events) noexcept {
        epoll_event event{};
        event.events = events;
        event.data.ptr = watched;
        return epoll_ctl(fd_, operation, fd, &event);
    }

    const int fd_;
    bool is_running_ = false;
};

}  // namespace pyserve
