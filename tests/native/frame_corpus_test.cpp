// The inputs of the fuzz target of the wire, and mutations of them by a seed. tests/fuzz/frame_fuzz.cpp finds new ones.
#include <dirent.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "frame_input.h"
#include "harness.h"

using harness::Random;

namespace {

// The folder is given by those who run this program elsewhere.
std::string corpus_folder() {
    const char* given = std::getenv("PYSERVE_FRAME_CORPUS");
    return given != nullptr ? given : PYSERVE_ROOT "/tests/fuzz/corpus/frames";
}

// In order of their names, so that a seed means the same everywhere.
std::vector<std::string> corpus() {
    std::vector<std::string> names, inputs;
    const std::string folder = corpus_folder();
    DIR* open = opendir(folder.c_str());
    CHECK(open != nullptr);
    while (const dirent* entry = readdir(open)) {
        if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
    }
    closedir(open);
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
        std::ifstream file(folder + "/" + name, std::ios::binary);
        inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    return inputs;
}

void mutate(std::string& data, const std::vector<std::string>& inputs, Random& random) {
    static const std::vector<uint64_t> edges = {0,
                                                1,
                                                31,
                                                32,
                                                33,
                                                4096,
                                                65536,
                                                65537,
                                                UINT32_MAX,
                                                uint64_t{1} << 30,
                                                (uint64_t{1} << 30) + 1,
                                                uint64_t{1} << 63,
                                                UINT64_MAX};
    const size_t at = random.below(data.size() + 1);
    switch (random.below(5)) {
        case 0: {
            const uint64_t value = random.chance(70) ? random.pick(edges) : random.next();
            std::memcpy(data.data() + at, &value, std::min(size_t{1} << random.below(4), data.size() - at));
            break;
        }
        case 1: data.erase(at, 1 + random.below(40)); break;
        case 2: data.insert(at, data.substr(at, 1 + random.below(200))); break;
        case 3: data.insert(at, random.pick(inputs)); break;
        default:
            if (at < data.size()) data[at] = static_cast<char>(random.next());
    }
}

}  // namespace

TEST(each_input_of_the_corpus_holds) {
    const std::vector<std::string> inputs = corpus();
    CHECK(inputs.size() >= 10);  // a folder that is not found would pass
    for (const std::string& input : inputs) frame_input::check(input);
}

TEST(mutations_of_the_corpus_hold) {
    const std::vector<std::string> inputs = corpus();
    harness::for_each_seed(5000, [&](uint64_t seed) {
        Random random(seed);
        std::string input = random.pick(inputs);
        for (size_t changes = 1 + random.below(4); changes > 0; --changes) mutate(input, inputs, random);
        frame_input::check(input);
    });
}

TEST_MAIN
