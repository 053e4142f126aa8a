// Requests of a front end's connections that are answered without Python (bindings_fast_path.h): into the ring to the engine, and from
// the row that comes back to the bytes of the answer.
//
//     FastPath::take ──> DoorPath::submit ──> ring ──> the engine (bindings_rows.h) ──> ring ──> FastDoor::take
//
// What the engine gets is what fronts/door.py sends of such a request, and it answers both alike. Whatever else comes under
// a request's number, its answer is Python's: `Door.take_over_call` makes the exchange of it that it would have been, and
// knows it from then on as one that it has sent itself.
//
// Without torch. Threads: loop thread only, with the GIL.
#pragma once

#include <sys/eventfd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings_fast_path.h"
#include "bindings_front.h"
#include "clock.h"
#include "row_frame.h"
#include "stage_counts.h"

namespace pyserve {

class DoorPath;

// A path of one model, as the engine's table has it.
class DoorRoute : public FastRoute {
  public:
    // `row_of` is Python's, for requests that it takes over; `bounds` are of the stages' durations, s.
    DoorRoute(uint64_t place, py::object row_of, std::vector<double> bounds, FastPlace found)
        : FastRoute(std::move(found)), place(place), row_of(std::move(row_of)), bounds_(std::move(bounds)) {}

    void note_decoded(int64_t duration_ns) { decoded_.observe(bounds_, s_of(duration_ns)); }
    void note_encoded(int64_t duration_ns) { encoded_.observe(bounds_, s_of(duration_ns)); }
    // What was noted, which is not kept: of decoding, and of encoding.
    std::pair<StageCounts, StageCounts> take_stages() {
        return {std::exchange(decoded_, {}), std::exchange(encoded_, {})};
    }

    const uint64_t place;
    const py::object row_of;
    size_t under_way = 0;  // of its requests

  private:
    static double s_of(int64_t duration_ns) {
        constexpr double ns_per_s = 1e9;
        return static_cast<double>(duration_ns) / ns_per_s;
    }

    const std::vector<double> bounds_;
    StageCounts decoded_, encoded_;
};

struct DoorCall : FastCall {
    uint64_t ticket = 0;
    DoorPath* path = nullptr;

    DoorRoute& door_route() const { return static_cast<DoorRoute&>(*route); }
    // It is over here: that its body was decoded counts, whatever becomes of it.
    void note_decoded() const {
        if (is_staged()) door_route().note_decoded(decoding_ns);
    }
};

// The link to the engine, for all listeners.
class FastDoor : public RowTaker {
  public:
    // `owner` is a Door.
    explicit FastDoor(py::object owner) : owner_(std::move(owner)) {}

    // There is a link: what it is written into, and the engine's eventfd.
    void attach(std::shared_ptr<Writer> writer, int wake) {
        writer_ = std::move(writer);
        wake_ = wake;
    }
    // It is over, or about to be. What is under way is Python's.
    void detach() {
        writer_.reset();
        while (!calls_.empty()) give(*calls_.begin()->second);
        taken();  // what was read before something that ends the link
    }
    // As `detach`, and there will be no other.
    void close() {
        detach();
        owner_ = py::none();
    }
    // Messages of Python's that wait for room come first.
    bool has_room() const { return writer_ && !writer_->has_waiting; }
    size_t count() const { return calls_.size(); }

    // Sends a request, under a number of its own. False if there is no room.
    bool send(DoorCall& call, RowForm form, std::string_view head, std::string_view item) {
        if (!has_room()) return false;
        call.ticket = next_ticket_;
        if (!writer_->put_whole(ring_row, static_cast<uint16_t>(form), call.ticket, head, item)) return false;
        ++next_ticket_;
        calls_.emplace(call.ticket, &call);
        return true;
    }
    void forget(const DoorCall& call) { calls_.erase(call.ticket); }
    // Wakes the engine, once for all that was sent in this turn of the loop.
    void wake() {
        if (writer_ && writer_->reader_sleeps()) {
            [[maybe_unused]] const int done = eventfd_write(wake_, 1);  // fails if it is awake
        }
    }
    // The client of a request that was sent has gone.
    void cancel(uint64_t ticket) {
        if (!writer_) return;
        bool is_sent = false;
        try {
            is_sent = writer_->put_whole(ring_cancel, 0, ticket, {}, {});
        } catch (const std::invalid_argument&) {
            // Python will meet the same, and ends the link.
        }
        if (is_sent) {
            wake();
        } else {
            owner_.attr("send_cancel")(ticket);
        }
    }
    const py::object& owner() const { return owner_; }

    bool take(const RingFrame& frame, RingReader& ring) override;
    void taken() override;

  private:
    // Python counts its requests from 1 on.
    static constexpr uint64_t first_ticket = uint64_t{1} << 62;

