// A race on purpose: two threads count without an atomic. ThreadSanitizer must find it, with the flags of the tests.
#include <thread>

static long count = 0;

int main() {
    std::thread other([] {
        for (int i = 0; i < 1000; ++i) ++count;
    });
    for (int i = 0; i < 1000; ++i) ++count;
    other.join();
    return count == 0;
}
