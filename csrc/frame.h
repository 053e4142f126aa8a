// The wire between the server and a worker process: frames over a stream socket, both ends on one machine.
//
//     frame  = FrameHead, then `size` bytes: `count` ItemHeads or AnswerHeads, then for each of them its head text
//              and, unless it lies in shared memory, its body
//
// A body of more than body_inline_max bytes lies in a memory file of its direction at `offset`. Both ends reach those
// files with pread and pwrite: a file that the other end cuts short gives a short read, not a signal.
//
// Each end takes the other for hostile: every number is checked before it is used (see parse below), and a frame
// that is wrong ends the connection.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace pyserve {

static_assert(std::endian::native == std::endian::little, "frames are little-endian");

inline constexpr uint32_t frame_magic = 0x57565350;  // "PSVW"
inline constexpr uint16_t frame_version = 1;
inline constexpr size_t body_inline_max = 4096;
inline constexpr uint64_t in_frame = UINT64_MAX;  // as an offset: the body follows in the frame
inline constexpr uint32_t items_max = 1 << 16;
inline constexpr uint64_t head_size_max = 1 << 20;
inline constexpr uint64_t frame_size_max = uint64_t{1} << 30;
inline constexpr uint64_t memory_size_max = uint64_t{1} << 30;
// Of the heads and bodies of a batch together: as many as fit a frame even without the memory.
inline constexpr uint64_t batch_bytes_max = frame_size_max - uint64_t{items_max} * 32;
inline constexpr uint64_t body_size_max = batch_bytes_max - head_size_max;
// Of the answer memory: the worker's notes, see WorkerNotes. Bodies lie behind it.
inline constexpr uint64_t notes_size = 4096;

enum class FrameType : uint16_t {
    batch = 1,     // to the worker; `flags` is the number of intra-op threads wanted
    cancel = 2,    // to the worker: the client of one request, whose ticket follows, has gone
    stop = 3,      // to the worker: no more comes
    copied = 4,    // to the worker: the answer memory may be written again
    answers = 16,  // to the server
};

enum class AnswerKind : uint16_t {
    answer = 0,
    error = 1,
    chunk = 2,  // a part of a streamed answer; more follow
    last = 3,   // its last part
};

struct FrameHead {
    uint32_t magic = frame_magic;
    uint16_t version = frame_version;
    FrameType type{};
    uint64_t batch = 0;
    uint32_t count = 0;
    uint32_t flags = 0;
    uint64_t size = 0;
};
static_assert(sizeof(FrameHead) == 32);

struct ItemHead {
    uint64_t ticket = 0;
    uint32_t flags = 0;
    uint32_t head_size = 0;
    uint64_t body_size = 0;
    uint64_t offset = in_frame;
};
static_assert(sizeof(ItemHead) == 32);  // see batch_bytes_max

struct AnswerHead {
    uint64_t ticket = 0;
    AnswerKind kind{};
    uint16_t status = 0;
    uint32_t head_size = 0;
    uint64_t body_size = 0;
    uint64_t offset = in_frame;
};
static_assert(sizeof(AnswerHead) == 32);

// At the start of the answer memory, written by the worker. The server reads it only after the worker's death, and
// believes it only as far as what to try again.
struct WorkerNotes {
    uint64_t begun = 0;  // the last batch that was handed to the handler
    uint64_t taken = 0;  // the last one that it came to: from here on a batch may be what ends the worker
    // Its call has failed, and its requests are run one by one: 1 + the ticket of the one that is run; else 0.
    uint64_t alone = 0;
};

