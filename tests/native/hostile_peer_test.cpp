// Peers that break the protocol, by mistake or on purpose: the lane ends such a worker, says why, and loses nothing; a
// worker takes such a server for gone.
#include <functional>
#include <optional>
#include <thread>

#include "peers.h"

using namespace peers;
using harness::Random;

namespace {

// The worker's end of a wire, byte by byte.
class RawPeer {
  public:
    explicit RawPeer(size_t answer_memory_size = 1 << 20) : wire(4096, answer_memory_size) {}

    // The next batch that was sent; the lane has sent it already.
    IncomingBatch batch() {
        if (!channel_) channel_ = std::make_unique<WorkerChannel>(wire.worker, wire.request_memory, wire.answer_memory);
        IncomingBatch got;
        CHECK(channel_->receive(got, 0) == WorkerChannel::Got::batch);
        return got;
    }
    // Writes what the socket takes at once.
    void write(std::string_view bytes) const {
        while (!bytes.empty()) {
            const ssize_t sent = send(wire.worker, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
            if (sent <= 0) return;
            bytes.remove_prefix(static_cast<size_t>(sent));
        }
    }
    void hang_up() {
        channel_.reset();
        close(std::exchange(wire.worker, -1));
    }

    Wire wire;

  private:
    std::unique_ptr<WorkerChannel> channel_;
};

struct Answer {
    uint64_t ticket;
    std::string body;
    AnswerKind kind = AnswerKind::answer;
    uint64_t offset = in_frame;
    uint64_t size_in_memory = 0;
};

std::string frame_of(uint64_t batch, const std::vector<Answer>& answers, FrameType type = FrameType::answers) {
    std::string heads, rest;
    for (const Answer& answer : answers) {
        AnswerHead head;
        head.ticket = answer.ticket;
        head.kind = answer.kind;
        head.status = 200;
        head.head_size = 2;
        head.offset = answer.offset;
        head.body_size = answer.offset == in_frame ? answer.body.size() : answer.size_in_memory;
        append(heads, head);
        rest += "OK";
        if (answer.offset == in_frame) rest += answer.body;
    }
    FrameHead frame;
    frame.type = type;
    frame.batch = batch;
    frame.count = static_cast<uint32_t>(answers.size());
    frame.size = heads.size() + rest.size();
    std::string out;
    append(out, frame);
    return out + heads + rest;
}

// Changes some of the bytes, most of them in numbers.
void mutate(std::string& bytes, Random& random) {
    static const std::vector<uint64_t> edges = {0,
                                                1,
                                                2,
                                                3,
                                                16,
                                                31,
                                                33,
                                                4096,
                                                65536,
                                                items_max + uint64_t{1},
                                                head_size_max + 1,
                                                frame_size_max,
                                                memory_size_max,
                                                UINT32_MAX,
                                                uint64_t{1} << 63,
                                                UINT64_MAX};
    for (size_t changes = random.below(4); changes > 0 && !bytes.empty(); --changes) {
        const size_t at = random.below(std::min<size_t>(bytes.size(), random.chance(80) ? 96 : SIZE_MAX));
        const uint64_t value = random.chance(50) ? random.pick(edges) : random.next();
        const size_t size = size_t{1} << random.below(4);
        std::memcpy(bytes.data() + at, &value, std::min(size, bytes.size() - at));
    }
    if (random.chance(15)) bytes.resize(random.below(bytes.size() + 1));
    if (random.chance(10)) bytes.insert(random.below(bytes.size() + 1), "\0junk\xff", 6);
}

// A lane whose only worker has two requests in one batch, and a third request is queued.
struct Stage {
    explicit Stage(size_t in_flight_max = 0, size_t answer_memory_size = 1 << 20) : peer(answer_memory_size) {
        loop.limit(2, 2, INT64_MAX / 4);
        id = loop.add(peer.wire, in_flight_max);
        loop.submit("a");
        loop.submit("b");
        loop.submit("c");
        batch = peer.batch();
        CHECK_EQ(batch.items.size(), 2u);
    }
    uint64_t ticket(size_t i) const { return loop.entries[i].ticket; }