    bool answer(DoorCall& call, const RingFrame& frame, RingReader& ring);
    // Its answer is Python's from here on.
    void give(DoorCall& call);

    py::object owner_;
    std::shared_ptr<Writer> writer_;
    int wake_ = -1;
    uint64_t next_ticket_ = first_ticket;
    std::unordered_map<uint64_t, DoorCall*> calls_;  // connections have them
    std::vector<DoorPath*> answered_;
    std::string bytes_;  // of an answer, kept so that it needs no new memory
};

// Of one listener. REQUIRES: it outlives the door's link.
class DoorPath : public FastPath, public std::enable_shared_from_this<DoorPath> {
  public:
    // `listener` is its number; `answer_size_max` bytes may be an answer's body.
    DoorPath(std::shared_ptr<FastDoor> door, uint8_t listener, size_t answer_size_max, FastOptions options,
             py::object budget, py::object call_soon, py::object log)
        : FastPath(options, std::move(budget), std::move(call_soon), std::move(log)), door_(std::move(door)),
          listener_(listener), answer_size_max_(answer_size_max) {}

    // The paths of the engine's table of that number; `key_until` is of KnownKeys.
    void set(uint64_t generation, const std::unordered_map<std::string, std::shared_ptr<DoorRoute>>& routes,
             py::object key_until) {
        generation_ = generation;
        set_routes({routes.begin(), routes.end()});
        keys_.ask(std::move(key_until));
    }

    py::object cancel(FastConnection& connection) override {
        const std::unique_ptr<DoorCall> gone = release(connection);
        gone->note_decoded();
        give_back(gone->body_size);
        try {
            door_->cancel(gone->ticket);
        } catch (py::error_already_set& error) {
            tell_fast(error);
        }
        return py::none();
    }
    py::object hand_over(FastConnection& connection) override {
        const std::unique_ptr<DoorCall> gone = release(connection);
        const std::string_view id = gone->id();
        return py::make_tuple(door_->owner(),
                              py::make_tuple(connection.protocol(), gone->ticket, gone->data,
                                             py::str(id.data(), id.size()), listener_, gone->door_route().row_of));
    }

    // The engine's answer to one. False if others have to make the client's of it.
    bool answer(DoorCall& call, std::string_view head, const RowOutput& output, std::string_view row) {
        const int64_t began_at = SteadyClock::now_ns();
        const FastRow made{head, output.shape(), output.rank(), row, output.count(), answer_size_max_};
        if (!answer_with(call, made)) return false;
        const std::unique_ptr<DoorCall> gone = release(*call.connection);
        gone->note_decoded();
        if (gone->is_staged()) gone->door_route().note_encoded(SteadyClock::now_ns() - began_at);
        return true;
    }
    void write() { write_answers(); }

  protected:
    bool has_room(const FastRoute&) const override { return door_->has_room(); }
    std::unique_ptr<FastCall> new_call() override { return std::make_unique<DoorCall>(); }
    char* new_item(const FastRoute& route) override {
        item_.resize(route.item_size);
        return item_.data();
    }
    bool submit(FastConnection& connection, std::unique_ptr<FastCall> taken) override {
        auto& call = static_cast<DoorCall&>(*taken);
        const std::string_view data = view_of(call.data.ptr());
        const RowOrigin origin{static_cast<uint64_t>(connection.arrived_at), data.size(), listener_, 1};
        write_row_head({generation_, call.door_route().place}, origin, call.id(), connection.client(),
                       data.substr(0, call.head_size), head_);
        const RowForm form = call.form->writes_json        ? RowForm::text
                             : call.route->describes_items ? RowForm::described
                                                           : RowForm::bytes;
        call.path = this;
        if (!door_->send(call, form, head_, item_)) return false;
        ++call.door_route().under_way;
        connection.call = std::move(taken);
        return true;
    }
    void begin() override { door_->wake(); }
    py::object announcer() override { return py::cast(shared_from_this()).attr("announce"); }

  private:
    std::unique_ptr<DoorCall> release(FastConnection& connection) {
        std::unique_ptr<DoorCall> call(static_cast<DoorCall*>(connection.call.release()));
        door_->forget(*call);
        --call->door_route().under_way;
        return call;
    }

