// Second runs: of the requests that a worker died with, those that may not have been the cause are run once more, by
// themselves, so that only the one at fault fails; wherever the worker was when it died.
#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <set>
#include <string>

#include "peers.h"

using namespace peers;
using harness::Random;

namespace {

constexpr size_t numbers_max = 4096;

// How often the request of this number was handed to a handler.
std::array<std::atomic<int>, numbers_max> runs;
// Workers that have a second run now.
std::atomic<int> rerunning;

void forget_runs() {
    for (auto& each : runs) each = 0;
    rerunning = 0;
}

enum class Moment { unread, read_in_part, taken, begun, computed, answered_in_part, answered_first, answered };

std::string frame_of(uint64_t batch, const std::vector<OutgoingAnswer>& answers) {
    std::string heads, rest;
    for (const OutgoingAnswer& each : answers) {
        AnswerHead head;
        head.ticket = each.ticket;
        head.kind = each.kind;
        head.status = each.status;
        head.head_size = static_cast<uint32_t>(each.head.size());
        head.body_size = each.body.size();
        append(heads, head);
        rest += each.head;
        rest += each.body;
    }
    FrameHead frame;
    frame.type = FrameType::answers;
    frame.batch = batch;
    frame.count = static_cast<uint32_t>(answers.size());
    frame.size = heads.size() + rest.size();
    std::string out;
    append(out, frame);
    return out + heads + rest;
}

// Handles a batch up to `end` and dies there; false.
bool die_at(Moment end, WorkerChannel& channel, const IncomingBatch& batch) {
    if (end <= Moment::taken) return false;
    channel.begin(batch.id);
    std::vector<std::string> bodies;
    for (const IncomingItem& item : batch.items) {
        const auto number = static_cast<size_t>(number_in(item.head));
        ++runs[number];
        bodies.push_back(answer_to(number_in(item.head), body_of(channel, item)));
    }
    if (end <= Moment::computed) return false;
    std::vector<OutgoingAnswer> answers;
    for (size_t i = 0; i < bodies.size(); ++i) answers.push_back(answer(batch.items[i].ticket, bodies[i]));
    std::string bytes = frame_of(batch.id, answers);
    if (end == Moment::answered_first) bytes = frame_of(batch.id, {answers[0]});
    if (end == Moment::answered_in_part) bytes.resize(bytes.size() - 1);
    CHECK_EQ(send(channel.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
    return false;
}

bool is_rerun(const IncomingBatch& batch) { return (batch.items[0].flags & rerun_flag) != 0; }

// Answers all of a batch, and counts its requests' runs.
bool echo(WorkerChannel& channel, const IncomingBatch& batch) {
    const bool again = is_rerun(batch);
    if (again) CHECK_EQ(++rerunning, 1);
    channel.begin(batch.id);
    std::vector<std::string> bodies;
    std::vector<OutgoingAnswer> answers;
    for (const IncomingItem& item : batch.items) {
        ++runs[static_cast<size_t>(number_in(item.head))];
        bodies.push_back(answer_to(number_in(item.head), body_of(channel, item)));
    }
    for (size_t i = 0; i < bodies.size(); ++i) answers.push_back(answer(batch.items[i].ticket, bodies[i]));
    if (again) --rerunning;
    return channel.send(batch.id, answers);
}

void bury(Loop& loop) {
    for (const ProcessWorkerRow& row : loop.lane->workers()) {
        if (row.state != ProcessState::ready) loop.lane->remove_worker(row.id);
    }
}

void check_answer(const Entry& entry) {
    CHECK(entry.is_over && entry.code == Code::ok);
    CHECK(entry.answer.body == answer_to(entry.number, entry.body));
}

}  // namespace

TEST(wherever_a_worker_dies_its_batch_is_answered_once_and_each_runs_at_most_twice) {
    for (const Moment moment : {Moment::unread, Moment::read_in_part, Moment::taken, Moment::begun, Moment::computed,
                                Moment::answered_in_part, Moment::answered_first, Moment::answered}) {
        for (const size_t in_flight_max : {size_t{0}, size_t{16}}) {
            forget_runs();
            constexpr size_t count = 4;
            std::deque<Peer> peers;
            Loop loop;
            loop.runs_again = true;
            loop.limit(count, count, 3'600'000'000'000);
            Wire silent(1 << 20, 1 << 20, false);
            if (moment <= Moment::read_in_part)
                loop.add(silent, in_flight_max);
            else
                peers.emplace_back(
                    loop, [=](auto& channel, auto& batch) { return die_at(moment, channel, batch); }, in_flight_max);
            for (size_t i = 0; i < count; ++i) loop.submit(std::string(i == 0 ? 6000 : 10, 'x'));
            if (moment == Moment::read_in_part) {
                char bytes[100];
                CHECK_EQ(recv(silent.worker, bytes, sizeof bytes, 0), static_cast<ssize_t>(sizeof bytes));
            }
            if (moment <= Moment::read_in_part) close(std::exchange(silent.worker, -1));
            loop.until([&] { return loop.lane->ready_count() == 0; });
            loop.drain();
            const size_t answered = moment == Moment::answered ? count : moment == Moment::answered_first ? 1 : 0;
            CHECK_EQ(loop.over_count, answered);
            CHECK_EQ(loop.lane->queue_size(), count - answered);
            CHECK_EQ(loop.lane->running(), 0u);
            bury(loop);
            // What may run again alone does not wait for a full batch.
            peers.emplace_back(loop, echo, in_flight_max);
            loop.until_over();
            for (size_t i = 0; i < count; ++i) {
                const Entry& entry = loop.entries[i];
                check_answer(entry);
                CHECK_EQ(runs[i].load(), moment <= Moment::taken || i < answered ? 1 : 2);
                const bool is_alone = i >= answered && moment >= Moment::taken;
                CHECK_EQ(entry.batch_size, is_alone ? 1u : static_cast<uint32_t>(count));
                CHECK_EQ((entry.flags & rerun_flag) != 0, is_alone);
            }
            loop.check_at_rest();
            loop.lane->close();
        }
    }
}

TEST(only_the_request_that_ends_its_worker_fails_and_costs_one_worker_more) {
    harness::for_each_seed(60, [](uint64_t seed) {
        forget_runs();
        Random random(seed);
        std::deque<Peer> peers;
        Loop loop(1024);  // room for all: one that was not run is submitted again
        loop.runs_again = true;
        const bool is_multiplexed = random.chance(30);
        const size_t workers = 1 + random.below(3), count = 300;
        loop.limit(1 + static_cast<uint32_t>(random.below(9)));
        std::set<int64_t> poison;
        for (size_t i = 0; i < 6; ++i) poison.insert(static_cast<int64_t>(random.below(count)));
        size_t deaths = 0;
        const auto handle = [&](WorkerChannel& channel, const IncomingBatch& batch) {
            if (is_rerun(batch)) CHECK_EQ(batch.items.size(), 1u);
            for (const IncomingItem& item : batch.items) {
                if (poison.contains(number_in(item.head))) return die_at(Moment::computed, channel, batch);
            }
            return echo(channel, batch);
        };
        while (loop.over_count < count) {
            for (const ProcessWorkerRow& row : loop.lane->workers()) deaths += row.state == ProcessState::died;
            bury(loop);
            while (loop.lane->ready_count() < workers)
                peers.emplace_back(loop, handle, is_multiplexed ? 1 + random.below(20) : 0);
            for (size_t burst = random.below(40); burst > 0 && loop.entries.size() < count; --burst)
                loop.submit(std::string(random.chance(10) ? 5000 : 3, 'x'));
            loop.turn(random.chance(50) ? 0 : 5);
        }
        loop.check_at_rest();
        for (const Entry& entry : loop.entries) {
            const bool is_guilty = poison.contains(entry.number);
            CHECK(entry.code == (is_guilty ? Code::worker_died : Code::ok));
            if (is_guilty) CHECK(entry.was_alone);
            if (!is_guilty) check_answer(entry);
            CHECK(runs[static_cast<size_t>(entry.number)] <= 2);
        }
        CHECK(deaths <= 2 * poison.size());
        loop.lane->close();
    });
}

TEST(whenever_workers_die_and_clients_leave_each_request_ends_once_and_runs_at_most_twice) {
    harness::for_each_seed(60, [](uint64_t seed) {
        forget_runs();
        Random random(seed);
        const size_t descriptors = open_descriptors();
        {
            std::deque<Peer> peers;
            Loop loop(1024);  // room for all: one that was not run is submitted again
            loop.runs_again = true;
            loop.group_size = 1 + random.below(4);
            const bool is_multiplexed = random.chance(40);
            const size_t workers = 1 + random.below(3), count = 500;
            loop.limit(1 + static_cast<uint32_t>(random.below(9)), 1 + static_cast<uint32_t>(random.below(4)),
                       random.between(0, 200'000),
                       random.chance(50) ? UINT32_MAX : 1 + static_cast<uint32_t>(random.below(2)));
            const auto hire = [&] {
                const auto handle = [own = Random(random.next())](WorkerChannel& channel,
                                                                  const IncomingBatch& batch) mutable {
                    if (own.chance(8)) return die_at(static_cast<Moment>(2 + own.below(6)), channel, batch);
                    return echo(channel, batch);
                };
                peers.emplace_back(loop, handle, is_multiplexed ? 1 + random.below(20) : 0);
            };
            while (loop.over_count < count) {
                bury(loop);
                while (loop.lane->ready_count() < workers) hire();
                for (size_t burst = random.below(40); burst > 0 && loop.entries.size() < count; --burst) {
                    const bool expires = random.chance(5);
                    if (loop.submit(std::string(random.chance(10) ? random.below(20'000) : 9, 'x'),
                                    expires ? SteadyClock::now_ns() + random.between(-5, 300'000) : never_ns) ==
                        nullptr)
                        break;
                    if (random.chance(5)) loop.lane->cancel(loop.entries[random.below(loop.entries.size())].ticket);
                }
                if (random.chance(5)) loop.lane->purge();
                loop.turn(random.chance(50) ? 0 : 5);
            }
            loop.check_at_rest();
            for (const Entry& entry : loop.entries) {
                CHECK(runs[static_cast<size_t>(entry.number)] <= 2);
                if (entry.state == State::done && entry.code == Code::ok) check_answer(entry);
                if (entry.state == State::expired && (entry.flags & rerun_flag) == 0)
                    CHECK_EQ(runs[static_cast<size_t>(entry.number)].load(), 0);
            }
            loop.lane->close();
            CHECK_EQ(loop.lane->ready_count(), 0u);
            loop.lane->join();
        }
        CHECK_EQ(open_descriptors(), descriptors);
    });
}

TEST(the_last_batch_begun_is_the_one_at_fault_and_those_before_it_run_again) {
    // How much goes ahead follows from how quick the worker is, so it is tried until all three went.
    for (bool went_ahead = false; !went_ahead;) {
        forget_runs();
        std::deque<Peer> peers;
        Loop loop;
        loop.runs_again = true;
        Wire wire;
        loop.add(wire);
        auto channel = wire.channel();
        IncomingBatch batch;
        const auto answer_next = [&] {
            CHECK(channel->receive(batch, -1) == WorkerChannel::Got::batch);
            echo(*channel, batch);
        };
        for (int i = 0; i < 40; ++i) {
            loop.submit("warm");
            answer_next();
            CHECK(channel->receive(batch, 0) == WorkerChannel::Got::timeout);  // what was sent leaves
            loop.until_over();
        }
        loop.submit("front");
        Entry* lost = loop.submit("answer lost");
        Entry* fatal = loop.submit("fatal");
        Entry* behind = loop.submit("behind");
        answer_next();
        CHECK(channel->receive(batch, 0) == WorkerChannel::Got::timeout);
        loop.until([&] { return loop.lane->queue_size() < 3; });  // at least the next is sent when that answer comes
        went_ahead = loop.lane->queue_size() == 0;
        if (went_ahead) {
            // Its answers wait in the worker for those of the next batch, and die with it.
            for (const Entry* each : {lost, fatal}) {
                CHECK(channel->receive(batch, -1) == WorkerChannel::Got::batch);
                CHECK_EQ(number_in(batch.items[0].head), each->number);
                ++runs[static_cast<size_t>(each->number)];
                channel->begin(batch.id);
            }
        }
        channel.reset();
        loop.until([&] { return loop.lane->ready_count() == 0; });
        loop.drain();
        if (went_ahead) {
            CHECK(fatal->is_over && fatal->code == Code::worker_died && fatal->was_alone);
            CHECK(!lost->is_over && !lost->was_alone && (lost->flags & rerun_flag) != 0);
            CHECK(!behind->is_over && (behind->flags & rerun_flag) == 0);
        }
        bury(loop);
        peers.emplace_back(loop, echo);
        loop.until_over();
        check_answer(*behind);
        if (went_ahead) {
            check_answer(*lost);
            CHECK_EQ(runs[static_cast<size_t>(lost->number)].load(), 2);
        }
        loop.check_at_rest();
        loop.lane->close();
    }
}

TEST(second_runs_go_one_at_a_time_while_others_are_served) {
    forget_runs();
    std::atomic<bool> may_go{false};
    std::deque<Peer> peers;
    Loop loop;
    loop.limit(4);
    const auto handle = [&](WorkerChannel& channel, const IncomingBatch& batch) {
        if (is_rerun(batch)) may_go.wait(false);
        return echo(channel, batch);
    };
    std::vector<Entry*> suspects;
    for (uint32_t i = 0; i < 3; ++i)
        suspects.push_back(loop.submit("suspect", never_ns, rerun_flag | i << rerun_group_shift));
    for (int i = 0; i < 3; ++i) peers.emplace_back(loop, handle);
    loop.until([&] { return loop.lane->find(suspects[0]->ticket)->started_at != 0; });
    for (int i = 0; i < 20; ++i) loop.submit("other");
    loop.until([&] { return loop.over_count == 20; });
    for (const Entry* suspect : suspects) CHECK(!suspect->is_over);
    CHECK_EQ(loop.lane->queue_size(), 2u);
    may_go = true;
    may_go.notify_all();
    loop.until_over();
    for (const Entry& entry : loop.entries) check_answer(entry);
    loop.check_at_rest();
    loop.lane->close();
}

TEST(a_single_worker_takes_second_runs_and_others_in_turn) {
    forget_runs();
    std::vector<std::string> order;
    std::deque<Peer> peers;
    {
        Loop loop;
        for (uint32_t i = 0; i < 3; ++i) loop.submit("again", never_ns, rerun_flag | i << rerun_group_shift);
        for (int i = 0; i < 3; ++i) loop.submit("other");
        peers.emplace_back(loop, [&](WorkerChannel& channel, const IncomingBatch& batch) {
            order.push_back(body_of(channel, batch.items[0]));
            return echo(channel, batch);
        });
        loop.until_over();
        loop.lane->close();
    }
    peers.clear();
    CHECK(order == (std::vector<std::string>{"again", "other", "again", "other", "again", "other"}));
}

TEST(a_group_runs_together_and_by_itself_and_late_or_cancelled_ones_never) {
    for (const size_t in_flight_max : {size_t{0}, size_t{16}}) {
        forget_runs();
        std::vector<size_t> sizes;
        std::deque<Peer> peers;
        {
            Loop loop;
            const auto group = [](uint32_t number) { return rerun_flag | number << rerun_group_shift; };
            Entry* late = loop.submit("late", SteadyClock::now_ns() - 1, group(0));
            for (int i = 0; i < 3; ++i) loop.submit("first", never_ns, group(0));
            Entry* gone = loop.submit("gone", never_ns, group(0));
            CHECK(loop.lane->cancel(gone->ticket));
            for (int i = 0; i < 2; ++i) loop.submit("second", never_ns, group(0xffff));
            Entry* purged = loop.submit("purged", never_ns, group(2));
            CHECK(loop.lane->cancel(purged->ticket));
            CHECK_EQ(loop.lane->queue_size(), 8u);
            loop.lane->purge();
            loop.drain();
            CHECK_EQ(loop.lane->queue_size(), 6u);
            CHECK(purged->is_over && gone->is_over && !late->is_over);
            loop.submit("other");
            peers.emplace_back(
                loop,
                [&](WorkerChannel& channel, const IncomingBatch& batch) {
                    sizes.push_back(batch.items.size());
                    return echo(channel, batch);
                },
                in_flight_max);
            loop.until_over();
            CHECK(late->state == State::expired && gone->state == State::cancelled);
            CHECK_EQ(runs[static_cast<size_t>(late->number)].load(), 0);
            loop.check_at_rest();
            loop.lane->close();
        }
        peers.clear();
        CHECK(sizes == (in_flight_max > 0 ? std::vector<size_t>{3, 2, 1} : std::vector<size_t>{3, 1, 2}));
    }
}

TEST(a_closed_lane_finishes_second_runs_and_a_joined_one_hands_them_back) {
    for (const bool is_joined : {false, true}) {
        forget_runs();
        std::deque<Peer> peers;
        Loop loop;
        for (uint32_t i = 0; i < 3; ++i) loop.submit("again", never_ns, rerun_flag | i << rerun_group_shift);
        loop.lane->close();
        if (is_joined) {
            loop.lane->join();
            loop.drain();
            for (const Entry& entry : loop.entries) CHECK(entry.is_over && entry.state == State::cancelled);
            continue;
        }
        for (int i = 0; i < 2; ++i) peers.emplace_back(loop, echo);
        loop.until_over();
        for (const Entry& entry : loop.entries) check_answer(entry);
        loop.until([&] { return loop.lane->ready_count() == 0; });  // and the workers end
    }
}

TEST_MAIN