    // The worker is ended for `error`, and what it had was run in vain.
    void check_dead(std::string_view error) {
        channel_begin();
        loop.until([&] { return loop.row(id).state != ProcessState::ready; });
        const ProcessWorkerRow row = loop.row(id);
        CHECK(row.state == ProcessState::died);
        if (row.error.find(error) == std::string::npos) {
            harness::fail(__FILE__, __LINE__, ("'" + row.error + "' is not '" + std::string(error) + "'").c_str());
        }
        loop.drain();
        for (size_t i = 0; i < 2; ++i) {
            CHECK(loop.entries[i].is_over);
            CHECK(loop.entries[i].code == Code::worker_died || loop.entries[i].code == Code::ok);
        }
        CHECK(!loop.entries[2].is_over);  // for another worker
        CHECK_EQ(loop.lane->queue_size(), 1u);
        CHECK_EQ(loop.lane->running(), 0u);
        CHECK_EQ(loop.lane->ready_count(), 0u);
        // The other end sees it too.
        char byte;
        ssize_t got;
        while ((got = recv(peer.wire.worker, &byte, 1, MSG_DONTWAIT)) > 0) {
        }
        CHECK(got == 0 || errno != EAGAIN);
    }
    void channel_begin() const {
        const WorkerNotes notes{batch.id};
        CHECK(pwrite(peer.wire.answer_memory, &notes, sizeof notes, 0) == sizeof notes);
    }

