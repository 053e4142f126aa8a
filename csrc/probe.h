// Named points of the lock-free code at which a test may stop a thread.
//
// Production code uses NoProbe, which compiles to nothing. Tests pass a probe that blocks the calling thread
// at a chosen point, to show that a thread stalled there harms no other.
#pragma once

namespace pyserve {

enum class Point {
    ring_before_claim,        // consumer has read the slots and not yet moved the head
    ring_after_claim,         // consumer owns the requests and has not looked at them
    ring_before_publish,      // producer has written the slot and not yet moved the tail
    batcher_before_sleep,     // consumer has announced that it will sleep
    batcher_after_wake,       // consumer was woken and has not looked at the ring
    batcher_holding_permit,   // consumer holds a run permit and has not claimed
    completions_before_push,  // worker has linked its node and not yet published it
    completions_after_push,   // worker has published and not yet signalled
    crew_before_end,          // worker has ended its last batch, and its thread is about to say so
    crew_before_loss,         // loop has decided to give a worker up and has not yet done so
};

struct NoProbe {
    static void at(Point) noexcept {}
};

}  // namespace pyserve
