// A process lane with its loop, in the thread of the test; and what its worker processes are joined to it by.
//
// Each request carries an Entry, which is told of every end of it: two ends, an answer to another request or none at
// all fail the test.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "harness.h"
#include "process_lane.h"
#include "worker_channel.h"

namespace peers {

using namespace pyserve;

inline size_t open_descriptors() {
    DIR* folder = opendir("/proc/self/fd");
    CHECK(folder != nullptr);
    size_t count = 0;
    while (readdir(folder) != nullptr) ++count;
    closedir(folder);
    return count;
}

// The descriptors of one worker: both ends of its socket, and its memory.
struct Wire {
    explicit Wire(size_t request_memory_size = 1 << 20, size_t answer_memory_size = 1 << 20, bool may_grow = true) {
        int ends[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        server = ends[0], worker = ends[1];
        request_memory = memfd_create("requests", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        answer_memory = memfd_create("answers", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        CHECK(ftruncate(request_memory, static_cast<off_t>(request_memory_size)) == 0);
        CHECK(ftruncate(answer_memory, static_cast<off_t>(answer_memory_size)) == 0);
        if (!may_grow) CHECK(fcntl(request_memory, F_ADD_SEALS, F_SEAL_GROW) == 0);
    }
    ~Wire() {
        for (const int fd : {server, worker, request_memory, answer_memory}) {
            if (fd >= 0) close(fd);
        }
    }
    Wire(const Wire&) = delete;
    Wire& operator=(const Wire&) = delete;

    // The worker's end, which lives as long as the channel then.
    std::unique_ptr<WorkerChannel> channel() {
        auto made = std::make_unique<WorkerChannel>(worker, request_memory, answer_memory);
        close(std::exchange(worker, -1));
        return made;
    }

    int server, worker, request_memory, answer_memory;
};

inline int64_t number_in(std::string_view head) { return std::stoll(std::string(head)); }

struct Entry {
    int64_t number = 0;  // is the request's head
    std::string body;
    uint64_t ticket = 0;
    bool is_over = false;
    Code code{};
    State state{};  // when it came back
    AnswerPart answer;
    uint32_t batch_size = 0;
    bool was_alone = false;
    Release release = Release::none;
    std::vector<std::string> chunks;
    int64_t deadline = never_ns;
    uint32_t flags = 0;
};

// What a worker answers: it tells the request and every byte of it.
inline std::string answer_to(int64_t number, std::string_view body) {
    return std::to_string(number) + ":" + std::string(body.rbegin(), body.rend());
}

class Loop : private Watched {
  public:
    explicit Loop(size_t capacity = 1024)
        : completions(std::make_shared<Completions<>>()), poller(std::make_shared<Poller>()) {
        poller->add(completions->fd(), *this);
        lane = std::make_unique<ProcessLane>(completions, poller, capacity);
    }
    ~Loop() override {
        runs_again = false;
        lane.reset();
        drain();
        for (const Entry& entry : entries) CHECK(entry.is_over);
    }

    void limit(uint32_t size_max, uint32_t size_min = 1, int64_t delay_ns = 0, uint32_t running_max = UINT32_MAX) {
        BatchLimits limits;
        limits.batch_size_max = size_max, limits.batch_size_min = size_min;
        limits.batch_delay_max_ns = delay_ns, limits.running_max = running_max;
        lane->set_limits(limits);
    }

    uint32_t add(const Wire& wire, size_t in_flight_max = 0) {
        return lane->add_worker(wire.server, wire.request_memory, wire.answer_memory, in_flight_max);
    }

    // nullptr when the queue is full.
    Entry* submit(std::string body, int64_t deadline = never_ns, uint32_t flags = 0) {
        Entry& entry = entries.emplace_back();
        entry.number = static_cast<int64_t>(entries.size()) - 1;
        entry.body = std::move(body);
        entry.deadline = deadline;
        entry.flags = flags;
        if (!submit(entry)) {
            entries.pop_back();
            return nullptr;
        }
        return &entry;
    }
    bool submit(Entry& entry) {
        const std::string head = std::to_string(entry.number);
        const ProcessRequest* request =
            lane->try_submit(head, entry.body, entry.flags, &entry, SteadyClock::now_ns(), entry.deadline);
        if (request != nullptr) entry.ticket = ProcessPool::ticket_of(*request);
        return request != nullptr;
    }

    // What the event loop of Python does: waits, then takes what has come.
    void turn(int timeout_ms = 20) {
        pollfd fd{poller->fd(), POLLIN, 0};
        poll(&fd, 1, timeout_ms);
        drain();
    }
    template <class Condition>
    void until(const Condition& is_met) {
        while (!is_met()) turn();
    }
    void until_over() {
        until([this] { return over_count == entries.size(); });
    }

    void drain() {
        poller->run_ready();
        for (CompletionNode* node = completions->drain(); node != nullptr;) {
            const std::unique_ptr<ProcessResult> result(static_cast<ProcessResult*>(static_cast<Result*>(node)));
            node = node->next;
            on_result(*result);
        }
    }

    ProcessWorkerRow row(uint32_t id) const {
        for (ProcessWorkerRow& each : lane->workers()) {
            if (each.id == id) return std::move(each);
        }
        CHECK(!"a worker of this id");
        return {};
    }

    // Nothing is counted any more once everything is over.
    void check_at_rest() const {
        CHECK_EQ(over_count, entries.size());
        CHECK_EQ(lane->running(), 0u);
        CHECK_EQ(lane->queue_size(), 0u);
    }

    std::shared_ptr<Completions<>> completions;
    std::shared_ptr<Poller> poller;
    std::unique_ptr<ProcessLane> lane;
    std::deque<Entry> entries;
    size_t over_count = 0;
    // Whether requests of a worker that died are submitted again, as the python lane does: once, those that may not
    // have been the cause; the others as often as no worker came to them.
    bool runs_again = false;
    size_t group_size = 1;

  private:
    void on_ready(uint32_t) noexcept override {}

    bool submit_again(Entry& entry, Code code) {
        if (code == Code::ok || (code == Code::worker_died && entry.was_alone) ||
            (code != Code::not_run && (entry.flags & rerun_flag) != 0))
            return false;
        if (code != Code::not_run)
            entry.flags |= rerun_flag | static_cast<uint32_t>(next_rerun_++ / group_size) << rerun_group_shift;
        CHECK(submit(entry));
        return true;
    }

    size_t next_rerun_ = 0;

    void on_result(ProcessResult& result) {
        if (result.is_chunk) {
            CHECK_EQ(result.answers.size(), 1u);
            const ProcessRequest* request = static_cast<ProcessPool*>(result.pool.get())->find(result.chunk_ticket);
            if (request == nullptr || request->state.load() == State::cancelled) return;
            auto& entry = *static_cast<Entry*>(request->owner);
            CHECK(!entry.is_over);
            entry.chunks.push_back(std::move(result.answers[0].body));
            return;
        }
        CHECK(!result.requests.empty());
        CHECK(result.answers.empty() || result.answers.size() == result.requests.size());
        CHECK_EQ(result.answers.empty(), result.status.code != Code::ok);
        for (size_t i = 0; i < result.requests.size(); ++i) {
            Request* request = result.requests[i];
            const State state = request->state.load();
            CHECK(state == State::done || state == State::cancelled || state == State::expired);
            const uint64_t ticket = RequestOwner::ticket_of(*request);
            auto* entry = static_cast<Entry*>(result.pool->release(request));
            CHECK(entry != nullptr && !entry->is_over);
            CHECK_EQ(entry->ticket, ticket);
            entry->was_alone = result.was_alone;
            if (runs_again && state == State::done && submit_again(*entry, result.status.code)) continue;
            entry->is_over = true;
            entry->code = result.status.code;
            entry->state = state;
            entry->batch_size = result.batch_size;
            entry->release = result.release;
            if (!result.answers.empty()) entry->answer = std::move(result.answers[i]);
            ++over_count;
        }
    }
};

inline std::string body_of(const WorkerChannel& channel, const IncomingItem& item) {
    if (item.offset == in_frame) return item.body;
    std::string body(item.body_size, '\0');
    CHECK(channel.read_body(item, body.data()));
    return body;
}

inline OutgoingAnswer answer(uint64_t ticket, std::string_view body, AnswerKind kind = AnswerKind::answer) {
    return {ticket, kind, 200, "OK", body};
}

// One worker process, played by a thread. `handle` returns false to die there and then.
class Peer {
  public:
    using Handle = std::function<bool(WorkerChannel&, const IncomingBatch&)>;

    Peer(Loop& loop, Handle handle, size_t in_flight_max = 0, std::unique_ptr<Wire> wire = std::make_unique<Wire>())
        : id(loop.add(*wire, in_flight_max)), thread_([channel = wire->channel(), on_batch = std::move(handle)] {
              IncomingBatch batch;
              for (;;) {
                  const WorkerChannel::Got got = channel->receive(batch, -1);
                  if (got == WorkerChannel::Got::closed) break;
                  if (got == WorkerChannel::Got::batch && !on_batch(*channel, batch)) break;
              }
          }) {}
    ~Peer() { thread_.join(); }

    const uint32_t id;

  private:
    std::thread thread_;
};

}  // namespace peers