    RawPeer peer;
    Loop loop;
    uint32_t id;
    IncomingBatch batch;
};

void check_refused(std::string_view error, const std::function<std::string(Stage&)>& bytes_of) {
    Stage stage;
    stage.channel_begin();
    stage.peer.write(bytes_of(stage));
    stage.check_dead(error);
}

}  // namespace

TEST(each_breach_of_the_protocol_ends_the_worker_and_says_why) {
    check_refused("bytes that are no frame", [](Stage&) { return std::string(64, 'x'); });
    check_refused("of a type that workers do not send",
                  [](Stage& s) { return frame_of(s.batch.id, {}, FrameType::batch); });
    check_refused("of a type", [](Stage& s) { return frame_of(s.batch.id, {}, static_cast<FrameType>(999)); });
    check_refused("a batch that it does not have",
                  [](Stage& s) { return frame_of(s.batch.id + 1, {{s.ticket(0), "a"}}); });
    check_refused("a batch that it does not have", [](Stage& s) {  // the same answers twice
        const std::string all = frame_of(s.batch.id, {{s.ticket(0), "a"}, {s.ticket(1), "b"}});
        return all + all;
    });
    check_refused("a request that it does not have",
                  [](Stage& s) { return frame_of(s.batch.id, {{s.ticket(2), "c"}}); });
    check_refused("a request that it does not have",
                  [](Stage& s) { return frame_of(s.batch.id, {{s.ticket(0), "a"}, {s.ticket(0), "a"}}); });
    check_refused("a request that it does not have", [](Stage& s) {
        return frame_of(s.batch.id, {{s.ticket(0), "a"}}) + frame_of(s.batch.id, {{s.ticket(0), "again"}});
    });
    check_refused("a request that it does not have", [](Stage& s) {  // a part after the last
        return frame_of(s.batch.id, {{s.ticket(0), "end", AnswerKind::last}, {s.ticket(0), "more", AnswerKind::chunk}});
    });
    check_refused("of an unknown kind",
                  [](Stage& s) { return frame_of(s.batch.id, {{s.ticket(0), "a", static_cast<AnswerKind>(4)}}); });
    check_refused("a frame that is too large", [](Stage& s) {
        std::string bytes = frame_of(s.batch.id, {});
        const uint64_t size = frame_size_max + 1;
        std::memcpy(bytes.data() + 24, &size, sizeof size);
        return bytes;
    });
    check_refused("not in its memory", [](Stage& s) {
        return frame_of(s.batch.id, {{s.ticket(0), "", AnswerKind::answer, 4096, 1 << 20}});
    });
    check_refused("beyond the end", [](Stage& s) {
        return frame_of(s.batch.id, {{s.ticket(0), "", AnswerKind::answer, UINT64_MAX - 10, 100}});
    });
    check_refused("not in its memory", [](Stage& s) {  // cut short after it was written
        CHECK(ftruncate(s.peer.wire.answer_memory, 5000) == 0);
        return frame_of(s.batch.id, {{s.ticket(0), "", AnswerKind::answer, 4096, 60'000}});
    });
    check_refused("larger than the memory", [](Stage& s) {
        return frame_of(s.batch.id, {{s.ticket(0), "", AnswerKind::chunk, 0, memory_size_max},
                                     {s.ticket(0), "", AnswerKind::chunk, 0, memory_size_max}});
    });
}

TEST(answers_before_the_breach_count_and_the_rest_of_the_batch_is_lost) {
    Stage stage;
    stage.channel_begin();
    stage.peer.write(frame_of(stage.batch.id, {{stage.ticket(1), "good"}, {stage.ticket(2), "stolen"}}));
    stage.check_dead("a request that it does not have");
    CHECK(stage.loop.entries[1].code == Code::ok && stage.loop.entries[1].answer.body == "good");
    CHECK(stage.loop.entries[0].code == Code::worker_died);
}

TEST(answers_for_a_request_of_another_batch_are_refused) {
    RawPeer peer;
    Loop loop;
    const uint32_t id = loop.add(peer.wire, 4);  // multiplexed: two batches at once
    loop.submit("a");
    loop.submit("b");
    const uint64_t first = peer.batch().id;
    CHECK_EQ(peer.batch().id, first + 1);
    peer.write(frame_of(first, {{loop.entries[1].ticket, "b"}}));
    loop.until([&] { return loop.row(id).state == ProcessState::died; });
    loop.until_over();
    for (const Entry& entry : loop.entries) CHECK(entry.code == Code::not_begun);  // its notes say so
}

TEST(a_memory_without_notes_means_that_all_may_have_begun) {
    Stage stage;
    CHECK(ftruncate(stage.peer.wire.answer_memory, 0) == 0);
    stage.peer.hang_up();
    stage.loop.until([&] { return stage.loop.row(stage.id).state == ProcessState::died; });
    stage.loop.drain();
    CHECK(stage.loop.entries[0].code == Code::worker_died && stage.loop.entries[0].is_over);
}

TEST(a_worker_that_reads_no_more_is_dead_though_it_does_not_hang_up) {
    RawPeer peer;
    Loop loop;
    const uint32_t id = loop.add(peer.wire);
    CHECK(shutdown(peer.wire.worker, SHUT_RD) == 0);
    Entry* entry = loop.submit("a");
    loop.until([&] { return entry->is_over; });
    CHECK(entry->code == Code::not_run);
    CHECK(loop.row(id).state == ProcessState::died);
}

TEST(a_worker_that_does_not_read_holds_nothing_up_and_its_end_is_seen) {
    RawPeer stuck, quick;
    Loop loop;
    const uint32_t id = loop.add(stuck.wire);
    // More than its socket takes: in the frame, as the memory cannot be written.
    CHECK(fcntl(stuck.wire.request_memory, F_ADD_SEALS, F_SEAL_WRITE) == 0);
    Entry* large = loop.submit(std::string(5'000'000, 'x'));
    loop.turn(0);
    loop.add(quick.wire);
    Entry* small = loop.submit("a");
    quick.write(frame_of(quick.batch().id, {{small->ticket, "done"}}));
    loop.until([&] { return small->is_over; });
    CHECK(small->code == Code::ok && !large->is_over);
    loop.lane->stop_worker(id);  // it has something, so it goes on
    stuck.hang_up();
    loop.until([&] { return large->is_over; });
    CHECK(large->code == Code::not_run && loop.row(id).state == ProcessState::died);
}

TEST(a_worker_that_sends_without_end_does_not_keep_the_loop) {
    Stage stage;
    std::atomic<bool> is_over{false};
    std::thread flood([&] {
        const std::string bytes = frame_of(stage.batch.id, {});
        while (!is_over) stage.peer.write(bytes);
    });
    for (int i = 0; i < 50; ++i) stage.loop.turn(20);  // each comes back
    CHECK(stage.loop.row(stage.id).state == ProcessState::ready);
    stage.loop.lane->remove_worker(stage.id);
    is_over = true;
    flood.join();
    stage.loop.drain();
    CHECK(stage.loop.entries[0].code == Code::not_begun);
}

TEST(whatever_a_worker_sends_every_request_comes_back_once) {
    harness::for_each_seed(2500, [](uint64_t seed) {
        Random random(seed);
        Stage stage(random.chance(30) ? 2 : 0, 4096 + random.below(20'000));
        if (random.chance(50)) stage.channel_begin();
        std::string bytes;
        if (random.chance(10)) {
            bytes.resize(random.below(300));
            for (char& c : bytes) c = static_cast<char>(random.next());
        } else {
            std::vector<Answer> answers;
            for (size_t count = random.below(4); count > 0; --count) {
                Answer answer{stage.ticket(random.below(random.chance(90) ? 2 : 3)),
                              std::string(random.below(50), 'a')};
                answer.kind = static_cast<AnswerKind>(random.below(4));
                if (random.chance(30))
                    answer.offset = random.below(30'000), answer.size_in_memory = random.below(10'000);
                answers.push_back(std::move(answer));
            }
            bytes = frame_of(stage.batch.id, answers);
            mutate(bytes, random);
            if (random.chance(50)) bytes += frame_of(stage.batch.id, {{stage.ticket(0), "a"}, {stage.ticket(1), "b"}});
        }
        if (random.chance(20))
            CHECK(ftruncate(stage.peer.wire.answer_memory, static_cast<off_t>(random.below(20'000))) == 0);
        stage.peer.write(bytes);
        if (random.chance(30)) stage.loop.turn(0);
        stage.peer.hang_up();
        stage.loop.until([&] { return stage.loop.row(stage.id).state == ProcessState::died; });
        CHECK(!stage.loop.row(stage.id).error.empty());
        stage.loop.drain();
        for (size_t i = 0; i < 2; ++i) CHECK(stage.loop.entries[i].is_over);
        for (const Entry& entry : stage.loop.entries) {
            if (entry.is_over)
                CHECK(entry.code == Code::ok || entry.code == Code::worker_died || entry.code == Code::not_begun ||
                      entry.code == Code::not_run);
        }
        CHECK_EQ(stage.loop.lane->running(), 0u);
        CHECK_EQ(stage.loop.lane->ready_count(), 0u);
    });
}

TEST(a_worker_reads_nothing_beyond_what_a_wrong_server_sent_and_ends) {
    harness::for_each_seed(3000, [](uint64_t seed) {
        Random random(seed);
        Wire wire(4096 + random.below(10'000));
        const auto channel = wire.channel();
        std::string bytes;
        for (size_t frames = 1 + random.below(3); frames > 0; --frames) {
            std::string frame;
            ItemHead item;
            item.ticket = random.next();
            item.head_size = 2;
            item.body_size = random.below(3000);
            if (random.chance(50)) item.offset = random.below(20'000);
            FrameHead head;
            static const std::vector<FrameType> types = {FrameType::batch,  FrameType::batch,  FrameType::batch,
                                                         FrameType::cancel, FrameType::copied, FrameType::answers};
            head.type = random.pick(types);
            head.count = 1;
            head.size = sizeof item + 2 + (item.offset == in_frame ? item.body_size : 0);
            append(frame, head);
            append(frame, item);
            frame += "OK" + std::string(item.offset == in_frame ? item.body_size : 0, 'b');
            mutate(frame, random);
            bytes += frame;
        }
        CHECK(send(wire.server, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()));
        if (random.chance(30)) CHECK(ftruncate(wire.request_memory, static_cast<off_t>(random.below(4096))) == 0);
        IncomingBatch batch;
        WorkerChannel::Got got;
        while ((got = channel->receive(batch, 0)) == WorkerChannel::Got::batch) {
            for (const IncomingItem& item : batch.items) {
                if (item.offset == in_frame) {
                    CHECK_EQ(item.body.size(), item.body_size);
                    continue;
                }
                CHECK(item.body.empty() && item.body_size <= memory_size_max);
                if (item.body_size > 100'000) continue;  // would be there only if the memory were
                std::vector<char> body(item.body_size);
                const off_t end = lseek(wire.request_memory, 0, SEEK_END);
                const bool is_there = item.body_size == 0 || item.offset + item.body_size <= static_cast<uint64_t>(end);
                CHECK_EQ(channel->read_body(item, body.data()), is_there);
            }
        }
        // Whatever came: once the server has gone there is an end.
        close(std::exchange(wire.server, -1));
        while ((got = channel->receive(batch, -1)) == WorkerChannel::Got::batch) {
        }
        CHECK(got == WorkerChannel::Got::closed);
        CHECK(channel->is_cancelled(1));  // nobody waits for anything
        CHECK(!channel->send(1, {}));
    });
}

TEST(what_waits_in_a_worker_is_not_begun_once_the_server_has_gone) {
    Loop loop;
    auto wire = std::make_unique<Wire>();
    const auto channel = wire->channel();
    loop.add(*wire, 4);
    wire.reset();
    for (int i = 0; i < 3; ++i) loop.submit("x");
    IncomingBatch batch;
    CHECK(channel->receive(batch, -1) == WorkerChannel::Got::batch);
    loop.lane->join();  // the others come back and may run elsewhere
    CHECK(channel->is_cancelled(batch.items[0].ticket));
    CHECK(channel->receive(batch, -1) == WorkerChannel::Got::closed);
    loop.drain();
    loop.check_at_rest();
}

TEST(a_channel_or_a_worker_of_wrong_descriptors_leaves_nothing_open) {
    Wire wire;
    const size_t before = open_descriptors();
    Wire small(4096, 100);
    const size_t with_small = open_descriptors();
    Loop loop;
    const size_t with_loop = open_descriptors();
    const auto throws = [](const std::function<void()>& call) {
        try {
            call();
        } catch (const std::system_error&) {
            return true;
        }
        return false;
    };
    CHECK(with_small > before);
    CHECK(throws([&] { WorkerChannel(wire.worker, wire.request_memory, -1); }));
    CHECK(throws([&] { WorkerChannel(small.worker, small.request_memory, small.answer_memory); }));
    CHECK(throws([&] { loop.lane->add_worker(wire.server, -1, wire.answer_memory, 0); }));
    CHECK(throws(
        [&] { loop.lane->add_worker(wire.request_memory, wire.request_memory, wire.answer_memory, 0); }));  // no epoll
    CHECK_EQ(loop.lane->ready_count(), 0u);
    CHECK_EQ(open_descriptors(), with_loop);
}

TEST_MAIN
