// A worker process's end of the wire: batches in, answers out.
//
// Threads: one.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "frame.h"
#include "memory_file.h"

namespace pyserve {

struct IncomingItem {
    uint64_t ticket = 0;
    uint32_t flags = 0;
    std::string head;
    std::string body;  // unless it lies in memory
    uint64_t body_size = 0;
    uint64_t offset = in_frame;
};

struct IncomingBatch {
    uint64_t id = 0;
    uint32_t intra_op_threads = 0;
    std::vector<IncomingItem> items;
};

struct OutgoingAnswer {
    uint64_t ticket = 0;
    AnswerKind kind{};
    uint16_t status = 200;
    std::string_view head;
    std::string_view body;
};

class WorkerChannel {
  public:
    enum class Got { batch, timeout, interrupted, closed };

    // Duplicates the descriptors. Throws std::system_error.
    WorkerChannel(int socket, int request_memory, int answer_memory);
    ~WorkerChannel();
    WorkerChannel(const WorkerChannel&) = delete;
    WorkerChannel& operator=(const WorkerChannel&) = delete;

    // The next batch; waits at most `timeout_ms`, for ever if negative. `interrupted`: a signal came. Notes of a batch
    // that the worker has come to it, whose bodies may be too much for it.
    // `closed`: told to stop and nothing is left, or the server is gone.
    Got receive(IncomingBatch& batch, int timeout_ms);
    // The batch is about to be handed to the handler.
    void begin(uint64_t batch) noexcept;
    // So is one request of it by itself, a second time. All that was sent leaves first: answers of requests that need
    // not be run again, should this one end the worker. False when the server is gone.
    bool begin_alone(uint64_t ticket);
    // False when the server is gone. Answers of cheap batches may leave together, at the latest with `receive`.
    // Throws std::length_error if they do not fit a frame; none of them is sent then.
    bool send(uint64_t batch, const std::vector<OutgoingAnswer>& answers);
    // Whether the client of a request has gone, as far as the server has said.
    bool is_cancelled(uint64_t ticket);
    // Those of which is_cancelled is true.
    std::vector<uint64_t> cancelled_tickets() const { return {cancelled_.begin(), cancelled_.end()}; }
    // Readable when receive() may have something.
    int fd() const noexcept { return socket_; }
    // Copies a body out of the request memory. False if it is not there.
    bool read_body(const IncomingItem& item, char* to) const;

  private:
    bool flush();
    bool read_available();
    void on_frame(const FrameHead& head, std::string_view content);
    void on_cancel(uint64_t ticket);

    Descriptor socket_, request_memory_, answer_memory_;
    WorkerNotes* notes_ = nullptr;
    FrameBuffer in_;
    std::deque<IncomingBatch> batches_;
    std::unordered_set<uint64_t> cancelled_;
    std::deque<uint64_t> cancels_;  // as they came, also of requests that are over
    std::vector<Part<ItemHead>> parts_;
    std::string out_;
    int64_t out_since_ = 0;     // ns
    uint64_t memory_size_ = 0;  // of the answer memory
    bool memory_busy_ = false;  // until the server has copied
    bool told_to_stop_ = false;
    bool is_closed_ = false;
};

}  // namespace pyserve
