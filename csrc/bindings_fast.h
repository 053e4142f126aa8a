// Requests of this process's own connections that are answered without Python: from the bytes of a plain request into
// a lane, and from the output's row to the bytes of its answer.
//
//     transport ──> FastConnection::receive ──> FastPath::take ──> Lane ──> Engine::drain ──> FastPath::answer ──> transport
//                       │ not plainly right, or something is to be said that only endpoints know
//                       └──> Http1Protocol.data_received, as it came
//
// What is taken is decided before anything is done, so that what is not taken goes its usual way as if nobody had looked.
// One request of a connection is under way here at most. Whatever else happens on its connection meanwhile, it is
// handed over first: it becomes the exchange that it would have been (`FastProtocol.adopt`), among the protocol's own. So
// is one that does not come to an answer of its model.
//
// What content types mean, and how the heads of answers look, Python says once for requests that look alike.
//
// Threads: loop thread only, with the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings_rows.h"
#include "completion.h"
#include "http/body_kind.h"
#include "http/fast_request.h"
#include "json_item.h"
#include "lookout.h"

namespace pyserve {

class FastConnection;

// What stands in an answer beside its numbers, for one second. The head: before the id, between it and the size, and
// behind that. The body: before the numbers, and behind them.
struct FastFrame {
    std::string output;     // the row's kind and sizes, see RowCut
    bool is_large = false;  // it would be compressed for clients that take that
    int64_t second = -1;
    std::string before, between, after, prefix, suffix;
};

// How a request asks, and is to be answered: the same of all that look alike.
class FastForm {
  public:
    // `told` is as of Python's fronts.fast_path.FastForm.
    explicit FastForm(const py::object& told);

    const FastFrame& frame(const std::string& output, bool is_large, int64_t second);

    const bool is_json;         // the body; else the bytes of an item
    const bool writes_json;     // the answer's numbers
    const bool writes_flat;     // all in one line
    const bool adopts_answers;  // endpoints would answer in the same words what the lane has run
    const bool is_coded;        // answers that are large are compressed
    bool is_left = false;       // answers are such that endpoints make them

  private:
    const py::object frame_of_;
    std::vector<FastFrame> frames_;
};

// One path.
class FastRoute {
  public:
    // `form_of`: the form of a content type and the accepted types, or of an item's description, and of the accepted
    // codings; None if a request has to go its usual way. `item` reads JSON.
    FastRoute(std::shared_ptr<LaneRows> rows, std::string version, bool describes, py::object form_of, std::string text,
              std::optional<JsonItem> item)
        : lane(std::move(rows)), url_version(std::move(version)), describes_items(describes), log_head(std::move(text)),
          json(std::move(item)), form_of_(std::move(form_of)) {}

    static constexpr size_t known_size_max = 1024;  // of what is remembered

    // Of a request with this description, or "". nullptr if it has to go its usual way.
    std::shared_ptr<FastForm> form(const FastRequest& request, std::string_view description);

    const std::shared_ptr<LaneRows> lane;
    const std::string url_version;
    const bool describes_items;  // JSON that describes it stands before an item's bytes
    const std::string log_head;  // of a line between the client and the time that it took
    std::optional<JsonItem> json;
    Lookout lookout;

  private:
    const py::object form_of_;
    std::unordered_map<std::string, std::shared_ptr<FastForm>> forms_;
    std::string key_;
};

struct FastCall : FrontCall {
    std::shared_ptr<FastConnection> connection;
    std::shared_ptr<FastRoute> route;
    std::shared_ptr<FastForm> form;
    py::object data;  // the request as it came
    size_t id_begin = 0, id_size = 0;
    uint64_t body_size = 0;
    bool was_alone = false;  // nothing else was under way when it was taken

    // Whether it counts what it takes to decode and encode: of bytes that become bytes nobody does, nor of what is described.
    bool is_staged() const { return !route->describes_items && (form->is_json || form->writes_json); }
};

// What never changes of a listener's way.
struct FastOptions {
    FastLimits limits;
    size_t coded_size_min = 0;  // answers from here on may be compressed; 0 if none is
    size_t json_size_max = 0;   // of a body
};

// Keys that Python has let in, by the header as it came, until they expire or are exchanged.
class KnownKeys {
  public:
    // `until` is asked about a header, once: until when requests with it are let in, s since the epoch, or None. None in its
    // place lets all in.
    explicit KnownKeys(py::object until) : until_(std::move(until)) {}

    bool lets_in(std::string_view header);
    void forget() { known_.clear(); }

  private:
    struct Known {
        std::string header;
        double until;
    };

