// Frames: what is written is read again; what is wrong is refused; and no byte outside of a frame is looked at
// (AddressSanitizer watches: every content lies in an allocation of exactly its size).
#include "frame.h"

#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "harness.h"

using namespace pyserve;
using harness::Random;

namespace {

// Bytes with nothing behind them that may be read.
class Exact {
  public:
    explicit Exact(std::string_view bytes) : bytes_(new char[bytes.size()]), size_(bytes.size()) {
        std::memcpy(bytes_.get(), bytes.data(), size_);
    }
    std::string_view view() const { return {bytes_.get(), size_}; }

  private:
    std::unique_ptr<char[]> bytes_;
    size_t size_;
};

// Reads a value that lies anywhere: a Part points into the content.
bool is_inside(std::string_view part, std::string_view whole) {
    return part.empty() || (part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size());
}

template <class Head>
struct Written {
    std::vector<Head> heads;
    std::vector<std::string> texts, bodies;

    std::string content() const {
        std::string out;
        for (const Head& head : heads) append(out, head);
        for (size_t i = 0; i < heads.size(); ++i) {
            out += texts[i];
            if (heads[i].offset == in_frame) out += bodies[i];
        }
        return out;
    }
    FrameHead frame(FrameType type) const {
        FrameHead head;
        head.type = type;
        head.count = static_cast<uint32_t>(heads.size());
        head.size = content().size();
        return head;
    }
};

std::string random_text(Random& random, size_t size_max) {
    std::string text(random.below(size_max + 1), '\0');
    for (char& c : text) c = static_cast<char>(random.next());
    return text;
}

template <class Head>
Written<Head> random_frame(Random& random) {
    Written<Head> written;
    const size_t count = random.below(6);
    uint64_t memory_used = 0;
    for (size_t i = 0; i < count; ++i) {
        Head head;
        head.ticket = random.next();
        written.texts.push_back(random_text(random, 20));
        written.bodies.push_back(random_text(random, random.chance(10) ? 5000 : 40));
        head.head_size = static_cast<uint32_t>(written.texts.back().size());
        head.body_size = written.bodies.back().size();
        if (random.chance(30)) {
            head.offset = memory_used;
            memory_used += head.body_size;
        }
        written.heads.push_back(head);
    }
    return written;
}

template <class Head>
void check_same(const Written<Head>& written, const std::vector<Part<Head>>& parts, std::string_view content) {
    CHECK_EQ(parts.size(), written.heads.size());
    for (size_t i = 0; i < parts.size(); ++i) {
        CHECK(std::memcmp(&parts[i].head, &written.heads[i], sizeof(Head)) == 0);
        CHECK(parts[i].text == written.texts[i]);
        CHECK(parts[i].body == (written.heads[i].offset == in_frame ? written.bodies[i] : std::string()));
        CHECK(is_inside(parts[i].text, content) && is_inside(parts[i].body, content));
    }
}

template <class Head>
const char* problem_in(const FrameHead& head, const std::string& bytes) {
    std::vector<Part<Head>> parts;
    const Exact content(bytes);
    return parse(head, content.view(), parts);
}

bool says(const char* problem, const char* part) {
    return problem != nullptr && std::string_view(problem).find(part) != std::string_view::npos;
}

// One item with a head of 3 bytes and a body of 5.
Written<ItemHead> small_frame() {
    Written<ItemHead> written;
    ItemHead head;
    head.ticket = 7;
    head.head_size = 3;
    head.body_size = 5;
    written.heads.push_back(head);
    written.texts.push_back("abc");
    written.bodies.push_back("12345");
    return written;
}

// Puts bytes into a buffer in pieces of random sizes and takes every frame that is complete.
template <class OnFrame>
const char* feed(FrameBuffer& buffer, std::string_view bytes, Random& random, const OnFrame& on_frame) {
    FrameHead head;
    std::string_view content;
    const char* problem = nullptr;
    while (!bytes.empty()) {
        size_t room;
        char* to = buffer.room(room);
        CHECK(room > 0);
        const size_t piece = std::min({room, bytes.size(), 1 + random.below(random.chance(50) ? 40 : 70000)});
        std::memcpy(to, bytes.data(), piece);
        buffer.received(piece);
        bytes.remove_prefix(piece);
        while (buffer.peek(head, content, problem)) {
            CHECK(buffer.has_frame());
            on_frame(head, content);
            buffer.take(head);
        }
        if (problem != nullptr) {
            CHECK(buffer.has_frame());
            return problem;
        }
        CHECK(!buffer.has_frame());
    }
    return nullptr;
}

}  // namespace

