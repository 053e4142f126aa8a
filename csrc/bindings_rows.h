// Requests whose body a front end has made a tensor of: out of the ring, into a lane and back, without Python.
//
//     ring ──> FrontRows::take ──> Lane ──> Engine::drain ──> FrontRows::answer ──> ring
//                  │ no room, or another table of models than the front end knows: it has to come again, as it was
//                  └──> front end
//
// A front end is one RowSource of such requests; the connections of this process are the other (bindings_fast.h).
//
// What goes well never becomes an object of Python's. What does not is handed to Python at that moment (`adopted`): the
// lane makes of the head, which came along, the request that it would have been, and answers it as all others. One
// that was run takes its output along, since nothing runs twice.
//
// Threads: loop thread only, with the GIL.
#pragma once

#include <sys/eventfd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings_front.h"
#include "clock.h"
#include "lane.h"
#include "row_cut.h"
#include "row_frame.h"
#include "stage_counts.h"

namespace pyserve {

class LaneRows;
class RowSource;

// One that runs. Its source has it, and its lane a list of all.
struct FrontCall {
    FrontCall() = default;
    FrontCall(const FrontCall&) = delete;
    FrontCall& operator=(const FrontCall&) = delete;
    virtual ~FrontCall() = default;

    std::shared_ptr<LaneRows> lane;
    RowSource* source = nullptr;
    uint64_t ticket = 0;   // the source's
    uint64_t request = 0;  // the lane's
    int64_t arrived_at = 0;
    std::string head, url_version;
    RowForm form = RowForm::bytes;
    int64_t finished_at = 0;  // its batch; 0 while that runs
    FrontCall *before = nullptr, *after = nullptr;
};

// Of answers that went out without Python, for the metrics: those of one version as in the URL.
struct RowCounts {
    std::string url_version;
    std::vector<uint64_t> counts;  // by duration
    uint64_t count = 0;
    double duration_s = 0, queue_s = 0;
};

// The rows of one lane.
class LaneRows {
  public:
    // `lane` is a Lane; `owner` gives the object that adopts, or None; `bounds` are of durations, s, and `stage_bounds`
    // of what is done to a request before and after the engine.
    LaneRows(py::object lane, py::object owner, std::vector<double> bounds, std::vector<double> stage_bounds)
        : lane_object_(std::move(lane)), lane_(lane_object_.cast<Lane*>()), owner_(std::move(owner)),
          bounds_(std::move(bounds)), stage_bounds_(std::move(stage_bounds)) {
        if (lane_->example().size() != 1 || !lane_->example().front().device().is_cpu()) {
            throw py::value_error("the model does not take one tensor");
        }
    }

    Lane& lane() const { return *lane_; }
    py::object owner() const { return owner_(); }
    const std::vector<double>& bounds() const { return bounds_; }
    const at::Tensor& item() const { return lane_->example().front(); }

    void set_limits(bool is_open, int64_t waiting_max, int64_t queue_limit_ns, uint64_t answer_size_max) {
        is_open_ = is_open;
        waiting_max_ = waiting_max;
        queue_limit_ns_ = queue_limit_ns;
        answer_size_max_ = answer_size_max;
    }
    bool is_open() const { return is_open_ && !is_refused_; }
    bool has_room() const {
        return is_open() && static_cast<int64_t>(lane_->queue_size()) < waiting_max_ && lane_->ready_count() != 0;
    }
    int64_t queue_limit_ns() const { return queue_limit_ns_; }
    uint64_t answer_size_max() const { return answer_size_max_; }
    // The model's outputs are none that a row can be cut from.
    void refuse() { is_refused_ = true; }

    size_t count() const { return count_; }
    FrontCall* first() const { return first_; }
    void add(FrontCall& call) {
        call.before = last_;
        (last_ != nullptr ? last_->after : first_) = &call;
        last_ = &call;
        ++count_;
    }
    void remove(FrontCall& call) {
        (call.before != nullptr ? call.before->after : first_) = call.after;
        (call.after != nullptr ? call.after->before : last_) = call.before;
        call.before = call.after = nullptr;
        --count_;
    }

    // A body became a tensor here; an output became an answer.
    void note_decoded(int64_t duration_ns) { decoded_.observe(stage_bounds_, s_of(duration_ns)); }
    void note_encoded(int64_t duration_ns) { encoded_.observe(stage_bounds_, s_of(duration_ns)); }
    // What was noted, which is not kept: of decoding, and of encoding.
    std::pair<StageCounts, StageCounts> take_stages() {
        return {std::exchange(decoded_, {}), std::exchange(encoded_, {})};
    }