    const py::object until_;
    std::vector<Known> known_;
};

// Of all connections of one listener.
class FastPath : public RowSource {
  public:
    // `budget` has `size` and `quick_max`, as of bodies in memory; `call_soon` is the loop's; `log` has when() and
    // put_all(lines), or is None; `key_until` is of KnownKeys.
    FastPath(std::shared_ptr<RowTable> table, FastOptions options, py::object budget, py::object call_soon,
             py::object log, py::object key_until)
        : table_(std::move(table)), options_(options), reader_(options.limits), keys_(std::move(key_until)),
          budget_(std::move(budget)), call_soon_(std::move(call_soon)), log_(std::move(log)) {}

    // Answers that are expected at once may be waited for awake; `drain` takes what has come.
    void wait_awake(std::shared_ptr<Completions<>> completions, py::object drain) {
        completions_ = std::move(completions);
        drain_ = std::move(drain);
    }

    // The paths that there are as long as the table has this generation.
    void set(uint64_t generation, std::unordered_map<std::string, std::shared_ptr<FastRoute>> routes) {
        generation_ = generation;
        routes_ = std::move(routes);
        keys_.forget();  // one that was exchanged takes the table back
    }
    // Takes nothing any more.
    void close() {
        is_open_ = false;
        routes_.clear();
    }
    uint64_t request_count() const { return request_count_; }

    // Whether `data`, all that has come, is taken. If it throws it was not.
    bool take(FastConnection& connection, PyObject* data);
    // All that was taken in this turn of the loop is to be worked on.
    void announce();
    // Gives bytes of a body back.
    void give_back(uint64_t size);

    std::unique_ptr<FrontCall> release(FrontCall* call) override;
    bool answer(FrontCall& call, const RowCut& cut, const char* row) override;
    void again(FrontCall& call) override;
    void wake() override;
    py::object link(const FrontCall& call) const override;
    py::object head(const FrontCall& call) const override;

  private:
    // The numbers of an answer in the form that it has, and what stands around them. Nothing if others have to make it.
    const FastFrame* frame_of(FastCall& call, const RowCut& cut, std::string_view& numbers);
    // Of the body, if that is plainly what the route takes, as `form` says.
    std::optional<at::Tensor> item_of(FastRoute& route, const FastRequest& request, std::shared_ptr<FastForm>& form);
    PyObject* bytes_of(const FastCall& call, const FastFrame& frame, std::string_view numbers);
    bool reserve(uint64_t size);
    void submit(FastConnection& connection, std::unique_ptr<FastCall> call, at::Tensor item);
    void note_lines();

    const std::shared_ptr<RowTable> table_;
    const FastOptions options_;
    FastRequestReader reader_;
    KnownKeys keys_;
    const py::object budget_, call_soon_, log_;
    std::shared_ptr<Completions<>> completions_;
    py::object drain_;
    size_t under_way_ = 0;
    std::shared_ptr<FastRoute> alone_;  // of what was taken in this turn, if it was alone
    bool is_open_ = true, is_announcing_ = false;
    uint64_t generation_ = 0, request_count_ = 0;
    std::unordered_map<std::string, std::shared_ptr<FastRoute>> routes_;
    std::string path_, numbers_;  // kept, so that they need no new memory
    TouchedLanes touched_;

    struct Answered {
        std::shared_ptr<FastConnection> connection;
        std::shared_ptr<FastRoute> route;
        int64_t arrived_at;
    };
    std::vector<Answered> answered_;
    std::vector<std::pair<std::shared_ptr<FastConnection>, py::object>> again_;
};

// One connection's part.
class FastConnection : public std::enable_shared_from_this<FastConnection> {
  public:
    explicit FastConnection(std::shared_ptr<FastPath> path) : path_(std::move(path)) {}

    // What a transport calls with the bytes that have come.
    static py::object receiver(const std::shared_ptr<FastConnection>& connection);

    // `protocol` has received(data), adopt(ticket, data) and again(data); `write` is its transport's. Until `close` they
    // keep each other.
    void open(py::object protocol, py::object write, std::string client) {
        protocol_ = std::move(protocol);
        received_ = protocol_.attr("received");
        write_ = std::move(write);
        client_ = std::move(client);
    }
    // Its client has gone. (the lane's owner, the version as in the URL) of a request that is cancelled by that, or None.
    py::object close();
    // What is under way, as `handed_over`, in front of it the lane's owner and its rows; None if nothing is.
    py::object hand_over();

    PyObject* receive(PyObject* data);
    void write();

    bool is_busy() const { return call != nullptr; }
    const std::string& client() const { return client_; }
    py::object protocol() const { return protocol_; }

    bool is_ready = false;  // the protocol has nothing of its own under way
    std::unique_ptr<FastCall> call;
    py::object answer;        // what `write` writes
    int64_t arrived_at = 0;   // of the last request that was taken, ns
    int64_t answered_at = 0;  // of the last answer, ns; 0 before the first

  private:
    const std::shared_ptr<FastPath> path_;
    py::object protocol_ = py::none(), received_, write_;
    std::string client_;
};

void bind_fast_path(py::module_& m);

}  // namespace pyserve
