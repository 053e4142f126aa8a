// Requests that are answered without Python: which are taken, where their parts lie, and that nothing behind the bytes
// is read.
#include "http/fast_request.h"

#include <string>
#include <string_view>
#include <vector>

#include "frame_input.h"
#include "harness.h"
#include "http/body_kind.h"

using harness::Random;
using pyserve::FastLimits;
using pyserve::FastRequest;
using pyserve::FastRequestReader;
using pyserve::may_be_read;

namespace {

constexpr FastLimits limits{
    .head_size_max = 4096, .line_size_max = 512, .fields_max = 8, .body_size_max = 64, .takes_ids = true};

const std::string start = "POST /predictions/m HTTP/1.1\r\nHost: a:8080\r\n";
const std::string ordinary = start +
                             "Content-Type: text/plain\r\nAccept: a\r\nx-request-id: 1-a\r\naccept: b\r\n"
                             "Content-Length: 3\r\n\r\nabc";

std::string post(const std::string& lines, const std::string& body = "abc") {
    return start + lines + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

bool takes(const std::string& data, const FastLimits& given = limits) {
    const frame_input::Exact exact(data);
    FastRequestReader reader(given);
    FastRequest found;
    return reader.read(exact.view(), found);
}

}  // namespace

TEST(parts_lie_where_they_stand) {
    FastRequestReader reader(limits);
    FastRequest found;
    CHECK(reader.read(ordinary, found));
    CHECK(found.path == "/predictions/m" && found.body == "abc" && found.id == "1-a");
    CHECK(found.content_type == "text/plain" && found.accept == "b");
    CHECK_EQ(found.head_size, ordinary.size() - 3);
    CHECK(reader.read(post(""), found));
    CHECK(found.id.empty() && found.content_type.empty() && found.accept.empty());
}

TEST(a_key_and_codings_are_taken_if_there_is_one_of_each) {
    FastRequestReader reader(limits);
    FastRequest found;
    const std::string both = post("Authorization: Bearer a b\r\naccept-encoding: gzip, br\r\n"), none = post("");
    CHECK(reader.read(both, found));
    CHECK(found.authorization == "Bearer a b" && found.accept_encoding == "gzip, br");
    CHECK(reader.read(none, found) && found.authorization.empty() && found.accept_encoding.empty());
    CHECK(!takes(post("Authorization: Bearer a\r\nauthorization: Bearer a\r\n")));
    CHECK(!takes(post("Accept-Encoding: gzip\r\nX: y\r\nAccept-Encoding: br\r\n")));
}

TEST(an_id_is_the_servers_where_clients_may_not_choose) {
    FastLimits given = limits;
    given.takes_ids = false;
    FastRequestReader reader(given);
    FastRequest found;
    CHECK(reader.read(ordinary, found) && found.id.empty());
}

TEST(what_asks_for_more_is_not_taken) {
    CHECK(takes(post("")) && takes(post("Connection: keep-alive\r\nCookie: a=b\r\n")));
    for (const std::string line :
         {"Connection: close", "Expect: 100-continue", "Transfer-Encoding: chunked", "Content-Encoding: gzip",
          "x-request-timeout-ms: 5", "X-Server-Timing: 1", "Upgrade: a", "a_b: 1", "Host: b"}) {
        CHECK(!takes(post(line + "\r\n")));
    }
    CHECK(!takes("GET" + ordinary.substr(4)) && !takes("PUT" + ordinary.substr(4)) && !takes("\r\n" + ordinary));
    CHECK(!takes("POST /predictions/m HTTP/1.0\r\nHost: a\r\nContent-Length: 1\r\n\r\na"));
    CHECK(!takes("POST /predictions/m? HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na"));
    CHECK(!takes("POST /predictions/m?a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na"));
    CHECK(!takes(start + "\r\n") && !takes(post("", "")));
}

TEST(only_all_of_one_request_is_taken) {
    for (size_t size = 0; size < ordinary.size(); ++size) CHECK(!takes(ordinary.substr(0, size)));
    CHECK(takes(ordinary) && !takes(ordinary + "P") && !takes(ordinary + ordinary));
}

TEST(limits_hold) {
    CHECK(takes(post("", std::string(64, 'a'))) && !takes(post("", std::string(65, 'a'))));
    const std::string lines = "a: 1\r\nb: 1\r\nc: 1\r\nd: 1\r\ne: 1\r\nf: 1\r\n";  // and two more
    CHECK(takes(post(lines)) && !takes(post(lines + "g: 1\r\n")));
    CHECK(takes(post("a: " + std::string(400, 'b') + "\r\n")) && !takes(post("a: " + std::string(500, 'b') + "\r\n")));
    FastLimits given = limits;
    given.head_size_max = ordinary.size() - 3;
    CHECK(takes(ordinary, given));
    --given.head_size_max;
    CHECK(!takes(ordinary, given));
}

TEST(bytes_at_random_harm_nobody) {
    harness::for_each_seed(3000, [](uint64_t seed) {
        Random random(seed);
        std::string data = ordinary;
        for (size_t changes = 1 + random.below(4); changes > 0; --changes) {
            data[random.below(data.size())] = static_cast<char>(random.below(256));
        }
        const frame_input::Exact exact(data);
        FastRequestReader reader(limits);
        FastRequest found;
        if (!reader.read(exact.view(), found)) return;
        CHECK(found.head_size + found.body.size() == data.size());
        CHECK(found.path.starts_with("/"));
    });
}

TEST(bodies_that_may_be_something_else_are_known) {
    constexpr std::string_view raw = "application/octet-stream";
    CHECK(may_be_read(raw, "[1]") && may_be_read(raw, std::string_view("\x93NUMPY\x01", 7)) && may_be_read(raw, ""));
    CHECK(!may_be_read(raw, "abc") && !may_be_read(raw, "[1") && !may_be_read("", "ab\xff") && may_be_read("a", "abc"));
}

TEST_MAIN
