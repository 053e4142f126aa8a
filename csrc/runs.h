// The runs of a network on one thread, and how another thread ends one.
//
// A run cannot be ended from outside, but it can be made to raise: a signal to its thread, whose handler sees to it that
// the thread's next operator raises (interrupt.cpp). Between two runs the signal does nothing: it names the run that it
// is meant for, and the handler, on the thread itself, compares. A loop that calls no operator at all notices nothing;
// its worker is given up, see crew.h.
//
// Threads: since() and interrupt(), any; the rest, the thread that is bound.
#pragma once

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

namespace pyserve {

class Runs {
  public:
    // What the handler calls for a run that is to end, and what undoes it. Both on the run's own thread, the first at
    // any moment of it, so that it may do only what a signal handler may.
    struct Effect {
        void (*begin)() noexcept;
        void (*end)() noexcept;
    };

    Runs() = default;
    ~Runs() { unbind(); }
    Runs(const Runs&) = delete;
    Runs& operator=(const Runs&) = delete;

    // Once per process, before the first bind.
    static void install(int signal_number, const Effect& effect) noexcept {
        signal_ = signal_number;
        effect_ = effect;
        struct sigaction action{};
        action.sa_handler = handle;
        action.sa_flags = SA_RESTART;
        sigaction(signal_number, &action, nullptr);
    }

    // The calling thread's runs are these from now on, and no others.
    void bind() noexcept {
        current_ = this;
        const std::lock_guard lock(mutex_);
        thread_ = static_cast<pid_t>(syscall(SYS_gettid));
    }
    void unbind() noexcept {
        {
            const std::lock_guard lock(mutex_);  // nobody is about to send a signal to a thread that may be over
            thread_ = 0;
        }
        if (current_ == this) current_ = nullptr;
    }
    // Of the calling thread; nullptr if nobody wants to end them.
    static Runs* current() noexcept { return current_; }

    // One store at each end of a run, and a load at its end.
    void begin(int64_t now) noexcept { since_.store(now, std::memory_order_relaxed); }
    void end() noexcept {
        since_.store(0, std::memory_order_relaxed);
        std::atomic_signal_fence(std::memory_order_seq_cst);  // from here on the handler does nothing
        if (is_interrupted_.load(std::memory_order_relaxed)) forgive();
    }
    // Whether the current run was interrupted. Operators raise until forgive().
    bool is_interrupted() const noexcept { return is_interrupted_.load(std::memory_order_relaxed); }
    void forgive() noexcept {
        is_interrupted_.store(false, std::memory_order_relaxed);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        effect_.end();
    }

    // When the current run began, ns; 0 if there is none.
    int64_t since() const noexcept { return since_.load(std::memory_order_relaxed); }

    // Makes the run that began at `since` raise, if it has not ended. May have to be asked again: what the thread does
    // at that very moment may undo it. False if there is no such run, or no thread any more.
    bool interrupt(int64_t since) noexcept {
        const std::lock_guard lock(mutex_);
        if (thread_ == 0 || since == 0 || since_.load(std::memory_order_relaxed) != since) return false;
        unwanted_.store(since, std::memory_order_relaxed);
        return syscall(SYS_tgkill, getpid(), thread_, signal_) == 0;
    }

    // From now on no run is to begin. Who begins them has to ask.
    void refuse() noexcept { is_refused_.store(true, std::memory_order_relaxed); }
    bool is_refused() const noexcept { return is_refused_.load(std::memory_order_relaxed); }

    // The kernel's number of the bound thread; 0 without one.
    pid_t thread() noexcept {
        const std::lock_guard lock(mutex_);
        return thread_;
    }

  private:
    static void handle(int) noexcept {
        const int error = errno;
        Runs* runs = current_;
        if (runs != nullptr) {
            const int64_t since = runs->since_.load(std::memory_order_relaxed);
            if (since != 0 && since == runs->unwanted_.load(std::memory_order_relaxed)) {
                runs->is_interrupted_.store(true, std::memory_order_relaxed);
                effect_.begin();
            }
        }
        errno = error;
    }

    static inline thread_local Runs* current_ = nullptr;
    static inline int signal_ = 0;
    static inline Effect effect_{};

    std::atomic<int64_t> since_{0};
    std::atomic<int64_t> unwanted_{0};  // `since_` of the run that is to end
    std::atomic<bool> is_interrupted_{false};
    std::atomic<bool> is_refused_{false};
    std::mutex mutex_;
    pid_t thread_ = 0;
};

}  // namespace pyserve