TEST(what_is_written_is_read_again) {
    harness::for_each_seed(3000, [](uint64_t seed) {
        Random random(seed);
        const auto items = random_frame<ItemHead>(random);
        std::vector<Part<ItemHead>> item_parts;
        const Exact content(items.content());
        CHECK(parse(items.frame(FrameType::batch), content.view(), item_parts) == nullptr);
        check_same(items, item_parts, content.view());

        auto answers = random_frame<AnswerHead>(random);
        for (AnswerHead& head : answers.heads) {
            head.kind = static_cast<AnswerKind>(random.below(4));
            head.status = static_cast<uint16_t>(random.next());
        }
        std::vector<Part<AnswerHead>> answer_parts;
        const Exact answered(answers.content());
        CHECK(parse(answers.frame(FrameType::answers), answered.view(), answer_parts) == nullptr);
        check_same(answers, answer_parts, answered.view());
    });
}

TEST(a_frames_head_is_refused_if_any_number_of_it_is_wrong) {
    FrameHead head;
    CHECK(problem_of(head) == nullptr);
    head.magic ^= 1;
    CHECK(says(problem_of(head), "no frame"));
    head = {};
    head.version = frame_version + 1;
    CHECK(says(problem_of(head), "version"));
    head = {};
    head.count = items_max;
    CHECK(problem_of(head) == nullptr);
    head.count = items_max + 1;
    CHECK(says(problem_of(head), "too many"));
    head = {};
    head.size = frame_size_max;
    CHECK(problem_of(head) == nullptr);
    for (const uint64_t size : {frame_size_max + 1, UINT64_MAX, UINT64_MAX - sizeof(FrameHead) + 1}) {
        head.size = size;
        CHECK(says(problem_of(head), "too large"));
    }
}

TEST(a_content_is_refused_if_its_size_or_count_is_not_that_of_its_parts) {
    const auto written = small_frame();
    const FrameHead head = written.frame(FrameType::batch);
    CHECK(problem_in<ItemHead>(head, written.content()) == nullptr);
    for (size_t size = 0; size < head.size; ++size) {  // cut short, with the head's size and with its own
        CHECK(problem_in<ItemHead>(head, written.content().substr(0, size)) != nullptr);
        FrameHead shorter = head;
        shorter.size = size;
        CHECK(problem_in<ItemHead>(shorter, written.content().substr(0, size)) != nullptr);
    }
    FrameHead longer = head;
    ++longer.size;
    CHECK(says(problem_in<ItemHead>(longer, written.content() + "x"), "size"));
    for (const uint32_t count : {0u, 2u, 3u, items_max}) {
        FrameHead wrong = head;
        wrong.count = count;
        CHECK(problem_in<ItemHead>(wrong, written.content()) != nullptr);
    }
}

