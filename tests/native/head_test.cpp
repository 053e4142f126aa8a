// Plain heads: what is taken, what is left to others, and that nothing behind the bytes is read.
#include "http/head.h"

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "frame_input.h"
#include "harness.h"

using harness::Random;
using harness::scaled;
using pyserve::HeadField;
using pyserve::PlainHead;
using pyserve::PlainHeadReader;
using pyserve::Span;

namespace {

const std::string ordinary =
    "POST /predictions/m?a=%20 HTTP/1.1\r\nHost: a:8080\r\nUser-Agent: x y \r\nContent-Length: 64\r\n"
    "X-Request-Id: 1-a\r\nConnection: keep-alive\r\nX-Server-Timing: 1\r\n\r\n";

// Of bytes with nothing behind them that may be read.
bool read(std::string_view head, PlainHead& found, size_t fields_max = 2000) {
    const frame_input::Exact exact(head);
    return PlainHeadReader::read(exact.view(), fields_max, found);
}

bool is_plain(const std::string& head) {
    PlainHead found;
    return read(head, found);
}

bool lies_inside(Span part, std::string_view head) { return size_t{part.begin} + part.size <= head.size(); }

void check_found(const PlainHead& found, std::string_view head) {
    CHECK(found.method < pyserve::plain_methods.size());
    CHECK(lies_inside(found.path, head) && lies_inside(found.query, head) && lies_inside(found.id, head));
    CHECK(found.path.size > 0 && found.path.of(head)[0] == '/');
    CHECK(found.count > 0 && found.count <= pyserve::plain_fields_max);
    size_t size = 0;
    for (size_t at = 0; at < found.count; ++at) {
        const HeadField& field = found.fields[at];
        CHECK(lies_inside(field.name, head) && lies_inside(field.value, head));
        CHECK(field.name.size > 0 && field.value.size > 0);
        size += size_t{field.name.size} + field.value.size + 3;  // ':' and the line's end
    }
    CHECK(size <= head.size());
    CHECK(pyserve::find_field(head, found.fields.data(), found.count, "host") != nullptr);
}

}  // namespace

TEST(an_ordinary_head_is_read) {
    PlainHead found;
    CHECK(read(ordinary, found));
    check_found(found, ordinary);
    CHECK(pyserve::plain_methods[found.method] == "POST");
    CHECK(found.path.of(ordinary) == "/predictions/m" && found.query.of(ordinary) == "a=%20");
    CHECK(found.id.of(ordinary) == "1-a");
    CHECK_EQ(found.length, uint64_t{64});
    CHECK(found.is_http11 && found.keep_alive && found.has_timing);
    CHECK_EQ(found.count, size_t{6});
    const HeadField* field = pyserve::find_field(ordinary, found.fields.data(), found.count, "user-agent");
    CHECK(field != nullptr && field->value.of(ordinary) == "x y");
    CHECK(pyserve::find_field(ordinary, found.fields.data(), found.count, "accept") == nullptr);
    CHECK(read(ordinary, found, 6) && !read(ordinary, found, 5));
}

TEST(what_a_head_leaves_does_not_show_in_the_next) {
    PlainHead found;
    CHECK(read(ordinary, found));
    const std::string next = "GET / HTTP/1.0\r\nHost: a\r\n\r\n";
    CHECK(read(next, found));
    CHECK(found.query.size == 0 && found.id.size == 0 && found.length == 0 && found.count == 1);
    CHECK(!found.keep_alive && !found.has_timing && !found.is_http11);
}

TEST(whatever_servers_disagree_about_is_left_to_others) {
    const std::string get = "GET / HTTP/1.1\r\nHost: a\r\n";
    CHECK(is_plain(get + "\r\n"));
    for (const char* line : {"Host: a",
                             "Content-Length: 1\r\nContent-Length: 1",
                             "Content-Length: +1",
                             "Content-Length: 1 ",
                             "Content-Length: 9999999999999999",
                             "Transfer-Encoding: chunked",
                             "Expect: 100-continue",
                             "Upgrade: h2c",
                             "Connection: close, te",
                             "Connection: close\r\nConnection: close",
                             "Proxy-Connection: close",
                             "X_Y: 1",
                             "ts_request_sequence_id: 1",
                             " X: 1",
                             "X : 1",
                             "X:",
                             "X: ",
                             "X:\t1",
                             "X: 1\t",
                             "X: \x01",
                             "X: \x7f",
                             "X: \xe9",
                             "X",
                             ": 1",
                             "X: 1\n",
                             "X: 1\r",
                             "Content-Type: a\r\ncontent-type: a",
                             "Expect: x",
                             "x-request-id: a\r\nx-request-id: b"}) {
        CHECK(!is_plain(get + line + "\r\n\r\n"));
    }
    for (const char* line :
         {"GET * HTTP/1.1", "GET /%41 HTTP/1.1", "GET /a#b HTTP/1.1", "GET http://h/ HTTP/1.1", "get / HTTP/1.1",
          "GET  / HTTP/1.1", "GET / HTTP/1.2", "GET / HTTP/1.1 ", "GET /\x80 HTTP/1.1", "GETS / HTTP/1.1", "GET /",
          "TRACE / HTTP/1.1", "CONNECT /a HTTP/1.1", " / HTTP/1.1", "/ HTTP/1.1"}) {
        CHECK(!is_plain(std::string(line) + "\r\nHost: a\r\n\r\n"));
    }
    for (const char* host : {"a:", "a:65536", "a:123456", "[::1]", "a b", "a,b", "a/b", "u@a", ":80"}) {
        CHECK(!is_plain(std::string("GET / HTTP/1.1\r\nHost: ") + host + "\r\n\r\n"));
    }
    CHECK(!is_plain("GET / HTTP/1.1\r\n\r\n"));                               // no host
    CHECK(!is_plain(get + "\r\n" + "x") && !is_plain(get) && !is_plain(""));  // it ends elsewhere
    CHECK(!is_plain(get + "\r\n" + get + "\r\n"));
    CHECK(!is_plain("GET /" + std::string(70'000, 'a') + " HTTP/1.1\r\nHost: a\r\n\r\n"));
}

TEST(as_many_fields_as_there_is_room_for) {
    const std::string get = "GET / HTTP/1.1\r\nHost: a\r\n";
    std::string fields;
    for (size_t at = 1; at < pyserve::plain_fields_max; ++at) fields += "X: 1\r\n";
    PlainHead found;
    CHECK(read(get + fields + "\r\n", found));
    CHECK_EQ(found.count, pyserve::plain_fields_max);
    CHECK(!read(get + fields + "X: 1\r\n\r\n", found));
}

TEST(every_cut_and_change_of_a_head_lies_within_its_bytes) {
    for (size_t size = 0; size < ordinary.size(); ++size) CHECK(!is_plain(ordinary.substr(0, size)));
    harness::for_each_seed(20, [](uint64_t seed) {
        Random random(seed);
        size_t plain = 0;
        for (int64_t round = scaled(2000); round > 0; --round) {
            std::string head = ordinary;
            for (uint64_t change = random.below(3); change > 0; --change) {
                const size_t at = random.below(head.size());
                switch (random.below(3)) {
                    case 0: head[at] = static_cast<char>(random.below(256)); break;
                    case 1: head.erase(at, 1 + random.below(3)); break;
                    default: head.insert(at, ordinary.substr(random.below(ordinary.size()), random.below(30)));
                }
            }
            PlainHead found;
            if (read(head, found)) {
                check_found(found, head);
                ++plain;
            }
        }
        CHECK(plain > 0);
    });
}

TEST_MAIN
