// What is tried with bytes of the wire from the other end, which may be hostile: of the libFuzzer target
// (tests/fuzz/frame_fuzz.cpp) and of the test that replays its corpus (frame_corpus_test.cpp).
//
// An input is a byte that says which end reads, a byte that says how the stream is cut, and the stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "frame.h"
#include "peers.h"

namespace frame_input {

using namespace pyserve;

// Larger streams would have to wait for their reader in the socket.
inline constexpr size_t stream_size_max = 1 << 14;

// Bytes with nothing behind them that may be read.
class Exact {
  public:
    explicit Exact(std::string_view bytes) : bytes_(new char[bytes.size()]), size_(bytes.size()) {
        if (size_ > 0) std::memcpy(bytes_.get(), bytes.data(), size_);
    }
    std::string_view view() const { return {bytes_.get(), size_}; }

  private:
    std::unique_ptr<char[]> bytes_;
    size_t size_;
};

inline bool is_inside(std::string_view part, std::string_view whole) {
    return part.empty() || (part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size());
}

// Whatever passes is inside of the frame, adds up to it, and points to no memory that cannot be.
template <class Head>
void check_parsed(const FrameHead& frame, std::string_view bytes) {
    const Exact content(bytes);
    std::vector<Part<Head>> parts;
    if (parse(frame, content.view(), parts) != nullptr) return;
    CHECK_EQ(parts.size(), size_t{frame.count});
    uint64_t size = parts.size() * sizeof(Head), in_memory = 0;
    for (const Part<Head>& part : parts) {
        CHECK(is_inside(part.text, content.view()) && is_inside(part.body, content.view()));
        CHECK_EQ(part.text.size(), size_t{part.head.head_size});
        size += part.text.size() + part.body.size();
        if (part.head.offset == in_frame) {
            CHECK_EQ(part.body.size(), part.head.body_size);
        } else {
            CHECK(part.body.empty());
            CHECK(part.head.body_size <= memory_size_max && part.head.offset <= memory_size_max - part.head.body_size);
            in_memory += part.head.body_size;
        }
    }
    CHECK_EQ(size, content.view().size());
    CHECK(in_memory <= memory_size_max);
}

struct Frames {
    std::vector<std::string> frames;  // head and content
    std::string problem;
};

// The frames of a stream that comes in pieces of `piece` bytes.
inline Frames frames_of(std::string_view stream, size_t piece) {
    Frames found;
    FrameBuffer buffer;
    while (!stream.empty()) {
        size_t room = 0;
        char* to = buffer.room(room);
        const size_t size = std::min({piece, room, stream.size()});
        CHECK(size > 0);
        std::memcpy(to, stream.data(), size);
        stream.remove_prefix(size);
        buffer.received(size);
        FrameHead head;
        std::string_view content;
        const char* problem = nullptr;
        while (buffer.peek(head, content, problem)) {
            CHECK(buffer.has_frame());
            std::string frame;
            append(frame, head);
            found.frames.push_back(frame.append(content));
            check_parsed<ItemHead>(head, content);
            check_parsed<AnswerHead>(head, content);
            buffer.take(head);
        }
        if (problem != nullptr) {
            found.problem = problem;
            break;
        }
        CHECK(!buffer.has_frame());
    }
    return found;
}

inline void check_buffer(std::string_view stream, size_t piece) {
    const Frames whole = frames_of(stream, SIZE_MAX), cut = frames_of(stream, piece);
    CHECK(whole.frames == cut.frames);
    CHECK(whole.problem == cut.problem);
}

// Writes what the socket takes at once, which is all unless the other end has closed.
inline void write_to(int socket, std::string_view bytes) {
    while (!bytes.empty()) {
        const ssize_t sent = send(socket, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent <= 0) return;
        bytes.remove_prefix(static_cast<size_t>(sent));
    }
}

// A worker's end reads the stream of a server, which then goes away.
inline void check_channel(std::string_view stream, size_t piece) {
    peers::Wire wire(8192, 8192);
    const auto channel = wire.channel();
    uint64_t ticket = 0;
    std::string body;
    const auto look = [&](WorkerChannel::Got& got) {
        IncomingBatch batch;
        while ((got = channel->receive(batch, 0)) == WorkerChannel::Got::batch) {
            for (const IncomingItem& item : batch.items) {
                ticket = item.ticket;
                CHECK(item.offset != in_frame || item.body.size() == item.body_size);
                if (item.offset == in_frame || item.body_size > (1 << 20)) continue;
                body.resize(item.body_size);
                // Only what lies in the memory can be read.
                const bool is_there = item.offset <= 8192 && item.body_size <= 8192 - item.offset;
                CHECK(channel->read_body(item, body.data()) == is_there || item.body_size == 0);
            }
            channel->begin(batch.id);
            const std::vector<OutgoingAnswer> answers(std::min<size_t>(batch.items.size(), 4),
                                                      {ticket, AnswerKind::answer, 200, "h", "body"});
            channel->send(batch.id, answers);
        }
    };
    WorkerChannel::Got got{};
    while (!stream.empty() && got != WorkerChannel::Got::closed) {
        write_to(wire.server, stream.substr(0, piece));
        stream.remove_prefix(std::min(piece, stream.size()));
        look(got);
    }
    channel->is_cancelled(ticket);
    close(std::exchange(wire.server, -1));
    look(got);
    CHECK(got == WorkerChannel::Got::closed);
    CHECK(!channel->send(1, {{ticket, AnswerKind::answer, 200, "h", "b"}}));
}

// A lane reads the stream of a worker that has a batch of two requests; a third one waits. The tickets and the batch's
// number are the same each time, so that an input can name them.
inline void check_lane(std::string_view stream, size_t piece) {
    peers::Wire wire(8192, 8192);
    peers::Loop loop(16);
    loop.limit(2, 2, INT64_MAX / 4);
    const uint32_t id = loop.add(wire);
    for (const char* body : {"a", "b", "c"}) loop.submit(body);
    while (!stream.empty()) {
        write_to(wire.worker, stream.substr(0, piece));
        stream.remove_prefix(std::min(piece, stream.size()));
        loop.turn(0);
    }
    close(std::exchange(wire.worker, -1));
    loop.until([&] { return loop.row(id).state == ProcessState::died; });
    CHECK(!loop.row(id).error.empty());
    loop.drain();
    CHECK_EQ(loop.lane->running(), 0u);
    loop.lane.reset();  // what waited for another worker comes back too
    loop.drain();
    CHECK_EQ(loop.over_count, loop.entries.size());  // each once: the loop counts
}

inline void check(std::string_view data) {
    if (data.size() < 2) return;
    const auto reader = static_cast<uint8_t>(data[0]);
    const size_t piece = size_t{1} + static_cast<uint8_t>(data[1]);
    const std::string_view stream = data.substr(2, stream_size_max);
    switch (reader % 3) {
        case 0: check_buffer(stream, piece); break;
        case 1: check_channel(stream, piece); break;
        default: check_lane(stream, piece);
    }
}

}  // namespace frame_input
