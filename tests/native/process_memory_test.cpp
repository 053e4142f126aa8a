// The lane when memory runs out: at each allocation that the loop makes in turn, one after another. Whatever it was,
// every request comes back once, and the lane goes on with another worker.
#include <cstdlib>
#include <new>

#include "peers.h"

using namespace peers;

namespace {

thread_local int64_t allocations_left = -1;  // -1: as many as it wants
thread_local int64_t failures_left = 0;      // how many fail then

void* allocate(size_t size) {
    if (allocations_left == 0 && failures_left > 0) {
        --failures_left;
        throw std::bad_alloc();
    }
    if (allocations_left > 0) --allocations_left;
    if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
    throw std::bad_alloc();
}

// Answers what is there, as a worker would, without the lane's thread being short of memory.
void answer_all(WorkerChannel& channel, bool with_chunk) {
    IncomingBatch batch;
    while (channel.receive(batch, 0) == WorkerChannel::Got::batch) {
        channel.begin(batch.id);
        static const std::string small(40, 'x'), large(9000, 'x');
        std::vector<OutgoingAnswer> answers;
        for (const IncomingItem& item : batch.items) {
            if (with_chunk) answers.push_back({item.ticket, AnswerKind::chunk, 200, "OK", "a part that is not short"});
            const std::string& body = number_in(item.head) % 3 == 0 ? large : small;
            answers.push_back({item.ticket, AnswerKind::answer, 200, "a head that is not so short", body});
        }
        channel.send(batch.id, answers);
    }
}

// Returns whether an allocation failed: not once the scenario is over before.
bool run(int64_t allowed, int64_t failures, size_t in_flight_max) {
    Wire wire, spare;
    Loop loop(16);
    loop.limit(3);
    const uint32_t id = loop.add(wire, in_flight_max);
    auto channel = wire.channel();
    const std::string large(9000, 'b'), small(100, 's');
    allocations_left = allowed, failures_left = failures;
    const auto unlimited = [&](const auto& call) {  // what the test itself needs
        const int64_t left = std::exchange(allocations_left, -1);
        call();
        allocations_left = left;
    };
    const auto submit = [&](const std::string& body, int64_t deadline) {
        Entry* entry = nullptr;
        unlimited([&] { entry = &loop.entries.emplace_back(); });
        entry->number = static_cast<int64_t>(loop.entries.size()) - 1;
        unlimited([&] { entry->body = body; });
        const char digit = static_cast<char>('0' + entry->number);
        const ProcessRequest* request = nullptr;
        try {
            request = loop.lane->try_submit({&digit, 1}, entry->body, 0, entry, 0, deadline);
        } catch (const std::bad_alloc&) {
            // Refused.
        }
        if (request == nullptr)
            loop.entries.pop_back();
        else
            entry->ticket = ProcessPool::ticket_of(*request);
    };
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 4; ++i) {
            submit(i % 2 == 0 ? large : small, i == 3 && round == 0 ? 1 : never_ns);  // the last has expired
        }
        loop.lane->cancel(loop.entries.empty() ? 0 : loop.entries.back().ticket);
        for (int turn = 0; turn < 4; ++turn) {
            unlimited([&] { answer_all(*channel, round == 1); });
            loop.poller->run_ready();  // the lane's part of a turn, on little memory
            unlimited([&] { loop.drain(); });
        }
    }
    loop.lane->stop_worker(id);
    const bool failed = failures_left < failures;
    allocations_left = -1;
    // With memory again: what could not come back yet does, and what is still queued finds another worker.
    loop.lane->remove_worker(id);
    loop.add(spare);
    channel = spare.channel();
    for (int turn = 0; turn < 50 && loop.over_count < loop.entries.size(); ++turn) {
        answer_all(*channel, false);
        loop.turn(1);
    }
    loop.check_at_rest();
    loop.lane->close();
    return failed;
}

}  // namespace

// Not inlined: gcc would take the free for that of memory which another operator new gave.
[[gnu::noinline]] void* operator new(size_t size) { return allocate(size); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

TEST(no_request_is_lost_whichever_allocation_fails) {
    for (const size_t in_flight_max : {size_t{0}, size_t{5}}) {
        for (const int64_t failures : {1, 3, 1000}) {
            int64_t allowed = 0;
            while (run(allowed, failures, in_flight_max)) ++allowed;
            CHECK(allowed > 20);  // there were as many to fail
        }
    }
}

TEST_MAIN
