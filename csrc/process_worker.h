// The server's side of one worker process: takes batches, sends them, and completes what comes back. Never touches
// Python, and never waits.
//
// It has no thread. The loop, which reads the request and writes the answer, also hands it to the process and takes
// it back: a thread between them would cost two wake-ups per request, which is more than all the rest of the work.
//
//     ready ──> stopped     told to stop: what it had was answered
//       └─────> died        the connection ended, or what came over it was wrong; `error` says what
//
// Cheap handlers are given several batches ahead, so that the process need not wait for the next one to come; how many
// follows from the time that its batches take. Requests of a batch that the process has not come to yet do not count
// as running: their started_at stays 0. In multiplexed mode all of them run.
//
// When the process dies, each of its requests comes back with what is known of its part in that: not_run (the process
// had not come to it), not_begun, or worker_died. Those of a batch of several may be run again: see reruns.h. What has
// been answered is over, whatever happens after it.
//
// Every request is at any moment in one place, `flights_` or `take_`; it leaves that place when the result that carries
// it is complete. So when memory runs out half-way, what was taken still comes back.
//
// Threads: loop thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "batcher.h"
#include "frame.h"
#include "memory_file.h"
#include "poller.h"
#include "pool.h"
#include "reruns.h"
#include "result.h"
#include "stats.h"

namespace pyserve {

// A request of the python lane. What it holds belongs to the loop thread; workers only read it.
struct ProcessRequest : Request {
    uint32_t flags = 0;
    std::string text;            // the head, and the body too if it is small
    size_t head_size = 0;        // of `text`
    const char* body = nullptr;  // of a larger body, kept alive by `buffer`
    size_t body_size = 0;
    void* owner = nullptr;   // a Python object, opaque here
    void* buffer = nullptr;  // what keeps `body` where it is, opaque here; let go of before the release

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
    bool was_alone = false;  // of a worker that died: no other request can have been the cause
};

// What all workers of a lane share.
struct ProcessLaneShared {
    Batcher<>* batcher = nullptr;
    Completions<>* completions = nullptr;
    Poller* poller = nullptr;
    std::shared_ptr<ProcessPool> pool = std::make_shared<ProcessPool>();
    Reruns<ProcessRequest> reruns;
    LaneStats stats;
    int intra_op_threads = 1;
    size_t ready_count = 0;      // workers that take batches
    std::function<void()> feed;  // gives workers what is queued

    void complete(std::unique_ptr<ProcessResult> result) {
        result->pool = pool;
        // Within a turn of the poller the drain follows at once.
        if (poller->is_running())
            completions->push_unsignalled(result.release());
        else
            completions->push(result.release());
    }
};

enum class ProcessState : uint8_t { ready, stopped, died };

class ProcessWorker : public Watched {
  public:
    // Duplicates the descriptors. `in_flight_max` above 0: requests join and leave at any time (multiplexed).
    ProcessWorker(ProcessLaneShared& shared, uint32_t id, int socket, int request_memory, int answer_memory,
                  size_t in_flight_max);
    ~ProcessWorker() override;  // what it has comes back unanswered
    ProcessWorker(const ProcessWorker&) = delete;
    ProcessWorker& operator=(const ProcessWorker&) = delete;

    // It finishes what it has, then tells the process to end.
    void stop() noexcept;
    // Takes a batch if it has none, or, in multiplexed mode, what there is room for. False if there is nothing for it
    // now; `wake_at` is then made earlier if there will be at some time.
    bool take(int64_t& wake_at) noexcept;
    // Takes a batch ahead of the one that runs. False if there is none for it.
    bool take_ahead() noexcept;
    // How many requests it was given together with this one, itself included; 0 if it does not have it.
    size_t batch_size_of(uint64_t ticket) const noexcept;
    // Tells the process that a client has gone, if it has that request.
    void tell_cancelled(uint64_t ticket) noexcept;
    // Sends what it was given, as far as the socket takes it.
    void flush() noexcept;
    void on_ready(uint32_t events) noexcept override;

    uint32_t id() const { return id_; }
    ProcessState state() const noexcept { return state_; }
    bool takes_batches() const noexcept { return state_ == ProcessState::ready && !is_stopping_; }
    bool is_stopping() const noexcept { return is_stopping_; }
    bool is_multiplexed() const noexcept { return in_flight_max_ > 0; }
    // Whether it died while it had a second run: what that may do to it was known.
    bool died_in_rerun() const noexcept { return died_in_rerun_; }
    // Why it died; empty if it did not.
    const std::string& error() const { return error_; }
    // When the batch at the front began, or last gave an answer, ns; 0 when idle.
    int64_t running_since() const noexcept { return running_since_; }
    uint64_t batches() const noexcept { return batches_; }

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
        int64_t started_at = 0;  // 0 until the process has come to it
        Release release = Release::none;
        bool uses_memory = false;
        bool holds_permit = false;
        bool is_rerun = false;
    };

    size_t ahead_max() const;
    bool take_rerun();
    void end_rerun() noexcept;
    void send_batch(Take& take, bool is_rerun = false);
    void write_item(const ProcessRequest& request, std::string& heads, std::string& rest, Flight& flight);
    void write_cancel(Waiting& waiting);
    void watch_writing(bool waits) noexcept;
    bool receive();
    bool on_frame(const FrameHead& head, std::string_view content);
    bool on_answers(Flight& flight, const std::vector<Part<AnswerHead>>& parts);
    void collect(Flight& flight, const std::vector<Part<AnswerHead>>& parts, ProcessResult& result);
    void deliver(std::unique_ptr<ProcessResult> result) noexcept;
    bool read_body(const Part<AnswerHead>& part, std::string& body, bool& used_memory);
    void on_chunk(Waiting& waiting, AnswerPart part, uint64_t ticket);
    void begin(Flight& flight);
    void observe(const Flight& flight);
    void trim(const Flight& flight);
    void drop(std::vector<Request*>& requests);
    void end_if_done() noexcept;
    void end(ProcessState state) noexcept;
    void die(std::string_view what, std::string_view why = {}) noexcept;
    void abandon();
    void hand_back(std::vector<Request*>& requests, Code code, const Flight& flight, bool was_alone = false);
    bool fail(const std::string& text) {
        if (error_.empty()) error_ = text;
        return false;
    }

    ProcessLaneShared& shared_;
    const uint32_t id_;
    const size_t in_flight_max_;
    const Descriptor socket_, request_memory_, answer_memory_;
    bool is_stopping_ = false;
    bool waits_to_write_ = false;  // as the poller was told
    bool has_rerun_ = false;       // and nothing else
    bool had_rerun_ = false;       // the last that it took, while others waited
    bool died_in_rerun_ = false;
    ProcessState state_ = ProcessState::ready;
    int64_t running_since_ = 0;
    uint64_t batches_ = 0;
    std::string error_;
    Take take_;
    std::deque<Flight> flights_;
    size_t in_flight_count_ = 0;  // requests
    uint64_t next_batch_ = 1;
    uint64_t memory_used_ = 0;  // bytes of the request memory that flights refer to
    uint64_t memory_high_ = 0;
    uint64_t answer_high_ = 0;
    double batch_time_ns_ = 0;  // moving average
    uint64_t measured_ = 0;
    std::string out_;
    size_t out_sent_ = 0;
    FrameBuffer in_;
    std::vector<Part<AnswerHead>> parts_;
};

}  // namespace pyserve
