#include "worker_channel.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "clock.h"
#include "memory_file.h"

namespace pyserve {
namespace {

// Answers wait for more to leave with them no longer than this, and no more than this of them.
constexpr int64_t out_time_max_ns = 200'000;
constexpr size_t out_size_max = 65536;
constexpr size_t cancelled_max = 4096;

}  // namespace

WorkerChannel::WorkerChannel(int socket, int request_memory, int answer_memory)
    : socket_(socket), request_memory_(request_memory), answer_memory_(answer_memory) {
    const off_t size = lseek(answer_memory_, 0, SEEK_END);
    memory_size_ = size < 0 ? 0 : static_cast<uint64_t>(size);
    if (memory_size_ < notes_size) throw std::system_error(EINVAL, std::generic_category(), "the answer memory");
    void* notes = mmap(nullptr, notes_size, PROT_READ | PROT_WRITE, MAP_SHARED, answer_memory_, 0);
    if (notes == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "the answer memory");
    notes_ = static_cast<WorkerNotes*>(notes);
}

WorkerChannel::~WorkerChannel() { munmap(notes_, notes_size); }

WorkerChannel::Got WorkerChannel::receive(IncomingBatch& batch, int timeout_ms) {
    const int64_t limit = timeout_ms < 0 ? never_ns : SteadyClock::now_ns() + int64_t{timeout_ms} * 1'000'000;
    for (;;) {
        // Without a server nobody waits for the batches that are here; it may have given them to another worker.
        if (is_closed_) return Got::closed;
        if (!batches_.empty()) {
            batch = std::move(batches_.front());
            batches_.pop_front();
            __atomic_store_n(&notes_->taken, batch.id, __ATOMIC_RELEASE);
            return Got::batch;
        }
        if (told_to_stop_) {
            flush();
            return Got::closed;
        }
        if (!read_available() || !batches_.empty()) continue;
        if (told_to_stop_ || !flush()) continue;
        pollfd fd{socket_, POLLIN, 0};
        int wait_ms = -1;
        if (timeout_ms >= 0) {
            const int64_t left = limit - SteadyClock::now_ns();
            if (left <= 0) return Got::timeout;
            wait_ms = static_cast<int>(std::min<int64_t>(left / 1'000'000 + 1, INT_MAX));
        }
        const int ready = poll(&fd, 1, wait_ms);
        if (ready < 0 && errno == EINTR) return Got::interrupted;
        if (ready == 0) return Got::timeout;
    }
}

void WorkerChannel::begin(uint64_t batch) noexcept {
    __atomic_store_n(&notes_->alone, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&notes_->begun, batch, __ATOMIC_RELEASE);
}

bool WorkerChannel::begin_alone(uint64_t ticket) {
    if (!flush()) return false;
    __atomic_store_n(&notes_->alone, ticket + 1, __ATOMIC_RELEASE);
    return true;
}

bool WorkerChannel::send(uint64_t batch, const std::vector<OutgoingAnswer>& answers) {
    if (is_closed_) return false;
    if (answers.size() > items_max) throw std::length_error("a batch has too many answers");
    std::string heads, rest;
    uint64_t memory_used = notes_size;
    for (const OutgoingAnswer& answer : answers) {
        if (answer.head.size() > head_size_max)
            throw std::length_error("the head of an answer may have " + std::to_string(head_size_max) + " bytes, not " +
                                    std::to_string(answer.head.size()));
        AnswerHead head;
        head.ticket = answer.ticket;
        head.kind = answer.kind;
        head.status = answer.status;
        head.head_size = static_cast<uint32_t>(answer.head.size());
        head.body_size = answer.body.size();
        if (!memory_busy_ && answer.body.size() > body_inline_max && answer.body.size() <= memory_size_ - memory_used &&
            write_at(answer_memory_, answer.body, memory_used)) {
            head.offset = memory_used;
            memory_used += answer.body.size();
        }
        append(heads, head);
        rest += answer.head;
        if (head.offset == in_frame) rest += answer.body;
        if (heads.size() + rest.size() > frame_size_max)
            throw std::length_error("the answers of a batch may have " + std::to_string(frame_size_max) + " bytes");
    }
    for (const OutgoingAnswer& answer : answers) {
        if (answer.kind != AnswerKind::chunk) cancelled_.erase(answer.ticket);
    }
    if (memory_used > notes_size) memory_busy_ = true;
    if (out_.empty()) out_since_ = SteadyClock::now_ns();
    FrameHead frame;
    frame.type = FrameType::answers;
    frame.batch = batch;
    frame.count = static_cast<uint32_t>(answers.size());
    frame.size = heads.size() + rest.size();
    append(out_, frame);
    out_ += heads;
    out_ += rest;
    const bool more_comes = !batches_.empty() && out_.size() < out_size_max &&
                            SteadyClock::now_ns() - out_since_ < out_time_max_ns &&
                            (answers.empty() || answers.front().kind != AnswerKind::chunk);
    return more_comes || flush();
}

bool WorkerChannel::is_cancelled(uint64_t ticket) {
    read_available();
    return is_closed_ || cancelled_.contains(ticket);
}

bool WorkerChannel::read_body(const IncomingItem& item, char* to) const {
    return read_at(request_memory_, to, item.body_size, item.offset);
}

// Blocks until the server has taken all. It always takes, unless it holds a stream back.
bool WorkerChannel::flush() {
    size_t sent = 0;
    while (sent < out_.size() && !is_closed_) {
        const ssize_t count = ::send(socket_, out_.data() + sent, out_.size() - sent, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                is_closed_ = true;
                break;
            }
            pollfd fd{socket_, POLLOUT, 0};
            poll(&fd, 1, 1000);
            continue;
        }
        sent += static_cast<size_t>(count);
    }
    out_.clear();
    if (out_.capacity() > (1 << 20)) out_.shrink_to_fit();
    return !is_closed_;
}