// Appends the bytes of a trivially copyable value.
template <class T>
void append(std::string& out, const T& value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <class T>
T read_at(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// One item or answer of a frame: its head, and where the rest of it is.
template <class Head>
struct Part {
    Head head;
    std::string_view text;
    std::string_view body;  // empty when it lies in memory
};

// What is wrong with a frame's head, or nullptr.
inline const char* problem_of(const FrameHead& head) {
    if (head.magic != frame_magic) return "bytes that are no frame";
    if (head.version != frame_version) return "a frame of another version";
    if (head.count > items_max) return "a frame of too many items";
    if (head.size > frame_size_max) return "a frame that is too large";
    return nullptr;
}

// Cuts the content of a frame into its parts. Returns what is wrong with it, or nullptr.
template <class Head>
const char* parse(const FrameHead& frame, std::string_view content, std::vector<Part<Head>>& parts) {
    parts.clear();
    const uint64_t heads_size = uint64_t{frame.count} * sizeof(Head);
    if (content.size() != frame.size || heads_size > content.size())
        return "a frame whose size is not that of its parts";
    uint64_t at = heads_size;
    uint64_t in_memory = 0;
    for (uint32_t i = 0; i < frame.count; ++i) {
        Part<Head> part{read_at<Head>(content.data() + i * sizeof(Head)), {}, {}};
        if (part.head.head_size > head_size_max || part.head.head_size > content.size() - at)
            return "a frame with a head that is too long";
        part.text = content.substr(at, part.head.head_size);
        at += part.head.head_size;
        if (part.head.offset == in_frame) {
            if (part.head.body_size > content.size() - at) return "a frame with a body that is too long";
            part.body = content.substr(at, part.head.body_size);
            at += part.head.body_size;
        } else if (part.head.offset > memory_size_max || part.head.body_size > memory_size_max - part.head.offset) {
            return "a body beyond the end of the memory";
        } else {
            // The same bytes over and over would make a small frame one that fills our memory.
            in_memory += part.head.body_size;
            if (in_memory > memory_size_max) return "bodies that are larger than the memory";
        }
        parts.push_back(part);
    }
    return at == content.size() ? nullptr : "a frame whose size is not that of its parts";
}

// Bytes of a stream socket, cut into frames.
class FrameBuffer {
  public:
    // Where to receive into, at least 64 KiB or what the frame under way needs.
    char* room(size_t& size) {
        if (begin_ == end_) begin_ = end_ = 0;
        size_t wanted = 65536;
        if (end_ - begin_ >= sizeof(FrameHead)) {
            const auto head = read_at<FrameHead>(bytes_.data() + begin_);
            if (problem_of(head) == nullptr && head.size > wanted) {
                // Grows as the bytes come, not as they are announced.
                wanted = std::min<size_t>(head.size + sizeof(FrameHead) - (end_ - begin_),
                                          std::max<size_t>(wanted, end_ - begin_));
                if (wanted == 0) wanted = 65536;
            }
        }
        if (bytes_.size() - end_ < wanted) {
            if (begin_ > 0) {
                std::memmove(bytes_.data(), bytes_.data() + begin_, end_ - begin_);
                end_ -= begin_;
                begin_ = 0;
            }
            if (bytes_.size() - end_ < wanted) bytes_.resize(end_ + wanted);
        }
        size = bytes_.size() - end_;
        return bytes_.data() + end_;
    }
    void received(size_t size) { end_ += size; }

    // The next complete frame, left in the buffer until taken. `problem` is set if what comes is no frame.
    bool peek(FrameHead& head, std::string_view& content, const char*& problem) const {
        problem = nullptr;
        if (end_ - begin_ < sizeof(FrameHead)) return false;
        head = read_at<FrameHead>(bytes_.data() + begin_);
        problem = problem_of(head);
        if (problem != nullptr || end_ - begin_ - sizeof(FrameHead) < head.size) return false;
        content = std::string_view(bytes_.data() + begin_ + sizeof(FrameHead), head.size);
        return true;
    }
    void take(const FrameHead& head) {
        begin_ += sizeof(FrameHead) + head.size;
        if (begin_ != end_) return;
        begin_ = end_ = 0;
        if (bytes_.size() > (1 << 20)) {  // what one large frame needed is not kept
            bytes_.resize(1 << 16);
            bytes_.shrink_to_fit();
        }
    }
    bool has_frame() const {
        FrameHead head;
        std::string_view content;
        const char* problem;
        return peek(head, content, problem) || problem != nullptr;
    }

  private:
    std::vector<char> bytes_;
    size_t begin_ = 0, end_ = 0;
};

}  // namespace pyserve
