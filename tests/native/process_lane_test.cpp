// Both ends of the wire to worker processes in one program, joined by real sockets and real shared memory: the lane
// in the test's thread, the workers in threads that echo, stream, fall silent and die.
#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <thread>

#include "peers.h"

using namespace peers;
using harness::Random;

namespace {

constexpr size_t numbers_max = 4096;

// Whether the request of this number was handed to a handler. By number: a request is submitted once here.
std::array<std::atomic<bool>, numbers_max> begun;

void begin(WorkerChannel& channel, const IncomingBatch& batch) {
    channel.begin(batch.id);
    for (const IncomingItem& item : batch.items) begun[static_cast<size_t>(number_in(item.head))] = true;
}

// Answers all of a batch, in one frame or in several, in any order.
bool echo(WorkerChannel& channel, const IncomingBatch& batch, Random* random = nullptr) {
    begin(channel, batch);
    std::vector<std::string> bodies;
    std::vector<OutgoingAnswer> answers;
    for (const IncomingItem& item : batch.items)
        bodies.push_back(answer_to(number_in(item.head), body_of(channel, item)));
    for (size_t i = 0; i < bodies.size(); ++i) answers.push_back(answer(batch.items[i].ticket, bodies[i]));
    if (random != nullptr && random->chance(30)) {
        std::reverse(answers.begin(), answers.end());
        const size_t first = random->below(answers.size() + 1);
        if (!channel.send(batch.id, {answers.begin(), answers.begin() + static_cast<ptrdiff_t>(first)})) return false;
        if (first == answers.size()) return true;
        answers.erase(answers.begin(), answers.begin() + static_cast<ptrdiff_t>(first));
    }
    return channel.send(batch.id, answers);
}

bool plain_echo(WorkerChannel& channel, const IncomingBatch& batch) { return echo(channel, batch); }

std::string random_body(Random& random, size_t large_max) {
    std::string body(random.chance(15) ? random.below(large_max) : random.below(60), '\0');
    const uint64_t start = random.next();
    for (size_t i = 0; i < body.size(); ++i) body[i] = static_cast<char>(start + i * 7 + i / 256);
    return body;
}

void check_end(const Entry& entry) {
    const bool was_begun = begun[static_cast<size_t>(entry.number)];
    if (entry.state == State::cancelled) return;
    if (entry.state == State::expired) {
        CHECK(!was_begun);
        return;
    }
    switch (entry.code) {
        case Code::ok:
            CHECK(was_begun);
            CHECK(entry.answer.body == answer_to(entry.number, entry.body));
            CHECK(entry.answer.head == "OK" && entry.answer.status == 200);
            break;
        case Code::worker_died: CHECK(was_begun); break;
        case Code::not_run:
        case Code::not_begun: CHECK(!was_begun); break;
        default: CHECK(!"an end that a request may come to");
    }
}

void check_ok(const Entry& entry) {
    CHECK(entry.code == Code::ok);
    check_end(entry);
}

void forget_begun() {
    for (auto& each : begun) each = false;
}

// A worker that dies at random: before it begins, while it runs, between its answers.
Peer::Handle mortal(uint64_t seed, unsigned percent) {
    return [random = Random(seed), percent](WorkerChannel& channel, const IncomingBatch& batch) mutable {
        if (random.chance(percent)) return false;
        if (random.chance(percent)) {
            begin(channel, batch);
            const IncomingItem& item = batch.items[random.below(batch.items.size())];
            const std::string body = answer_to(number_in(item.head), body_of(channel, item));
            if (random.chance(50)) channel.send(batch.id, {answer(item.ticket, body)});
            return false;
        }
        return echo(channel, batch, &random);
    };
}

}  // namespace

