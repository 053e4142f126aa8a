// A ring of frames in memory that a front end and the engine process share: one of them writes, the other reads.
//
//     memory = RingState, then `size` bytes, a power of two; counters only grow, byte i lies at i & (size - 1)
//     frame  = RingFrame, then the head, then the body, filled up to a multiple of 8
//
// A message whose body is longer than its first frame says so in `total`; frames of kind ring_more with its ticket
// bring the rest, between frames of other messages. Any other frame with that ticket takes it back.
//
// Each end takes the other for hostile. What it has to know of itself it keeps in memory of its own; the other end's
// counter is read once and checked, and a frame's numbers are copied out before they are looked at. A ring that is
// wrong is not read on. The memory is sealed against being cut short, so that no access can fail.
//
// Sleeping: a reader that finds nothing says so in `reader_sleeps` and looks once more; a writer that has published
// looks there. Both orders are sequentially consistent, so one of them sees the other. The same the other way round
// with a writer that finds no room.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace pyserve {

static_assert(std::endian::native == std::endian::little, "frames are little-endian");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "the counters are shared between processes");

inline constexpr uint32_t ring_magic = 0x46565350;  // "PSVF"
inline constexpr uint16_t ring_more = 0;
inline constexpr uint16_t ring_kind_max = 63;
// Kinds that native code reads or writes, of those in fronts/wire.py.
inline constexpr uint16_t ring_cancel = 2;  // the client of a request has gone
// A request whose body is a tensor, and its answer, the row of the output.
inline constexpr uint16_t ring_row = 7;
inline constexpr uint16_t ring_row_answer = 26;
inline constexpr uint16_t ring_again = 27;  // the request has to come again, as it was
inline constexpr uint32_t ring_head_size_max = 1 << 20;
inline constexpr uint64_t ring_state_size = 4096;

struct RingFrame {
    uint32_t magic = ring_magic;
    uint16_t kind = 0;
    uint16_t flags = 0;
    uint64_t ticket = 0;
    uint32_t head_size = 0;
    uint32_t body_size = 0;
    uint64_t total = 0;  // of the whole body; of ring_more not used
};
static_assert(sizeof(RingFrame) == 32 && std::is_trivially_copyable_v<RingFrame>);

struct RingState {
    alignas(64) std::atomic<uint64_t> tail;  // the writer's
    alignas(64) std::atomic<uint64_t> head;  // the reader's
    alignas(64) std::atomic<uint32_t> reader_sleeps;
    alignas(64) std::atomic<uint32_t> writer_waits;
};
static_assert(sizeof(RingState) <= ring_state_size);

inline uint64_t ring_frame_size(uint64_t head_size, uint64_t body_size) {
    return (sizeof(RingFrame) + head_size + body_size + 7) & ~uint64_t{7};
}

// What both ends have of a ring. `memory` outlives it and is aligned to a page; `size` is a power of two.
class RingEnd {
  protected:
    RingEnd(char* memory, uint64_t size)
        : state_(*reinterpret_cast<RingState*>(memory)), bytes_(memory + ring_state_size), mask_(size - 1) {}

    uint64_t size() const { return mask_ + 1; }
    void copy_in(uint64_t at, const void* from, uint64_t count) {
        const uint64_t place = at & mask_, first = std::min(count, size() - place);
        if (first) std::memcpy(bytes_ + place, from, first);
        if (count > first) std::memcpy(bytes_, static_cast<const char*>(from) + first, count - first);
    }
    void copy_out(uint64_t at, void* to, uint64_t count) const {
        const uint64_t place = at & mask_, first = std::min(count, size() - place);
        if (first) std::memcpy(to, bytes_ + place, first);
        if (count > first) std::memcpy(static_cast<char*>(to) + first, bytes_, count - first);
    }

    RingState& state_;
    char* const bytes_;
    const uint64_t mask_;
};