    // All that was submitted is to be worked on, and somebody looks at the time limits.
    void announce() {
        lane_->announce();
        if (is_watched) return;
        if (const py::object its_owner = owner(); !its_owner.is_none()) {
            is_watched = true;
            its_owner.attr("watch_rows")();
        }
    }

    bool is_watched = false;

  private:
    static double s_of(int64_t duration_ns) {
        constexpr double ns_per_s = 1e9;
        return static_cast<double>(duration_ns) / ns_per_s;
    }

    const py::object lane_object_;
    Lane* const lane_;
    const py::object owner_;
    const std::vector<double> bounds_, stage_bounds_;
    StageCounts decoded_, encoded_;
    bool is_open_ = false, is_refused_ = false;
    int64_t waiting_max_ = 0, queue_limit_ns_ = 0;
    uint64_t answer_size_max_ = 0;
    FrontCall *first_ = nullptr, *last_ = nullptr;
    size_t count_ = 0;
};

// Lanes that were given something in this turn of the loop.
class TouchedLanes {
  public:
    void add(const std::shared_ptr<LaneRows>& lane) {
        if (std::find(lanes_.begin(), lanes_.end(), lane) == lanes_.end()) lanes_.push_back(lane);
    }
    void announce() {
        for (const auto& lane : std::exchange(lanes_, {})) lane->announce();
    }

  private:
    std::vector<std::shared_ptr<LaneRows>> lanes_;
};

// What front ends may send rows to. A front end names the table that it has looked into; one that has changed since
// counts no more, whatever the change was.
struct RowTable {
    struct Route {
        std::shared_ptr<LaneRows> lane;
        std::string url_version;
    };
    uint64_t generation = 0;
    std::vector<Route> routes;

    const Route* find(const RowHead& head) const {
        return head.generation == generation && head.route < routes.size() ? &routes[head.route] : nullptr;
    }
};

// Where such requests come from, and their answers go to.
class RowSource : public std::enable_shared_from_this<RowSource> {
  public:
    virtual ~RowSource() = default;
    // Lets go of a call, without its request.
    virtual std::unique_ptr<FrontCall> release(FrontCall* call) = 0;
    // The end of a call that was run and released. False if it cannot be answered here.
    virtual bool answer(FrontCall& call, const RowCut& cut, const char* row) = 0;
    // It has to go as it was.
    virtual void again(FrontCall& call) = 0;
    // All that is there for now was answered.
    virtual void wake() = 0;
    // Who makes the request of it that it would have been, and of what; None if there is nobody any more.
    virtual py::object link(const FrontCall& call) const = 0;
    virtual py::object head(const FrontCall& call) const = 0;
};

// Those of one front end.
class FrontRows : public RowTaker, public RowSource {
  public:
    // `link` is told what does not go without Python; `wake` is the front end's eventfd.
    FrontRows(py::object link, std::shared_ptr<Writer> writer, int wake, std::shared_ptr<RowTable> table,
              uint64_t count_max, uint64_t size_max)
        : link_(std::move(link)), writer_(std::move(writer)), wake_(wake), table_(std::move(table)),
          count_max_(count_max), size_max_(size_max) {}

    size_t count() const { return calls_.size(); }
    uint64_t size() const { return size_; }
    uint64_t request_count() const { return request_count_; }
    py::object link(const FrontCall&) const override { return link_; }
    py::object head(const FrontCall& call) const override { return py::bytes(call.head); }

    bool take(const RingFrame& frame, RingReader& ring) override {
        if (frame.kind != ring_row) return false;
        if (frame.body_size != frame.total || frame.head_size < sizeof(RowHead) + sizeof(uint64_t)) {
            throw std::invalid_argument("a tensor that no front end sends");
        }
        if (calls_.size() >= count_max_ || frame.body_size > size_max_ - size_) {
            throw std::invalid_argument("more requests at once than a front end lets in");
        }
        if (calls_.contains(frame.ticket)) throw std::invalid_argument("two requests with one number");
        if (frame.flags > static_cast<uint16_t>(RowForm::text))
            throw std::invalid_argument("an unknown form of answers");
        RowHead head;
        ring.look(0, &head, sizeof head);
        const RowTable::Route* route = table_->find(head);
        if (route == nullptr || !route->lane->has_room() || !submit(frame, ring, *route)) again(frame.ticket);
        ring.skip(frame);
        return true;
    }

