// How the runs of torch's networks are ended: see runs.h.
#pragma once

#include <stdexcept>

#include "clock.h"
#include "runs.h"

namespace pyserve {

// What ended runs raise.
struct Interrupted : std::runtime_error {
    Interrupted() : std::runtime_error("the model's forward did not come to an end in time") {}
};

// To be called once, when the module is loaded.
void install_interrupts();

// A run on a thread that is bound; nothing special on others, nor within another run. Throws Interrupted where runs are
// refused, and instead of whatever an interruption made the run throw.
template <class Body>
auto interruptible(const Body& body) {
    Runs* runs = Runs::current();
    if (runs == nullptr || runs->since() != 0) return body();
    if (runs->is_refused()) throw Interrupted();
    struct Scope {
        Runs& runs;
        ~Scope() { runs.end(); }
    };
    const Scope scope{*runs};
    runs->begin(SteadyClock::now_ns());
    try {
        auto result = body();
        if (runs->is_interrupted()) throw Interrupted();
        return result;
    } catch (...) {
        if (runs->is_interrupted()) throw Interrupted();
        throw;
    }
}

}  // namespace pyserve