class RingWriter : RingEnd {
  public:
    RingWriter(char* memory, uint64_t size) : RingEnd(memory, size) {}

    // Whether a frame was written. `problem` is set if the reader's counter makes no sense.
    bool put(RingFrame frame, std::string_view head, std::string_view body, const char*& problem) {
        const uint64_t used = tail_ - state_.head.load(std::memory_order_seq_cst);
        if (used > size()) {
            problem = "the reader's place in the ring makes no sense";
            return false;
        }
        const uint64_t wanted = ring_frame_size(head.size(), body.size());
        if (wanted > size() - used) return false;
        frame.head_size = static_cast<uint32_t>(head.size());
        frame.body_size = static_cast<uint32_t>(body.size());
        copy_in(tail_, &frame, sizeof frame);
        copy_in(tail_ + sizeof frame, head.data(), head.size());
        copy_in(tail_ + sizeof frame + head.size(), body.data(), body.size());
        tail_ += wanted;
        state_.tail.store(tail_, std::memory_order_seq_cst);
        return true;
    }
    // To be asked once something was written: whether the reader has to be woken.
    bool reader_sleeps() {
        return state_.reader_sleeps.load(std::memory_order_seq_cst) && state_.reader_sleeps.exchange(0);
    }
    // To be said before another, last try: the reader wakes this end when it has made room.
    void wait_for_room() { state_.writer_waits.store(1, std::memory_order_seq_cst); }

  private:
    uint64_t tail_ = 0;
};

class RingReader : RingEnd {
  public:
    RingReader(char* memory, uint64_t size) : RingEnd(memory, size) {}

    // The next frame; its head and body are copied out with `take`. `problem` is set if what is there is none.
    bool peek(RingFrame& frame, const char*& problem) {
        const uint64_t there = state_.tail.load(std::memory_order_acquire) - head_;
        if (there == 0) return false;
        if (there > size()) {
            problem = "the writer's place in the ring makes no sense";
        } else if (there < sizeof frame) {
            problem = "half a frame";
        } else {
            copy_out(head_, &frame, sizeof frame);
            if (frame.magic != ring_magic) {
                problem = "bytes that are no frame";
            } else if (frame.kind > ring_kind_max) {
                problem = "a frame of an unknown kind";
            } else if (frame.head_size > ring_head_size_max) {
                problem = "a frame with a head that is too long";
            } else if (ring_frame_size(frame.head_size, frame.body_size) > there) {
                problem = "a frame whose size is not that of its parts";
            }
        }
        return problem == nullptr;
    }
    // Of the frame that was peeked at, whose numbers the caller has not changed.
    void take(const RingFrame& frame, char* head, char* body) {
        copy_out(head_ + sizeof frame, head, frame.head_size);
        copy_out(head_ + sizeof frame + frame.head_size, body, frame.body_size);
        head_ += ring_frame_size(frame.head_size, frame.body_size);
        state_.head.store(head_, std::memory_order_seq_cst);
    }
    // The same with places for it in parts: `size` bytes of the frame's head and body from `from` on.
    void look(uint64_t from, void* to, uint64_t size) const { copy_out(head_ + sizeof(RingFrame) + from, to, size); }
    void skip(const RingFrame& frame) {
        head_ += ring_frame_size(frame.head_size, frame.body_size);
        state_.head.store(head_, std::memory_order_seq_cst);
    }
    // Whether there is nothing, and the writer knows that it has to wake this end.
    bool sleep() {
        state_.reader_sleeps.store(1, std::memory_order_seq_cst);
        if (state_.tail.load(std::memory_order_seq_cst) == head_) return true;
        state_.reader_sleeps.store(0, std::memory_order_relaxed);
        return false;
    }
    // To be asked once something was taken: whether the writer has to be woken.
    bool writer_waits() {
        return state_.writer_waits.load(std::memory_order_seq_cst) && state_.writer_waits.exchange(0);
    }

  private:
    uint64_t head_ = 0;
};

}  // namespace pyserve