    void taken() override {
        touched_.announce();
        wake();
    }

    // What the front end could make no answer of stays here: it has to be counted as what it becomes, and once.
    bool answer(FrontCall& call, const RowCut& cut, const char* row) override {
        if (!has_answer(call, cut, row)) return false;
        constexpr size_t whole_max = 128 << 10;  // more would keep others from the ring
        has_written_ = true;
        if (cut.size > whole_max || !writer_->put_whole(ring_row_answer, 200, call.ticket, cut.head, {row, cut.size})) {
            link_.attr("send_row")(call.ticket, py::bytes(cut.head), py::bytes(row, cut.size));
        }
        return true;
    }
    void again(FrontCall& call) override { again(call.ticket); }
    void again(uint64_t ticket) {
        has_written_ = true;
        if (!writer_->put_whole(ring_again, 0, ticket, {}, {})) link_.attr("send_again")(ticket);
    }
    // Wakes the front end, once for all that was written.
    void wake() override {
        if (std::exchange(has_written_, false) && writer_ && writer_->reader_sleeps()) {
            [[maybe_unused]] const int done = eventfd_write(wake_, 1);  // fails if it is awake
        }
    }

    std::unique_ptr<FrontCall> release(FrontCall* call) override {
        call->lane->remove(*call);
        size_ -= call->lane->item().nbytes();
        return std::move(calls_.extract(call->ticket).mapped());
    }
    // The client has gone. The call; nothing if there is none of that number.
    std::unique_ptr<FrontCall> cancel(uint64_t ticket) {
        const auto found = calls_.find(ticket);
        if (found == calls_.end()) return {};
        FrontCall* call = found->second.get();
        if (TensorRequest* request = call->lane->lane().find(call->request)) {
            request->call = nullptr;
            request->try_cancel();
        }
        return release(call);
    }
    // The front end has gone, and its clients with it. Returns what had not come to its end.
    std::vector<std::unique_ptr<FrontCall>> close() {
        std::vector<std::unique_ptr<FrontCall>> gone;
        while (!calls_.empty()) {
            if (auto call = cancel(calls_.begin()->first)) gone.push_back(std::move(call));
        }
        link_ = py::none();
        writer_.reset();
        has_written_ = false;
        return gone;
    }

  private:
    static bool has_answer(const FrontCall& call, const RowCut& cut, const char* row) {
        constexpr size_t around_max = 64 << 10;  // of what may stand around numbers
        const size_t room = call.lane->answer_size_max() - std::min(call.lane->answer_size_max(), around_max);
        switch (call.form) {
            case RowForm::bytes: return true;
            case RowForm::described: return cut.size <= room;
            case RowForm::text: return cut.text_size_max() <= room && cut.has_words(row);
        }
        return false;
    }

    bool submit(const RingFrame& frame, const RingReader& ring, const RowTable::Route& route) {
        const at::Tensor& like = route.lane->item();
        if (frame.body_size != like.nbytes()) throw std::invalid_argument("a tensor of another size than the model's");
        auto call = std::make_unique<FrontCall>();
        int64_t arrived_at = 0;
        ring.look(sizeof(RowHead), &arrived_at, sizeof arrived_at);
        call->arrived_at = std::clamp<int64_t>(arrived_at, 0, SteadyClock::now_ns());
        call->head.resize(frame.head_size - sizeof(RowHead));
        ring.look(sizeof(RowHead), call->head.data(), call->head.size());
        at::Tensor item = at::empty(like.sizes(), like.options());
        ring.look(frame.head_size, item.data_ptr(), frame.body_size);
        call->lane = route.lane;
        call->source = this;
        call->ticket = frame.ticket;
        call->url_version = route.url_version;
        call->form = static_cast<RowForm>(frame.flags);
        Inputs inputs;
        inputs.push_back(std::move(item));
        Lane& lane = route.lane->lane();
        const int64_t deadline = call->arrived_at + route.lane->queue_limit_ns();
        FrontCall* const place = call.get();
        calls_.emplace(frame.ticket, std::move(call));
        TensorRequest* request = lane.try_submit(std::move(inputs), nullptr, place->arrived_at, deadline);
        if (request == nullptr) {
            calls_.erase(frame.ticket);
            return false;
        }
        request->call = place;
        place->request = RequestPool::ticket_of(*request);
        route.lane->add(*place);
        size_ += frame.body_size;
        ++request_count_;
        touched_.add(route.lane);
        return true;
    }