TEST(lengths_and_offsets_beyond_their_limits_are_refused) {
    const auto refused = [](auto change, const char* why) {
        auto written = small_frame();
        change(written.heads[0]);
        const std::string content = written.content();
        FrameHead head = written.frame(FrameType::batch);
        head.size = content.size();
        CHECK(says(problem_in<ItemHead>(head, content), why));
    };
    for (const uint32_t size :
         {9u, static_cast<uint32_t>(head_size_max), static_cast<uint32_t>(head_size_max) + 1, UINT32_MAX})
        refused([&](ItemHead& head) { head.head_size = size; }, "head that is too long");
    for (const uint64_t size :
         {uint64_t{6}, frame_size_max, UINT64_MAX, UINT64_MAX - 2, UINT64_MAX - 34, uint64_t{1} << 63})
        refused([&](ItemHead& head) { head.body_size = size; }, "body that is too long");
    // In memory: the sum of offset and size must neither pass the end nor come round.
    const struct {
        uint64_t offset, size;
    } beyond[] = {{memory_size_max + 1, 0},
                  {memory_size_max, 1},
                  {0, memory_size_max + 1},
                  {1, memory_size_max},
                  {1, UINT64_MAX},
                  {UINT64_MAX - 1, 2},
                  {UINT64_MAX - 1, UINT64_MAX},
                  {uint64_t{1} << 63, uint64_t{1} << 63}};
    for (const auto& body : beyond) {
        refused([&](ItemHead& head) { head.offset = body.offset, head.body_size = body.size; }, "beyond the end");
    }
    // Exactly at the end is inside.
    auto last = small_frame();
    last.heads[0].offset = memory_size_max - 5;
    CHECK(problem_in<ItemHead>(last.frame(FrameType::batch), last.content()) == nullptr);
}

TEST(bodies_in_memory_may_not_sum_up_to_more_than_the_memory) {
    // The same large body over and over: few bytes that would make the reader allocate without end.
    Written<AnswerHead> written;
    for (int i = 0; i < 3; ++i) {
        AnswerHead head;
        head.offset = 0;
        head.body_size = memory_size_max / 2;
        written.heads.push_back(head);
        written.texts.emplace_back();
        written.bodies.emplace_back();
    }
    CHECK(says(problem_in<AnswerHead>(written.frame(FrameType::answers), written.content()), "memory"));
    written.heads.pop_back();
    CHECK(problem_in<AnswerHead>(written.frame(FrameType::answers), written.content()) == nullptr);
}

TEST(a_body_too_long_for_one_part_does_not_eat_that_of_the_next) {
    Written<ItemHead> written = small_frame();
    written.heads.push_back(written.heads[0]);
    written.texts.push_back("def");
    written.bodies.push_back("67890");
    const std::string content = written.content();
    const FrameHead head = written.frame(FrameType::batch);
    CHECK(problem_in<ItemHead>(head, content) == nullptr);
    for (const int delta : {-1, 1, 8}) {  // the first takes more or less; the sum is wrong then
        Written<ItemHead> wrong = written;
        wrong.heads[0].body_size = static_cast<uint64_t>(5 + delta);
        std::string bytes;
        for (const ItemHead& each : wrong.heads) append(bytes, each);
        bytes += content.substr(2 * sizeof(ItemHead));
        CHECK(problem_in<ItemHead>(head, bytes) != nullptr);
    }
}

