// The ring between a front end and the engine: two threads, two processes, and a writer that writes rubbish.
#include "front_ring.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "harness.h"

using harness::Random;
using harness::scaled;
using pyserve::ring_head_size_max;
using pyserve::ring_kind_max;
using pyserve::ring_state_size;
using pyserve::RingFrame;
using pyserve::RingReader;
using pyserve::RingWriter;

namespace {

constexpr uint64_t ring_size = 4096;

// Memory of one ring, all 0, shared with children.
class Shared {
  public:
    Shared() : place_(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) {
        CHECK(place_ != MAP_FAILED);
    }
    ~Shared() { munmap(place_, size); }
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    char* place() const { return static_cast<char*>(place_); }
    static constexpr size_t size = ring_state_size + ring_size;

  private:
    void* place_;
};

std::string text_of(Random& random, uint64_t size_max) {
    std::string text(random.below(size_max + 1), '\0');
    for (char& each : text) each = static_cast<char>(random.below(256));
    return text;
}

// Writes `count` frames, each of which can be told from its number and `seed`.
void write_all(char* memory, uint64_t seed, uint64_t count) {
    RingWriter writer(memory, ring_size);
    Random random(seed);
    for (uint64_t number = 0; number < count; ++number) {
        const std::string head = text_of(random, 40), body = text_of(random, 600);
        const char* problem = nullptr;
        while (!writer.put({.kind = 1, .ticket = number, .total = body.size()}, head, body, problem)) {
            CHECK(problem == nullptr);
            writer.wait_for_room();
            std::this_thread::yield();
        }
        writer.reader_sleeps();
    }
}

void read_all(char* memory, uint64_t seed, uint64_t count) {
    RingReader reader(memory, ring_size);
    Random random(seed);
    for (uint64_t number = 0; number < count; ++number) {
        RingFrame frame;
        const char* problem = nullptr;
        while (!reader.peek(frame, problem)) {
            CHECK(problem == nullptr);
            reader.sleep();
            std::this_thread::yield();
        }
        const std::string head = text_of(random, 40), body = text_of(random, 600);
        CHECK_EQ(frame.ticket, number);
        CHECK_EQ(size_t{frame.head_size}, head.size());
        CHECK_EQ(size_t{frame.body_size}, body.size());
        std::string got_head(head.size(), '\0'), got_body(body.size(), '\0');
        if (number % 2 == 0) {
            reader.take(frame, got_head.data(), got_body.data());
        } else {  // in parts, as native code takes what is a tensor
            reader.look(0, got_head.data(), got_head.size());
            reader.look(frame.head_size, got_body.data(), got_body.size());
            reader.skip(frame);
        }
        CHECK(got_head == head && got_body == body);
        reader.writer_waits();
    }
}

}  // namespace

TEST(two_threads) {
    harness::for_each_seed(3, [](uint64_t seed) {
        const Shared memory;
        const uint64_t count = scaled(20'000);
        std::thread writer([&] { write_all(memory.place(), seed, count); });
        read_all(memory.place(), seed, count);
        writer.join();
    });
}

TEST(two_processes) {
    harness::for_each_seed(3, [](uint64_t seed) {
        const Shared memory;
        const uint64_t count = scaled(20'000);
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            write_all(memory.place(), seed, count);
            std::_Exit(0);
        }
        read_all(memory.place(), seed, count);
        int status = 0;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK_EQ(status, 0);
    });
}

// Whatever another process writes, all the time, a reader gets frames within their limits or a word on what is wrong.
TEST(a_process_that_writes_rubbish) {
    harness::for_each_seed(scaled(200), [](uint64_t seed) {
        const Shared memory;
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            Random random(seed);
            {
                RingWriter writer(memory.place(), ring_size);
                const char* problem = nullptr;
                const std::string body(random.below(2000), 'x');
                for (int i = 0; i < 3; ++i)
                    writer.put({.kind = 1, .ticket = 1, .total = body.size()}, "h", body, problem);
            }
            for (int i = 0; i < 2000; ++i) {
                const uint64_t at = random.below(3) == 0 ? random.below(256) : random.below(Shared::size - 8);
                uint64_t value = random.below(4) == 0 ? UINT64_MAX - random.below(9000) : random.below(9000);
                std::memcpy(memory.place() + at, &value, 1 + random.below(8));
            }
            std::_Exit(0);
        }
        // Its own memory on the heap, so that a sanitizer sees what leaves it.
        RingReader reader(memory.place(), ring_size);
        const char* problem = nullptr;
        for (int i = 0; i < 2000 && problem == nullptr; ++i) {
            RingFrame frame;
            if (!reader.peek(frame, problem)) continue;
            CHECK(frame.kind <= ring_kind_max && frame.head_size <= ring_head_size_max);
            CHECK(uint64_t{frame.head_size} + frame.body_size <= ring_size);
            const auto head = std::make_unique<char[]>(frame.head_size);
            const auto body = std::make_unique<char[]>(frame.body_size);
            reader.take(frame, head.get(), body.get());
        }
        int status = 0;
        CHECK_EQ(waitpid(child, &status, 0), child);
    });
}

TEST_MAIN