TEST(every_request_comes_back_once_with_its_own_answer_while_workers_die) {
    harness::for_each_seed(60, [](uint64_t seed) {
        forget_begun();
        Random random(seed);
        const size_t descriptors = open_descriptors();
        {
            std::deque<Peer> peers;  // outlives the loop: threads end when their sockets do
            Loop loop(256);
            loop.limit(1 + static_cast<uint32_t>(random.below(9)), 1 + static_cast<uint32_t>(random.below(4)),
                       random.between(0, 200'000),
                       random.chance(50) ? UINT32_MAX : 1 + static_cast<uint32_t>(random.below(6)));
            const bool is_multiplexed = random.chance(30);
            const size_t workers = 1 + random.below(4), count = 700;
            const auto hire = [&] {
                peers.emplace_back(loop, mortal(random.next(), 2), is_multiplexed ? 1 + random.below(20) : 0,
                                   std::make_unique<Wire>(4096, 40'000 + random.below(100'000), random.chance(70)));
            };
            while (loop.over_count < count) {
                while (loop.lane->ready_count() < workers) hire();
                for (const ProcessWorkerRow& row : loop.lane->workers()) {
                    if (row.state == ProcessState::ready) continue;
                    CHECK(row.state == ProcessState::died);
                    CHECK(row.error == "its connection ended");
                    loop.lane->remove_worker(row.id);
                }
                for (size_t burst = random.below(40); burst > 0 && loop.entries.size() < count; --burst) {
                    const bool expires = random.chance(2);
                    if (loop.submit(random_body(random, 100'000),
                                    expires ? SteadyClock::now_ns() + random.between(-5, 100'000) : never_ns) ==
                        nullptr)
                        break;
                    if (random.chance(3)) loop.lane->cancel(loop.entries[random.below(loop.entries.size())].ticket);
                }
                if (random.chance(5)) loop.lane->purge();
                loop.turn(random.chance(50) ? 0 : 5);
            }
            loop.check_at_rest();
            for (const Entry& entry : loop.entries) check_end(entry);
            loop.lane->close();
            CHECK_EQ(loop.lane->ready_count(), 0u);
            loop.lane->join();
        }
        CHECK_EQ(open_descriptors(), descriptors);
    });
}

TEST(stop_remove_close_and_join_at_any_moment_lose_nothing) {
    harness::for_each_seed(150, [](uint64_t seed) {
        forget_begun();
        Random random(seed);
        const size_t descriptors = open_descriptors();
        {
            std::deque<Peer> peers;
            Loop loop(128);
            loop.limit(1 + static_cast<uint32_t>(random.below(5)), 1, 0, random.chance(50) ? UINT32_MAX : 2);
            for (size_t i = 0; i < 3; ++i) peers.emplace_back(loop, plain_echo, random.chance(30) ? 5 : 0);
            bool is_closed = false, is_joined = false;
            for (int step = 0; step < 60 && !is_joined; ++step) {
                if (!is_closed && random.chance(60)) loop.submit(random_body(random, 20'000));
                const uint32_t id = peers[random.below(peers.size())].id;
                switch (random.below(20)) {
                    case 0: loop.lane->stop_worker(id); break;
                    case 1: loop.lane->remove_worker(id); break;
                    case 2:
                        if (step > 30) loop.lane->close(), is_closed = true;
                        break;
                    case 3:
                        if (step > 30) loop.lane->join(), is_joined = true;
                        break;
                    default:
                        if (random.chance(50)) loop.turn(0);
                }
            }
            if (random.chance(50)) {
                loop.lane->close();  // what still has a worker is finished
                loop.until([&] { return loop.lane->ready_count() == 0; });
                loop.until([&] {
                    const auto rows = loop.lane->workers();
                    return std::none_of(rows.begin(), rows.end(),
                                        [](const auto& row) { return row.state == ProcessState::ready; });
                });
            }
            loop.lane->join();
            loop.drain();
            loop.check_at_rest();
            CHECK_EQ(loop.lane->ready_count(), 0u);
            CHECK(loop.lane->workers().empty());
            for (const Entry& entry : loop.entries) {
                // A worker that is removed while it lives may begin afterwards what was handed back as not begun.
                if (entry.code != Code::not_run && entry.code != Code::not_begun) check_end(entry);
            }
        }
        CHECK_EQ(open_descriptors(), descriptors);
    });
}

TEST(a_stopped_worker_answers_what_it_has_and_then_sees_the_end) {
    std::deque<Peer> peers;
    Loop loop;
    forget_begun();
    std::atomic<bool> may_go{false};
    peers.emplace_back(loop, [&](WorkerChannel& channel, const IncomingBatch& batch) {
        may_go.wait(false);
        return plain_echo(channel, batch);
    });
    loop.submit("first");
    loop.lane->stop_worker(peers[0].id);
    Entry* second = loop.submit("second");  // stays queued: there is no other worker
    CHECK_EQ(loop.lane->ready_count(), 0u);
    CHECK(loop.row(peers[0].id).is_stopping && loop.row(peers[0].id).state == ProcessState::ready);
    may_go = true;
    may_go.notify_all();
    loop.until([&] { return loop.row(peers[0].id).state == ProcessState::stopped; });
    CHECK(loop.entries[0].is_over && loop.entries[0].code == Code::ok);
    CHECK(loop.row(peers[0].id).error.empty());
    CHECK(!second->is_over);
    CHECK_EQ(loop.lane->queue_size(), 1u);
    peers.emplace_back(loop, plain_echo);
    loop.until_over();
    CHECK(second->code == Code::ok);
    loop.lane->close();
}

TEST(large_bodies_pass_both_ways_within_the_memory_and_beyond_it) {
    // (request memory, answer memory): ample; too small, so that bodies go in the frame.
    const std::pair<size_t, size_t> memory_sizes[] = {{size_t{1} << 24, size_t{1} << 24}, {4096, 20'000}};
    for (const auto& [request_size, answer_size] : memory_sizes) {
        forget_begun();
        std::deque<Peer> peers;
        Loop loop;
        loop.limit(4);
        peers.emplace_back(loop, plain_echo, 0, std::make_unique<Wire>(request_size, answer_size, false));
        Random random(7);
        for (const size_t size :
             {body_inline_max - 1, body_inline_max, body_inline_max + 1, size_t{10'000}, size_t{19'000}, size_t{65'536},
              size_t{1'000'000}, size_t{3'000'000}, size_t{0}, size_t{5000}}) {
            std::string body(size, '\0');
            for (char& c : body) c = static_cast<char>(random.next());
            loop.submit(std::move(body));
        }
        loop.until_over();
        for (const Entry& entry : loop.entries) check_ok(entry);
        loop.check_at_rest();
        loop.lane->close();
    }
}

TEST(parts_of_a_stream_come_in_order_and_a_cancel_reaches_the_worker) {
    for (const size_t in_flight_max : {size_t{0}, size_t{8}}) {
        forget_begun();
        constexpr int parts = 200;
        std::atomic<int> cancelled{0};
        std::deque<Peer> peers;
        Loop loop;
        peers.emplace_back(
            loop,
            [&](WorkerChannel& channel, const IncomingBatch& batch) {
                begin(channel, batch);
                for (const IncomingItem& item : batch.items) {
                    const bool is_endless = item.head == "1";
                    for (int i = 0; is_endless || i < parts; ++i) {
                        if (channel.is_cancelled(item.ticket)) {
                            ++cancelled;
                            break;
                        }
                        const std::string part(i % 10 == 3 ? 6000 : 5, static_cast<char>('a' + i % 26));
                        const std::string body = std::to_string(i) + part;
                        if (!channel.send(batch.id, {answer(item.ticket, body, AnswerKind::chunk)})) return false;
                    }
                    if (!channel.send(batch.id, {answer(item.ticket, "end", AnswerKind::last)})) return false;
                }
                return true;
            },
            in_flight_max);
        Entry* whole = loop.submit("a");
        Entry* endless = loop.submit("b");
        loop.until([&] { return endless->chunks.size() > 20; });
        CHECK(loop.lane->cancel(endless->ticket));
        CHECK(!loop.lane->cancel(endless->ticket));
        const size_t seen = endless->chunks.size();
        loop.until_over();
        CHECK_EQ(cancelled.load(), 1);
        CHECK(endless->state == State::cancelled);
        CHECK_EQ(endless->chunks.size(), seen);  // none after the cancel
        CHECK_EQ(whole->chunks.size(), static_cast<size_t>(parts));
        for (int i = 0; i < parts; ++i) {
            const std::string start = std::to_string(i) + static_cast<char>('a' + i % 26);
            CHECK(whole->chunks[static_cast<size_t>(i)].starts_with(start));
        }
        CHECK(whole->answer.kind == AnswerKind::last && whole->answer.body == "end");
        loop.check_at_rest();
        loop.lane->close();
    }
}

TEST(a_batch_that_runs_learns_which_of_its_clients_have_gone) {
    forget_begun();
    std::atomic<bool> saw{false};
    std::deque<Peer> peers;
    Loop loop;
    loop.limit(2, 2, 3'600'000'000'000);
    peers.emplace_back(loop, [&](WorkerChannel& channel, const IncomingBatch& batch) {
        begin(channel, batch);
        while (!channel.is_cancelled(batch.items[0].ticket)) std::this_thread::yield();
        saw = !channel.is_cancelled(batch.items[1].ticket);
        std::vector<OutgoingAnswer> answers;
        for (const IncomingItem& item : batch.items) answers.push_back(answer(item.ticket, item.head));
        return channel.send(batch.id, answers);
    });
    Entry* gone = loop.submit("gone");
    Entry* other = loop.submit("other");
    loop.until([&] { return loop.lane->find(gone->ticket)->started_at != 0; });
    CHECK(loop.lane->cancel(gone->ticket));
    loop.until_over();
    CHECK(saw.load());
    CHECK(gone->state == State::cancelled);
    CHECK(other->code == Code::ok && other->answer.body == "1");
    CHECK(other->batch_size == 2 && other->release == Release::full);
    loop.check_at_rest();
    loop.lane->close();
}

TEST(cancels_that_come_too_late_do_not_make_a_worker_deaf) {
    Wire wire;
    const auto channel = wire.channel();
    const auto cancel = [&](uint64_t ticket) {
        FrameHead head;
        head.type = FrameType::cancel;
        head.size = sizeof ticket;
        std::string bytes;
        append(bytes, head);
        append(bytes, ticket);
        CHECK_EQ(send(wire.server, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
        return channel->is_cancelled(ticket);
    };
    for (uint64_t ticket = 1; ticket < 10'000; ++ticket) CHECK(cancel(ticket));
    CHECK(channel->is_cancelled(9'998));
    CHECK(!channel->is_cancelled(1));  // long ago
}

TEST(of_a_dead_workers_batches_those_not_begun_may_run_elsewhere) {
    // How much goes ahead follows from how quick the worker is, so it is tried until something went.
    bool went_ahead = false;
    for (int round = 0; !went_ahead; ++round) {
        forget_begun();
        std::atomic<int64_t> dies_at{-1};
        std::deque<Peer> peers;
        Loop loop;
        peers.emplace_back(loop, [&](WorkerChannel& channel, const IncomingBatch& batch) {
            if (number_in(batch.items[0].head) != dies_at) return plain_echo(channel, batch);
            begin(channel, batch);
            return false;
        });
        for (int i = 0; i < 40; ++i) {
            loop.submit("warm");
            loop.until_over();
        }
        dies_at = static_cast<int64_t>(loop.entries.size()) + 1;
        Entry* answered = loop.submit("answered");
        Entry* fatal = loop.submit("fatal");
        std::vector<Entry*> behind;
        for (int i = 0; i < 30; ++i) behind.push_back(loop.submit("behind"));
        CHECK_EQ(loop.lane->running(), 1u);
        CHECK(loop.lane->find(answered->ticket)->started_at.load() > 0);
        CHECK_EQ(loop.lane->find(fatal->ticket)->started_at.load(), 0);
        loop.until([&] { return loop.row(peers[0].id).state == ProcessState::died; });
        loop.drain();
        CHECK(answered->code == Code::ok && answered->is_over);
        CHECK(fatal->is_over && fatal->code == Code::worker_died);
        size_t not_run = 0, queued = 0;
        for (const Entry* entry : behind) {
            CHECK(!entry->is_over || entry->code == Code::not_run);
            ++(entry->is_over ? not_run : queued);
        }
        went_ahead = not_run > 0;
        CHECK(not_run < 16);  // no more than were ever sent ahead
        CHECK_EQ(loop.lane->queue_size(), queued);
        CHECK_EQ(loop.lane->running(), 0u);
        loop.lane->remove_worker(peers[0].id);
        peers.emplace_back(loop, plain_echo);
        loop.until_over();
        for (const Entry& entry : loop.entries) check_end(entry);
        loop.check_at_rest();
        loop.lane->close();
    }
}

TEST(in_multiplexed_mode_requests_overtake_one_another_and_all_of_them_run) {
    constexpr size_t in_flight_max = 4;
    forget_begun();
    std::atomic<bool> may_end{false};
    std::atomic<size_t> most{0};
    std::deque<Peer> peers;
    Loop loop;
    // The first request stays open until all others have been answered; of these always the newest is answered.
    peers.emplace_back(
        loop,
        [&, open = std::map<uint64_t, std::pair<uint64_t, std::string>>(), first = uint64_t{0},
         first_batch = uint64_t{0}](WorkerChannel& channel, const IncomingBatch& batch) mutable {
            begin(channel, batch);
            for (const IncomingItem& item : batch.items) {
                if (number_in(item.head) == 0)
                    first = item.ticket, first_batch = batch.id;
                else
                    open[item.ticket] = {batch.id, answer_to(number_in(item.head), body_of(channel, item))};
            }
            most = std::max(most.load(), open.size() + 1);
            if (open.size() < in_flight_max - 1) return true;
            while (!open.empty()) {
                const auto newest = std::prev(open.end());
                if (!channel.send(newest->second.first, {answer(newest->first, newest->second.second)})) return false;
                open.erase(newest);
            }
            if (!may_end) return true;
            return channel.send(first_batch, {answer(first, answer_to(0, "first"))});
        },
        in_flight_max);
    Entry* front = loop.submit("first");
    for (size_t i = 0; i < 20 * (in_flight_max - 1); ++i) loop.submit("x");
    CHECK(loop.lane->find(loop.entries[3].ticket)->started_at.load() > 0);    // though the first is before it
    CHECK_EQ(loop.lane->find(loop.entries[5].ticket)->started_at.load(), 0);  // no room yet
    loop.until([&] { return loop.over_count == loop.entries.size() - 1; });
    CHECK(!front->is_over);
    CHECK_EQ(loop.lane->running(), 0u);  // they need no permits
    CHECK(loop.row(peers[0].id).running_since > 0);
    may_end = true;
    for (size_t i = 0; i < in_flight_max - 1; ++i) loop.submit("x");
    loop.until_over();
    CHECK_EQ(most.load(), in_flight_max);
    for (const Entry& entry : loop.entries) check_ok(entry);
    loop.check_at_rest();
    CHECK_EQ(loop.row(peers[0].id).running_since, 0);
    loop.lane->close();
}

TEST(the_permit_of_a_removed_worker_goes_to_another) {
    forget_begun();
    Wire silent;
    std::deque<Peer> peers;
    Loop loop;
    loop.limit(1, 1, 0, 1);
    const uint32_t stuck = loop.add(silent);
    peers.emplace_back(loop, plain_echo);
    Entry* lost = loop.submit("stuck");
    Entry* waiting = loop.submit("waits for the permit");
    loop.turn(0);
    CHECK(!waiting->is_over);
    loop.lane->remove_worker(stuck);
    loop.until_over();
    CHECK(lost->code == Code::not_run && waiting->code == Code::ok);
    loop.lane->close();
}

TEST(a_batch_never_has_more_items_than_a_frame) {
    forget_begun();
    Wire wire;
    Loop loop(1 << 17);
    loop.limit(UINT32_MAX, UINT32_MAX, 0, UINT32_MAX);
    const size_t count = size_t{items_max} + 10;
    for (size_t i = 0; i < count; ++i) CHECK(loop.submit("") != nullptr);
    std::atomic<size_t> received{0};
    loop.add(wire);
    std::thread worker([&, channel = wire.channel()] {
        IncomingBatch batch;
        while (channel->receive(batch, 5000) == WorkerChannel::Got::batch) {
            channel->begin(batch.id);
            std::vector<OutgoingAnswer> answers;
            for (const IncomingItem& item : batch.items) answers.push_back(answer(item.ticket, ""));
            received += answers.size();
            CHECK(channel->send(batch.id, answers));
        }
    });
    loop.until_over();
    CHECK_EQ(received.load(), count);
    for (const Entry& entry : loop.entries) CHECK(entry.code == Code::ok);
    loop.lane->close();
    worker.join();
}

TEST(answers_that_fit_no_frame_are_refused_before_any_of_them_is_sent) {
    Wire wire;
    const auto channel = wire.channel();
    const std::string head(head_size_max + 1, 'x');
    for (const auto& answers : {std::vector<OutgoingAnswer>{{1, AnswerKind::answer, 200, head, {}}},
                                std::vector<OutgoingAnswer>(size_t{items_max} + 1)}) {
        bool refused = false;
        try {
            channel->send(1, answers);
        } catch (const std::length_error&) {
            refused = true;
        }
        CHECK(refused);
    }
    IncomingBatch batch;
    CHECK(channel->receive(batch, 0) == WorkerChannel::Got::timeout);
    char byte;
    CHECK(recv(wire.server, &byte, 1, MSG_DONTWAIT) < 0);
}

TEST_MAIN