// Takes what has come, without waiting. False when there is something to look at.
bool WorkerChannel::read_available() {
    if (is_closed_) return false;
    for (;;) {
        size_t room;
        char* to = in_.room(room);
        const ssize_t got = recv(socket_, to, room, MSG_DONTWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        if (got <= 0) {
            is_closed_ = true;
            return false;
        }
        in_.received(static_cast<size_t>(got));
        FrameHead head;
        std::string_view content;
        const char* problem = nullptr;
        while (in_.peek(head, content, problem)) {
            on_frame(head, content);
            if (is_closed_) return false;
            in_.take(head);
        }
        if (problem != nullptr) {
            is_closed_ = true;
            return false;
        }
        if (static_cast<size_t>(got) < room) return true;
    }
}

void WorkerChannel::on_frame(const FrameHead& head, std::string_view content) {
    switch (head.type) {
        case FrameType::batch: {
            if (parse(head, content, parts_) != nullptr) break;
            IncomingBatch& batch = batches_.emplace_back();
            batch.id = head.batch;
            batch.intra_op_threads = head.flags;
            batch.items.reserve(parts_.size());
            for (const auto& part : parts_) {
                batch.items.push_back({part.head.ticket, part.head.flags, std::string(part.text),
                                       std::string(part.body), part.head.body_size, part.head.offset});
            }
            return;
        }
        case FrameType::cancel:
            if (content.size() != sizeof(uint64_t)) break;
            on_cancel(read_at<uint64_t>(content.data()));
            return;
        case FrameType::copied: memory_busy_ = false; return;
        case FrameType::stop: told_to_stop_ = true; return;
        default: break;
    }
    is_closed_ = true;  // not our server
}

// The answer may have left already, so that some are kept in vain: the oldest are forgotten.
void WorkerChannel::on_cancel(uint64_t ticket) {
    if (!cancelled_.insert(ticket).second) return;
    cancels_.push_back(ticket);
    if (cancels_.size() <= cancelled_max) return;
    cancelled_.erase(cancels_.front());
    cancels_.pop_front();
}

}  // namespace pyserve