    py::object link_;
    std::shared_ptr<Writer> writer_;
    const int wake_;
    const std::shared_ptr<RowTable> table_;
    const uint64_t count_max_, size_max_;
    uint64_t size_ = 0, request_count_ = 0;
    bool has_written_ = false;
    std::unordered_map<uint64_t, std::unique_ptr<FrontCall>> calls_;
    TouchedLanes touched_;
};

// (link, the source's ticket, head, version as in the URL, the lane's ticket): Python continues with it.
inline py::tuple handed_over(FrontCall& call) {
    if (TensorRequest* request = call.lane->lane().find(call.request)) request->call = nullptr;
    RowSource& source = *call.source;
    const py::object link = source.link(call), head = source.head(call);
    const std::unique_ptr<FrontCall> gone = source.release(&call);
    return py::make_tuple(link, gone->ticket, head, gone->url_version, gone->request);
}

// What becomes of the calls among a batch's requests.
class RowDelivery {
  public:
    RowDelivery(const c10::IValue& output, size_t count, bool is_ok, int64_t finished_at) : finished_at_(finished_at) {
        if (is_ok) cut_ = RowCut::of(output, count);
    }

    // Of request `index`, which has ended in this state and was given back. Returns what Python has to answer, or
    // None.
    py::object deliver(FrontCall* ended, State state, size_t index, bool is_ok, int64_t started_at,
                       std::vector<std::shared_ptr<RowSource>>& sources) {
        const auto source = ended->source->shared_from_this();
        const std::unique_ptr<FrontCall> call = source->release(ended);
        call->finished_at = finished_at_;
        if (lane_ == nullptr) lane_ = call->lane;
        if (std::find(sources.begin(), sources.end(), source) == sources.end()) sources.push_back(source);
        if (state == State::done && is_ok) {
            if (!cut_) call->lane->refuse();
            const bool fits = cut_ && cut_->size <= call->lane->answer_size_max();
            if (fits && source->answer(*call, *cut_, cut_->bytes + index * cut_->size)) {
                note(*call, started_at);
                return py::none();
            }
        }
        const py::object owner = call->lane->owner(), link = source->link(*call);
        if ((state != State::done && state != State::expired) || owner.is_none() || link.is_none()) {
            source->again(*call);  // the lane has ended; endpoints will say so
            return py::none();
        }
        return owner.attr("adopt")(link, call->ticket, source->head(*call), call->url_version);
    }

    const std::shared_ptr<LaneRows>& lane() const { return lane_; }
    int64_t arrived_at() const { return arrived_at_; }
    py::list counts() const {
        py::list out;
        for (const RowCounts& each : counts_) {
            out.append(py::make_tuple(each.url_version, each.counts, each.count, each.duration_s, each.queue_s));
        }
        return out;
    }

  private:
    void note(const FrontCall& call, int64_t started_at) {
        constexpr double ns_per_s = 1e9;
        const auto is_same = [&](const RowCounts& each) { return each.url_version == call.url_version; };
        auto found = std::find_if(counts_.begin(), counts_.end(), is_same);
        const std::vector<double>& bounds = call.lane->bounds();
        if (found == counts_.end()) {
            counts_.push_back({call.url_version, std::vector<uint64_t>(bounds.size() + 1), 0, 0, 0});
            found = std::prev(counts_.end());
        }
        if (arrived_at_ == 0) arrived_at_ = call.arrived_at;
        const double duration_s = static_cast<double>(SteadyClock::now_ns() - call.arrived_at) / ns_per_s;
        ++found->counts[std::lower_bound(bounds.begin(), bounds.end(), duration_s) - bounds.begin()];
        ++found->count;
        found->duration_s += duration_s;
        found->queue_s += static_cast<double>(started_at - call.arrived_at) / ns_per_s;
    }

    const int64_t finished_at_;
    std::optional<RowCut> cut_;
    std::shared_ptr<LaneRows> lane_;
    std::vector<RowCounts> counts_;
    int64_t arrived_at_ = 0;
};

void bind_front_rows(py::module_& m);

}  // namespace pyserve