TEST(frames_come_out_of_a_stream_as_they_went_in_however_it_is_cut) {
    harness::for_each_seed(300, [](uint64_t seed) {
        Random random(seed);
        std::string stream;
        std::vector<std::string> contents;
        const size_t count = 1 + random.below(8);
        for (size_t i = 0; i < count; ++i) {
            FrameHead head;
            head.batch = i;
            std::string content = random_text(random, random.chance(10)   ? 3'000'000
                                                      : random.chance(50) ? 100
                                                                          : 100'000);
            head.size = content.size();
            append(stream, head);
            stream += content;
            contents.push_back(std::move(content));
        }
        FrameBuffer buffer;
        size_t taken = 0;
        const char* problem = feed(buffer, stream, random, [&](const FrameHead& head, std::string_view content) {
            CHECK_EQ(head.batch, taken);
            CHECK(content == contents[taken]);
            ++taken;
        });
        CHECK(problem == nullptr);
        CHECK_EQ(taken, count);
        size_t room;
        buffer.room(room);
        CHECK(room <= (1 << 20) + sizeof(FrameHead));  // what a large frame needed has not been kept
    });
}

TEST(a_frame_that_announces_much_gets_room_only_as_it_comes) {
    FrameBuffer buffer;
    FrameHead head;
    head.size = frame_size_max;
    size_t room;
    std::memcpy(buffer.room(room), &head, sizeof head);
    buffer.received(sizeof head);
    size_t have = sizeof head;
    for (int i = 0; i < 6; ++i) {
        char* to = buffer.room(room);
        CHECK(room >= 65536 && room <= 2 * have + 2 * 65536);
        std::memset(to, 0, room);
        buffer.received(room);
        have += room;
    }
}

TEST(a_stream_of_anything_is_parsed_within_its_bounds_or_refused) {
    harness::for_each_seed(6000, [](uint64_t seed) {
        Random random(seed);
        // A valid frame with some bytes changed, often in its numbers, sometimes cut or grown.
        const auto items = random_frame<ItemHead>(random);
        std::string stream;
        append(stream, items.frame(random.chance(50) ? FrameType::batch : FrameType::answers));
        stream += items.content();
        const size_t changes = random.below(5);
        for (size_t i = 0; i < changes; ++i) {
            const size_t heads_end = std::min(stream.size(), sizeof(FrameHead) * (1 + items.heads.size()));
            const size_t at = random.below(random.chance(80) ? heads_end : stream.size());
            switch (random.below(3)) {
                case 0: stream[at] = static_cast<char>(random.next()); break;
                case 1:
                    stream[at] = static_cast<char>(static_cast<unsigned char>(stream[at]) ^ (1u << random.below(8)));
                    break;
                default: {  // a whole number, of those that are on the brink
                    static const std::vector<uint64_t> edges = {0,
                                                                1,
                                                                31,
                                                                32,
                                                                33,
                                                                items_max,
                                                                head_size_max,
                                                                frame_size_max,
                                                                memory_size_max,
                                                                UINT32_MAX,
                                                                uint64_t{1} << 63,
                                                                UINT64_MAX - 1,
                                                                UINT64_MAX};
                    const uint64_t value = random.pick(edges) + (random.chance(30) ? random.below(3) : 0);
                    const size_t word = at / 8 * 8;
                    std::memcpy(stream.data() + word, &value, std::min<size_t>(8, stream.size() - word));
                }
            }
        }
        if (random.chance(20)) stream.resize(random.below(stream.size() + 1));
        if (random.chance(10)) stream += random_text(random, 100);
        FrameBuffer buffer;
        feed(buffer, stream, random, [&](const FrameHead& head, std::string_view view) {
            CHECK(problem_of(head) == nullptr);
            CHECK_EQ(view.size(), head.size);
            const Exact content(view);
            std::vector<Part<AnswerHead>> parts;
            if (parse(head, content.view(), parts) != nullptr) return;
            CHECK_EQ(parts.size(), head.count);
            uint64_t size = parts.size() * sizeof(AnswerHead), in_memory = 0;
            for (const auto& part : parts) {
                CHECK(is_inside(part.text, content.view()) && is_inside(part.body, content.view()));
                CHECK_EQ(part.text.size(), part.head.head_size);
                size += part.text.size() + part.body.size();
                if (part.head.offset != in_frame) {
                    CHECK(part.head.body_size <= memory_size_max);
                    CHECK(part.head.offset <= memory_size_max - part.head.body_size);
                    in_memory += part.head.body_size;
                } else {
                    CHECK_EQ(part.body.size(), part.head.body_size);
                }
            }
            CHECK_EQ(size, content.view().size());
            CHECK(in_memory <= memory_size_max);
        });
    });
}

TEST_MAIN
