// The server's side of one worker process: a thread that takes batches, sends them, and completes what comes back.
// Never touches Python.
//
//     ready ──> stopped     told to stop: what it had was answered
//       └─────> died        the connection ended, or what came over it was wrong; `error` says what
//
// Cheap handlers are given several batches ahead, so that the process need not wait for the next one to come; how many
// follows from the time that its batches take. Requests of a batch that the process has not come to yet do not count
// as running: their started_at stays 0.
//
// Threads: construction, stop and join from the loop; the rest is its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "batcher.h"
#include "frame.h"
#include "pool.h"
#include "result.h"
#include "stats.h"

namespace pyserve {

// A request of the python lane. What it holds belongs to the loop thread; workers only read it.
struct ProcessRequest : Request {
    uint32_t flags = 0;
    std::string text;               // the head, and the body too if it is small
    size_t head_size = 0;           // of `text`
    const char* body = nullptr;     // of a larger body, kept alive by `buffer`
    size_t body_size = 0;
    void* owner = nullptr;          // a Python object, opaque here
    void* buffer = nullptr;         // what keeps `body` where it is, opaque here; let go of before the release

    void clear() {
        if (text.capacity() > 2 * body_inline_max) std::string().swap(text);
        text.clear();
        body = nullptr;
        body_size = 0;
    }
    std::string_view head() const { return std::string_view(text).substr(0, head_size); }
    std::string_view content() const {
        return body != nullptr ? std::string_view(body, body_size) : std::string_view(text).substr(head_size);
    }
};

using ProcessPool = Pool<ProcessRequest>;

struct AnswerPart {
    AnswerKind kind{};
    uint16_t status = 0;
    std::string head;
    std::string body;
};

// Requests that were answered in one frame; or one part of a streamed answer, whose request goes on.
struct ProcessResult : Result {
    ProcessResult() : Result(Lane::process) {}

    std::vector<AnswerPart> answers;  // as many as requests, or none if there is no answer
    uint64_t chunk_ticket = 0;        // of a streamed part: `requests` is empty
    bool is_chunk = false;
    // Bytes of parts that the loop has not seen yet; less by this one's when it does.
    std::shared_ptr<std::atomic<int64_t>> undrained;
};

// What all workers of a lane share. Constant after construction, or thread-safe by itself.
struct ProcessLaneShared {
    Batcher<>* batcher = nullptr;
    Completions<>* completions = nullptr;
    std::shared_ptr<ProcessPool> pool = std::make_shared<ProcessPool>();
    LaneStats stats;
    std::atomic<int> intra_op_threads{1};
    std::atomic<uint32_t> ready_count{0};
};

enum class ProcessState : uint8_t { ready, stopped, died };

class ProcessWorker {
  public:
    // Duplicates the descriptors. `in_flight_max` above 0: requests join and leave at any time (multiplexed).
    ProcessWorker(ProcessLaneShared& shared, uint32_t id, int socket, int request_memory, int answer_memory,
                  size_t in_flight_max);
    ~ProcessWorker();  // stops and joins
    ProcessWorker(const ProcessWorker&) = delete;
    ProcessWorker& operator=(const ProcessWorker&) = delete;

    void stop() noexcept;
    // A request came: for a thread that does not sleep in the batcher.
    void wake() noexcept;
    bool is_stopping() const noexcept { return stop_.load(std::memory_order_acquire); }
    bool is_multiplexed() const noexcept { return in_flight_max_ > 0; }

    uint32_t id() const { return id_; }
    ProcessState state() const noexcept { return state_.load(std::memory_order_acquire); }
    bool is_over() const noexcept { return state() != ProcessState::ready; }
    // REQUIRES: is_over().
    const std::string& error() const { return error_; }
    // When the batch at the front began, or last gave an answer, ns; 0 when idle.
    int64_t running_since() const noexcept { return running_since_.load(std::memory_order_relaxed); }
    uint64_t batches() const noexcept { return batches_.load(std::memory_order_relaxed); }

  private:
    struct Waiting {
        ProcessRequest* request;
        bool is_over = false;
        bool cancel_sent = false;
    };
    // A batch that was sent.
    struct Flight {
        uint64_t id = 0;
        std::vector<Waiting> requests;
        size_t open_count = 0;
        size_t next = 0;  // where the next answer's request probably is
        int64_t taken_at = 0;
        int64_t sent_at = 0;
        int64_t started_at = 0;  // 0 until it is at the front
        bool uses_memory = false;
        bool holds_permit = false;
    };

    void main() noexcept;
    void serve();
    bool wait_for_first(Take& take);
    bool take_more(Take& take, int64_t& wake_at);
    size_t ahead_max() const;
    void send_batch(Take& take);
    void write_item(const ProcessRequest& request, std::string& heads, std::string& rest, Flight& flight);
    bool flush();
    bool exchange(int64_t wake_at);
    void poll_once(int64_t wake_at);
    bool receive();
    bool on_frame(const FrameHead& head, std::string_view content);
    bool on_answers(Flight& flight, const FrameHead& head, const std::vector<Part<AnswerHead>>& parts);
    bool read_body(const Part<AnswerHead>& part, std::string& body, bool& used_memory);
    void on_chunk(Waiting& waiting, AnswerPart part, uint64_t ticket);
    void begin_front();
    void finish_front(const Flight& flight);
    void trim(const Flight& flight);
    void complete(std::unique_ptr<ProcessResult> result);
    void drop(std::vector<Request*>& requests);
    void abandon();
    void fail(const std::string& text) { if (error_.empty()) error_ = text; }

    ProcessLaneShared& shared_;
    const uint32_t id_;
    const size_t in_flight_max_;
    int socket_ = -1, request_memory_ = -1, answer_memory_ = -1, wake_fd_ = -1;
    std::atomic<bool> stop_{false};
    std::atomic<ProcessState> state_{ProcessState::ready};
    std::atomic<int64_t> running_since_{0};
    std::atomic<uint64_t> batches_{0};
    std::string error_;
    // Its own thread only.
    std::deque<Flight> flights_;
    size_t in_flight_count_ = 0;  // requests
    uint64_t next_batch_ = 1;
    uint64_t memory_used_ = 0;    // bytes of the request memory that flights refer to
    uint64_t memory_high_ = 0;
    uint64_t answer_high_ = 0;
    double batch_time_ns_ = 0;    // moving average
    uint64_t measured_ = 0;
    std::string out_;
    size_t out_sent_ = 0;
    FrameBuffer in_;
    std::vector<Part<AnswerHead>> parts_;
    std::shared_ptr<std::atomic<int64_t>> undrained_ = std::make_shared<std::atomic<int64_t>>(0);
    std::thread thread_;  // last: starts when the rest is there
};

}  // namespace pyserve
