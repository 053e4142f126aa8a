// What a module for Python has of front_ring.h: both ends of a ring, in memory that processes share. Without torch.
#pragma once

#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "front_ring.h"

namespace py = pybind11;

namespace pyserve {

// A part of a memory file that is shared.
class SharedMemory {
  public:
    SharedMemory(int fd, uint64_t offset, uint64_t size, int access = PROT_READ | PROT_WRITE) : size_(size) {
        struct stat found{};
        if (fstat(fd, &found) != 0) throw std::system_error(errno, std::generic_category(), "the ring's memory");
        const auto there = static_cast<uint64_t>(found.st_size);
        if (there < offset || there - offset < size) throw std::invalid_argument("the ring's memory is too small");
        place_ = mmap(nullptr, size, access, MAP_SHARED, fd, static_cast<off_t>(offset));
        if (place_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "the ring's memory");
    }
    ~SharedMemory() { munmap(place_, size_); }
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    char* place() const { return static_cast<char*>(place_); }

  private:
    const uint64_t size_;
    void* place_ = nullptr;
};

inline uint64_t checked_size(uint64_t size) {
    if (size < 4096 || size > uint64_t{1} << 30 || !std::has_single_bit(size)) {
        throw std::invalid_argument("a ring's size must be a power of two from 4 KiB to 1 GiB");
    }
    return size;
}

class View {
  public:
    explicit View(const py::handle& from) {
        if (PyObject_GetBuffer(from.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    ~View() { PyBuffer_Release(&view_); }
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    std::string_view text() const { return {static_cast<const char*>(view_.buf), static_cast<size_t>(view_.len)}; }

  private:
    Py_buffer view_{};
};

class Writer {
  public:
    Writer(int fd, uint64_t offset, uint64_t size)
        : memory_(fd, offset, ring_state_size + checked_size(size)), ring_(memory_.place(), size) {}

    bool put(uint16_t kind, uint16_t flags, uint64_t ticket, const py::handle& head, const py::handle& body,
             uint64_t total) {
        const View head_view(head), body_view(body);
        if (head_view.text().size() > ring_head_size_max) throw std::length_error("the head of a frame is too long");
        const char* problem = nullptr;
        const bool done = ring_.put(RingFrame{.kind = kind, .flags = flags, .ticket = ticket, .total = total},
                                    head_view.text(), body_view.text(), problem);
        if (problem != nullptr) throw std::invalid_argument(problem);
        return done;
    }
    // As `put`, of a message that is complete. False if others wait for room, too.
    bool put_whole(uint16_t kind, uint16_t flags, uint64_t ticket, std::string_view head, std::string_view body) {
        const char* problem = nullptr;
        return !has_waiting &&
               ring_.put({.kind = kind, .flags = flags, .ticket = ticket, .total = body.size()}, head, body, problem);
    }
    bool reader_sleeps() { return ring_.reader_sleeps(); }
    void wait_for_room() { ring_.wait_for_room(); }

    bool has_waiting = false;  // messages that found no room

  private:
    SharedMemory memory_;
    RingWriter ring_;
};

// What takes frames where they lie, in place of Python.
class RowTaker {
  public:
    virtual ~RowTaker() = default;
    // Takes or skips the frame that was peeked at; false if it is Python's. Throws what ends the link.
    virtual bool take(const RingFrame& frame, RingReader& ring) = 0;
    // All that is there for now was taken.
    virtual void taken() = 0;
};

// Reads frames, and puts together bodies that come in several.
class Reader {
  public:
    Reader(int fd, uint64_t offset, uint64_t size, uint64_t body_size_max, uint64_t coming_size_max, bool keeps_bodies)
        : memory_(fd, offset, ring_state_size + checked_size(size)), ring_(memory_.place(), size),
          body_size_max_(body_size_max), coming_size_max_(coming_size_max), keeps_bodies_(keeps_bodies) {}

    // Python works on a frame for as long as native code takes many rows.
    static constexpr size_t rows_per_frame = 16;

    py::list take(size_t count_max) {
        py::list taken;
        for (size_t left = count_max * rows_per_frame; left > 0;) {
            RingFrame frame;
            const char* problem = nullptr;
            if (!ring_.peek(frame, problem)) {
                if (problem != nullptr) throw std::invalid_argument(problem);
                break;
            }
            if (rows_ && rows_->take(frame, ring_)) {
                left -= 1;
            } else {
                take_frame(frame, taken);
                left -= std::min(left, rows_per_frame);
            }
        }
        if (rows_) rows_->taken();
        return taken;
    }
    void give_rows_to(std::shared_ptr<RowTaker> rows) { rows_ = std::move(rows); }
    bool sleep() { return ring_.sleep(); }
    bool writer_waits() { return ring_.writer_waits(); }

  private:
    struct Coming {
        RingFrame frame;
        py::object head, body;
        uint64_t size;
    };

    // A body of so many bytes that nobody has set to 0: of requests a bytearray, which they own, of answers bytes.
    py::object new_body(uint64_t size) const {
        const auto length = static_cast<Py_ssize_t>(size);
        PyObject* made =
            keeps_bodies_ ? PyByteArray_FromStringAndSize(nullptr, length) : PyBytes_FromStringAndSize(nullptr, length);
        if (made == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(made);
    }
    char* place_of(const py::object& body) const {
        return keeps_bodies_ ? PyByteArray_AS_STRING(body.ptr()) : PyBytes_AS_STRING(body.ptr());
    }

    void take_frame(const RingFrame& frame, py::list& taken) {
        if (frame.kind == ring_more) {
            take_more(frame, taken);
            return;
        }
        if (frame.total > body_size_max_ || frame.body_size > frame.total) {
            throw std::invalid_argument("a body that is too long");
        }
        forget(frame.ticket);
        py::object head = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, frame.head_size));
        if (!head) throw py::error_already_set();
        const bool is_whole = frame.body_size == frame.total;
        if (!is_whole && frame.total > coming_size_max_ - coming_size_) {
            throw std::invalid_argument("more bodies at once than were agreed on");
        }
        py::object body = new_body(frame.total);
        ring_.take(frame, PyBytes_AS_STRING(head.ptr()), place_of(body));
        if (is_whole) {
            emit(frame, head, body, taken);
            return;
        }
        coming_size_ += frame.total;
        coming_.emplace(frame.ticket, Coming{frame, std::move(head), std::move(body), frame.body_size});
    }

    void take_more(const RingFrame& frame, py::list& taken) {
        const auto found = coming_.find(frame.ticket);
        if (found == coming_.end()) throw std::invalid_argument("more of a body that was not begun");
        Coming& coming = found->second;
        if (frame.head_size != 0 || frame.body_size == 0 || frame.body_size > coming.frame.total - coming.size) {
            throw std::invalid_argument("more of a body than was announced");
        }
        char* const place = place_of(coming.body) + coming.size;
        ring_.take(frame, place, place);  // it has no head
        coming.size += frame.body_size;
        if (coming.size < coming.frame.total) return;
        emit(coming.frame, coming.head, coming.body, taken);
        forget(frame.ticket);
    }

    void emit(const RingFrame& frame, const py::object& head, const py::object& body, py::list& taken) {
        taken.append(py::make_tuple(frame.kind, frame.flags, frame.ticket, head, body));
    }

    void forget(uint64_t ticket) {
        if (coming_.empty()) return;
        const auto found = coming_.find(ticket);
        if (found == coming_.end()) return;
        coming_size_ -= found->second.frame.total;
        coming_.erase(found);
    }

    SharedMemory memory_;
    RingReader ring_;
    const uint64_t body_size_max_, coming_size_max_;
    const bool keeps_bodies_;
    std::shared_ptr<RowTaker> rows_;
    std::unordered_map<uint64_t, Coming> coming_;
    uint64_t coming_size_ = 0;
};

// Of the module that it is called by alone: both modules that have these classes load beside each other.
inline void bind_front_link(py::module_& m) {
    py::class_<Writer, std::shared_ptr<Writer>>(m, "Writer", py::module_local())
        .def(py::init<int, uint64_t, uint64_t>(), py::arg("fd"), py::arg("offset"), py::arg("size"))
        .def("put", &Writer::put)
        .def("reader_sleeps", &Writer::reader_sleeps)
        .def("wait_for_room", &Writer::wait_for_room)
        .def_readwrite("has_waiting", &Writer::has_waiting);
    py::class_<Reader>(m, "Reader", py::module_local())
        .def(py::init<int, uint64_t, uint64_t, uint64_t, uint64_t, bool>(), py::arg("fd"), py::arg("offset"),
             py::arg("size"), py::kw_only(), py::arg("body_size_max"), py::arg("coming_size_max"),
             py::arg("keeps_bodies"))
        .def("take", &Reader::take)
        .def("sleep", &Reader::sleep)
        .def("writer_waits", &Reader::writer_waits);
}

}  // namespace pyserve