    const std::shared_ptr<FastDoor> door_;
    const uint8_t listener_;
    const size_t answer_size_max_;
    uint64_t generation_ = 0;
    std::string item_, head_;  // of the request that is being taken
};

inline bool FastDoor::take(const RingFrame& frame, RingReader& ring) {
    const auto found = calls_.find(frame.ticket);
    if (found == calls_.end()) return false;
    DoorCall& call = *found->second;
    if (frame.kind == ring_row_answer && answer(call, frame, ring)) {
        ring.skip(frame);
        return true;
    }
    give(call);
    return false;
}

inline bool FastDoor::answer(DoorCall& call, const RingFrame& frame, RingReader& ring) {
    if (frame.body_size != frame.total || frame.head_size > RowOutput::text_size_max) return false;
    if (frame.body_size > fast::answer_size_max) return false;
    bytes_.resize(size_t{frame.head_size} + frame.body_size);
    ring.look(0, bytes_.data(), bytes_.size());
    const std::string_view all = bytes_, head = all.substr(0, frame.head_size), row = all.substr(frame.head_size);
    RowOutput output;
    if (!output.read(head) || output.byte_count() != row.size()) return false;
    DoorPath* const path = call.path;
    if (!path->answer(call, head, output, row)) return false;
    if (answered_.empty() || answered_.back() != path) answered_.push_back(path);
    return true;
}

inline void FastDoor::taken() {
    for (DoorPath* const path : std::exchange(answered_, {})) path->write();
}

inline void FastDoor::give(DoorCall& call) {
    const std::shared_ptr<FastConnection> connection = call.connection;
    const auto handed = connection->hand_over().cast<std::pair<py::object, py::object>>();
    if (handed.first.is_none()) return;
    try {
        handed.first.attr("take_over_call")(handed.second);
    } catch (py::error_already_set& error) {
        tell_fast(error);
    }
}

inline void bind_fast_door(py::module_& m) {
    py::class_<FastDoor, std::shared_ptr<FastDoor>>(m, "FastDoor")
        .def(py::init<py::object>(), py::arg("owner"))
        .def("attach", &FastDoor::attach, py::arg("writer"), py::arg("wake"))
        .def("read_from", [](const std::shared_ptr<FastDoor>& door, Reader& reader) { reader.give_rows_to(door); })
        .def("detach", &FastDoor::detach)
        .def("close", &FastDoor::close)
        .def_property_readonly("count", &FastDoor::count);
    py::class_<DoorRoute, std::shared_ptr<DoorRoute>>(m, "FastRoute", py::module_local())
        .def(py::init([](uint64_t place, size_t size, py::object row_of, std::vector<double> bounds,
                         bool describes_items, py::object form_of, std::string log_head, char kind,
                         std::vector<int64_t> shape, bool takes_json) {
                 return std::make_shared<DoorRoute>(
                     place, std::move(row_of), std::move(bounds),
                     FastPlace::make(size, describes_items, std::move(form_of), std::move(log_head), kind,
                                     std::move(shape), takes_json));
             }),
             py::arg("place"), py::kw_only(), py::arg("size"), py::arg("row_of"), py::arg("bounds"),
             py::arg("describes_items"), py::arg("form_of"), py::arg("log_head"), py::arg("kind"), py::arg("shape"),
             py::arg("takes_json"))
        .def_readonly("under_way", &DoorRoute::under_way)
        .def("take_stages", [](DoorRoute& route) {
            const auto [decoded, encoded] = route.take_stages();
            const auto told = [](const StageCounts& stage) { return py::make_tuple(stage.counts, stage.total_s); };
            return py::make_tuple(told(decoded), told(encoded));
        });
    py::class_<DoorPath, std::shared_ptr<DoorPath>>(m, "FastPath", py::module_local())
        .def(py::init([](std::shared_ptr<FastDoor> door, uint8_t listener, size_t answer_size_max, py::object budget,
                         py::object call_soon, py::object log, size_t head_size_max, size_t line_size_max,
                         size_t header_count_max, uint64_t body_size_max, bool takes_ids, size_t coded_size_min,
                         size_t json_size_max) {
                 const FastLimits limits{head_size_max, line_size_max, header_count_max, body_size_max, takes_ids};
                 return std::make_shared<DoorPath>(std::move(door), listener, answer_size_max,
                                                   FastOptions{limits, coded_size_min, json_size_max},
                                                   std::move(budget), std::move(call_soon), std::move(log));
             }),
             py::arg("door"), py::kw_only(), py::arg("listener"), py::arg("answer_size_max"), py::arg("budget"),
             py::arg("call_soon"), py::arg("log"), py::arg("head_size_max"), py::arg("line_size_max"),
             py::arg("header_count_max"), py::arg("body_size_max"), py::arg("takes_ids"), py::arg("coded_size_min"),
             py::arg("json_size_max"))
        .def("set", &DoorPath::set, py::arg("generation"), py::arg("routes"), py::arg("key_until"))
        .def("announce", [](DoorPath& path) { path.announce(); })
        .def("close", [](DoorPath& path) { path.close(); })
        .def_property_readonly("request_count", [](const DoorPath& path) { return path.request_count(); });
    bind_fast_connection<DoorPath>(m);
}

}  // namespace pyserve
